"""What blocks that run again save and cost: a GPT with dropout and a ResNet with BatchNorm, whole batches.

Beside torch.utils.checkpoint round every block. Peaks are what a step needs beyond weights and their gradients: counted
tensor bytes on the CPU, the allocator's on a GPU. Times are the fastest of a few steps. ``same_bits`` compares
gradients and buffers with the plain step's; plain checkpointing updates running statistics twice.
"""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import _results
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samegrad.exact.recomputed import recomputed_blocks
from samegrad.exact.replaced_forward import forward_replaced
from samegrad.measure.counting import ByteCounter

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.exact.batchnorm_zoo import resnet18

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
WIDTH, LAYERS, TOKENS, ROWS = (768, 12, 1024, 8) if ON_GPU else (64, 8, 64, 8)
PIXELS, IMAGES = (128, 64) if ON_GPU else (32, 16)
STEPS = 7 if ON_GPU else 5
Within = Callable[[nn.Module], AbstractContextManager[Any]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.mix, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in self.mix(self.ln_1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


def checkpointed(network: nn.Module, blocks: list[str]) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for name in blocks:
        block = network.get_submodule(name)
        stack.enter_context(
            forward_replaced(block, functools.partial(checkpoint, block.forward, use_reentrant=False))
        )
    return stack


def ways(blocks: list[str]) -> dict[str, Within]:
    def runs(length: int) -> list[Any]:
        return [blocks[i : i + length] for i in range(0, len(blocks), length)]

    found: dict[str, Within] = {
        "plain": lambda _: nullcontext(),
        "torch.utils.checkpoint, every block": lambda network: checkpointed(network, blocks),
        "every block": lambda network: recomputed_blocks(network, blocks),
        "every second block": lambda network: recomputed_blocks(network, blocks[::2]),
    }
    for length in (2, 4):
        found[f"runs of {length}"] = lambda network, length=length: recomputed_blocks(network, runs(length))
    return found


def step(network: nn.Module, x: Tensor, within: Within) -> None:
    torch.manual_seed(0)
    with within(network):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=ON_GPU):
            outputs = network(x)
        outputs.float().square().mean().backward()


def left(network: nn.Module) -> list[Tensor]:
    return [t.clone() for t in (*(p.grad for p in network.parameters() if p.grad is not None), *network.buffers())]


def peak_bytes(network: nn.Module, x: Tensor, within: Within) -> int:
    if ON_GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(network, x, within)
        return torch.cuda.max_memory_allocated() - before
    with ByteCounter(DEVICE) as counter:
        step(network, x, within)
    return counter.peak_bytes


def seconds(network: nn.Module, x: Tensor, within: Within) -> float:
    found = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step(network, x, within)
        if ON_GPU:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


def compared(network: nn.Module, x: Tensor, blocks: list[str]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    plain: list[Tensor] = []
    for name, within in ways(blocks).items():
        twin = copy.deepcopy(network)
        step(twin, x, within)
        ours = left(twin)
        plain = plain or ours
        table[name] = {
            "same_bits": all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True)),
            "peak_bytes": peak_bytes(twin, x, within),
            "milliseconds": round(1e3 * seconds(twin, x, within), 2),
        }
    return table


def main() -> None:
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(0)
    gpt = nn.Sequential(*(Block() for _ in range(LAYERS))).to(DEVICE)
    tokens = torch.randn(ROWS, TOKENS, WIDTH, device=DEVICE)
    images = torch.randn(IMAGES, 3, PIXELS, PIXELS, device=DEVICE)
    stages = [f"stages.{i}.{j}" for i in range(4) for j in range(2)]
    _results.write(
        "recompute",
        {
            "gpt": {"width": WIDTH, "tokens": [ROWS, TOKENS]} | compared(gpt, tokens, [str(i) for i in range(LAYERS)]),
            "resnet18": {"images": [IMAGES, PIXELS]} | compared(resnet18().to(DEVICE), images, stages),
        },
    )


if __name__ == "__main__":
    main()
