"""What a run leaves: weights in two formats, a score a clip, and pictures."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from samegrad.recipes._recipe.written import save_picture, save_weights

from .data import Clips, Patching
from .scores import Judged, MachineScore, Run, Scores, code_usage

if TYPE_CHECKING:
    from .pictures import Shown

SHOWN_PATCHES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The test clips judged. ``machines``: AUC and pAUC of every id, by the kind of score.

    ``upwards``: what a row of a patch is, in a word.
    """

    clips: Clips
    upwards: str
    judged: Judged
    num_codes: int
    scores: Mapping[str, Scores]
    machines: Mapping[str, Sequence[MachineScore]]

    @property
    def anomalous(self) -> list[bool]:
        return [clip.anomalous for clip in self.clips.clips]


def write_weights(model: nn.Module, patching: Patching, folder: Path) -> list[Path]:
    """The weights as safetensors and as ``.pt`` for ``weights_only=True``, and the bands' mean and deviation."""
    written = [*save_weights(model, folder, "vq_spectrogram"), folder / "norm_stats.npz"]
    np.savez(written[-1], mean=patching.normalisation.mean, std=patching.normalisation.std)
    return written


def write_scores(results: Results, folder: Path) -> list[Path]:
    """``scores.csv``: a line a test clip; and, as the challenge wants them, ``anomaly_score_<machine>.csv`` files."""
    names = list(results.scores)
    written = [folder / "scores.csv"]
    with written[0].open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["clip", "machine", "anomalous", *names])
        for index, clip in enumerate(results.clips.clips):
            values = [f"{results.scores[name][index]:.9g}" for name in names]
            lines.writerow([clip.name, clip.machine, int(clip.anomalous), *values])
    for machine in sorted({clip.machine for clip in results.clips.clips}):
        type_, _, id_ = machine.rpartition(" ")
        path = folder / f"anomaly_score_{type_}_id_{id_}.csv"
        with path.open("w", newline="") as file:
            lines = csv.writer(file)
            for index, clip in enumerate(results.clips.clips):
                if clip.machine == machine:
                    lines.writerow([f"{clip.name}.wav", f"{results.scores[names[0]][index]:.9g}"])
        written.append(path)
    return written


def write_pictures(results: Results, run: Run, patching: Patching, folder: Path) -> list[Path]:
    """The four pictures. Raises ModuleNotFoundError without matplotlib."""
    from . import pictures

    name, scores = next(iter(results.scores.items()))
    labels = np.array(results.anomalous)
    figures = {
        "spectrograms": pictures.draw_spectrograms(_shown(results, scores, run, patching)),
        "score_histograms": pictures.draw_histograms(results.scores, results.anomalous),
        "roc": pictures.draw_roc(
            scores, results.anomalous, [clip.machine for clip in results.clips.clips], results.machines[name], name
        ),
        "codebook_usage": pictures.draw_codebook(
            *(code_usage(results.judged.codes[chosen], results.num_codes) for chosen in (~labels, labels))
        ),
    }
    return [save_picture(figure, folder / f"{stem}.png") for stem, figure in figures.items()]


def _shown(results: Results, scores: Scores, run: Run, patching: Patching) -> list[Shown]:
    """The normal clip and the anomalous one in the middle of their kind's scores: neither best nor worst."""
    from .pictures import Shown

    shown: list[Shown] = []
    for wanted in (False, True):
        mine = [i for i, anomalous in enumerate(results.anomalous) if anomalous is wanted]
        index = sorted(mine, key=lambda i: float(scores[i]))[len(mine) // 2]
        patches = patching.plain(results.clips, [index])
        rebuilt = run(patches).reconstructed.cpu()
        kind = "anomalous" if wanted else "normal"
        shown.append(
            Shown(
                title=f"{kind}\n{results.clips.clips[index].machine}",
                upwards=results.upwards,
                patches=_side_by_side(patches),
                reconstructed=_side_by_side(rebuilt),
            )
        )
    return shown


def _side_by_side(patches: Tensor) -> npt.NDArray[np.float64]:
    """(H, N · W) of a clip's (1, N, 1, H, W); four patches at most."""
    side_by_side: npt.NDArray[np.float64] = patches[0, :SHOWN_PATCHES, 0].permute(1, 0, 2).flatten(1).double().numpy()
    return side_by_side
