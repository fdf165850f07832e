"""One run in its folder: from the loaded program to its report. The rules stand in ``run.py``."""

from __future__ import annotations

import dataclasses
import math
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import samegrad as sg
from samegrad.cli.boundary import INTERNAL, known_error
from samegrad.cli.console import Console
from samegrad.cli.given_plan import of_plan_file, read_plan
from samegrad.cli.measured import measured_footprint
from samegrad.cli.options import Call
from samegrad.cli.planned import Planned, plan_step
from samegrad.cli.programs import advised, load_training
from samegrad.cli.ranks import first_folder, rank_count
from samegrad.cli.run import CONFIG, RunOptions, changed_options, config_text
from samegrad.cli.run_health import peaks_of
from samegrad.cli.run_loop import RANKS, train_in
from samegrad.cli.run_memory import memory_notes
from samegrad.cli.run_story import Summary, read_metrics, read_record, read_story, verdict_text
from samegrad.cli.stopping import Stopped, listening
from samegrad.cli.target import Target
from samegrad.cli.training import Outcome, Training
from samegrad.errors import BadInput, GradientsDiffer, NonFinite
from samegrad.measure import counters
from samegrad.records import Plan, Same, Verdict
from samegrad.report import render_markdown, render_report
from samegrad.report.verdicts import judge
from samegrad.store import RunFolder, check_step, load_checkpoint

VERDICT = "verdict.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that came to its end: what it reached, and the records that say so."""

    folder: Path
    unit: str
    done: int
    final_loss: float | None
    plan: Plan
    verdict: Verdict
    outcome: Outcome
    measured_peak_bytes: int | None

    @property
    def exit_code(self) -> int:
        return exit_code_of(self.verdict)

    def to_dict(self) -> dict[str, Any]:
        """The document of ``--json``; numbers that are not finite are null."""
        finite = {k: v for k, v in self.outcome.metrics.items() if not isinstance(v, float) or math.isfinite(v)}
        return {
            "final_loss": self.final_loss,
            "predicted_peak_bytes": self.plan.predicted_peak_bytes,
            "measured_peak_bytes": self.measured_peak_bytes,
            "plan": self.plan.to_dict(),
            "verdict": self.verdict.to_dict(),
            "run_folder": str(self.folder),
            f"{self.unit}s": self.done,
            **dict.fromkeys(self.outcome.metrics),
            **finite,
        }


def exit_code_of(verdict: Verdict) -> int:
    return 0 if verdict.same else 1


def run_session(target: Target, call: Call, folder: RunFolder, console: Console) -> Finished:
    """Trains ``target`` in ``folder``, from the start or from its newest checkpoint."""
    options = call.part(RunOptions)
    if options.resume_from is not None:
        # Before the status says anything else than how the run ended, and before data is read.
        check_step(first_folder(folder.path) / folder.checkpoints.name, options.resume_from)
    with Status(folder, target.name) as status, listening() as stop, advised(target):
        changed = changed_options(target, call, folder.path / CONFIG) if options.resume else {}
        if not options.resume:
            folder.write_text(CONFIG, config_text(target, call))
        given = _given_plan(folder, options, changed)
        training = load_training(target, call)
        if options.resume:
            _resume(training, folder, options, console)
            stop.saved = str(folder.path)
        if options.resume and (given is None or options.plan is not None):
            # It was another plan's; should this process end before there is a new one, nobody takes it for this one's.
            folder.remove(VERDICT)
        as_before = options.resume and given is not None and options.plan is None
        with of_plan_file(options.plan, target):
            planned = _plan(training, folder, given, console, resumed=as_before)
        # After the plan: a resume that failed before it is to find the change again, and plan for it.
        folder.write_text(CONFIG, config_text(target, call))
        _write_summary(training, folder, planned, Outcome())
        try:
            verdict = _verify(training, folder, options, console, as_before=as_before)
            train_in(folder, training, planned.plan, options, stop, console)
            # After training, because only now the optimizer's state is there to be counted.
            measured = measured_footprint(training.step, training.batch, planned.footprint)
            folder.write_text("measured.json", measured.to_json())
            outcome = training.finish(folder.path)
        finally:
            counters.uncap_allocator(training.step.declared.device)
            training.step.close()
        _write_summary(training, folder, planned, outcome)
        _write_report(folder)
        status.exit_code = exit_code_of(verdict)
    results = read_metrics(folder.path / "metrics.jsonl").results
    return Finished(
        folder=folder.path,
        unit=training.unit,
        done=training.done,
        final_loss=results[-1].loss if results else None,
        plan=planned.plan,
        verdict=verdict,
        outcome=outcome,
        measured_peak_bytes=max(peaks_of(results), default=None),
    )


class Status:
    """status.json: "running" on the way in, and on the way out how it ended (rule 1)."""

    def __init__(self, folder: RunFolder, name: str) -> None:
        self.folder, self.name, self.exit_code = folder, name, 0

    def __enter__(self) -> Status:
        self._write("running", {})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        match error:
            case None:
                self._write("done", {"exit_code": self.exit_code})
            case Stopped():
                self._write("stopped", {"exit_code": error.exit_code, "message": str(error), "saved": error.saved})
            case _ if (known := known_error(error)) is not None:
                told = {"exit_code": known.exit_code, "error_code": known.code, "message": str(known)}
                self._write("failed", told)
            case _:
                self._write("failed", {"exit_code": INTERNAL, "message": f"{type(error).__name__}: {error}"})

    def _write(self, state: str, rest: dict[str, Any]) -> None:
        self.folder.write_status({"schema_version": 1, "name": self.name, "state": state, **rest})


