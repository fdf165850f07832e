"""Images by class, and episodes drawn from them: plain PyTorch and numpy, nothing of ours.

An episode takes a few classes and a few images of each, at random; it is a function of its seed alone. Images are read
when an episode takes them: from memory, where a class is a tensor of bytes, or from files (``image_files.py``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Mean and deviation of ImageNet's colours, and of black signs on white turned round.
COLOUR = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INK = ((0.18,), (0.37,))
# A picture is first made so much larger than the square that is cut from its middle.
RESIZED_OVER_CUT = 1.15
SPLITS = ("base", "val", "novel")


class ImageClasses(Protocol):
    """Classes with images: names, how many each has, and the images themselves."""

    @property
    def names(self) -> Sequence[str]: ...

    def count(self, of_class: int) -> int:
        """Images of the class."""
        ...

    def read(self, of_class: int, images: Sequence[int]) -> Tensor:
        """Those images, (len(images), channels, height, width) float32, normalised, on the host."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldImages:
    """Classes in memory: ``pictures[c]`` is (count, channels, height, width) uint8; ``side`` pixels when read."""

    names: tuple[str, ...]
    pictures: tuple[Tensor, ...]
    side: int
    colours: tuple[tuple[float, ...], tuple[float, ...]] = INK

    def count(self, of_class: int) -> int:
        return len(self.pictures[of_class])

    def read(self, of_class: int, images: Sequence[int]) -> Tensor:
        read = self.pictures[of_class][list(images)].float() / 255
        if read.shape[-1] != self.side:
            read = F.interpolate(read, size=(self.side, self.side), mode="bilinear", antialias=True)
        return normalised(read, self.colours)


def normalised(images: Tensor, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Images (..., channels, height, width) with the mean taken off each colour, over its deviation."""
    mean, deviation = (torch.tensor(c, dtype=images.dtype).view(-1, 1, 1) for c in colours)
    return (images - mean) / deviation


def enough_classes(classes: ImageClasses, per_class: int) -> list[int]:
    """The classes with at least ``per_class`` images."""
    return [c for c in range(len(classes.names)) if classes.count(c) >= per_class]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episodes:
    """Episode number i of ``seed``: (n_way, per_class, channels, height, width) and the classes it took.

    Raises ValueError when there are not enough classes with enough images.
    """

    classes: ImageClasses
    n_way: int
    per_class: int
    seed: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self._usable) < self.n_way:
            raise ValueError(
                f"{self.n_way} classes of {self.per_class} images each are needed, and {len(self._usable)} of "
                f"{len(self.classes.names)} classes have as many"
            )

    @functools.cached_property
    def _usable(self) -> list[int]:
        return enough_classes(self.classes, self.per_class)

    def draw(self, number: int) -> tuple[Tensor, list[str]]:
        generator = np.random.default_rng([*self.seed, number])
        taken = generator.choice(self._usable, size=self.n_way, replace=False).tolist()
        images = [
            self.classes.read(c, generator.choice(self.classes.count(c), size=self.per_class, replace=False).tolist())
            for c in taken
        ]
        return torch.stack(images), [self.classes.names[c] for c in taken]


def augmented(images: Tensor, *, seed: Sequence[int], flips: bool) -> Tensor:
    """Images (N, channels, height, width), each moved, turned and scaled a little, its contrast changed, some mirrored.

    A function of images and ``seed`` alone; draws nothing from torch's generators. ``flips``: signs are not mirrored.
    """
    generator = np.random.default_rng(list(seed))
    count = len(images)

    def drawn(low: float, high: float) -> Tensor:
        return torch.from_numpy(generator.uniform(low, high, size=count)).to(images.dtype)

    angle, scale, across, down = drawn(-0.2, 0.2), drawn(0.85, 1.1), drawn(-0.12, 0.12), drawn(-0.12, 0.12)
    mirror = torch.where(drawn(0, 1) < 0.5, -1.0, 1.0).to(images.dtype) if flips else torch.ones_like(angle)
    rows = [
        torch.stack([scale * mirror * angle.cos(), -scale * angle.sin(), across], dim=1),
        torch.stack([scale * mirror * angle.sin(), scale * angle.cos(), down], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved * drawn(0.8, 1.2).view(-1, 1, 1, 1)


def prototype_predictions(episode: Tensor, k_shot: int) -> Tensor:
    """The baseline: the class whose mean of (n, k) support rows is nearest, for (n, n_query) queries.

    episode: (n, k + n_query, ...) images or embeddings. Source: Snell, Swersky, Zemel 2017, arXiv:1703.05175.
    """
    rows: Any = episode.flatten(2).double()
    prototypes = rows[:, :k_shot].mean(dim=1)
    distances: Tensor = torch.cdist(rows[:, k_shot:].flatten(0, 1), prototypes)
    return distances.argmin(dim=1).view(len(rows), -1)
