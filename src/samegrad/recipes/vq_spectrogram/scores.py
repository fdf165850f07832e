"""How a trained model is judged, as the challenge does it: a score a clip, AUC and pAUC a machine id, their means.

Reconstruction score: the mean squared error over all patches of a clip. Code score: the mean negative log-likelihood
of its codes under the histogram of the training clips' codes of the same machine, each code counted once more than it
was seen (Laplace). Labels are those of the file names. pAUC is up to a false positive rate of 0.1, standardised as
``sklearn.metrics.roc_auc_score(max_fpr=0.1)`` does it (McClish 1989), so that chance is 0.5.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """Of every clip: ``errors`` (clips,), ``code_counts`` (clips, K), ``levels`` (clips,) the mean of its log-mel."""

    errors: Scores
    code_counts: npt.NDArray[np.int64]
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


def judge_clips(run: Run, patching: Patching, clips: Clips, num_codes: int, *, rows: int) -> Judged:
    """``run`` takes patches (B, N, 1, H, W) on the host; ``rows`` clips are run at a time."""
    errors, counts, levels = [], [], []
    for start in range(0, len(clips.clips), rows):
        places = range(start, min(start + rows, len(clips.clips)))
        patches = patching.plain(clips, places)
        outputs = run(patches)
        apart = outputs.reconstructed.to("cpu", torch.float64) - patches
        errors.append(apart.square().mean((1, 2, 3, 4)).numpy())
        flat = outputs.codes.flatten(1).cpu()
        counts.append(torch.zeros(len(flat), num_codes, dtype=torch.int64).scatter_add_(1, flat, torch.ones_like(flat)))
        levels += [float(clips.read(place).mean(dtype=np.float64)) for place in places]
    return Judged(
        errors=np.concatenate(errors), code_counts=torch.cat(counts).numpy(), levels=np.array(levels)
    )


def code_scores(test: Clips, judged: Judged, train: Clips, trained: Judged) -> Scores:
    """(clips,): the mean negative log-likelihood of each test clip's codes."""
    scores = np.empty(len(test.clips))
    places = np.array([clip.machine for clip in train.clips])
    for machine in {clip.machine for clip in test.clips}:
        seen = trained.code_counts[places == machine].sum(axis=0)
        surprise = -np.log((seen + 1) / (seen.sum() + len(seen)))
        mine = [i for i, clip in enumerate(test.clips) if clip.machine == machine]
        counts = judged.code_counts[mine]
        scores[mine] = counts @ surprise / counts.sum(axis=1)
    return scores


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


def perplexity(counts: npt.NDArray[np.int64]) -> float:
    """exp of the entropy of code usage, from (…, K) counts: how many codes are in use, as it were.

    Of all counts together: the mean of perplexities of batches is another number.
    """
    totals = counts.reshape(-1, counts.shape[-1]).sum(axis=0)
    shares = totals[totals > 0] / totals.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
