"""``samegrad plan TARGET --budget``: the fastest plan that fits, and why; exit code 1 when nothing exact does.

With a card's name as ``--device`` everything is predicted for that card, at hand or not. ``--pareto`` shows what every
budget buys instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samegrad.cli.console import Console
from samegrad.cli.devices import find_card_asked
from samegrad.cli.options import Switch
from samegrad.cli.output_folder import check_output
from samegrad.cli.target import FunctionTarget, Target, asked_device, target_call
from samegrad.errors import UsageError
from samegrad.recipes import OutOfRange
from samegrad.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from samegrad.cli.training import Training
    from samegrad.json_record import Record
    from samegrad.measure.cards import Card
    from samegrad.recipes._recipe import LongTable
    from samegrad.records import Plan


# What --output may come to hold; with --pareto a plan for each point.
PLAN_FILES = ("plan.json", "footprint.json", "measured.json")
FRONT_FILES = ("front.json", "front.svg", "plan-1.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is planned, and where the plan goes."""

    plan: Path | None = None
    """A plan.json to judge instead of making one: exit code 1 when it does not fit. Measured here, predicted for a
    card; refused where the model or the shapes are others."""
    pareto: Switch = False
    """List budgets against step times: the fastest plan at each."""
    steps: int | None = None
    """Steps that the training will have; they are written down, and their time is added up."""
    table: Switch = False
    """The table of the recipe's document, with our bytes and times beside its own."""
    output: Path | None = None
    """Folder for plan.json, footprint.json (predicted) and, with --plan, measured.json; with --pareto for front.json,
    front.svg and a plan.json for each budget."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise OutOfRange(
                asked=f"--steps {self.steps}", found="it must be at least 1", do="give 1 or more", option="steps"
            )
        ways = [name for name in ("pareto", "table", "plan") if getattr(self, name)]
        if len(ways) > 1:
            raise UsageError(
                asked=" and ".join(f"--{name}" for name in ways), found="each is an answer of its own",
                do="ask one of them at a time", option=ways[0],
            )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What ``plan`` found: whether it fits, the JSON document, and the records for ``--output``."""

    fits: bool
    document: Mapping[str, Any]
    records: Mapping[str, Record]


def main(argv: Sequence[str], console: Console) -> int:
    target, call = target_call("plan", (PlanOptions,), argv)
    options = call.part(PlanOptions)
    check_output(options.output, files=FRONT_FILES if options.pareto else PLAN_FILES)
    card = find_card_asked(asked_device(target, call))
    from samegrad.cli.given_plan import of_plan_file, read_plan
    from samegrad.cli.programs import advised, load_training
    from samegrad.cli.run_story import write_records
    from samegrad.cli.stopping import listening

    with listening(), advised(target):
        if options.table:
            return _show_table(target, call.part(target.options_class), console)
        given = read_plan(options.plan) if options.plan is not None else None
        training = load_training(target, call)
        training.step.expected_steps = options.steps or training.step.expected_steps
        if options.pareto:
            from samegrad.cli.pareto import show_front

            return show_front(training, card, options.output, console)
        with of_plan_file(options.plan, target):
            if card is None:
                answer = _plan_here(training, given, console)
            else:
                answer = _plan_ahead(training, card, given, console)
    expected = _tell_expected(training.step.expected_steps, answer.document["plan"]["predicted_seconds"], console)
    console.document({"fits": answer.fits, **answer.document, **expected})
    write_records(options.output, answer.records)
    return 0 if answer.fits else 1


