"""A model that hooks its own modules in its first forward, and remembers it: trials take both back, steps neither."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.module_hooks import ModuleHooks
from samegrad.exact.undisturbed import undisturbed

Seen = dict[str, Any]
ROWS = 5


class Collects(nn.Module):
    """(rows, 6) to 3 scores, and what every layer returned on the way. Its hooks come with the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Seen:
        if not getattr(self, "collects", False):
            for layer in self.layers:
                layer.register_forward_hook(self._note, always_call=True)
            self.collects = True
        # Of each forward anew, and nothing that is kept: an object with slots is not looked into.
        self._layers_seen = _Notes()
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {"scores": self.head(x), "seen": list(self._layers_seen.outputs)}

    def _note(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self._layers_seen.outputs.append(output)


class _Notes:
    __slots__ = ("outputs",)

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def __deepcopy__(self, _: Any) -> _Notes:
        return _Notes()


def loss_of(outputs: Seen, batch: Any) -> Tensor:
    """Grows with every output that is seen twice."""
    found: Tensor = F.cross_entropy(outputs["scores"], batch[1])
    for seen in outputs["seen"]:
        found = found + seen.pow(2).sum(1).mean()
    return found


def stepped(**how: Any) -> tuple[list[float], list[Tensor], int]:
    """The losses of two steps, the gradients that they add up to, and the hooks there are then."""
    torch.manual_seed(0)
    model = Collects().double()
    batch = torch.randn(ROWS, 6, dtype=torch.float64), torch.arange(ROWS) % 3
    if how:
        step = sg.Step(model, loss_of, **how)
        losses = [float(step.backward(batch)) for _ in range(2)]
    else:
        losses = []
        for _ in range(2):
            loss = loss_of(model(batch[0]), batch)
            loss.backward()
            losses.append(float(loss.detach()))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return losses, gradients, sum(len(part._forward_hooks) for part in model.modules())


def same(ours: tuple[list[float], list[Tensor], int], plain: tuple[list[float], list[Tensor], int]) -> bool:
    close = all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(ours[1], plain[1], strict=True))
    return ours[0] == pytest.approx(plain[0], rel=1e-14) and close and ours[2] == plain[2]


@pytest.mark.parametrize("rows", [ROWS, 2, [1, 4]], ids=str)
def test_a_model_that_hooks_itself_runs_as_ever(rows: Any) -> None:
    assert same(stepped(rows=rows), stepped())


def test_a_plan_from_a_budget_leaves_it_to_the_step_to_hook() -> None:
    assert same(stepped(budget="1GiB"), stepped())


def test_planted_hooks_that_stay_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModuleHooks, "restore", lambda self: None)
    assert not same(stepped(rows=ROWS), stepped())


def test_hooks_come_and_go_with_their_flags_and_in_their_order() -> None:
    model = nn.Linear(2, 2)
    calls: list[str] = []
    first = model.register_forward_hook(lambda *_: calls.append("first"), always_call=True)
    model.register_forward_pre_hook(lambda *_: calls.append("before"), with_kwargs=True)
    model.register_forward_hook(lambda *_: calls.append("second"))
    model(torch.ones(1, 2))
    wanted, calls[:] = list(calls), []
    slots = ("_forward_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs",
             "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks")  # fmt: skip
    before = {slot: copy.copy(vars(model)[slot]) for slot in slots}
    with undisturbed([model], torch.device("cpu")):
        first.remove()
        model.register_forward_hook(lambda *_: calls.append("another"), always_call=True)
        model.register_full_backward_hook(lambda *_: None)
    assert {slot: dict(vars(model)[slot]) for slot in slots} == {slot: dict(old) for slot, old in before.items()}
    model(torch.ones(1, 2))
    assert calls == wanted


def test_hooks_of_samegrads_own_are_left_alone() -> None:
    model = nn.Linear(2, 2)

    def ours(*_: Any) -> None: ...

    ours.__module__ = "samegrad.exact.anything"
    with undisturbed([model], torch.device("cpu")) as (_, state):
        handle = model.register_forward_hook(ours)
        state.restore()
        assert list(model._forward_hooks.values()) == [ours]
        handle.remove()
    assert not model._forward_hooks
