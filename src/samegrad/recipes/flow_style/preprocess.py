"""``python -m samegrad.recipes.flow_style.preprocess``: folders of pictures to folders of latents.

    RAW/<style>/*.{png,jpg,...}  ->  OUTPUT/<style>/*.pt (4, side / 8, side / 8) and OUTPUT/codec.safetensors

Pictures are cut to the middle square and scaled to ``--target_size``. The codec is the linear one, fitted on them; a
Stable Diffusion encoder's latents, made elsewhere, can be put into the same layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe.picture_files import open_picture

from .codec import BLOCK_SIDE, FILE_NAME, fit_codec

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Two halvings lie between a latent's side and the network's coarsest.
_SIDE_MULTIPLE = 4 * BLOCK_SIDE


def middle_square(path: Path, side: int) -> Tensor:
    """The middle square of a picture, (3, side, side) in [0, 1]. Raises BadInput for a file that is no picture."""
    from PIL import Image, ImageOps

    picture = open_picture(path, what="a picture", mode="RGB")
    fitted = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).transpose(2, 0, 1).astype(np.float32) / 255)


def check_side(side: int) -> None:
    """Raises UsageError for a picture's side that the network has no latents for."""
    if side < _SIDE_MULTIPLE or side % _SIDE_MULTIPLE:
        raise sg.UsageError(
            asked=f"--target_size {side}",
            found=f"not a multiple of {_SIDE_MULTIPLE}" if side > 0 else "it must be positive",
            do="give for example 256",
            option="target_size",
        )


def preprocess(raw_data_root: Path, output_root: Path, target_size: int = 256) -> list[Path]:
    """Writes the latents of all pictures, and the codec; their paths. Raises BadInput or UsageError."""
    check_side(target_size)
    if output_root.exists() and any(output_root.iterdir()):
        raise sg.UsageError(
            asked=f"--output_root {output_root}", found="it holds files already", do="name a new folder",
            option="output_root",
        )  # fmt: skip
    folders = sorted(path for path in raw_data_root.iterdir() if path.is_dir()) if raw_data_root.is_dir() else []
    named = {f.name: sorted(p for p in f.iterdir() if p.suffix.lower() in SUFFIXES) for f in folders}
    named = {name: paths for name, paths in named.items() if paths}
    if len(named) < 2:
        raise sg.BadInput(
            asked=f"pictures by style in {raw_data_root}",
            found=f"{len(named)} folders with pictures ({', '.join(named) or 'none'})",
            do=f"give one folder for each style, with {', '.join(SUFFIXES)} files in it",
            file=str(raw_data_root),
        )
    pictures = {path: middle_square(path, target_size) for paths in named.values() for path in paths}
    try:
        codec = fit_codec(torch.stack(list(pictures.values())))
    except ValueError as error:
        raise sg.BadInput(
            asked=f"a codec of the pictures in {raw_data_root}", found=str(error), do="give more pictures, or others",
            file=str(raw_data_root),
        ) from None  # fmt: skip
    output_root.mkdir(parents=True, exist_ok=True)
    written = [codec.save(output_root / FILE_NAME)]
    for path, picture in pictures.items():
        folder = output_root / path.parent.name
        folder.mkdir(exist_ok=True)
        # Two files of one name and two suffixes are two pictures.
        target = folder / f"{path.stem}.pt"
        if target in written:
            target = folder / f"{path.name}.pt"
        torch.save(codec.encode(picture[None])[0], target)
        written.append(target)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m samegrad.recipes.flow_style.preprocess", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--raw_data_root", type=Path, required=True, help="folder of styles, each a folder of pictures")
    parser.add_argument("--output_root", type=Path, required=True, help="folder that is made for the latents")
    parser.add_argument("--target_size", type=int, default=256, help="side of a picture; a latent's is an eighth")
    given = parser.parse_args(argv)
    try:
        written = preprocess(given.raw_data_root, given.output_root, given.target_size)
    except sg.SamegradError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    sys.stdout.write(f"{len(written) - 1} latents and {FILE_NAME} in {given.output_root}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
