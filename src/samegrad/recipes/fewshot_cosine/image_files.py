"""Classes of picture files: what an episode takes is read when it is drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samegrad.recipes._recipe.picture_files import open_picture
from samegrad.recipes._recipe.refused_files import refused_file

from .data import COLOUR, INK, RESIZED_OVER_CUT, normalised

# The shorter side is made as long as asked, and the longer one with it: a strip of a few KB would be gigabytes.
_LONGEST_OVER_SHORTEST = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Classes on disk: ``files[c]`` are the paths of a class. Every image is resized and cut to ``side`` pixels.

    ``channels``: 3 for colour, 1 for ink on paper, which is turned round so that paper is 0. Reading raises BadInput
    naming the file, its class and its place there.
    """

    names: tuple[str, ...]
    files: tuple[tuple[Path, ...], ...]
    side: int
    channels: int = 3

    def count(self, of_class: int) -> int:
        return len(self.files[of_class])

    def read(self, of_class: int, images: Sequence[int]) -> Tensor:
        return torch.stack([self._read(of_class, image) for image in images])

    def _read(self, of_class: int, image: int) -> Tensor:
        path, what = self.files[of_class][image], f"picture {image} of the class {self.names[of_class]}"
        picture = open_picture(path, what=what, mode="RGB" if self.channels == 3 else "L")
        if max(picture.size) > _LONGEST_OVER_SHORTEST * min(picture.size):
            found = f"{picture.width} x {picture.height} pixels, a strip of which little would be seen"
            raise refused_file(path, what=what, found=found, do="cut it to what it shows, or take it out of the data")
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
