"""The document's table of forward, backward and whole, before and after: its own lines, and measured or predicted ones.

A line is of one origin: "stated" by the document for its ResNet34, "measured" here, or "predicted" for a card.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe import Cell, LongTable

from . import document, stepping
from .courses import document_step, follow_course, plain_step
from .model import FewShotTransformer
from .objective import EpisodeLoss
from .options import FewShotOptions

Line = Mapping[str, Cell]
_BEFORE, _ONE_FORWARD = "the document", "one forward, Gram"


def measured_table(
    options: FewShotOptions, step: sg.Step, model: FewShotTransformer, amp: str | None, episode: Tensor
) -> LongTable:
    """Each measured line is a real step of ``episode`` with its optimizer's turn, counted and undone; last ``step``."""
    optimizer = step.declared.optimizer
    assert optimizer is not None
    # The document's chunks, whatever runs.
    chunks = dataclasses.replace(
        options, budget=None, dynamic_accumulation=False, gradient_accumulation_steps=0,
        use_gradient_checkpointing=False, query_rows=0,
    )  # fmt: skip
    loss = stepping.make_loss(chunks, model).to(step.declared.device)
    steps = [
        (_BEFORE, document_step(model, loss, optimizer)),
        (_ONE_FORWARD, plain_step(model, loss, optimizer)),
    ]
    if amp is not None:
        steps.append((f"and {amp}", plain_step(model, loss, optimizer, amp=amp)))
    in_chunks = (f"and {chunks.steps} chunks", stepping.make_step(chunks, model, optimizer, episode))

    def measured(label: str, step: sg.Step) -> Line:
        course = follow_course(label, step, model, episode)
        ended = ", out of memory" if course.out_of_memory else ""
        peaks = (course.peak_by_phase, course.peak_bytes, course.reserved_bytes)
        return _line(label + ended, "measured", peaks, course.seconds)

    def lines() -> Iterator[Line]:
        yield _stated(_BEFORE, document.BEFORE_BYTES)
        for label, each in steps:
            yield measured(label, each)
        yield _stated("AMP and 4 chunks", document.AFTER_BYTES)
        yield measured(*in_chunks)
        yield measured("as run", step)

    return LongTable(len(steps) + 4, lines())


def predicted_table(
    model: FewShotTransformer, loss: EpisodeLoss, amp: str | None, episode: Tensor, *, card: str, plain: sg.Step
) -> LongTable:
    """The same for a card that need not be at hand, each step followed without running it; none is planned.

    ``plain``: the step, with its optimizer. Reading it raises CannotTrace where one cannot be followed.
    """
    optimizer = plain.declared.optimizer
    assert optimizer is not None
    written = document_step(model, loss, optimizer).declared
    steps = [
        (_BEFORE, sg.Step(model.backbone, written.loss_fn, forward=written.forward, optimizer=optimizer)),
        (_ONE_FORWARD, sg.Step(model.backbone, loss, optimizer=optimizer)),
    ]
    if amp is not None:
        steps.append((f"and {amp}", stepping.step_under_autocast(model, loss, optimizer, amp)))

    def lines() -> Iterator[Line]:
        yield _stated(_BEFORE, document.BEFORE_BYTES)
        for label, step in steps:
            found = sg.measure_step(step, episode, device=card)
            phases = {phase.value: peak for phase, peak in found.by_phase.items()}
            peaks = (phases, found.peak_allocated_bytes, found.peak_reserved_bytes)
            yield _line(label, f"predicted, {card}", peaks, found.seconds)
        yield _stated("AMP and 4 chunks", document.AFTER_BYTES)

    return LongTable(len(steps) + 2, lines())


def _line(
    label: str, origin: str, peaks: tuple[Mapping[str, int], int | None, int | None], seconds: float | None
) -> Line:
    phases, peak_bytes, reserved_bytes = peaks
    cells: dict[str, Cell] = {
        "formulation": label,
        "origin": origin,
        "forward_bytes": max(phases.get("forward", 0), phases.get("loss", 0)),
        "backward_bytes": phases.get("backward", 0),
        "peak_bytes": peak_bytes,
        "step_seconds": seconds,
    }
    if reserved_bytes is not None:
        cells["reserved_bytes"] = reserved_bytes
    return cells


def _stated(label: str, figures: tuple[float, float, float]) -> Line:
    """A line of the document's own."""
    cells: dict[str, Cell] = {"formulation": label, "origin": "stated"}
    return cells | dict(zip(("forward_bytes", "backward_bytes", "peak_bytes"), figures))
