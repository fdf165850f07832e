"""The live bytes of one step, operation by operation, before and after: the document's formulation, ours, the plan's.

Each is one real step with its optimizer's turn, counted, and undone: weights, buffers and optimizer state are put back.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import samegrad as sg

from .document import DocumentLoss, called_twice
from .model import FewShotTransformer
from .objective import EpisodeLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """One step: its phases with the live bytes at points along it, its peaks, its time.

    ``points``: (fraction of the step's operations, phase, live bytes). ``out_of_memory``: it ended there.
    """

    label: str
    points: tuple[tuple[float, str, int], ...]
    peak_by_phase: dict[str, int]
    peak_bytes: int
    reserved_bytes: int | None
    seconds: float | None
    out_of_memory: bool = False


def document_step(model: FewShotTransformer, loss: EpisodeLoss, optimizer: torch.optim.Optimizer) -> sg.Step:
    """The document's formulation of the same step."""
    whole = sg.Plan(levers={}, exactness=sg.Exactness.SAME_BITS, batch_rows=loss.shape.images)
    return sg.Step(model.backbone, DocumentLoss(loss), forward=called_twice, optimizer=optimizer, plan=whole)


def plain_step(
    model: FewShotTransformer, loss: EpisodeLoss, optimizer: torch.optim.Optimizer, *, amp: str | None = None
) -> sg.Step:
    """One forward, the covariance by the Gram trick, no lever but AMP."""
    levers = {} if amp is None else {"autocast": {"dtype": amp, "full_precision": []}}
    exactness = sg.Exactness.SAME_BITS if amp is None else sg.Exactness.ROUNDED
    plan = sg.Plan(levers=levers, exactness=exactness, batch_rows=loss.shape.images)
    return sg.Step(model.backbone, loss, optimizer=optimizer, plan=plan, allow=max(exactness, sg.Exactness.SAME_SUM))


def follow_course(label: str, step: sg.Step, model: nn.Module, episode: Tensor) -> Course:
    """One step of ``step`` on ``episode``, twice: timed, and counted. Nothing is left changed but the step's plan."""
    optimizer = step.declared.optimizer
    assert optimizer is not None
    with _put_back(model, optimizer):
        counter = sg.count_bytes(step, with_timeline=True)
        seconds, reserved, out_of_memory = None, None, False
        try:
            # The first step makes the optimizer's state, which the later ones hold.
            results = list(sg.train(step, [episode, episode]))
            seconds, reserved = results[-1].seconds, results[-1].peak_reserved_bytes
            list(sg.train(step, [episode], counter=counter))
        except sg.OverBudget:
            # This is the document's story, and is told as such; what was counted until then stands.
            out_of_memory = True
            optimizer.zero_grad()
    points = counter.timeline()
    return Course(
        label=label,
        points=tuple((p.position_fraction, p.phase.value, sum(p.live_bytes.values())) for p in points),
        peak_by_phase={phase.value: peak for phase, peak in counter.peak_by_phase.items()},
        peak_bytes=counter.peak_bytes,
        reserved_bytes=reserved,
        seconds=seconds,
        out_of_memory=out_of_memory,
    )


@contextlib.contextmanager
def _put_back(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Weights, buffers and optimizer state as they were, kept on the host meanwhile; gradients are cleared."""
    weights = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    try:
        yield
    finally:
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
