"""That a function of rows is one function of them however many there are, looked at before it runs in chunks.

Trials on a few rows cannot see ``if len(x) > 16``. So its code is followed on rows without data, as many as are tried,
as a chunk has and as there are, and must make the same calls with the same numbers (``compare_calls.py``). Where the
code needs values it is followed up to there, and the outputs of a few rows alone are compared with those in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from samegrad import trees
from samegrad.errors import CannotSplit
from samegrad.exact.calls import Calls, CallsSeen, uncompiled
from samegrad.exact.compare_calls import first_difference
from samegrad.exact.dataless import has_data
from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.exact.row_blind import is_blind
from samegrad.exact.row_comparisons import close
from samegrad.trees import RowLayout

# What code raises that is given tensors without data, and what torch does for operations that it cannot follow.
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def refuse_counting_rows(
    function: Callable[..., Any],
    modules: Sequence[nn.Module],
    run: Callable[[Any], Any],
    batch: Any,
    layout: RowLayout,
    rows: Sequence[int],
) -> None:
    """Raises CannotSplit where ``run(rows of batch)``, which is ``function``'s code, asks how many rows there are.

    rows: the numbers of rows that are tried, that a chunk has, and that there are. Nothing is to be changed by it:
    whoever calls puts back what the function writes.
    """
    numbers = sorted(set(rows))
    tensors = [leaf for leaf in trees.leaves_of(batch) if isinstance(leaf, Tensor)]
    if len(numbers) < 2 or not all(map(has_data, tensors)) or is_blind([function], modules, batch):
        # What has no data is followed already, by whoever looks at the whole step.
        return
    # Whoever counts bytes is not to count these.
    with torch.no_grad(), uncompiled(), _disable_current_modes():
        runs = [_followed(run, batch, layout, count) for count in numbers]
    found = first_difference(runs)
    if found is None and any(one.failure for one in runs):
        _compare(run, batch, layout, numbers[0], max(n for n in numbers if n < layout.rows or len(numbers) == 1))
    if found is not None:
        raise CannotSplit(
            asked="run a function of rows in chunks",
            found=f"{found.place} {found.words}: the code asks how many rows there are",
            do="take that out of the code, or make it the same for any number of rows",
        )


def _followed(run: Callable[[Any], Any], batch: Any, layout: RowLayout, count: int) -> Calls:
    found = Calls(count)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves: list[Any] = []
        for leaf, axis in zip(trees.leaves_of(batch), layout.axes):
            if not isinstance(leaf, Tensor):
                leaves.append(leaf)
            elif axis is None:
                leaves.append(mode.from_tensor(leaf.detach()))
            else:
                shape = (*leaf.shape[:axis], count, *leaf.shape[axis + 1 :])
                leaves.append(torch.empty(shape, dtype=leaf.dtype, device=leaf.device))
        chunk = trees.unflatten(leaves, layout.spec)
        try:
            seen = CallsSeen(found.calls, _called)
            with seen, seen.within([], "the function"):
                run(chunk)
        except _FAILURES as error:
            if is_out_of_memory(error):
                raise
            found.failure = type(error).__name__
    return found


def _called(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _compare(run: Callable[[Any], Any], batch: Any, layout: RowLayout, few: int, most: int) -> None:
    """The same rows alone and among ``most``, for real. Raises CannotSplit when they differ."""
    with torch.no_grad():
        alone, among = (run(trees.slice_rows(batch, layout, 0, rows)) for rows in (few, most))
    for (path, mine), all_rows in zip(trees.flatten_with_paths(alone, "outputs"), trees.leaves_of(among)):
        if isinstance(mine, Tensor) and has_data(mine) and not close(all_rows[:few], mine):
            raise CannotSplit(
                asked="run a function of rows in chunks",
                found=f"{path} of the first {few} rows are others when {most} rows run with them",
                do="make the function's rows independent of how many there are",
            )
