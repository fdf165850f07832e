"""What changes from epoch to epoch: stages, warm-ups. Pure functions of the epoch, so that a resumed run agrees."""

from __future__ import annotations

import dataclasses

from .options import VQSpectrogramOptions


@dataclasses.dataclass(frozen=True)
class Stage:
    """``vq_scale`` and ``heads_scale``: factors of the loss terms; ``lr``; whether the codebook learns."""

    vq_scale: float
    heads_scale: float
    lr: float
    codebook_learns: bool


def stage_of(options: VQSpectrogramOptions, epoch: int) -> Stage:
    """The stage of ``epoch``, counted from 0."""
    first, frozen_from = phases(options)
    staged = not options.no_staged_training
    return Stage(
        vq_scale=_grown(epoch, options.commitment_warmup_epochs, options.commitment_warmup_start),
        heads_scale=0.0 if staged and epoch < first else 1.0,
        lr=options.lr * min(1.0, (epoch + 1) / max(1, options.lr_warmup_epochs)),
        codebook_learns=not (staged and epoch >= frozen_from),
    )


def phases(options: VQSpectrogramOptions) -> tuple[int, int]:
    """The first epoch with the heads' losses, and the first with the codebook frozen."""
    epochs = options.total_epochs
    return round(options.phase1_frac * epochs), round((options.phase1_frac + options.phase2_frac) * epochs)


def _grown(epoch: int, warmup_epochs: int, start: float) -> float:
    """From ``start`` in epoch 0 to 1 in epoch ``warmup_epochs``, in equal steps."""
    if epoch >= warmup_epochs:
        return 1.0
    return start + (1 - start) * epoch / warmup_epochs
