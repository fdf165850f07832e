"""Images by class, and episodes drawn from them: plain PyTorch and numpy, nothing of ours.

An episode takes a few classes and a few images of each, at random; it is a function of its seed alone. Images are read
when an episode takes them: from memory, where a class is a tensor of bytes, or from files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Classes on disk: ``files[c]`` are the paths of a class. Every image is resized and cut to ``side`` pixels.

    ``channels``: 3 for colour, 1 for ink on paper, which is turned round so that paper is 0.
    """

    names: tuple[str, ...]
    files: tuple[tuple[Path, ...], ...]
    side: int
    channels: int = 3

    def count(self, of_class: int) -> int:
        return len(self.files[of_class])

    def read(self, of_class: int, images: Sequence[int]) -> Tensor:
        return torch.stack([self._read(self.files[of_class][image]) for image in images])

    def _read(self, path: Path) -> Tensor:
        from PIL import Image

        with Image.open(path) as opened:
            picture = opened.convert("RGB" if self.channels == 3 else "L")
        resized = int(self.side * RESIZED_OVER_CUT)
        ratio = resized / min(picture.size)
        width, height = (max(resized, round(length * ratio)) for length in picture.size)
        picture = picture.resize((width, height))
        left, top = (picture.width - self.side) // 2, (picture.height - self.side) // 2
        cut = np.asarray(picture.crop((left, top, left + self.side, top + self.side)), dtype=np.float32) / 255
        values = torch.from_numpy(cut)
        if self.channels == 3:
            return normalised(values.permute(2, 0, 1), COLOUR)
        return normalised(1 - values.unsqueeze(0), INK)


def normalised(images: Tensor, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Images (..., channels, height, width) with the mean taken off each colour, over its deviation."""
    mean, deviation = (torch.tensor(c, dtype=images.dtype).view(-1, 1, 1) for c in colours)
    return (images - mean) / deviation


def read_split_json(path: Path, *, root: Path, side: int, channels: int = 3) -> ImageFiles:
    """The classes of a split file: an object with ``label_names``, ``image_names`` and ``image_labels``.

    Image names are absolute, or relative to ``root``. ``image_labels`` count through all splits in some files and
    through one in others: classes without an image here are left out. Raises ValueError saying what is wrong.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in ("label_names", "image_names", "image_labels") if key not in document]
    if missing:
        raise ValueError(f"no {missing[0]!r} in it")
    names, images, labels = (document[key] for key in ("label_names", "image_names", "image_labels"))
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} image_names, but {len(labels)} image_labels")
    by_label: dict[int, list[Path]] = {}
    for image, label in zip(images, labels):
        by_label.setdefault(int(label), []).append(root / image)
    ordered = sorted(by_label)
    # Some files name all classes, some only their own.
    called = {label: str(names[place if len(names) == len(ordered) else label]) for place, label in enumerate(ordered)}
    return ImageFiles(
        names=tuple(called[label] for label in ordered),
        files=tuple(tuple(by_label[label]) for label in ordered),
        side=side,
        channels=channels,
    )


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
