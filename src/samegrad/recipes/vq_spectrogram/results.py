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
from .sources import Scales

if TYPE_CHECKING:
    from .pictures import Shown

SHOWN_PATCHES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The test clips judged. ``machines``: AUC and pAUC of every id, by the kind of score."""

    clips: Clips
    scales: Scales
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
        "score_histograms": pictures.draw_histograms(
            {_told(kind, results.scales): values for kind, values in results.scores.items()}, results.anomalous
        ),
        "roc": pictures.draw_roc(
            scores, results.anomalous, [clip.machine for clip in results.clips.clips], results.machines[name], name
        ),
        "codebook_usage": pictures.draw_codebook(
            *(code_usage(results.judged.codes[chosen], results.num_codes) for chosen in (~labels, labels))
        ),
    }
    return [save_picture(figure, folder / f"{stem}.png") for stem, figure in figures.items()]


def _told(kind: str, scales: Scales) -> str:
    """A kind of score with its unit."""
    units = {
        "reconstruction": "mean squared error",
        "codes": "mean negative log-likelihood, nats",
        "mean_energy": scales.level,
    }
    return f"{kind.replace('_', ' ')}: {units[kind]}"


def _shown(results: Results, scores: Scores, run: Run, patching: Patching) -> list[Shown]:
    """The normal clip and the anomalous one in the middle of their kind's scores: neither best nor worst."""
    from .pictures import Shown

    shown: list[Shown] = []
    for wanted in (False, True):
        mine = [i for i, anomalous in enumerate(results.anomalous) if anomalous is wanted]
        index = sorted(mine, key=lambda i: float(scores[i]))[len(mine) // 2]
        starts = patching.starts(results.clips.read(index).shape[1])
        places = shown_places(starts)
        patches = patching.plain(results.clips, [index])
        rebuilt = run(patches).reconstructed.cpu()
        kind = "anomalous" if wanted else "normal"
        shown.append(
            Shown(
                title=f"{kind}\n{results.clips.clips[index].machine}",
                upwards=results.scales.upwards,
                along=results.scales.along,
                spans=[span_in_words(starts[place], patching.patch_len, results.scales) for place in places],
                patches=_side_by_side(patches, places),
                reconstructed=_side_by_side(rebuilt, places),
            )
        )
    return shown


def shown_places(starts: Sequence[int]) -> list[int]:
    """Of patches that begin at ``starts``, the places of a few that are spread over the clip, none twice."""
    apart = [place for place, start in enumerate(starts) if start not in starts[:place]]
    chosen = np.linspace(0, len(apart) - 1, min(SHOWN_PATCHES, len(apart))).round().astype(int)
    return [apart[i] for i in chosen]


def span_in_words(start: int, frames: int, scales: Scales) -> str:
    """From where to where a patch lies, in the unit of the axis; of pixels the first and the last."""
    if scales.column == 1:
        return f"{start}–{start + frames - 1}"
    return f"{start * scales.column:.1f}–{(start + frames) * scales.column:.1f}"


def _side_by_side(patches: Tensor, places: Sequence[int]) -> npt.NDArray[np.float64]:
    """(H, len(places) · W) of a clip's (1, N, 1, H, W)."""
    side_by_side: npt.NDArray[np.float64] = patches[0, list(places), 0].permute(1, 0, 2).flatten(1).double().numpy()
    return side_by_side
