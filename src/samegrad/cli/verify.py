"""``samegrad verify TARGET``: the planned step against the plain one; exit code 0 only when proven the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from samegrad.cli.console import Console
from samegrad.cli.devices import refuse_card
from samegrad.cli.output_folder import check_output
from samegrad.cli.target import asked_device, target_call
from samegrad.recipes import OutOfRange


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What is compared."""

    rows: int | None = None
    """Compare on the first so many rows; default: as many as fit."""
    reference: Literal["device", "cpu"] | None = None
    """Where the plain step runs; default: the device where the batch fits, else the CPU where that takes seconds."""
    plan: Path | None = None
    """A plan.json to verify, instead of making a plan."""
    output: Path | None = None
    """Folder for verdict.json."""

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise OutOfRange(
                asked=f"--rows {self.rows}", found="it must be at least 1", do="give 1 or more", option="rows"
            )


def main(argv: Sequence[str], console: Console) -> int:
    target, call = target_call("verify", (VerifyOptions,), argv)
    options = call.part(VerifyOptions)
    check_output(options.output, files=("verdict.json",))
    refuse_card("verify", asked_device(target, call))
    import samegrad as sg
    from samegrad.cli.given_plan import of_plan_file, read_plan
    from samegrad.cli.planned import plan_step
    from samegrad.cli.programs import advised, load_training
    from samegrad.cli.run_story import verdict_text, write_records
    from samegrad.cli.stopping import listening
    from samegrad.records import Same

    with listening(), advised(target):
        given = read_plan(options.plan) if options.plan is not None else None
        training = load_training(target, call)
        with of_plan_file(options.plan, target):
            planned = plan_step(training, given)
        console.detail(planned.explanation)
        if not planned.plan.levers:
            console.note("The plan runs the step whole; a smaller --budget makes it split, and that would be verified.")
        verdict = sg.verify_step(training.step, training.batch, rows=options.rows, reference=options.reference)
    console.result(verdict_text(verdict))
    if verdict.answer is Same.UNPROVEN:
        console.result("unproven is not the same: exit code 1")
    document = {"same": verdict.same, "same_as": verdict.reference, "verdict": verdict.to_dict()}
    console.document(document | {"plan": planned.plan.to_dict()})
    write_records(options.output, {"verdict.json": verdict})
    return 0 if verdict.same else 1
