"""``samegrad measure TARGET``: what the planned step holds over its course, predicted and measured, and at its peak.

Predicted by following the step without running it, measured by a few real steps that are undone. For a card's name as
``--device`` nothing is run, and everything is predicted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samegrad.cli.console import Console
from samegrad.cli.devices import find_card_asked
from samegrad.cli.output_folder import check_output, write_output
from samegrad.cli.target import asked_device, target_call
from samegrad.units import format_bytes

if TYPE_CHECKING:
    from samegrad.cli.training import Training
    from samegrad.measure.cards import Card
    from samegrad.records import Footprint, Plan


# What --output may come to hold.
FILES = ("plan.json", "footprint.json", "measured.json", "measure.html", "timeline.svg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Where the records go."""

    output: Path | None = None
    """Folder for measure.html, timeline.svg, footprint.json (predicted), measured.json and plan.json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The step under its plan: as predicted, as measured where there is a device, and the plain step's peak.

    ``beside``: what else the JSON document tells; ``lines``: for a person.
    """

    plan: Plan
    predicted: Footprint
    measured: Footprint | None
    plain_peak_bytes: int
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lines: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_dict(),
            "predicted": self.predicted.to_dict(),
            "measured": None if self.measured is None else self.measured.to_dict(),
            "plain_predicted_peak_bytes": self.plain_peak_bytes,
            **self.beside,
        }


def main(argv: Sequence[str], console: Console) -> int:
    target, call = target_call("measure", (MeasureOptions,), argv)
    output = call.part(MeasureOptions).output
    check_output(output, files=FILES)
    card = find_card_asked(asked_device(target, call))
    from samegrad.cli.programs import advised, load_training
    from samegrad.cli.stopping import listening

    with listening(), advised(target):
        training = load_training(target, call)
        found = _measure_here(training, console) if card is None else _measure_ahead(training, card)
    _tell(found, console)
    console.document(found.to_dict())
    if output is not None:
        _write(found, f"What one step of {training.title} holds", output, console)
    return 0


def _measure_here(training: Training, console: Console) -> Measured:
    from samegrad.cli.measured import measure_real_steps
    from samegrad.cli.planned import plan_step

    planned = plan_step(training)
    console.detail(planned.explanation)
    predicted = _followed(training, planned.predicted, console)
    measured = measure_real_steps(training.step, training.batch, planned.footprint)
    plain = planned.footprint.predicted_peak_bytes(rows=planned.footprint.batch_rows)
    return Measured(plan=planned.plan, predicted=predicted, measured=measured, plain_peak_bytes=plain)


def _followed(training: Training, by_laws: Footprint, console: Console) -> Footprint:
    """The step as followed; as its laws predict it where that cannot be, which is said."""
    from samegrad.cli.measured import MOST_FOLLOWED_CHUNKS, followed_footprint
    from samegrad.errors import CannotTrace

    chunks = len(training.step.sizes_for(training.batch))
    if chunks > MOST_FOLLOWED_CHUNKS:
        console.note(f"{chunks} chunks are too many to follow one by one, so the prediction has no course")
        return by_laws
    try:
        return followed_footprint(training.step, training.batch, by_laws)
    except CannotTrace as error:
        console.note(f"the step cannot be followed, so its prediction has no course: {error.found}")
        return by_laws


def _measure_ahead(training: Training, card: Card) -> Measured:
    from samegrad.cli.ahead import plan_for_card
    from samegrad.report.ahead import ahead_lines

    ahead = plan_for_card(training, card)
    document = ahead.to_dict()
    return Measured(
        plan=ahead.plan,
        predicted=ahead.predicted,
        measured=None,
        plain_peak_bytes=ahead.plain.steady_cap_bytes or ahead.plain.peak_allocated_bytes,
        beside={"card": document["card"]},
        lines=tuple(ahead_lines(ahead.plan, ahead.predicted, document["card"])),
    )


def _tell(found: Measured, console: Console) -> None:
    from samegrad.report.at_peak import peak_lines
    from samegrad.report.course import course_text
    from samegrad.report.terminal import footprint_table

    predicted, measured = found.predicted, found.measured
    shown = predicted if measured is None or not measured.timeline else measured
    console.show(course_text(shown, found.plan.budget))
    console.show(footprint_table(predicted, measured))
    if predicted.at_peak:
        console.result("\n".join(["", *peak_lines(predicted), ""]))
    if measured is not None and measured.batch_rows != predicted.batch_rows:
        console.result(f"measured: {measured.basis}, of {predicted.batch_rows}")
    for line in found.lines:
        console.result(line)
    whole = f"plain step, all {predicted.batch_rows} rows at once"
    console.result(f"{whole}: {format_bytes(found.plain_peak_bytes)}, predicted")


def _write(found: Measured, title: str, output: Path, console: Console) -> None:
    """The records, the page and the picture of the course."""
    from samegrad.cli.run_story import write_records
    from samegrad.report import Story, render_report, timeline_svg
    from samegrad.report.facts import comparable_budget

    records = {"plan.json": found.plan, "footprint.json": found.predicted}
    if found.measured is not None:
        records["measured.json"] = found.measured
    write_records(output, records)
    story = Story(title=title, plan=found.plan, predicted=found.predicted, measured=found.measured)
    write_output(output, "measure.html", render_report(story))
    shown = found.measured if found.measured is not None and found.measured.timeline else found.predicted
    beside = found.predicted if shown is not found.predicted else None
    picture = timeline_svg(shown, comparable_budget(found.plan.budget, shown), beside)
    if picture:
        write_output(output, "timeline.svg", picture)
    console.result(f"{output / 'measure.html'}")
