"""When a measurement goes to a thread of its own. What that is for: tests/gpu/test_fresh_kernels.py."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from samegrad.declared import DeclaredStep, declare
from samegrad.measure import counters
from samegrad.measure.fresh_kernels import _belongs_here, with_fresh_kernels
from samegrad.module_walk import convolves

from ..contract.plain import cross_entropy


def step_of(first: nn.Module) -> DeclaredStep:
    return declare(nn.Sequential(first, nn.Flatten()), cross_entropy)


def test_a_step_off_cuda_is_measured_where_it_is() -> None:
    declared = step_of(nn.Conv2d(1, 2, 3))
    assert convolves(declared.modules)
    assert with_fresh_kernels(declared, threading.get_ident) == threading.get_ident()


IN_FORCE: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "nothing": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no grad": torch.no_grad,
    "default device": lambda: torch.device("cpu"),
    "dispatch mode": TorchDispatchMode,
    "hooks on saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
}


@pytest.mark.parametrize("name", IN_FORCE)
def test_what_only_this_thread_sees_keeps_a_measurement_on_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "has_captured", lambda _: False)
    declared = step_of(nn.Conv2d(1, 2, 3))
    assert not _belongs_here(declared)
    with IN_FORCE[name]():
        assert _belongs_here(declared) is (name != "nothing")


def test_what_was_compiled_or_captured_keeps_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "has_captured", lambda _: False)
    convolution = nn.Conv2d(1, 2, 3)
    declared = step_of(convolution)
    convolution.compile()
    assert _belongs_here(declared)
    monkeypatch.setattr(counters, "has_captured", lambda _: True)
    assert _belongs_here(step_of(nn.Conv2d(1, 2, 3)))
