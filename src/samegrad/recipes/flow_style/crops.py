"""Pictures of two styles without a network: what scikit-image and scikit-learn ship, cut into square crops.

    photograph   astronaut, coffee, chelsea, motorcycle, rocket; china, flower
    histology    ihc: stained tissue under a microscope, brown and blue

**No leak.** Every picture is divided across its longer side before anything is cut: training crops lie wholly in the
first part, held-out crops in the last, as wide as a crop. The two share no pixel. Plain PyTorch and pillow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

STYLES = {
    "histology": (("skimage", "data", "ihc.png"),),
    "photograph": (
        ("skimage", "data", "astronaut.png"), ("skimage", "data", "chelsea.png"), ("skimage", "data", "coffee.png"),
        ("skimage", "data", "motorcycle_left.png"), ("skimage", "data", "rocket.jpg"),
        ("sklearn", "datasets", "images", "china.jpg"), ("sklearn", "datasets", "images", "flower.jpg"),
    ),
}  # fmt: skip
CROP_SIDE = 256
# Beyond a crop, so that crops of one picture differ.
_ROOM = 1.25

Picture = npt.NDArray[np.uint8]


class Crops(NamedTuple):
    """Crops (n, 3, side, side) in [0, 1] by style, in the order of the styles' names."""

    names: tuple[str, ...]
    training: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]


def bundled_crops(training: int, held_out: int, *, seed: int, side: int = CROP_SIDE) -> Crops:
    """``training`` and ``held_out`` crops of each style, in random places and orientations, from the bundled pictures.

    Raises ModuleNotFoundError without scikit-image, scikit-learn or pillow, FileNotFoundError naming a picture that
    the installed version does not ship.
    """
    names = tuple(sorted(STYLES))
    sides: list[list[Tensor]] = [[], []]
    for number, name in enumerate(names):
        pictures = [_sized(_opened(parts), side) for parts in STYLES[name]]
        for held, count in enumerate((training, held_out)):
            regions = [_region(picture, side, held=bool(held)) for picture in pictures]
            random = np.random.default_rng([seed, number, held])
            sides[held].append(torch.stack([_crop(regions[i % len(regions)], side, random) for i in range(count)]))
    return Crops(names, tuple(sides[0]), tuple(sides[1]))


def _opened(parts: Sequence[str]) -> Picture:
    """The picture at a path below an installed package; nothing of the package runs, so nothing is fetched."""
    from PIL import Image

    spec = importlib.util.find_spec(parts[0])
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {parts[0]!r}", name=parts[0])
    path = Path(spec.submodule_search_locations[0]).joinpath(*parts[1:])
    if not path.is_file():
        raise FileNotFoundError(f"{parts[0]} does not ship {path.name} in {path.parent}")
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB")).copy()


def _sized(picture: Picture, side: int) -> Picture:
    """The picture lying on its longer side, scaled so that both its parts have room for crops."""
    from PIL import Image

    lying = picture if picture.shape[1] >= picture.shape[0] else picture.transpose(1, 0, 2)
    scale = max(_ROOM * side / lying.shape[0], (1 + _ROOM) * side / lying.shape[1])
    size = (round(scale * lying.shape[1]), round(scale * lying.shape[0]))
    return np.asarray(Image.fromarray(lying).resize(size, Image.Resampling.LANCZOS))


def _region(picture: Picture, side: int, *, held: bool) -> Picture:
    """The part of a lying picture that training or held-out crops come from."""
    return picture[:, -side:] if held else picture[:, :-side]


def _crop(region: Picture, side: int, random: np.random.Generator) -> Tensor:
    """A crop (3, side, side) in [0, 1], mirrored half of the time."""
    top = int(random.integers(region.shape[0] - side + 1))
    left = int(random.integers(region.shape[1] - side + 1))
    crop = region[top : top + side, left : left + side]
    if random.integers(2):
        crop = crop[:, ::-1]
    return torch.from_numpy(crop.transpose(2, 0, 1).astype(np.float32) / 255)
