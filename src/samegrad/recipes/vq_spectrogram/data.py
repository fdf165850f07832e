"""Log-mel clips of machines and the batches made of them, in plain PyTorch. Nothing is downloaded.

    <root>/<machine>/{train,test}/{normal,anomaly}_id_XX_XXXXXXXX.npy         (bands, frames), or (frames, bands)

is the layout of DCASE 2020 task 2 as log-mels; ``clip_files.py`` reads it. What a file holds is in its name: whether
it is normal, and the id of the machine. A clip is cut into patches of ``patch_len`` frames; a row of a batch is a clip
with all its patches.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BANDS = 64
MACHINES = ("ToyCar", "ToyConveyor", "fan", "pump", "slider", "valve")
TRANSFORMS = ("identity", "time mask", "frequency mask", "noise", "scale", "time roll")
EPSILON = 1e-6
_NAME = re.compile(r"(normal|anomaly)_id_(\d+)_(\d+)")

Spectrogram = npt.NDArray[np.float32]
Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is known of a clip by its name. ``machine``: its type and id, such as "fan 02"."""

    name: str
    machine: str
    anomalous: bool


class Clips(Protocol):
    """Named clips, read one at a time."""

    @property
    def clips(self) -> Sequence[Clip]: ...

    def read(self, index: int) -> Spectrogram:
        """(bands, frames)."""
        ...


def clip_of(name: str, machine_type: str) -> Clip:
    """The clip called ``name`` (no suffix). Raises ValueError for a name that says neither label nor id."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name}: expected normal_id_XX_XXXXXXXX or anomaly_id_XX_XXXXXXXX")
    return Clip(name, f"{machine_type} {found[2]}", found[1] == "anomaly")


class HeldClips:
    """Clips that are in memory already."""

    def __init__(self, clips: Sequence[Clip], spectrograms: Sequence[Spectrogram]) -> None:
        self.clips, self.spectrograms = clips, spectrograms

    def read(self, index: int) -> Spectrogram:
        return self.spectrograms[index]


class Chosen:
    """Some of ``clips``, by their ``places``."""

    def __init__(self, clips: Clips, places: Sequence[int]) -> None:
        self.source, self.places = clips, list(places)
        self.clips = [clips.clips[place] for place in self.places]

    def read(self, index: int) -> Spectrogram:
        return self.source.read(self.places[index])


def save_clips(clips: Clips, root: Path, machine_type: str, split: str) -> list[Path]:
    """The clips as files of the layout above."""
    folder = root / machine_type / split
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{clip.name}.npy" for clip in clips.clips]
    for index, path in enumerate(written):
        np.save(path, clips.read(index))
    return written


def split_validation(clips: Clips, fraction: float, *, seed: int) -> tuple[Chosen, Chosen]:
    """Training and validation clips, ``fraction`` of every machine id's (rounded, at least one)."""
    held: set[int] = set()
    for number, machine in enumerate(machines_of(clips)):
        places = [i for i, clip in enumerate(clips.clips) if clip.machine == machine]
        order = np.random.default_rng([seed, number]).permutation(places)
        held.update(order[: max(1, round(fraction * len(places)))].tolist())
    return Chosen(clips, [i for i in range(len(clips.clips)) if i not in held]), Chosen(clips, sorted(held))


def subset(clips: Clips, fraction: float, *, seed: int) -> Chosen:
    """``fraction`` of every machine id's clips, normal and anomalous apart; at least one of each."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for place, clip in enumerate(clips.clips):
        groups.setdefault((clip.machine, clip.anomalous), []).append(place)
    kept: list[int] = []
    for number, places in enumerate(groups.values()):
        order = np.random.default_rng([seed, number]).permutation(places)
        kept += order[: max(1, round(fraction * len(places)))].tolist()
    return Chosen(clips, sorted(kept))


def machines_of(clips: Clips) -> list[str]:
    """The machine ids, sorted: the classes of the machine head."""
    return sorted({clip.machine for clip in clips.clips})


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of every mel band, (bands,) each, of all training frames of a machine type."""

    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]

    @classmethod
    def of(cls, clips: Clips) -> Normalisation:
        """Read clip by clip, merged by counts and sums of squares about the mean."""
        count, mean, squares = 0, np.zeros(()), np.zeros(())
        for index in range(len(clips.clips)):
            read = clips.read(index).astype(np.float64)
            here, own = read.shape[1], read.mean(axis=1)
            apart = own - mean
            squares = squares + ((read - own[:, None]) ** 2).sum(axis=1) + apart**2 * (count * here / (count + here))
            mean = mean + apart * (here / (count + here))
            count += here
        return cls(mean, np.sqrt(squares / count))

    def applied(self, spectrogram: Spectrogram) -> Spectrogram:
        scaled = (spectrogram - self.mean[:, None]) / (self.std[:, None] + EPSILON)
        return scaled.astype(np.float32)


