"""Latents on disk, read without running anything in them.

    root/<style>/*.pt        one latent a file, (4, H, W) or (1, 4, H, W); Stable Diffusion's are 4 x 32 x 32

Those that were scaled down twice are scaled up again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe.refused_files import refused_file
from samegrad.recipes._recipe.tensor_files import read_plain, unusable

from .data import LATENT_CHANNELS, SCALING_FACTOR, Latents

# Below this a latent has been scaled down once too often, by the document's rule.
_SCALED_TWICE_STD = 0.5
LAYOUT = (
    "give a folder of styles, each a folder of .pt files with a tensor (4, H, W); "
    "python -m samegrad.recipes.flow_style.preprocess makes one of pictures; "
    "without --data_root the bundled pictures are used"
)


def read_latents(root: Path) -> Latents:
    """Every ``root/<style>/*.pt``; styles are numbered in the order of their names. Raises BadInput."""
    folders = sorted(path for path in root.iterdir() if any(path.glob("*.pt"))) if root.is_dir() else []
    if len(folders) < 2:
        raise sg.BadInput(
            asked=f"latents in {root}",
            found=f"{len(folders)} folders with .pt files in them; a style transfer takes two or more"
            if root.is_dir() else "no such folder",
            do=LAYOUT,
            file=str(root),
        )  # fmt: skip
    parts, ids = [], []
    for number, folder in enumerate(folders):
        for path in sorted(folder.glob("*.pt")):
            parts.append(read_latent(path))
            ids.append(number)
            if parts[-1].shape != parts[0].shape:
                raise _refused(path, f"shape {tuple(parts[-1].shape)}, others have {tuple(parts[0].shape)}")
    return Latents(torch.stack(parts), torch.tensor(ids), tuple(folder.name for folder in folders))


def read_latent(path: Path) -> Tensor:
    """One latent (4, H, W) float32. Raises BadInput for a file that is none or would have to run code."""
    latent = read_plain(path, what="a latent")
    if not isinstance(latent, Tensor):
        raise _refused(path, f"a {type(latent).__name__}, not a tensor")
    if latent.dim() == 4 and len(latent) == 1:
        latent = latent[0]
    if latent.dim() != 3 or len(latent) != LATENT_CHANNELS:
        raise _refused(path, f"{tuple(latent.shape)}, not ({LATENT_CHANNELS}, height, width)")
    sides = latent.shape[1:]
    if min(sides) == 0 or any(side % 4 for side in sides):
        raise _refused(path, f"{tuple(latent.shape)}: height and width must be multiples of 4")
    if not latent.is_floating_point():
        raise _refused(path, f"numbers of {latent.dtype}, and a latent's have fractions")
    # After it is float32: a float64 may hold what that has no room for.
    problem = unusable(latent.detach().float(), "the latent")
    if problem is not None:
        raise _refused(path, problem)
    latent = latent.detach().float()
    return latent / SCALING_FACTOR if float(latent.std()) < _SCALED_TWICE_STD else latent


def _refused(path: Path, found: str) -> sg.BadInput:
    return refused_file(path, what="a latent", found=found, do=LAYOUT)
