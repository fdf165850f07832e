"""The loop, as a generator: iterate over it, and log, validate or stop in your own ``for``.

    for result in sg.train(step, batches):
        print(result.index, result.loss)
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import BadInput, NonFinite, UsageError
from samegrad.exact.out_of_memory import OutOfMemory, is_out_of_memory
from samegrad.exact.phases import announce, listening
from samegrad.exact.stepping_hooks import refuse_stepping_hooks
from samegrad.measure import counters
from samegrad.measure.counted_targets import IGNORED, refuse_without_targets
from samegrad.measure.counting import ByteCounter
from samegrad.measure.probe import claim_residents
from samegrad.module_walk import parameters_of
from samegrad.records import Phase, Recovery, StepResult

_log = logging.getLogger("samegrad")

# Steps in a row that a scaler may skip: by then its scale is a thousandth of what it was.
_MOST_SKIPPED = 10

_UNCHANGED = "; the optimizer did not step and the weights are unchanged"


class Trainable(Protocol):
    """A step that knows its model and optimizer: a ``Step``, for one."""

    @property
    def declared(self) -> DeclaredStep: ...

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """Attempts of the last backward that ran out of memory before the one that counted."""
        ...

    def backward(self, batch: Any, *, scaler: Any = None) -> Tensor: ...


def train(
    step: Trainable,
    batches: Iterable[Any],
    *,
    scaler: Any = None,
    first_index: int = 0,
    counter: ByteCounter | None = None,
    batches_per_step: int = 1,
) -> Iterator[StepResult]:
    """One optimizer step a batch; yields after each, with gradients already cleared.

    ``batches_per_step``: so many batches one after another for one optimizer step, each weighed by its rows, or by
    what ``normalise(batch)`` of the step counts, so that their loss is that of one large batch; a loss that
    ``normalise`` says is a sum is added up. Where they run out, the last step is made of those that are left. A loss
    that couples rows sees one batch at a time, and one that counts its targets by itself (``ignore_index``) needs
    ``normalise``. Each is a step's worth of memory by itself.
    ``scaler``: a GradScaler, used as PyTorch's own recipe does: it skips steps whose gradients are not finite; after
    ten in a row NonFinite is raised. ``counter`` (from ``count_bytes``): counts the tensor bytes of every step, which
    is what a peak means where there is no CUDA allocator.
    Raises, before the optimizer steps and with the weights unchanged, NonFinite, or BadInput where a loss is not finite
    because no target of its batch counts; UsageError when the step was declared without an optimizer, or when hooks on
    parameters step one inside backward where a gradient is not whole by then (``scaler``, several batches a step).
    """
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
    device = step.declared.device
    reading = counters.read_allocator(device)
    skipped = 0
    upcoming = iter(batches)
    groups = iter(lambda: list(itertools.islice(upcoming, batches_per_step)), [])
    for index, group in enumerate(groups, start=first_index):
        counters.reset_peaks(device)
        start = time.perf_counter()
        rows = sum(step.declared.layout(batch).rows for batch in group)
        if counter is None:
            loss, norm = _one_step(step, optimizer, group, scaler, index)
        else:
            claim_residents(counter, step.declared, group)
            counter.reset_peaks()
            with counter, listening(counter):
                loss, norm = _one_step(step, optimizer, group, scaler, index)
            counter.forget([leaf for leaf in trees.leaves_of(group) if isinstance(leaf, Tensor)])
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
            allocated_bytes=reading.allocated_bytes if reading else counter.live_bytes if counter else None,
            reserved_bytes=reading.reserved_bytes if reading else None,
            peak_allocated_bytes=reading.peak_allocated_bytes if reading else counter.peak_bytes if counter else None,
            peak_reserved_bytes=reading.peak_reserved_bytes if reading else None,
            allocator_retries=reading.retries - retries_before if reading else None,
            recoveries=step.recoveries,
        )


def _one_step(
    step: Trainable, optimizer: torch.optim.Optimizer, batches: Sequence[Any], scaler: Any, index: int
) -> tuple[float, float]:
    weights = _weights(step.declared, batches)
    losses = []
    for batch, weight, before in zip(batches, weights, [weights[0], *weights]):
        if weight != before:
            # What stands is in units of this batch's weight from here on; batches of one size are left as they are.
            _multiply(_gradients(optimizer), before / weight)
        losses.append(step.backward(batch, scaler=scaler))
    whole = math.fsum(weights) if step.declared.normalise != "sum" else 1.0
    loss = math.fsum(float(loss) * weight for loss, weight in zip(losses, weights)) / whole
    if scaler is not None:
        scaler.unscale_(optimizer)
    if (share := weights[-1] / whole) != 1:
        # What was added up was their sum. Once: a loss divided before would be another declared loss.
        _multiply(_gradients(optimizer), share)
    norm = gradient_norm(optimizer)
    # With a scaler what is not finite is the scaler's affair: it skips the step and lowers the scale.
    if scaler is None and not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        for batch in batches if math.isnan(loss) else ():
            refuse_without_targets(step.declared, batch, asked=f"step {index}", found=_UNCHANGED)
        raise NonFinite(
            asked=f"step {index}",
            found=f"loss {loss:g}, gradient norm {norm:g}{_seen_in(step.declared, batches)}{_UNCHANGED}",
            do="look at that batch's rows, lower the learning rate, or clip the gradients",
        )
    announce(Phase.OPTIMIZER)
    with _known_lack_of_memory(index):
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    optimizer.zero_grad()
    return loss, norm


@contextlib.contextmanager
def _known_lack_of_memory(index: int) -> Iterator[None]:
    """A block of the optimizer's turn, which cannot be undone: Raises OutOfMemory that says so."""
    try:
        yield
    except Exception as error:  # of many types; all but one kind go on
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            asked=f"step {index}: optimizer.step()",
            found="memory ran out in the optimizer's turn; some weights may have moved and others not",
            do="go on from the last checkpoint, with a smaller budget, and with optimizer= given to the Step, so that "
            "what its turn takes is planned",
        ) from error


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


