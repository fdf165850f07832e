"""Gradients that meet at one tensor: the engine adds the later one into the earlier one's memory where it may.

It may where nothing else holds the earlier one and its memory is dense. A traced tensor is of a class of its own, and
for those the engine always makes a third, so that the trace has to say what plain tensors would have done. A sum that a
formula of torch makes for itself looks the same and is taken for one; first derivatives have next to none. Source:
``accumulate`` and ``can_accumulate_inplace`` of torch's ``torch/csrc/autograd/input_buffer.cpp``.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from samegrad.errors import CannotTrace
from samegrad.exact.looking_on import LookingOn

_ADD = torch.ops.aten.add.Tensor
_ENGINE = "_engine_run_backward"
# Modules between an operation and who called it: what follows operations, and torch's wrappers around that.
_BETWEEN = ("samegrad.measure.", "torch._compile", "torch._dynamo.")


class References(NamedTuple):
    """How many hold a tensor and its memory while it is an argument of an operation."""

    of_tensor: int
    of_memory: int


def adds_in_place(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``operation``, which a mode was asked to dispatch, is a sum that plain tensors make in place."""
    if operation is not _ADD or kwargs or len(args) != 2 or torch.is_grad_enabled():
        return False
    earlier, later = args
    if not isinstance(earlier, Tensor) or not isinstance(later, Tensor) or not _called_by_engine():
        return False
    same = earlier.shape == later.shape and earlier.dtype is later.dtype
    # Python objects count once for torch. What follows operations holds both alike; more of one is the user's.
    free = sys.getrefcount(earlier) <= sys.getrefcount(later) and _references(earlier) == engines_own()
    return same and free and _is_dense(earlier)


@functools.cache
def engines_own() -> References:
    """What is counted where only the engine holds a tensor: seen once a process, since versions of torch differ."""
    counting = _Counting()
    with FakeTensorMode(), counting:
        weight = torch.empty(2, 2, requires_grad=True)
        torch.autograd.backward(torch.tanh(weight * 2) + torch.relu(weight), torch.empty(2, 2))
    if not counting.found:
        raise CannotTrace(
            asked="follow CUDA's sums of gradients",
            found=f"torch {torch.__version__} does not let them be seen",
            do="use torch 2.11 to 2.15, or measure the step on its device",
        )
    return counting.found[0]


class _Counting(LookingOn):
    """The references of what the engine adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[References] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _ADD and _called_by_engine():
            self.found.append(_references(args[0]))
        return func(*args, **kwargs or {})


def _references(tensor: Tensor) -> References:
    memory = tensor.untyped_storage()._cdata
    return References(tensor._use_count(), torch._C._storage_Use_Count(memory))  # type: ignore[attr-defined]  # not in torch's stubs


def _called_by_engine() -> bool:
    """Whether no Python code lies between the engine and the operation: a hook's sums are its own."""
    if torch._C._current_autograd_node() is None:
        return False
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_BETWEEN):
        frame = frame.f_back
    return frame.f_code.co_name == _ENGINE


def _is_dense(tensor: Tensor) -> bool:
    """Whether its entries lie without gaps, each in a place of its own."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True
