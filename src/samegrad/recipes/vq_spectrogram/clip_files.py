"""Clips on disk, read one at a time when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import samegrad as sg
from samegrad.recipes._recipe.array_files import read_array
from samegrad.recipes._recipe.refused_files import refused_file

from .data import BANDS, Clip, Spectrogram, clip_of

LAYOUT = "<root>/<machine>/{train,test}/{normal,anomaly}_id_XX_XXXXXXXX.npy, log-mels of 64 bands"
_WHAT, _DO = "a log-mel", f"write or fetch the file anew, or take it out of the data; expected: {LAYOUT}"


class FolderClips:
    """The ``.npy`` files of one split of ``machine_types`` under ``root``, in the order of their names.

    ``least_frames``: those of a patch. Raises BadInput for a folder without any file, and for a file whose name says
    neither label nor id.
    """

    def __init__(self, root: Path, machine_types: Sequence[str], split: str, *, least_frames: int = 1) -> None:
        self.least_frames = least_frames
        self.paths: list[Path] = []
        self.clips: list[Clip] = []
        for machine_type in machine_types:
            found = clip_paths(root / machine_type / split, ".npy", layout=LAYOUT)
            self.paths += found
            self.clips += [clip_of(path.stem, machine_type) for path in found]

    def read(self, index: int) -> Spectrogram:
        """(bands, frames) float32. Raises BadInput for a file that is no log-mel of 64 bands, or too short a one."""
        path = self.paths[index]
        read = read_array(path, what=_WHAT, dtype=np.float32)
        if read.ndim == 3 and 1 in (read.shape[0], read.shape[-1]):
            read = read[..., 0] if read.shape[-1] == 1 else read[0]
        if read.ndim != 2 or BANDS not in read.shape:
            raise refused_file(path, what=_WHAT, found=f"shape {read.shape}, not ({BANDS}, frames)", do=_DO)
        clip = read if read.shape[0] == BANDS else read.T
        if clip.shape[1] < self.least_frames:
            raise refused_file(
                path, what=_WHAT, found=f"{clip.shape[1]} frames hold no patch of {self.least_frames}", do=_DO
            )
        return clip


def clip_paths(folder: Path, suffix: str, *, layout: str) -> list[Path]:
    """The files of ``folder``, by name. Raises BadInput without any, and for a name that says neither label nor id."""
    found = sorted(folder.glob(f"*{suffix}"))
    if not found:
        raise sg.BadInput(
            asked=f"clips in {folder}",
            found=f"no {suffix} files" if folder.is_dir() else "no such folder",
            do=f"give {layout}",
            file=str(folder),
        )
    for path in found:
        try:
            clip_of(path.stem, folder.parent.name)
        except ValueError as error:
            raise refused_file(path, what="a clip", found=error, do="name it so, or take it out of the data") from None
    return found