def _multiply(gradients: list[Tensor], factor: float) -> None:
    if gradients:
        torch._foreach_mul_(gradients, factor)


def _weights(declared: DeclaredStep, batches: Sequence[Any]) -> list[float]:
    """What each batch counts in the mean of all of them; 1 each where losses are added up."""
    normalise = declared.normalise
    if normalise == "sum" or len(batches) == 1:
        return [1.0] * len(batches)
    if callable(normalise):
        counts = [float(normalise(batch)) for batch in batches]
    else:
        for batch in batches if normalise is None else ():
            _refuse_ignored_targets(batch)
        counts = [float(declared.layout(batch).rows) for batch in batches]
    if not all(count > 0 for count in counts):
        raise BadInput(
            asked="batches with at least one row or target that counts each",
            found=f"normalise(batch) is {counts} for the batches of one step",
            do="drop batches without valid targets",
        )
    return counts


def _seen_in(declared: DeclaredStep, batches: Sequence[Any]) -> str:
    """What of the batches may be why: rows that are not finite."""
    found = []
    for batch in batches:
        layout = declared.layout(batch)
        for (path, leaf), axis in zip(trees.flatten_with_paths(batch, "batch"), layout.axes):
            if not isinstance(leaf, Tensor) or axis is None or not leaf.numel():
                continue
            if leaf.is_floating_point() or leaf.is_complex():
                bad = (~torch.isfinite(leaf)).movedim(axis, 0).flatten(1).any(1) if leaf.dim() > 1 else ~leaf.isfinite()
                rows = bad.nonzero().flatten().tolist()
                if rows:
                    more = "" if len(rows) == 1 else f" and {len(rows) - 1} more"
                    found.append(f"row {rows[0]}{more} of {path} is not finite")
    return f"; {', '.join(found)}" if found else ""


def _refuse_ignored_targets(batch: Any) -> None:
    """Raises UsageError where rows do not say what a batch counts: the loss will leave targets out."""
    for path, leaf in trees.flatten_with_paths(batch, "batch"):
        if isinstance(leaf, Tensor) and leaf.dtype == torch.int64 and bool((leaf == IGNORED).any()):
            raise UsageError(
                asked="several batches a step, each weighed by its rows",
                found=f"{path} holds {IGNORED}, by which torch's losses leave targets out; what is left counts",
                do=f"say what each counts: Step(..., normalise=lambda batch: ({path} != {IGNORED}).sum())",
            )


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """The 2-norm of all gradients the optimizer is about to use."""
    gradients = _gradients(optimizer)
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


class BestWeights:
    """The weights of the best validation value so far, on the host, and when to stop waiting for a better one.

    ``patience``: how many values in a row may fail to improve; None never stops. Smaller is better. A value that is
    not finite never counts as best.
    """

    def __init__(self, model: nn.Module, *, patience: int | None) -> None:
        self._model = model
        self.patience = patience
        self.best_value = math.inf
        self.best_index: int | None = None
        self.waited = 0
        self._count = 0
        self._weights: dict[str, Tensor] = {}

    def update(self, value: float) -> bool:
        """Takes the next validation value; True when it is time to stop."""
        index, self._count = self._count, self._count + 1
        if math.isfinite(value) and value < self.best_value:
            self.best_value, self.best_index, self.waited = value, index, 0
            self._weights = {k: v.detach().to("cpu", copy=True) for k, v in self._model.state_dict().items()}
            return False
        self.waited += 1
        return self.patience is not None and self.waited >= self.patience

    def restore(self) -> None:
        """Puts the best weights into the model; without any finite value the model stays as it is."""
        if self._weights:
            self._model.load_state_dict(self._weights)

    def state(self) -> dict[str, Any]:
        """What resuming needs besides ``weights``, as plain numbers."""
        return {
            "best_value": self.best_value if math.isfinite(self.best_value) else None,
            "best_index": self.best_index,
            "waited": self.waited,
            "count": self._count,
        }

    def weights(self) -> dict[str, Tensor]:
        return dict(self._weights)

    def load_state(self, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        best = state["best_value"]
        self.best_value = math.inf if best is None else best
        self.best_index, self.waited, self._count = state["best_index"], state["waited"], state["count"]
        self._weights = dict(weights)