def _plan_here(training: Training, given: Plan | None, console: Console) -> Answer:
    """The plan for the device that the model is on; a given one is measured."""
    from samegrad.cli.measured import measure_real_steps
    from samegrad.cli.planned import plan_step
    from samegrad.report.facts import describe_budget
    from samegrad.report.terminal import plan_table

    planned = plan_step(training, given)
    plan, predicted = planned.plan, planned.predicted
    document: dict[str, Any] = {"plan": plan.to_dict(), "footprint": predicted.to_dict()}
    records: dict[str, Record] = {"plan.json": plan, "footprint.json": predicted}
    if plan.budget is not None:
        console.result(f"Budget: {describe_budget(plan.budget)}.")
    console.show(plan_table(plan, predicted))
    if planned.told:
        console.result(planned.told)
    console.detail(planned.explanation)
    if given is None or plan.budget is None:
        return Answer(fits=True, document=document, records=records)
    measured = measure_real_steps(training.step, training.batch, planned.footprint)
    document["measured"] = measured.to_dict()
    records["measured.json"] = measured
    peak_bytes = measured.peak_reserved_bytes or measured.peak_allocated_bytes
    if plan.budget.counting is not measured.counting:
        console.result(
            f"the given plan was made for {plan.budget.device} ({plan.budget.counting.value}); here it holds "
            f"{format_bytes(peak_bytes)} ({measured.counting.value}), which its budget does not bound"
        )
        return Answer(fits=True, document=document, records=records)
    fits = peak_bytes <= plan.budget.total_bytes
    verb = "fits" if fits else "does not fit"
    budget = format_bytes(plan.budget.total_bytes)
    console.result(f"the given plan {verb}: measured {format_bytes(peak_bytes)} of {budget}")
    return Answer(fits=fits, document=document, records=records)


def _plan_ahead(training: Training, card: Card, given: Plan | None, console: Console) -> Answer:
    """The plan for a card, at hand or not: nothing is run."""
    from samegrad.cli.ahead import plan_for_card
    from samegrad.plan.explain import explain_plan
    from samegrad.report.ahead import ahead_lines
    from samegrad.report.facts import describe_budget
    from samegrad.report.terminal import plan_table

    ahead = plan_for_card(training, card, given)
    assert ahead.plan.budget is not None
    document = ahead.to_dict()
    console.result(f"Budget: {describe_budget(ahead.plan.budget)}.")
    console.show(plan_table(ahead.plan, None))
    console.result()
    console.result("\n".join(ahead_lines(ahead.plan, ahead.predicted, document["card"])))
    pinned = "\n".join(training.told_of_pins())
    if pinned:
        console.result(pinned)
    console.detail("\n".join(filter(None, (explain_plan(ahead.plan, ahead.plain), pinned))))
    if given is not None:
        verb = "fits" if ahead.fits else "does not fit"
        cap, budget = ahead.predicted.steady_cap_bytes or 0, ahead.plan.budget.total_bytes
        console.result(f"the given plan {verb}: predicted {format_bytes(cap)} of {format_bytes(budget)}")
    records = {"plan.json": ahead.plan, "footprint.json": ahead.predicted}
    return Answer(fits=ahead.fits, document=document, records=records)


def _tell_expected(steps: int | None, seconds: float | None, console: Console) -> dict[str, Any]:
    """The steps that were announced, with their time; for the JSON document."""
    if steps is None:
        return {}
    total = None if seconds is None else steps * seconds
    if total is not None and seconds is not None:
        console.result(f"{steps} steps of {format_seconds(seconds)} would take {format_seconds(total)}, predicted.")
    return {"expected_steps": steps, "predicted_total_seconds": total}


def _show_table(target: Target, options: Any, console: Console) -> int:
    if isinstance(target, FunctionTarget):
        raise UsageError(
            asked=f"plan {target.name} --table", found="only a recipe's document has a table",
            do="leave --table out", option="table",
        )  # fmt: skip
    from samegrad.cli.tables import DrawnTable
    from samegrad.recipes import find_recipe

    rows = list(rows_with_bar(target.name, find_recipe(target.name).table(options), console))
    console.show(DrawnTable(rows))
    console.document({"table": [dict(row) for row in rows]})
    return 0


def rows_with_bar(
    name: str, rows: Sequence[Mapping[str, Any]] | LongTable, console: Console
) -> Iterator[Mapping[str, Any]]:
    """The rows, with a bar beside those that are measured one after the other."""
    if isinstance(rows, Sequence):
        yield from rows
        return
    with console.progress(name, len(rows)) as bar:
        for row in rows:
            # The first cell says what was measured.
            bar.advance(str(next(iter(row.values()))))
            yield row
