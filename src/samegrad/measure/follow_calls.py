"""The calls of a step on any number of rows, without running it: forward, and the loss where that is asked for.

The user's code runs on twins without data, as in a trace, but nothing is counted and no backward runs. What does not
depend on the step's data is computed: masks and positions made from a number of rows alone have values, so that code
may look at them, and caches of them, which outlive this, are good.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.exact.batchnorm import by_rows
from samegrad.exact.calls import Calls, CallsSeen, tensors_in, uncompiled
from samegrad.exact.module_names import entered
from samegrad.exact.undisturbed import undisturbed
from samegrad.measure.failures import first_line, line_of
from samegrad.measure.shadows import Twins, held_with_hooks, named_modules, shadow_batch, standing_in
from samegrad.trees import RowLayout

# Larger constants stay without data.
_LARGEST_CONSTANT_BYTES = 2**24
# What code raises that is given tensors without data, and what torch does for operations that it cannot follow.
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def follow_calls(
    declared: DeclaredStep, batch: Any, layout: RowLayout, rows: Iterable[int], *, with_loss: bool, warm: int = 0
) -> list[Calls]:
    """What the step calls on the first rows of ``batch``, for each of the numbers ``rows``; all begin in one state.

    ``with_loss``: the loss of those rows is followed too. ``warm``: where not 0, each comes after a run on so many rows
    and one on its own, which leave caches. What ends a run early is in its ``failure``. Nothing of the user's changes.
    Raises CannotTrace for tensors that have no twin.
    """
    modules, twins = named_modules(declared), Twins(declared.device, declared.device)
    without_data = FakeTensorMode(allow_non_fake_inputs=True)

    def follow(count: int) -> Calls:
        found = Calls(count)
        with contextlib.ExitStack() as stack:
            held = held_with_hooks(declared, modules)
            stack.enter_context(undisturbed(declared.modules, declared.device, held))
            stack.enter_context(without_data)
            stack.enter_context(standing_in(modules, twins))
            # Rows meet in it; whoever runs chunks has another layer in its place.
            stack.enter_context(by_rows(declared.network))
            stack.enter_context(torch.enable_grad())
            whole = shadow_batch(batch, twins)
            for taken in (warm, count, count) if warm else (count,):
                found = Calls(count)
                chunk = trees.move(trees.slice_rows(whole, layout, 0, taken), declared.device)
                try:
                    _run(declared, chunk, found, with_loss)
                except _FAILURES as error:
                    found.failure = first_line(error) + line_of(error)
        return found

    # Whoever counts the step's bytes is not to count these.
    with uncompiled(), _unlogged(), _disable_current_modes():
        return [follow(count) for count in rows]


def _run(declared: DeclaredStep, chunk: Any, found: Calls, with_loss: bool) -> None:
    seen = CallsSeen(found.calls, _called)
    with seen:
        with entered(declared.network) as running, seen.within(running):
            outputs = declared.forward(declared.network, chunk)
        if with_loss:
            with seen.within([], "the loss"):
                declared.loss_fn(outputs, chunk)


def _called(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call; for real where nothing in it depends on the step's data."""
    tensors = list(tensors_in((*args, *kwargs.values())))
    if any(isinstance(tensor, FakeTensor) for tensor in tensors) or kwargs.get("generator") is not None:
        return function(*args, **kwargs)
    if tensors:
        # Made here before, or the user's own, which is put back.
        with unset_fake_temporarily():
            return function(*args, **kwargs)
    result = function(*args, **kwargs)
    made = list(tensors_in((result,)))
    if not made or sum(tensor.numel() * tensor.itemsize for tensor in made) > _LARGEST_CONSTANT_BYTES:
        return result
    with unset_fake_temporarily():
        return function(*args, **kwargs)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """A block in which torch does not log what it cannot follow; whoever asked is told."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
