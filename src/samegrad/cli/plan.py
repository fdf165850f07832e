"""``samegrad plan TARGET --budget``: the fastest plan that fits, and why; exit code 1 when nothing exact does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samegrad.cli.console import Console
from samegrad.cli.options import Switch
from samegrad.cli.target import FunctionTarget, Target, target_call
from samegrad.errors import UsageError
from samegrad.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is planned, and where the plan goes."""

    plan: Path | None = None
    """A plan.json to judge here instead of making one: measured, exit code 1 when it does not fit."""
    table: Switch = False
    """The table of the recipe's document, with our bytes and times beside its own."""
    output: Path | None = None
    """Folder for plan.json, footprint.json (predicted) and, with --plan, measured.json."""


def main(argv: Sequence[str], console: Console) -> int:
    target, call = target_call("plan", (PlanOptions,), argv)
    options = call.part(PlanOptions)
    from samegrad.cli.planned import measured_after_a_step, plan_step
    from samegrad.cli.programs import advised, load_training
    from samegrad.cli.run_story import read_plan, write_records
    from samegrad.cli.stopping import listening
    from samegrad.report.facts import describe_budget
    from samegrad.report.terminal import plan_table

    with listening(), advised(target):
        if options.table:
            return _show_table(target, call.part(target.options_class), console)
        given = read_plan(options.plan) if options.plan is not None else None
        training = load_training(target, call)
        planned = plan_step(training, given)
        measured = measured_after_a_step(training.step, training.batch, planned.footprint) if given else None
    fits = True
    records = {"plan.json": planned.plan, "footprint.json": planned.predicted}
    if planned.plan.budget is not None:
        console.result(f"Budget: {describe_budget(planned.plan.budget)}.")
    console.show(plan_table(planned.plan, planned.predicted))
    console.detail(planned.explanation)
    document: dict[str, Any] = {"plan": planned.plan.to_dict(), "footprint": planned.predicted.to_dict()}
    if measured is not None and planned.plan.budget is not None:
        budget_bytes = planned.plan.budget.total_bytes
        peak_bytes = measured.peak_reserved_bytes or measured.peak_allocated_bytes
        fits = peak_bytes <= budget_bytes
        verb = "fits" if fits else "does not fit"
        console.result(f"the given plan {verb}: measured {format_bytes(peak_bytes)} of {format_bytes(budget_bytes)}")
        document["measured"] = measured.to_dict()
        records["measured.json"] = measured
    console.document({"fits": fits, **document})
    write_records(options.output, records)
    return 0 if fits else 1


def _show_table(target: Target, options: Any, console: Console) -> int:
    if isinstance(target, FunctionTarget):
        raise UsageError(
            asked=f"plan {target.name} --table", found="only a recipe's document has a table",
            do="leave --table out", option="table",
        )  # fmt: skip
    from samegrad.recipes import find_recipe

    rows = list(find_recipe(target.name).table(options))
    console.show(drawn_table(rows))
    console.document({"table": [dict(row) for row in rows]})
    return 0


def drawn_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows under their column names, with amounts in units that read well."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(Text(_cell(name, row.get(name))) for name in names))
    return table


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (int, float)) and name.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, (int, float)) and name.endswith("_seconds"):
        return format_seconds(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
