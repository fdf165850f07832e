"""The document's verification checklist and tuning guide, by the figures of a run. No torch."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from samegrad.recipes._recipe import Answer, Finding, is_slow

from .history import History, read_document, read_history
from .options import FlowStyleOptions

# The document looks at the first so many epochs. In fewer nothing has a trend: thirds of three epochs are the least
# whose medians one odd epoch does not make.
_EARLY_EPOCHS = 10
_FEWEST_STEPS = 6
# One that is not whole yet says little of the next.
_FEWEST_TIMED_EPOCHS = 2
_WARM_UP_STEPS = 2
# The SSM loss may rise by so much and is stable.
_STABLE_FRACTION = 0.25
# From here on it is the clip that sets the size of steps.
_CLIPPED_FRACTION = 0.9
_UNSTABLE_FACTOR = 5.0
_LAUNCH_FRACTION = 0.3


def examine(folder: Path) -> tuple[Finding, ...]:
    """The lines of the checklist that are this recipe's own; memory and endings are every run's."""
    history = read_history(folder)
    config = read_document(folder / "config.json")
    return (
        _loss_falls(history),
        _style_falls(history.part("swd_loss")),
        _content_stable(history.part("ssm_loss")),
        _epoch_time(history, read_document(folder / "plan.json")),
        _clipped(history, config),
        _compiled(config, read_document(folder / "summary.json")),
    )


def _thirds(figures: Sequence[float]) -> tuple[float, float]:
    """The medians of the first and the last third."""
    third = max(1, len(figures) // 3)
    return statistics.median(figures[:third]), statistics.median(figures[-third:])


def _not_judged(name: str, count: int, needed: int, unit: str = "epoch") -> Finding:
    """The finding on a run of ``count`` epochs, or whatever ``unit`` says, where the check needs more of them."""
    units = unit if count == 1 else f"{unit}s"
    detail = f"not judged, not enough epochs: {count} {units}, needs {needed}"
    return Finding(name=name, answer=Answer.UNKNOWN, detail=detail, do="train longer")


def _finding(name: str, good: bool, detail: str, do: str) -> Finding:
    return Finding(
        name=name, answer=Answer.OK if good else Answer.FAILS, detail=detail, do="" if good else do
    )


def _loss_falls(history: History) -> Finding:
    name = f"loss falls over the first {_EARLY_EPOCHS} epochs"
    if len(history.validations) < _EARLY_EPOCHS:
        return _not_judged(name, len(history.validations), _EARLY_EPOCHS)
    losses = [loss for loss in history.first_epochs(_EARLY_EPOCHS).of_steps("loss") if math.isfinite(loss)]
    if len(losses) < _FEWEST_STEPS:
        return _not_judged(name, len(losses), _FEWEST_STEPS, "finite loss")
    first, last = _thirds(losses)
    detail = f"median {first:.4g} in the first third of {len(losses)} steps, {last:.4g} in the last"
    return _finding(name, last < first, detail, "lower --learning_rate, or see --max_grad_norm")


def _style_falls(swd: Sequence[float]) -> Finding:
    name = "SWD loss falling (validation)"
    if len(swd) < _EARLY_EPOCHS:
        return _not_judged(name, len(swd), _EARLY_EPOCHS)
    # Most of it falls early: where it began counts, and not its first third.
    third = _EARLY_EPOCHS // 3
    first, last = statistics.median(swd[:third]), _thirds(swd)[1]
    detail = f"{first:.4g} in the first {third} of {len(swd)} epochs, {last:.4g} in the last third"
    return _finding(name, last < first, detail, "raise --w_style; --patch_pool batch cannot tell styles apart")


def _content_stable(ssm: Sequence[float]) -> Finding:
    name = "SSM loss stable (validation)"
    if len(ssm) < _EARLY_EPOCHS:
        return _not_judged(name, len(ssm), _EARLY_EPOCHS)
    first, last = _thirds(ssm)
    growth = last / first - 1 if first else 0.0
    detail = f"{first:.4g} in the first third, {last:.4g} in the last, {growth:+.0%} (at most {_STABLE_FRACTION:+.0%})"
    return _finding(name, growth <= _STABLE_FRACTION, detail, "raise --w_content")


def _step_seconds(history: History) -> list[float]:
    """Seconds of the steps after the warm-up, as every run's own check takes them."""
    return dataclasses.replace(history, steps=history.steps[_WARM_UP_STEPS:]).timed().of_steps("seconds")


def _epoch_time(history: History, plan: dict[str, Any]) -> Finding:
    """By the median step, so that a step's time and an epoch's are not found good and bad in one run."""
    name = "epoch time as planned"
    seconds, epochs = _step_seconds(history), len(history.validations)
    if epochs < _FEWEST_TIMED_EPOCHS or not seconds:
        return _not_judged(name, epochs, _FEWEST_TIMED_EPOCHS)
    size = int(history.validations[0]["step"]) + 1
    median, planned = statistics.median(seconds), plan.get("predicted_seconds")
    took = f"median {median * size:.3g} s for {size} steps (the document: 3 to 5 minutes)"
    if not planned:
        return Finding(name=name, answer=Answer.UNKNOWN, detail=f"not judged, the plan predicts no time: {took}")
    detail = f"{took}, {median / planned:.2f} times the planned"
    return _finding(name, not is_slow(median, planned), detail, "see whether others use the machine")


