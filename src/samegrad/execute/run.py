"""The loop, as an iterator: go through it, and log, validate or stop in your own ``for``.

    for result in sg.train(step, batches):
        print(result.index, result.loss)
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import check_step, is_one_batch
from samegrad.errors import NonFinite, UsageError
from samegrad.exact.phases import listening
from samegrad.exact.stepping_hooks import refuse_stepping_hooks
from samegrad.execute.one_step import Trainable, gradient_norm, one_step
from samegrad.measure import counters
from samegrad.measure.counting import ByteCounter
from samegrad.measure.probe import claim_residents
from samegrad.module_walk import parameters_of
from samegrad.records import StepResult

_log = logging.getLogger("samegrad")

# Steps in a row that a scaler may skip: by then its scale is a thousandth of what it was.
_MOST_SKIPPED = 10


def train(
    step: Trainable,
    batches: Iterable[Any],
    *,
    scaler: Any = None,
    first_index: int = 0,
    counter: ByteCounter | None = None,
    batches_per_step: int = 1,
) -> Iterator[StepResult]:
    """One optimizer step a batch, made as its result is asked for, with gradients already cleared then.

    ``batches_per_step``: so many batches one after another for one optimizer step, each weighed by its rows, or by
    what ``normalise(batch)`` of the step counts, so that their loss is that of one large batch; a loss that
    ``normalise`` says is a sum is added up. Where they run out, the last step is made of those that are left. A loss
    that couples rows sees one batch at a time, and one that counts its targets by itself (``ignore_index``) needs
    ``normalise``. Each is a step's worth of memory by itself.
    ``scaler``: a GradScaler, used as PyTorch's own recipe does: it skips steps whose gradients are not finite; after
    ten in a row NonFinite is raised. ``counter`` (from ``count_bytes``): counts the tensor bytes of every step, which
    is what a peak means where there is no CUDA allocator, and which takes time: such results are ``counted``.
    Raises, before the optimizer steps and with the weights unchanged, NonFinite, or BadInput where a loss is not finite
    because no target of its batch counts; UsageError when the step was declared without an optimizer, or when hooks on
    parameters step one inside backward where a gradient is not whole by then (``scaler``, several batches a step).
    """
    check_step(step, asked="train(step, batches)")
    if isinstance(batches, str) or (not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__")):
        raise UsageError(
            asked="train(step, batches)", found=f"batches is a {type(batches).__name__}, which holds no batches",
            do="give what is iterated over for them: a DataLoader, a list of batches, a generator that was called",
        )  # fmt: skip
    if is_one_batch(batches):
        raise UsageError(
            asked="train(step, batches)", found=f"batches is a {type(batches).__name__} that looks like one batch",
            do="give a list of batches: train(step, [batch])",
        )  # fmt: skip
    optimizer = step.declared.optimizer
    if optimizer is None:
        raise UsageError(
            asked="train(step, batches)",
            found="the step was declared without an optimizer",
            do="Step(model, loss_fn, optimizer=optimizer)",
        )
    if type(batches_per_step) is not int or batches_per_step < 1:
        raise UsageError(
            asked=f"train(..., batches_per_step={batches_per_step})", found="not a positive whole number",
            do="give 1 or more",
        )  # fmt: skip
    _refuse_closures(optimizer)
    if (standing := gradient_norm(optimizer)) != 0:
        _log.warning(
            "samegrad: gradients of norm %g stand from before training, and the first step adds to them; "
            "optimizer.zero_grad() before train() takes them away", standing,
        )  # fmt: skip
    if batches_per_step > 1:
        # With a scaler the step itself refuses them.
        refuse_stepping_hooks(
            parameters_of(step.declared.modules), asked=f"train(..., batches_per_step={batches_per_step})",
            do="take the hooks off and let train step the optimizer, or train on one batch a step",
        )  # fmt: skip
    return _Training(_steps(step, optimizer, batches, scaler, first_index, counter, batches_per_step))


class _Training(Iterator[StepResult]):
    """The results of steps that are made when they are asked for; tells when nobody ever did."""

    def __init__(self, steps: Iterator[StepResult]) -> None:
        self._steps, self._begun = steps, False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepResult:
        self._begun = True
        return next(self._steps)

    def __del__(self) -> None:
        if not self._begun:
            warnings.warn(
                "samegrad: train(step, batches) was not iterated over, so nothing was trained; write "
                "'for result in samegrad.train(step, batches): ...'",
                RuntimeWarning,
                stacklevel=2,
            )


def _steps(
    step: Trainable,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    scaler: Any,
    first_index: int,
    counter: ByteCounter | None,
    batches_per_step: int,
) -> Iterator[StepResult]:
    device = step.declared.device
    reading = counters.read_allocator(device)
    skipped = 0
    upcoming = iter(batches)
    groups = iter(lambda: list(itertools.islice(upcoming, batches_per_step)), [])
    for index, group in enumerate(groups, start=first_index):
        counters.reset_peaks(device)
        start = time.perf_counter()
        rows = sum(step.declared.layout(batch).rows for batch in group)
        counting = counter if counter is not None and counter.counts(index) else None
        if counting is None:
            loss, norm = one_step(step, optimizer, group, scaler, index)
        else:
            claim_residents(counting, step.declared, group)
            counting.reset_peaks()
            with counting, listening(counting):
                loss, norm = one_step(step, optimizer, group, scaler, index)
            counting.forget([leaf for leaf in trees.leaves_of(group) if isinstance(leaf, Tensor)])
        skipped = skipped + 1 if not math.isfinite(loss) or not math.isfinite(norm) else 0
        if skipped == _MOST_SKIPPED:
            raise NonFinite(
                asked=f"step {index}",
                found=f"loss {loss:g}, gradient norm {norm:g}, and so for {skipped} steps in a row, which the scaler "
                "skipped; the weights are those before them",
                do="look at those batches' rows, lower the learning rate, or compute in bfloat16 or float32",
            )
        counters.synchronize(device)
        retries_before = reading.retries if reading else 0
        reading = counters.read_allocator(device)
        yield StepResult(
            index=index,
            loss=loss,
            seconds=time.perf_counter() - start,
            batch_rows=rows,
            grad_norm=norm,
            allocated_bytes=reading.allocated_bytes if reading else counting.live_bytes if counting else None,
            reserved_bytes=reading.reserved_bytes if reading else None,
            peak_allocated_bytes=reading.peak_allocated_bytes if reading else counting.peak_bytes if counting else None,
            peak_reserved_bytes=reading.peak_reserved_bytes if reading else None,
            allocator_retries=reading.retries - retries_before if reading else None,
            recoveries=step.recoveries,
            counted=counting is not None,
        )


def _refuse_closures(optimizer: torch.optim.Optimizer) -> None:
    """Raises UsageError for an optimizer that computes the loss as often as it likes, on weights of its own choice."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(
            asked="train(step, batches)",
            found=f"{type(optimizer).__name__}.step needs a closure, and train steps once for one backward",
            do="write the loop: optimizer.step(closure), where closure zeroes the gradients and returns "
            "step.backward(batch); or take an optimizer without a closure",
        )
