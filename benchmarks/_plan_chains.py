"""Chains of units after models that people train, for the planner's benchmark. Bytes by hand from the shapes.

Times are those of a card that does 250e12 operations or 3.5e12 bytes a second, whichever takes longer.
"""

from __future__ import annotations

import random
from typing import Any

from samegrad.unit_tables import Unit

_OPERATIONS_A_SECOND, _BYTES_A_SECOND = 250e12, 3.5e12


def _unit(
    name: str, output: int, inner: int, flops: float, *, gradients: int = 0, later: int = 0, crossing: int = 0,
    scratch: int = 0, rows_alone: bool = False, recomputable: bool = True,
) -> Unit:  # fmt: skip
    """A block that keeps ``inner`` beside its output; ``later``: gradients of the parameters after it."""
    forward = max(flops / _OPERATIONS_A_SECOND, 2 * (inner + output) / _BYTES_A_SECOND)
    return Unit(
        name=name, kept_bytes=inner + output, output_bytes=output, crossing_bytes=crossing,
        forward_extra_bytes=inner + output + scratch, backward_extra_bytes=gradients + output + inner // 3 + scratch,
        arrival_extra_bytes=later, incoming_bytes=later + output, gradient_bytes=gradients,
        forward_seconds=forward, backward_seconds=2 * forward, recomputable=recomputable, row_independent=rows_alone,
        chunk_seconds=2e-5, offloadable_bytes=inner, moved_bytes=inner,
    )  # fmt: skip


def _in_order(blocks: list[dict[str, Any]]) -> list[Unit]:
    """The units with the gradients that later ones have left when theirs arrive."""
    later, units = 0, []
    for block in reversed(blocks):
        units.append(_unit(later=later, **block))
        later += block.get("gradients", 0)
    return units[::-1]


def uniform(count: int) -> list[Unit]:
    return _in_order([{"name": f"block{k}", "output": 2**24, "inner": 11 * 2**24, "flops": 1e12} for k in range(count)])


def resnet(depths: tuple[int, ...], rows: int, bottleneck: bool) -> list[Unit]:
    """Stem, blocks, head; float32."""
    pixels, width = 112 * 112, 64
    stem = 4 * rows * pixels * 64
    blocks: list[dict[str, Any]] = [
        {"name": "stem", "output": stem // 4, "inner": 2 * stem, "flops": 236e6 * rows, "gradients": 37_632}
    ]
    pixels //= 4
    for stage, depth in enumerate(depths):
        if stage:
            pixels, width = pixels // 4, width * 2
        out = width * (4 if bottleneck else 1)
        weights = 17 * width * width if bottleneck else 18 * width * width
        for k in range(depth):
            one = 4 * rows * pixels * width
            inner = (6 * one if bottleneck else 3 * one) + (4 * rows * pixels * out)
            blocks.append(
                {"name": f"layer{stage}.{k}", "output": 4 * rows * pixels * out, "inner": inner,
                 "flops": 2.0 * weights * pixels * rows, "gradients": 4 * weights}
            )  # fmt: skip
    blocks.append({"name": "", "output": 4, "inner": 4 * rows * 2000, "flops": 4e6 * rows, "recomputable": False})
    return _in_order(blocks)


def transformer(layers: int, width: int, rows: int, tokens: int, words: int, *, rows_alone: bool = False) -> list[Unit]:
    """Embedding, blocks, and a head with its loss, whose logits are most of it; bfloat16, logits also in float32."""
    stream = 2 * rows * tokens * width
    weights = 12 * width * width
    blocks: list[dict[str, Any]] = [
        {"name": "embed", "output": stream, "inner": 0, "flops": 0.0, "gradients": 4 * words * width}
    ]
    for k in range(layers):
        flops = 2.0 * rows * tokens * (weights + 2 * tokens * width)
        blocks.append(
            {"name": f"blocks.{k}", "output": stream, "inner": 16 * stream, "flops": flops, "gradients": 4 * weights}
        )
    logits = rows * tokens * words
    blocks.append(
        {"name": "head", "output": 2 * logits, "inner": 4 * logits, "flops": 2.0 * logits * width,
         "scratch": 4 * logits, "rows_alone": rows_alone}
    )  # fmt: skip
    blocks.append({"name": "", "output": 4, "inner": 0, "flops": 0.0, "recomputable": False})
    return _in_order(blocks)


def unet(levels: int, rows: int) -> list[Unit]:
    """Down, a middle that keeps most of all, up; each way down is read again on the way up."""
    sizes = [4 * rows * (256 >> k) ** 2 * (32 << k) for k in range(levels)]
    down: list[dict[str, Any]] = [
        {"name": f"down{k}", "output": n, "inner": 4 * n, "flops": n * 2e3, "crossing": n, "gradients": 40_000 << 2 * k}
        for k, n in enumerate(sizes)
    ]
    least = sizes[-1]
    middle = {"name": "middle", "output": least, "inner": 30 * least, "flops": least * 9e3, "gradients": 9 << 20}
    up: list[dict[str, Any]] = [
        {"name": f"up{k}", "output": n, "inner": 6 * n, "flops": n * 3e3, "gradients": 60_000 << 2 * k}
        for k, n in reversed(list(enumerate(sizes)))
    ]
    return _in_order([*down, middle, *up])


def uneven(count: int, seed: int, *, gaps: bool = False) -> list[Unit]:
    """Blocks of all sizes, with code between that cannot run again where ``gaps``."""
    draw = random.Random(seed)
    blocks: list[dict[str, Any]] = []
    for k in range(count):
        gap = gaps and k % 4 == 3
        output = draw.randint(2**18, 2**23)
        blocks.append(
            {"name": "" if gap else f"block{k}", "output": output, "inner": output * draw.randint(0, 20),
             "flops": draw.uniform(0.05, 2.0) * 1e11, "gradients": draw.randint(0, 2**22),
             "scratch": draw.randint(0, 2**22), "recomputable": not gap}
        )  # fmt: skip
    return _in_order(blocks)


def chains() -> dict[str, tuple[list[Unit], tuple[int, ...]]]:
    """By name: the units, and into how many chunks a row-independent stretch may be cut."""
    return {
        "uniform, 9": (uniform(9), ()),
        "uneven, 8": (uneven(8, 3), ()),
        "U-Net, worst in the middle, 9": (unet(4, 16), ()),
        "autoencoder, 7": (uneven(7, 11), ()),
        "ResNet-34, 105 rows": (resnet((3, 4, 6, 3), 105, False), ()),
        "ResNet-50, 128 rows": (resnet((3, 4, 6, 3), 128, True), ()),
        "GPT-2 with its head, 16 x 1024": (transformer(12, 768, 16, 1024, 50257), ()),
        "the same, head in chunks": (transformer(12, 768, 16, 1024, 50257, rows_alone=True), (2, 4, 8, 16)),
        "ViT-B/16, 128 rows": (transformer(12, 768, 128, 197, 5), ()),
        "uneven with gaps, 24": (uneven(24, 5, gaps=True), ()),
        "GPT-2 XL, 4 x 1024": (transformer(48, 1600, 4, 1024, 50257), ()),
        "uneven, 40": (uneven(40, 7), ()),
    }
