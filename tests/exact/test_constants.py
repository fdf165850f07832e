"""What a captured chunk takes for constant: changes that Python would see are seen, changes of values are not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.exact.constants import Constants

RATE = 0.5
MASK = np.ones(3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 4), nn.Dropout(0.1), nn.BatchNorm1d(4)
        self.slope, self.shape, self.table = 0.5, [4, (2, 2)], {"scale": 1.0}
        self.shift, self.config = torch.zeros(4), SimpleNamespace(width=4)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.first(x), self.slope) * RATE


def step() -> tuple[Any, dict[str, Any]]:
    model, held = Model(), {"weight": torch.ones(4), "margin": 0.1}

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs * held["weight"] + held["margin"] + MASK.sum()).mean()

    return declare(model, loss), held


def replace(holder: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(holder, name, value)


def test_nothing_changed_holds_and_values_in_place_are_no_constants() -> None:
    declared, held = step()
    constants = Constants.of(declared)
    assert constants.hold()
    with torch.no_grad():
        for tensor in (declared.model.first.weight, declared.model.shift, held["weight"]):
            tensor.add_(1)
    assert constants.hold()


CHANGES: dict[str, Callable[[Any, dict[str, Any]], object]] = {
    "a number of the model": lambda m, _: setattr(m, "slope", 0.25),
    "a number in a list": lambda m, _: m.shape.__setitem__(0, 5),
    "a number in a tuple of a list": lambda m, _: m.shape.__setitem__(1, (2, 3)),
    "a number in a dictionary": lambda m, _: m.table.__setitem__("scale", 2.0),
    "True for 1": lambda m, _: m.table.__setitem__("scale", True),
    "a number of an object": lambda m, _: setattr(m.config, "width", 5),
    "a rate of a layer": lambda m, _: setattr(m.drop, "p", 0.2),
    "a mode": lambda m, _: m.drop.eval(),
    "a layer": lambda m, _: setattr(m, "drop", nn.Dropout(0.1)),
    "a tensor": lambda m, _: setattr(m, "shift", torch.zeros(4)),
    "a tensor of the loss": lambda _, held: held.__setitem__("weight", torch.ones(4)),
    "a number of the loss": lambda _, held: held.__setitem__("margin", 0.3),
    "the memory of a parameter": lambda m, _: setattr(m.first.weight, "data", m.first.weight.data.clone()),
    "a frozen parameter": lambda m, _: m.first.weight.requires_grad_(False),
    "a buffer": lambda m, _: m.last._buffers.__setitem__("running_mean", torch.zeros(4)),
    "a hook": lambda m, _: m.first.register_forward_hook(lambda *_: None),
    "an array": lambda *_: MASK.__setitem__(0, 3.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_python_could_read_is_seen(change: Callable[..., object]) -> None:
    declared, held = step()
    constants = Constants.of(declared)
    try:
        change(declared.model, held)
        assert not constants.hold()
    finally:
        MASK[0] = 1.0


AMBIENT: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a default dtype": lambda: switched(torch.set_default_dtype, torch.get_default_dtype(), torch.float64),
    "matrix precision": lambda: switched(
        torch.set_float32_matmul_precision, torch.get_float32_matmul_precision(), "medium"
    ),
    "deterministic kernels": lambda: switched(torch.use_deterministic_algorithms, False, True),
    "convolutions of any speed": lambda: torch.backends.cudnn.flags(benchmark=not torch.backends.cudnn.benchmark),
    "attention by one kernel": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
}


@contextlib.contextmanager
def switched(put: Callable[[Any], object], before: Any, value: Any) -> Iterator[None]:
    put(value)
    try:
        yield
    finally:
        put(before)


@pytest.mark.parametrize("block", AMBIENT.values(), ids=AMBIENT)
def test_a_step_under_another_ambient_setting_is_another_step(block: Callable[[], Any]) -> None:
    constants = Constants.of(step()[0])
    with block():
        assert not constants.hold()
    assert constants.hold()


def test_an_object_in_the_place_of_one_that_is_gone_is_another_one() -> None:
    """Its number may be the old one's: what is compared by identity is kept alive."""
    declared, _ = step()
    declared.model.table["scale"] = SimpleNamespace(factor=2.0)
    constants = Constants.of(declared)
    for _ in range(8):
        declared.model.table["scale"] = SimpleNamespace(factor=3.0)
        assert not constants.hold()


def test_a_hook_in_the_place_of_another_is_seen() -> None:
    declared, _ = step()
    handle = declared.model.first.register_forward_hook(lambda *_: None)
    constants = Constants.of(declared)
    for _ in range(8):
        handle.remove()
        handle = declared.model.first.register_forward_hook(lambda *_: None)
        assert not constants.hold()


def test_a_global_that_the_models_code_reads_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = Constants.of(step()[0])
    monkeypatch.setitem(globals(), "RATE", 0.75)
    assert not constants.hold()


def test_not_a_number_is_itself() -> None:
    declared, _ = step()
    declared.model.slope = float("nan")
    assert Constants.of(declared).hold()


def test_what_is_set_in_a_modules_new_dictionary_is_seen() -> None:
    """As __setstate__ and code that restores snapshots do it: the old dictionary still holds the old values."""
    declared = step()[0]
    constants = Constants.of(declared)
    part = declared.model
    part.__dict__ = dict(part.__dict__)
    assert constants.hold()
    part.scale_of_somebody = 0.5
    assert not constants.hold()
    constants = Constants.of(declared)
    part.__dict__ = {**part.__dict__, "scale_of_somebody": 0.25}
    assert not constants.hold()