def _given_plan(folder: RunFolder, options: RunOptions, changed: Mapping[str, object]) -> Plan | None:
    """The plan asked for, or that of the run being resumed, unless its budget or device is another (rule 2)."""
    if options.plan is not None:
        return read_plan(options.plan)
    planned_anew = not options.resume or not changed.keys().isdisjoint(("budget", "device"))
    return None if planned_anew else read_record(folder.path / "plan.json", Plan)


def _resume(training: Training, folder: RunFolder, options: RunOptions, console: Console) -> None:
    checkpoints = first_folder(folder.path) / folder.checkpoints.name
    checkpoint = load_checkpoint(checkpoints, step=options.resume_from, strict=options.strict_resume)
    ranks = checkpoint.state.get(RANKS, 1)
    if ranks != rank_count():
        raise BadInput(
            asked=f"resume {training.title} on {rank_count()} ranks",
            found=f"it was saved by a run on {ranks}, each of which has its share of every batch",
            do=f"start it with torchrun --nproc-per-node {ranks}" if ranks > 1 else "start it without torchrun",
            file=str(checkpoint.path),
        )
    for sentence in checkpoint.warnings:
        # Steps are lost: said also with --quiet.
        console.error(f"warning: {sentence}")
    for sentence in training.restore(checkpoint):
        console.note(f"warning: {sentence}")
    dropped = folder.rewind_metrics(step=training.steps_done - 1)
    redo = f"; {dropped} later lines of metrics.jsonl will be written again" if dropped else ""
    step = "" if training.unit == "step" else f" (step {training.steps_done})"
    console.note(f"resuming after {training.unit} {training.done}{step}, from {checkpoint.path}{redo}")


def _plan(training: Training, folder: RunFolder, given: Plan | None, console: Console, *, resumed: bool) -> Planned:
    planned = plan_step(training, given, resumed=resumed)
    budget = planned.plan.budget
    if budget is not None:
        # The library leaves the allocator alone; the command line holds itself to the budget.
        counters.cap_allocator(training.step.declared.device, budget.total_bytes)
    folder.write_text("footprint.json", planned.predicted.to_json())
    folder.write_text("plan.json", planned.plan.to_json())
    console.note(planned.explanation)
    return planned


def _verify(
    training: Training, folder: RunFolder, options: RunOptions, console: Console, *, as_before: bool
) -> Verdict:
    """The verdict on the step before it trains; that of a run resumed under its plan was given when it began."""
    verdict = read_record(folder.path / VERDICT, Verdict) if as_before else None
    if verdict is None:
        verdict = sg.verify_step(training.step, training.batch, rows=options.verify_rows)
        folder.write_text(VERDICT, verdict.to_json())
    console.note(judge(verdict).text)
    if not math.isfinite(verdict.max_relative_error):
        raise NonFinite(
            asked=f"verify the gradients of {training.title} before training",
            found=f"on the first batch they are not finite, at {verdict.worst_parameter or 'the loss'}",
            do="look at that batch's rows and at the loss; samegrad verify shows every check",
        )
    if verdict.answer is Same.DIFFERS:
        raise GradientsDiffer(
            asked=f"train {training.title} with the gradients of the plain step",
            found=judge(verdict).text,
            do="report it, with verdict.json of the run folder; --plan or --rows with other chunks may go round it",
            file=str(folder.path / VERDICT),
        )
    return verdict


def _write_summary(training: Training, folder: RunFolder, planned: Planned, outcome: Outcome) -> None:
    """Once before training, so that a run that was stopped can be reported, and once with what it reached."""
    summary = Summary(
        title=training.title,
        command=shlex.join(["samegrad", *sys.argv[1:]]),
        machine=machine_of(training.step),
        metrics=dict(outcome.metrics),
        explanation=planned.explanation,
        troubleshooting=outcome.troubleshooting,
        notes=(*outcome.notes, *memory_notes(read_metrics(folder.path / "metrics.jsonl").results)),
        pictures=outcome.pictures,
    )
    folder.write_text("summary.json", summary.to_json())


def _write_report(folder: RunFolder) -> None:
    story = read_story(folder.path)
    folder.write_text("report.html", render_report(story))
    folder.write_text("report.md", render_markdown(story))


def machine_of(step: sg.Step) -> dict[str, str]:
    """The machine and versions a result came from."""
    return {
        "device": counters.device_name(step.declared.device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "samegrad": sg.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }


def tell(finished: Finished, report: Path, console: Console) -> None:
    """The result of a run, for a person and as a document."""
    console.document(finished.to_dict())
    loss = "nothing trained" if finished.final_loss is None else f"loss {finished.final_loss:.6g}"
    console.result(f"{loss} after {finished.done} {finished.unit}s")
    for name, value in finished.outcome.metrics.items():
        console.result(f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}")
    console.result(verdict_text(finished.verdict))
    console.result(f"report: {report}")
