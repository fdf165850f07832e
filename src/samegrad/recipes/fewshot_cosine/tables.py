"""The document's table of forward, backward and whole, before and after, with measured or predicted bytes beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe import Cell, LongTable

from . import document, stepping
from .courses import document_step, follow_course, plain_step
from .model import FewShotTransformer
from .objective import EpisodeLoss

Line = Mapping[str, Cell]
_Figures = tuple[float, float, float] | None


def measured_table(
    step: sg.Step, model: FewShotTransformer, loss: EpisodeLoss, amp: str | None, episode: Tensor
) -> LongTable:
    """Each line is a real step of ``episode`` with its optimizer's turn, counted and undone; the last is ``step``."""
    optimizer = step.declared.optimizer
    assert optimizer is not None
    steps: list[tuple[str, sg.Step, _Figures]] = [
        ("the document", document_step(model, loss, optimizer), document.BEFORE_BYTES),
        ("one forward, Gram", plain_step(model, loss, optimizer), None),
    ]
    if amp is not None:
        steps.append((f"and {amp}", plain_step(model, loss, optimizer, amp=amp), None))
    steps.append(("as run", step, document.AFTER_BYTES))

    def lines() -> Iterator[Line]:
        for label, each, known in steps:
            course = follow_course(label, each, model, episode)
            ended = ", out of memory" if course.out_of_memory else ""
            peaks = (course.peak_by_phase, course.peak_bytes, course.reserved_bytes)
            yield _line(label + ended, "measured", peaks, course.seconds, known)

    return LongTable(len(steps), lines())


def predicted_table(
    model: FewShotTransformer, loss: EpisodeLoss, amp: str | None, episode: Tensor, *, card: str, plain: sg.Step
) -> LongTable:
    """The same for a card that need not be at hand, each step followed without running it; none is planned.

    ``plain``: the step, with its optimizer. Reading it raises CannotTrace where one cannot be followed.
    """
    optimizer = plain.declared.optimizer
    assert optimizer is not None
    written = document_step(model, loss, optimizer).declared
    steps: list[tuple[str, sg.Step, _Figures]] = [
        (
            "the document",
            sg.Step(model.backbone, written.loss_fn, forward=written.forward, optimizer=optimizer),
            document.BEFORE_BYTES,
        ),
        ("one forward, Gram", sg.Step(model.backbone, loss, optimizer=optimizer), None),
    ]
    if amp is not None:
        steps.append((f"and {amp}", stepping.step_under_autocast(model, loss, optimizer, amp), None))

    def lines() -> Iterator[Line]:
        for label, step, known in steps:
            found = sg.measure_step(step, episode, device=card)
            phases = {phase.value: peak for phase, peak in found.by_phase.items()}
            peaks = (phases, found.peak_allocated_bytes, found.peak_reserved_bytes)
            yield _line(label, f"predicted, {card}", peaks, found.seconds, known)

    return LongTable(len(steps), lines())


def _line(
    label: str,
    origin: str,
    peaks: tuple[Mapping[str, int], int | None, int | None],
    seconds: float | None,
    known: _Figures,
) -> Line:
    phases, peak_bytes, reserved_bytes = peaks
    cells: dict[str, Cell] = {
        "step": label,
        "origin": origin,
        "forward_bytes": max(phases.get("forward", 0), phases.get("loss", 0)),
        "backward_bytes": phases.get("backward", 0),
        "peak_bytes": peak_bytes,
        "step_seconds": seconds,
    }
    if reserved_bytes is not None:
        cells["reserved_bytes"] = reserved_bytes
    names = ("document_forward_bytes", "document_backward_bytes", "document_peak_bytes")
    return {**cells, **dict(zip(names, known or (None,) * 3))}
