"""A linear codec between pictures and latents: the four principal components of 8 x 8 blocks of colour.

    encode: (B, 3, 8 H, 8 W) in [0, 1]  ->  (B, 4, H, W), each channel of mean 0 and variance 1 on the fitted pictures
    decode: the other way; what four components of 192 numbers do not hold is lost

It stands in for Stable Diffusion's encoder where there is no network to fetch it: latents of the same shape, and a
decoder to look at them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from samegrad.recipes._recipe.refused_files import refused_file
from samegrad.recipes._recipe.tensor_files import read_tensors

BLOCK_SIDE = 8
COMPONENTS = 4
FILE_NAME = "codec.safetensors"
SHAPES = {"mean": (192,), "components": (COMPONENTS, 192), "spread": (COMPONENTS,)}


@dataclasses.dataclass(frozen=True)
class LinearCodec:
    """mean: (192,); components: (4, 192) orthonormal rows; spread: (4,) standard deviations along them."""

    mean: Tensor
    components: Tensor
    spread: Tensor

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents (B, 4, H, W) of pictures (B, 3, 8 H, 8 W) in [0, 1]."""
        blocks = _blocks(pictures.to(self.mean.dtype)) - self.mean[:, None, None]
        latents = torch.einsum("kd,bdhw->bkhw", self.components, blocks)
        return (latents / self.spread[:, None, None]).to(pictures.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, 8 H, 8 W) of latents (B, 4, H, W), cut off at 0 and 1."""
        scaled = latents.to(self.mean.dtype) * self.spread[:, None, None]
        blocks = torch.einsum("kd,bkhw->bdhw", self.components, scaled) + self.mean[:, None, None]
        pictures = torch.nn.functional.pixel_shuffle(blocks, BLOCK_SIDE)
        return pictures.clamp(0, 1).to(latents.dtype)

    def save(self, path: Path) -> Path:
        safetensors.torch.save_file({"mean": self.mean, "components": self.components, "spread": self.spread}, path)
        return path


def _blocks(pictures: Tensor) -> Tensor:
    """(B, 3, 8 H, 8 W) as (B, 192, H, W)."""
    return torch.nn.functional.pixel_unshuffle(pictures, BLOCK_SIDE)


def load_codec(path: Path) -> LinearCodec:
    """The codec in a file that ``save`` wrote. Raises BadInput for another file."""
    found = read_tensors(path, what="a codec")
    problem = codec_problem(found)
    if problem is not None:
        raise refused_file(path, what="a codec", found=problem, do="preprocess the pictures again")
    return LinearCodec(**found)


def codec_problem(found: Mapping[str, Tensor]) -> str | None:
    """Why ``found`` is not what a codec is made of; None where it is."""
    missing = [name for name in SHAPES if name not in found]
    if missing or len(found) > len(SHAPES):
        return f"no {missing[0]} in it" if missing else f"more than {', '.join(SHAPES)}"
    wrong = [name for name, shape in SHAPES.items() if found[name].shape != shape]
    if wrong:
        return f"{wrong[0]} has shape {tuple(found[wrong[0]].shape)}, not {SHAPES[wrong[0]]}"
    return "spread is not above 0" if not bool((found["spread"] > 0).all()) else None


def fit_codec(pictures: Tensor) -> LinearCodec:
    """The codec of the principal components of the blocks of pictures (B, 3, 8 H, 8 W) in [0, 1].

    Signs are fixed (the largest entry of a component is positive), so the same pictures give the same latents.
    Raises ValueError for pictures without four components.
    """
    blocks = _blocks(pictures.double()).movedim(1, -1).flatten(0, -2)
    mean = blocks.mean(dim=0)
    centred = blocks - mean
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(blocks))
    values, components = values.flip(0)[:COMPONENTS], vectors.mT.flip(0)[:COMPONENTS].contiguous()
    if not float(values[-1]) > 1e-12:
        raise ValueError("pictures of fewer than four independent colours and slopes have no four components")
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    components = components * largest.sign()
    return LinearCodec(mean.float(), components.float(), values.sqrt().float())
