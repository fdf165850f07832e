"""Gradients that meet: added in place where plain tensors are, as their addresses tell, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from samegrad.measure import accumulation
from samegrad.measure.cuda_dispatch import CUDA, CudaDispatch
from samegrad.measure.recorder import Recorder
from samegrad.measure.shadows import Twins

Seen = dict[str, Any]


def address(tensor: Tensor) -> int | None:
    return None if isinstance(tensor, FakeTensor) else tensor.data_ptr()


class Passing(torch.autograd.Function):
    """Changes nothing; its backward makes a gradient of its own and notes where. ``how``: what is done with it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, seen: Seen, name: str, how: str) -> Tensor:
        ctx.noted = seen, name, how
        return values.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        seen, name, how = ctx.noted
        made = cotangent[:, :1].clone().expand_as(cotangent) if how == "expanded" else cotangent * 2
        if how == "kept":
            seen["kept"] = made
        if how == "kept in part":
            seen["kept"] = made[0]
        seen[name] = address(made)
        return made, None, None, None


class Met(torch.autograd.Function):
    """Changes nothing; notes where the sum is that arrives."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, seen: Seen) -> Tensor:
        ctx.seen = seen
        return values.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        ctx.seen["sum"] = address(cotangent)
        return cotangent, None


def two_paths(weight: Tensor, seen: Seen, how: str) -> Tensor:
    """Two functions of one tensor, whose gradients meet there; ``how`` is that of the one that comes first."""
    met = Met.apply(weight, seen)  # type: ignore[no-untyped-call]
    later = Passing.apply(met, seen, "later", "")  # type: ignore[no-untyped-call]
    earlier = Passing.apply(met, seen, "earlier", how)  # type: ignore[no-untyped-call]
    made: Tensor = later + earlier
    return made


def memory_taken_by_sums(how: str, *, create_graph: bool = False) -> int:
    """How many sums of the traced backward took memory of their own."""
    dispatch = CudaDispatch()
    with dispatch.followed(), FakeTensorMode(), Recorder(dispatch, Twins(CUDA, CUDA), {}) as recorder:
        weight = torch.empty(3, 4, device=CUDA, requires_grad=True)
        made, cotangent = two_paths(weight, {}, how), torch.empty(3, 4, device=CUDA)
        forward = len(recorder.operations)
        torch.autograd.grad(made, weight, cotangent, create_graph=create_graph)
    taken = {event.operation for event in recorder.events() if event.change_bytes > 0}
    return sum(k in taken and "aten.add" in o.name for k, o in enumerate(recorder.operations) if k >= forward)


HOWS = ["", "kept", "kept in part", "expanded"]


@pytest.mark.parametrize("how", HOWS)
def test_a_sum_takes_memory_where_it_does_without_a_trace(how: str) -> None:
    seen: Seen = {}
    weight = torch.ones(3, 4, requires_grad=True)
    torch.autograd.backward(two_paths(weight, seen, how), torch.ones_like(weight))
    in_place = seen["sum"] == seen["earlier"]
    assert in_place is (how == "")
    assert memory_taken_by_sums(how) == (not in_place)


def test_a_backward_that_is_differentiated_keeps_both() -> None:
    assert memory_taken_by_sums("", create_graph=True) == 1


def test_a_sum_of_the_users_own_backward_is_none_of_the_engines() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return torch.add(cotangent * 2, cotangent * 3)

    dispatch = CudaDispatch()
    with dispatch.followed(), FakeTensorMode(), Recorder(dispatch, Twins(CUDA, CUDA), {}) as recorder:
        weight = torch.empty(3, 4, device=CUDA, requires_grad=True)
        made: Tensor = Own.apply(weight)  # type: ignore[no-untyped-call]
        torch.autograd.backward(made, torch.empty(3, 4, device=CUDA))
    [at] = [k for k, operation in enumerate(recorder.operations) if operation.name == "aten.add.Tensor"]
    assert at in {event.operation for event in recorder.events() if event.change_bytes > 0}


def test_without_it_every_sum_takes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulation, "adds_in_place", lambda *_: False)
    with pytest.raises(AssertionError):
        test_a_sum_takes_memory_where_it_does_without_a_trace("")