def _clipped_share(history: History, config: dict[str, Any]) -> float | None:
    norms = history.of_steps("grad_norm")
    largest = config.get("max_grad_norm", FlowStyleOptions.max_grad_norm)
    return sum(norm > largest for norm in norms) / len(norms) if norms else None


def _clipped(history: History, config: dict[str, Any]) -> Finding:
    name = "share of clipped steps"
    share = _clipped_share(history, config)
    if share is None or len(history.steps) < _FEWEST_STEPS:
        return _not_judged(name, len(history.of_steps("grad_norm")), _FEWEST_STEPS, "gradient norm")
    detail = f"{share:.0%} of {len(history.steps)} logical steps had a norm above {config.get('max_grad_norm')}"
    return _finding(name, share <= _CLIPPED_FRACTION, detail, "lower --learning_rate, or raise --max_grad_norm")


def _compiled(config: dict[str, Any], summary: dict[str, Any]) -> Finding:
    name = "torch.compile logs"
    if not config.get("use_compile"):
        return Finding(name=name, answer=Answer.OK, detail="off (use_compile is false)")
    metrics = summary.get("metrics", {})
    if "compiled_graphs" not in metrics:
        detail = "not judged, the run has not ended: the counts come with its end"
        return Finding(name=name, answer=Answer.UNKNOWN, detail=detail, do="samegrad run with --resume continues it")
    graphs, breaks = metrics["compiled_graphs"], metrics.get("graph_breaks", 0)
    limit = config.get("cache_size_limit", FlowStyleOptions.cache_size_limit)
    detail = f"{graphs:.0f} graphs compiled (limit {limit} a function), {breaks:.0f} graph breaks"
    return _finding(name, 0 < graphs <= limit, detail, "see TORCH_LOGS=recompiles; raise --cache_size_limit")


def advise(folder: Path) -> tuple[str, ...]:
    """The lines of the tuning guide that the run's figures speak for, in its order."""
    return tuple(_advice(folder))


def _advice(folder: Path) -> Iterator[str]:
    history = read_history(folder)
    config, plan = read_document(folder / "config.json"), read_document(folder / "plan.json")
    yield from _memory_advice(history, plan)
    yield from _stability_advice(history, config)
    yield from _speed_advice(history, config, plan, read_document(folder / "footprint.json"))
    if (falls := _style_falls(history.part("swd_loss"))).answer is Answer.FAILS:
        yield f"The SWD loss does not fall ({falls.detail}): raise --w_style or train longer."


def _memory_advice(history: History, plan: dict[str, Any]) -> Iterator[str]:
    """The document's "If OOM occurs"."""
    budget = (plan.get("budget") or {}).get("total_bytes")
    peaks = history.of_steps("peak_reserved_bytes") or history.of_steps("peak_allocated_bytes")
    retries = sum(history.of_steps("allocator_retries"))
    if retries or (budget and peaks and max(peaks) > budget):
        yield (
            f"Over the budget (peak {max(peaks, default=0):,.0f} of {budget or 0:,} bytes, {retries:.0f} allocator "
            "retries): give a smaller --budget. Fewer accumulation_steps would only make the logical batch smaller."
        )


def _stability_advice(history: History, config: dict[str, Any]) -> Iterator[str]:
    """The document's "If training is unstable"."""
    norms = history.of_steps("grad_norm")[_WARM_UP_STEPS:]
    if len(norms) < _FEWEST_STEPS:
        return
    median, largest = statistics.median(norms), max(norms)
    if largest <= _UNSTABLE_FACTOR * median:
        return
    share = _clipped_share(history, config) or 0.0
    measured = f"gradient norms reach {largest:.3g} with a median of {median:.3g}, and {share:.0%} of steps are clipped"
    yield f"Unstable ({measured}): try --max_grad_norm {config.get('max_grad_norm', 1.0) / 2:g}."
    if not config.get("use_velocity_reg"):
        yield "Unstable, by the same figures: --use_velocity_reg penalises large velocities."
    warmup = config.get("epsilon_warmup_epochs", FlowStyleOptions.epsilon_warmup_epochs)
    yield f"Unstable, by the same figures: --epsilon_warmup_epochs {2 * warmup} (now {warmup})."


def _speed_advice(
    history: History, config: dict[str, Any], plan: dict[str, Any], footprint: dict[str, Any]
) -> Iterator[str]:
    """The document's "If training is too slow": launches, then fewer ODE steps."""
    seconds = _step_seconds(history)
    each, row = footprint.get("seconds_per_chunk"), footprint.get("seconds_per_row")
    rows = plan.get("levers", {}).get("split_rows", {}).get("rows")
    if seconds and each and row and rows:
        size = rows if isinstance(rows, int) else max(rows)
        share = each / (each + row * size)
        if share > _LAUNCH_FRACTION:
            compiled = "" if config.get("use_compile") else "--use_compile, or "
            yield f"Launch-bound ({share:.0%} of a chunk's time is there at any rows): {compiled}a larger --budget."
    planned = plan.get("predicted_seconds")
    if seconds and planned and is_slow(statistics.median(seconds), planned):
        steps = config.get("ode_integration_steps", FlowStyleOptions.ode_integration_steps)
        yield (
            f"Slower than planned (a step takes {statistics.median(seconds):.3g} s, planned were {planned:.3g} s): see "
            f"what else uses the machine. --ode_integration_steps {max(1, round(0.7 * steps))} is faster in "
            "proportion, and another model."
        )
