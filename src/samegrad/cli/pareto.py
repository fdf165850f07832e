"""``samegrad plan TARGET --pareto``: what every budget buys, as a table, as JSON, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from samegrad.cli.console import Console
from samegrad.cli.output_folder import write_output
from samegrad.cli.run_story import write_records
from samegrad.cli.training import Training
from samegrad.measure.cards import Card
from samegrad.measure.target import Target
from samegrad.plan.options import Options
from samegrad.records import Front
from samegrad.report.front import front_rows, front_svg
from samegrad.settle.front import front_here, front_on_card

if TYPE_CHECKING:
    from rich.table import Table


def show_front(training: Training, card: Card | None, output: Path | None, console: Console) -> int:
    """Tells the front of the step of ``training`` on its device, or on ``card``; exit code 0."""
    declared, options = training.step.declared, Options(allow=training.step.allow)
    if card is None:
        front = front_here(declared, training.batch, options)
    else:
        console.note("Each plan is followed whole, without running it; large models take a minute.")
        front = front_on_card(declared, training.batch, Target.named(card.name), options)
    console.result(
        f"Budgets on {front.device} ({front.counting.value}) against step times, {front.batch_rows} rows a step; "
        "predicted, not measured."
    )
    console.show(_table(front))
    for left_out in front.left_out:
        console.note(f"left out: {left_out}")
    console.detail(front.basis)
    console.document({"front": front.to_dict()})
    if output is not None:
        plans = {f"plan-{number}.json": point.plan for number, point in enumerate(front.points, start=1)}
        write_records(output, {"front.json": front, **plans})
        write_output(output, "front.svg", front_svg(front))
        console.result(f"{output / 'front.svg'}, and plan-1.json to plan-{len(plans)}.json: run one with --plan")
    return 0


def _table(front: Front) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "budget", "step", "slower", "how"):
        table.add_column(name, justify="left" if name == "how" else "right")
    for row in front_rows(front):
        table.add_row(*(Text(cell) for cell in row))
    return table
