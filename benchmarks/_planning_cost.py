"""What planning costs, by its phases: seconds, and how many plain steps that would have been.

A plain step of a batch is one forward and one backward of all its rows. Every call of the model on real tensors counts
the share of the batch that it sees: whole where gradients are recorded, a third where only the forward runs. What a
plan runs again in backward is not counted.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import samegrad.settle

# What ``plan_here`` calls. Within ``measure_for`` the rest of it is the first look: examination and small probes.
_PHASES = (
    ("examined_and_probed", "measure"),
    ("levers_probed", "with_probed_ways"),
    ("followed", "followed_beside"),
    ("blocks_again_probed", "with_blocks_again"),
    ("rungs_measured", "settle"),
    ("made_quicker", "quicker_plan"),
)
# Of a plain step, what its forward takes.
_FORWARD_SHARE = 1 / 3


class PlanningCost:
    """``phases``: seconds and plain steps of each, of those that were entered."""

    def __init__(self, counted: type[nn.Module], batch_rows: int) -> None:
        self.phases: dict[str, dict[str, float]] = {}
        self._counted, self._batch_rows, self._steps = counted, batch_rows, 0.0

    def _timed(self, name: str, planning: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(planning)
        def run(*args: Any, **kwargs: Any) -> Any:
            begun, before = time.perf_counter(), self._steps
            try:
                return planning(*args, **kwargs)
            finally:
                seconds = round(time.perf_counter() - begun, 3)
                self.phases[name] = {"seconds": seconds, "plain_steps": round(self._steps - before, 2)}

        return run

    def _seen(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        # A step that is followed without data has tensors of other types.
        if isinstance(module, self._counted) and type(arguments[0]) is Tensor:
            share = len(arguments[0]) / self._batch_rows
            self._steps += share if torch.is_grad_enabled() else _FORWARD_SHARE * share

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, function in _PHASES:
                timed = self._timed(name, getattr(samegrad.settle, function))
                stack.enter_context(mock.patch.object(samegrad.settle, function, timed))
            stack.callback(register_module_forward_pre_hook(self._seen).remove)
            yield