def patch_starts(frames: int, patch_len: int, stride: int) -> list[int]:
    """Where patches begin: every ``stride`` frames. Raises ValueError for a clip shorter than a patch."""
    if frames < patch_len:
        raise ValueError(f"a clip of {frames} frames holds no patch of {patch_len}")
    return list(range(0, frames - patch_len + 1, stride))


def chosen_starts(starts: Sequence[int], n_patches: int, draws: np.random.Generator | None) -> list[int]:
    """``n_patches`` of ``starts`` in order: repeated where there are fewer; else drawn, or spread evenly without draws.
    """
    if len(starts) < n_patches:
        return sorted((list(starts) * -(-n_patches // len(starts)))[:n_patches])
    if draws is None:
        return [starts[i] for i in np.linspace(0, len(starts) - 1, n_patches).round().astype(int)]
    return [starts[i] for i in sorted(draws.choice(len(starts), n_patches, replace=False))]


def transformed(patches: Spectrogram, transform: int, draws: np.random.Generator) -> Spectrogram:
    """Patches (N, bands, frames) of one clip under transformation ``transform``, the same for all of them."""
    made = patches.copy()
    if transform in (1, 2):
        axis, width = 3 - transform, int(draws.integers(4, 13))
        at = int(draws.integers(0, patches.shape[axis] - width + 1))
        np.moveaxis(made, axis, 0)[at : at + width] = 0
    elif transform == 3:
        made += draws.normal(0, draws.uniform(0.01, 0.05), made.shape).astype(np.float32)
    elif transform == 4:
        made *= np.float32(draws.uniform(0.9, 1.1))
    elif transform == 5:
        made = np.roll(made, int(draws.integers(-8, 9)), axis=2)
    return made


@dataclasses.dataclass(frozen=True)
class Patching:
    """How clips become rows. ``keeps_original``: rows bring the patches before their transformation too."""

    patch_len: int
    stride: int
    n_patches: int
    normalisation: Normalisation
    keeps_original: bool = False

    def batch(self, clips: Clips, indices: Sequence[int], machines: Sequence[str], *, key: Sequence[int]) -> Batch:
        """A training batch: patches and a transformation drawn for every clip by (``key``, its number).

        ``patches`` and ``original`` (B, N, 1, bands, patch_len) float32, ``machine`` and ``transform`` (B,) int64.
        """
        rows, originals, labels, transforms = [], [], [], []
        for index in indices:
            draws = np.random.default_rng([*key, index])
            patches = self._cut(clips.read(index), draws)
            transforms.append(int(draws.integers(len(TRANSFORMS))))
            originals.append(patches)
            rows.append(transformed(patches, transforms[-1], draws))
            labels.append(machines.index(clips.clips[index].machine))
        batch = {
            "patches": _stacked(rows),
            "machine": torch.tensor(labels),
            "transform": torch.tensor(transforms),
        }
        return batch | ({"original": _stacked(originals)} if self.keeps_original else {})

    def plain(self, clips: Clips, indices: Sequence[int]) -> Tensor:
        """Patches (B, N, 1, bands, patch_len) to judge by: evenly spread, no transformation."""
        return _stacked([self._cut(clips.read(index), None) for index in indices])

    def starts(self, frames: int, draws: np.random.Generator | None = None) -> list[int]:
        """The frame at which each patch of a clip of ``frames`` begins, in order; drawn, or evenly spread."""
        return chosen_starts(patch_starts(frames, self.patch_len, self.stride), self.n_patches, draws)

    def _cut(self, spectrogram: Spectrogram, draws: np.random.Generator | None) -> Spectrogram:
        scaled = self.normalisation.applied(spectrogram)
        starts = self.starts(scaled.shape[1], draws)
        return np.stack([scaled[:, start : start + self.patch_len] for start in starts])


def _stacked(rows: Sequence[Spectrogram]) -> Tensor:
    return torch.from_numpy(np.stack(rows)).unsqueeze(2)


def shuffled_batches(clips: int, batch_rows: int, *, seed: int, epoch: int) -> Iterator[list[int]]:
    """The clips' numbers in the order of ``epoch``, ``batch_rows`` at a time; the last batch holds the rest."""
    order = np.random.default_rng([seed, epoch]).permutation(clips).tolist()
    for start in range(0, clips, batch_rows):
        yield order[start : start + batch_rows]
