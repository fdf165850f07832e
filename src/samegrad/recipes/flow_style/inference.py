"""``python -m samegrad.recipes.flow_style.inference CHECKPOINT INPUT OUTPUT --target_style_id N``: one picture, styled.

INPUT and OUTPUT are pictures where the checkpoint holds a codec, or ``.pt`` latents (4, H, W). The source is noised to
the checkpoint's start time and carried on; with ``--source_style_id`` it is first carried back to time 0 under its own
style, as in the document.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

import samegrad as sg

from .checkpoint import SavedFlow, load_flow
from .latent_files import read_latent
from .preprocess import check_side, middle_square

# Settings of the sampler that may be changed: the least and the most.
_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, math.inf),
    "start_time": (0, 1),
    "guidance": (0, math.inf),
    "temperature": (0, math.inf),
}


def style_file(
    checkpoint: Path,
    source: Path,
    output: Path,
    *,
    target_style_id: int = 1,
    source_style_id: int | None = None,
    target_size: int = 256,
    random_seed: int = 42,
    changed: dict[str, float] | None = None,
) -> Path:
    """Writes ``source`` in the style numbered ``target_style_id`` to ``output``. Raises BadInput or UsageError.

    ``changed``: settings of the sampler to use instead of the checkpoint's.
    """
    # What can be known without the checkpoint is told before it is read.
    _check_sampler(changed or {})
    check_side(target_size)
    _check_output(output)
    flow = load_flow(checkpoint)
    for name, number in (("target_style_id", target_style_id), ("source_style_id", source_style_id)):
        if number is not None and not 0 <= number < len(flow.names):
            known = ", ".join(f"{i} {style}" for i, style in enumerate(flow.names))
            raise sg.UsageError(
                asked=f"--{name} {number}", found=f"the checkpoint's styles are {known}", do="give one of the numbers",
                option=name,
            )  # fmt: skip
    latent = _read(flow, source, target_size)[None]
    if output.suffix != ".pt" and flow.codec is None:
        raise _no_codec(output)
    # A dictionary has one type for all its values; the options gave each its own.
    sampler = dataclasses.replace(flow.sampler, **(changed or {}))  # type: ignore[arg-type]
    generator, target = Generator().manual_seed(random_seed), torch.tensor([target_style_id])
    if source_style_id is None:
        styled = sampler.style(flow.network, latent, target, generator)
    else:
        styled = sampler.restyle(flow.network, latent, torch.tensor([source_style_id]), target, generator)
    return _write(flow, styled[0], output)


def _check_sampler(changed: dict[str, float]) -> None:
    """Raises UsageError for settings with which the sampler takes no step, or one the wrong way."""
    for name, value in changed.items():
        least, most = _RANGES[name]
        if not least <= value <= most:
            wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise sg.UsageError(
                asked=f"--{name} {value}", found=f"it must be {wanted}", do="give one within", option=name
            )


def _check_output(output: Path) -> None:
    """Raises UsageError for a path that no latent and no picture can be written to."""
    if output.is_dir():
        found, do = "a folder", f"name a file in it, such as {output / 'styled.png'}"
    elif output.suffix != ".pt" and not _is_written(output.suffix.lower()):
        found = f"no pictures are written as {output.suffix}" if output.suffix else "a name without a suffix"
        do = "end it in .png or .jpg for a picture, in .pt for a latent"
    else:
        return
    raise sg.UsageError(asked=f"output to {output}", found=found, do=do, file=str(output))


def _is_written(suffix: str) -> bool:
    """Whether Pillow writes colours into files that end so: it knows suffixes that it only reads, or writes in grey."""
    from PIL import Image

    if suffix not in Image.registered_extensions():
        return False
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), Image.registered_extensions()[suffix])
    except (KeyError, OSError, ValueError):
        return False
    return True


def _read(flow: SavedFlow, source: Path, side: int) -> Tensor:
    """The source as a latent (4, H, W)."""
    if source.suffix == ".pt":
        return read_latent(source)
    if flow.codec is None:
        raise _no_codec(source)
    return flow.codec.encode(middle_square(source, side)[None])[0]


def _no_codec(path: Path) -> sg.UsageError:
    return sg.UsageError(
        asked=f"pictures ({path.name})",
        found="the checkpoint was trained on latents of an encoder that it does not hold",
        do="give and take .pt latents, and encode and decode with that encoder",
    )


def _write(flow: SavedFlow, styled: Tensor, output: Path) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".pt":
        torch.save(styled, output)
        return output
    from PIL import Image

    assert flow.codec is not None
    picture = (flow.codec.decode(styled[None])[0] * 255).round().permute(1, 2, 0)
    Image.fromarray(picture.numpy().astype(np.uint8)).save(output)
    return output


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m samegrad.recipes.flow_style.inference", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("checkpoint", type=Path, help="flow_style.pt of a run folder")
    parser.add_argument("input", type=Path, help="a picture, or a latent (.pt)")
    parser.add_argument("output", type=Path, help="the same for the result")
    parser.add_argument("--target_style_id", type=int, default=1, help="number of the style, in the order of names")
    parser.add_argument("--source_style_id", type=int, help="the source's own style: go back to time 0 under it first")
    parser.add_argument("--target_size", type=int, default=256, help="side that a picture is cut and scaled to")
    parser.add_argument("--random_seed", type=int, default=42, help="seed of the sampler's noise")
    for field, kind in (("steps", int), ("start_time", float), ("guidance", float), ("temperature", float)):
        parser.add_argument(f"--{field}", type=kind, help=f"the sampler's {field}; as trained with when left out")
    given = vars(parser.parse_args(argv))
    changed = {n: given.pop(n) for n in ("steps", "start_time", "guidance", "temperature")}
    files = [given.pop(name) for name in ("checkpoint", "input", "output")]
    try:
        written = style_file(*files, **given, changed={n: v for n, v in changed.items() if v is not None})
    except sg.SamegradError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
