"""``samegrad measure TARGET``: what the planned step holds, by category and phase, predicted and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from samegrad.cli.console import Console
from samegrad.cli.target import target_call
from samegrad.units import format_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Where the records go."""

    output: Path | None = None
    """Folder for footprint.json (predicted) and measured.json."""


def main(argv: Sequence[str], console: Console) -> int:
    target, call = target_call("measure", (MeasureOptions,), argv)
    from samegrad.cli.planned import measured_after_a_step, plan_step
    from samegrad.cli.programs import advised, load_training
    from samegrad.cli.run_story import write_records
    from samegrad.cli.stopping import listening
    from samegrad.report.terminal import footprint_table

    with listening(), advised(target):
        training = load_training(target, call)
        planned = plan_step(training)
        measured = measured_after_a_step(training.step, training.batch, planned.footprint)
    predicted = planned.predicted
    console.detail(planned.explanation)
    console.show(footprint_table(predicted, measured))
    if measured.batch_rows < predicted.batch_rows:
        console.result(f"measured: {measured.basis}, of {predicted.batch_rows}")
    whole = planned.footprint.predicted_peak_bytes(rows=planned.footprint.batch_rows)
    console.result(f"plain step, all {predicted.batch_rows} rows at once: {format_bytes(whole)}, predicted")
    console.document(
        {"predicted": predicted.to_dict(), "measured": measured.to_dict(), "plain_predicted_peak_bytes": whole}
    )
    write_records(call.part(MeasureOptions).output, {"footprint.json": predicted, "measured.json": measured})
    return 0
