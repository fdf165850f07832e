"""A linear codec between pictures and latents: the four principal components of 8 x 8 blocks of colour.

    encode: (B, 3, 8 H, 8 W) in [0, 1]  ->  (B, 4, H, W), each channel of mean 0 and variance 1 on the fitted pictures
    decode: the other way; what four components of 192 numbers do not hold is lost

It stands in for Stable Diffusion's encoder where there is no network to fetch it: latents of the same shape, and a
decoder to look at them. Plain PyTorch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

BLOCK_SIDE = 8
COMPONENTS = 4
FILE_NAME = "codec.safetensors"


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
    """The codec in a file that ``save`` wrote. Raises ValueError for another file."""
    try:
        found = safetensors.torch.load_file(path)
        return LinearCodec(found["mean"], found["components"], found["spread"])
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: no codec ({error})") from None


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
