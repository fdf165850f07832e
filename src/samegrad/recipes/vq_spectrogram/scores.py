"""How a trained model is judged, as the challenge does it: a score a clip, AUC and pAUC a machine id, their means.

Reconstruction score: the mean squared error over all patches of a clip. Code score: the mean negative log-likelihood
of its codes under the histogram of the training clips' codes of the same machine at the same place of a patch, each
code counted once more than it was seen there (Laplace). Labels are those of the file names. pAUC is up to a false
positive rate of 0.1, standardised as ``sklearn.metrics.roc_auc_score(max_fpr=0.1)`` does it (McClish 1989), so that
chance is 0.5.
Source: Koizumi et al. 2020, "Description and discussion on DCASE2020 challenge task 2", arXiv:2006.05822.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .data import Clips, Patching
from .model import Outputs

MAX_FALSE_POSITIVE_RATE = 0.1
Run = Callable[[Tensor], Outputs]
Scores = npt.NDArray[np.float64]
# Kept of every clip, and there are thousands: as short as numbers of codes can be.
Codes = npt.NDArray[np.int16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """Of every clip: ``errors`` (clips,), ``codes`` (clips, N, h, w), ``levels`` (clips,) the mean of its log-mel."""

    errors: Scores
    codes: Codes
    levels: Scores


@contextlib.contextmanager
def judging(model: nn.Module) -> Iterator[None]:
    """A block in eval mode and without gradients; every module's own mode is back on every way out."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def judge_clips(run: Run, patching: Patching, clips: Clips, *, rows: int) -> Judged:
    """``run`` takes patches (B, N, 1, H, W) on the host; ``rows`` clips are run at a time."""
    errors, codes, levels = [], [], []
    for start in range(0, len(clips.clips), rows):
        places = range(start, min(start + rows, len(clips.clips)))
        patches = patching.plain(clips, places)
        outputs = run(patches)
        apart = outputs.reconstructed.to("cpu", torch.float64) - patches
        errors.append(apart.square().mean((1, 2, 3, 4)).numpy())
        codes.append(outputs.codes.to("cpu", torch.int16).numpy())
        levels += [float(clips.read(place).mean(dtype=np.float64)) for place in places]
    return Judged(errors=np.concatenate(errors), codes=np.concatenate(codes), levels=np.array(levels))


def code_scores(test: Clips, judged: Judged, train: Clips, trained: Judged, num_codes: int) -> Scores:
    """(clips,): the mean negative log-likelihood of each test clip's codes."""
    scores = np.empty(len(test.clips))
    trained_on = np.array([clip.machine for clip in train.clips])
    for machine in {clip.machine for clip in test.clips}:
        surprise = _surprise(trained.codes[trained_on == machine], num_codes)
        mine = [i for i, clip in enumerate(test.clips) if clip.machine == machine]
        codes = judged.codes[mine].reshape(len(mine), -1, surprise.shape[0])
        scores[mine] = surprise[np.arange(len(surprise)), codes].mean(axis=(1, 2))
    return scores


def _surprise(codes: Codes, num_codes: int) -> Scores:
    """(places, K): −log of how likely each code is at each place, from codes (clips, N, h, w)."""
    places = codes.shape[2] * codes.shape[3]
    seen = np.zeros((places, num_codes))
    flat = codes.reshape(-1, places)
    np.add.at(seen, (np.broadcast_to(np.arange(places), flat.shape), flat), 1)
    return np.asarray(-np.log((seen + 1) / (seen + 1).sum(axis=1, keepdims=True)))


def code_usage(codes: Codes, num_codes: int) -> npt.NDArray[np.int64]:
    """(K,): how often each code is used in ``codes``."""
    return np.bincount(codes.ravel(), minlength=num_codes)


@dataclasses.dataclass(frozen=True)
class MachineScore:
    """AUC and pAUC of one machine id."""

    machine: str
    auc: float
    pauc: float


def score_machines(clips: Clips, scores: Scores) -> list[MachineScore]:
    """AUC and pAUC of every machine id. Raises ValueError for one with clips of one label only."""
    from sklearn.metrics import roc_auc_score

    found = []
    for machine in sorted({clip.machine for clip in clips.clips}):
        mine = [i for i, clip in enumerate(clips.clips) if clip.machine == machine]
        labels = [clips.clips[i].anomalous for i in mine]
        if len(set(labels)) < 2:
            raise ValueError(f"all test clips of {machine} are {'anomalous' if labels[0] else 'normal'}")
        found.append(
            MachineScore(
                machine,
                float(roc_auc_score(labels, scores[mine])),
                float(roc_auc_score(labels, scores[mine], max_fpr=MAX_FALSE_POSITIVE_RATE)),
            )
        )
    return found


def mean_scores(machines: Sequence[MachineScore]) -> tuple[float, float]:
    """AUC and pAUC averaged over machine ids."""
    return float(np.mean([m.auc for m in machines])), float(np.mean([m.pauc for m in machines]))


def perplexity(usage: npt.NDArray[np.int64]) -> float:
    """exp of the entropy of ``usage`` (K,): how many codes are in use, as it were.

    Of all clips together: the mean of perplexities of batches is another number.
    """
    shares = usage[usage > 0] / usage.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
