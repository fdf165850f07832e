"""One step of training: backward on a batch or several, a look at what came of it, and the optimizer's turn."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import BadInput, NonFinite, UsageError
from samegrad.exact.left_out import IGNORED
from samegrad.exact.out_of_memory import OutOfMemory, is_out_of_memory
from samegrad.exact.phases import announce
from samegrad.measure.counted_targets import refuse_without_targets
from samegrad.records import Phase, Recovery

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


def one_step(
    step: Trainable, optimizer: torch.optim.Optimizer, batches: Sequence[Any], scaler: Any, index: int
) -> tuple[float, float]:
    """The loss of ``batches``, and the norm of its gradients; the weights have moved. Raises as ``train`` does."""
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
