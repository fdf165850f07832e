"""The steps of one run: each written down as it is made, checkpoints between them. The rules stand in ``run.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from samegrad.cli.console import Bar, Console
from samegrad.cli.data_workers import worker_is_gone
from samegrad.cli.ranks import rank_count
from samegrad.cli.run import RunOptions
from samegrad.cli.run_memory import thrashing_line
from samegrad.cli.stopping import StopFlag
from samegrad.cli.training import Tick, Training, counting_of
from samegrad.measure import counters
from samegrad.records import Budget, Plan, StepResult
from samegrad.report.terminal import memory_line
from samegrad.store import RunFolder, save_checkpoint

# In a checkpoint's state, beside the program's own.
RANKS = "ranks"


def train_in(
    folder: RunFolder, training: Training, plan: Plan, options: RunOptions, stop: StopFlag, console: Console
) -> None:
    """Trains to the end, or until ``stop`` says so or data workers end; then what was done last is saved."""
    if options.steps is not None:
        training.limit(options.steps)
        if training.total is not None and training.total > options.steps:
            unit, total = training.unit, training.total
            console.note(f"--steps {options.steps} becomes {total}: training can stop after {unit} {total} first")
    saved_at = training.done if options.resume else None
    if training.total is not None and training.done >= training.total:
        done = f"{training.unit} {training.done} is done, and the last one was to be {training.total}"
        console.note(f"nothing is left to train: {done}")
    thrashing, ended, before = False, _Ended(), training.done
    is_logged = before > 0
    # Not every step's bytes are counted.
    counted: StepResult | None = None
    with stop.hold(), console.progress(training.title, training.total) as bar:
        for tick in _until_workers_end(training, ended):
            told = _record(tick, training, folder)
            counted = next((r for r in reversed(tick.results) if r.peak_allocated_bytes is not None), counted)
            if not thrashing and (line := thrashing_line(tick.results)):
                thrashing = True
                bar.say(line)
            bar.advance(told, done=training.done)
            if not is_logged or tick.last or _is_due(options.log_every, before, training.done):
                _log_memory(tick, counted, told, training, folder, plan.budget, bar)
                is_logged = True
            if stop or tick.last or _is_due(options.save_every, before, training.done):
                _save(training, folder, stop)
                saved_at = training.done
            before = training.done
            stop.obey()
        if saved_at != training.done:
            _save(training, folder, stop)
            if ended.error is not None:
                console.error(f"saved after {training.unit} {training.done}; --resume goes on from there")
        stop.obey()
        if ended.error is not None:
            raise ended.error


def _is_due(every: int, before: int, done: int) -> bool:
    """Whether a multiple of ``every`` came with the units after ``before``; a tick may bring several units."""
    return done // every > before // every


@dataclasses.dataclass
class _Ended:
    """What ended data workers before the training's own end; None where nothing did."""

    error: RuntimeError | None = None


def _until_workers_end(training: Training, ended: _Ended) -> Iterator[Tick]:
    """The ticks up to where data workers are gone: killed, or by the signal that asks this process to stop as well.

    Between two steps nothing is lost, so that what was done can be saved; an epoch that is half done is neither.
    """
    try:
        yield from training.ticks()
    except RuntimeError as error:
        if training.unit != "step" or not worker_is_gone(error):
            raise
        ended.error = error


def _save(training: Training, folder: RunFolder, stop: StopFlag) -> None:
    state = {**training.state(), RANKS: rank_count()}
    save_checkpoint(folder.checkpoints, step=training.steps_done, tensors=training.tensors(), state=state)
    stop.saved = str(folder.path)


def _record(tick: Tick, training: Training, folder: RunFolder) -> str:
    """Writes the tick's lines of metrics.jsonl, and the plan where another one came; returns its losses in words."""
    if any(result.recoveries for result in tick.results) and training.step.plan is not None:
        # A resumed run goes on as this one does.
        folder.write_text("plan.json", training.step.plan.to_json())
    for result in tick.results:
        record = {k: v for k, v in result.to_dict().items() if k not in ("schema_version", "record")}
        folder.append_metrics({"kind": "step", "step": result.index, **record})
    last = tick.results[-1]
    if tick.validation_loss is None:
        return f"loss {last.loss:.6g}"
    parts = dict(tick.validation_parts)
    told = {"parts": parts} if parts else {}
    folder.append_metrics({"kind": "validation", "step": last.index, "loss": tick.validation_loss, **told})
    of = ", ".join(f"{name} {value:.6g}" for name, value in parts.items())
    return f"loss {last.loss:.6g}, validation {tick.validation_loss:.6g}" + (f" ({of})" if of else "")


def _log_memory(
    tick: Tick,
    counted: StepResult | None,
    told: str,
    training: Training,
    folder: RunFolder,
    budget: Budget | None,
    bar: Bar,
) -> None:
    """``counted``: the last step that has peaks."""
    last = tick.results[-1]
    # Asked here and not after every step: the driver takes milliseconds to answer.
    driver_bytes = counters.driver_process_bytes(training.step.declared.device)
    result = dataclasses.replace(counted or last, driver_process_bytes=driver_bytes)
    memory = memory_line(result, budget, counting_of(training.step))
    folder.append_metrics({"kind": "memory", "step": last.index, "text": memory, "driver_process_bytes": driver_bytes})
    bar.say(f"{training.unit} {training.done}: {told}. {memory}")
