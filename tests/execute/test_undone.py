"""Real steps inside ``undone`` leave nothing of the user's changed, also when the user's code raises."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.execute.undone import undone

ROWS = 13


class Noisy(nn.Module):
    """Keeps statistics and counts, draws everywhere, and can be told to raise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 7), nn.BatchNorm1d(7)
        self.last = nn.Linear(7, 3)
        self.calls, self.fails_at = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        made = nn.functional.dropout(self.norm(self.first(x)), 0.3) * random.random() * np.random.rand()
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise ValueError("the user's own")
        return self.last(made)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rate in a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
}


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Setting:
    """A step in the middle of training: state in the optimizer, a gradient left over, a hook, a schedule."""

    def __init__(self, optimizer: str, *, trained: bool) -> None:
        seed_all(0)
        self.model, self.seen = Noisy(), []
        self.held = {"centre": torch.ones(3)}
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.batch = (torch.randn(ROWS, 5), torch.randn(ROWS, 3))
        self.step = sg.Step(self.model, self.loss, optimizer=self.optimizer, rows=ROWS)
        self.model.last.weight.register_hook(lambda gradient: self.seen.append(1))
        if trained:
            self.run()
            self.schedule.step()
        self.model.first.weight.grad = torch.full_like(self.model.first.weight, 2.0)
        self.model.last.eval()

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        self.held["centre"].mul_(0.9).add_(outputs.detach().mean(0), alpha=0.1)
        return (outputs - self.held["centre"] - batch[1]).square().mean()

    def run(self) -> None:
        for _ in range(2):
            self.step.backward(self.batch)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def fingerprint(self) -> str:
        digest = hashlib.sha256()

        def add(*parts: Any) -> None:
            for part in parts:
                digest.update(part.detach().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())

        for path, part in self.model.named_modules():
            add(path, part.training, sorted(part._forward_hooks), *part.buffers(recurse=False))
        for name, parameter in self.model.named_parameters():
            add(name, id(parameter), parameter, id(parameter.grad), len(parameter._backward_hooks or ()))
            add(*([] if parameter.grad is None else [parameter.grad]))
        for parameter, state in self.optimizer.state.items():
            add(id(parameter), id(state), sorted(state))
            add(*(part for value in state.values() for part in (id(value), value)))
        for group in self.optimizer.param_groups:
            add(id(group), [id(p) for p in group["params"]])
            add(*(part for key, value in sorted(group.items()) if key != "params" for part in (key, value)))
        add({k: v for k, v in vars(self.optimizer).items() if isinstance(v, (int, float, bool, str))})
        add(self.schedule.state_dict(), self.scaler.state_dict(), self.model.calls)
        add(self.held["centre"], *self.batch)
        add(torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True))
        return digest.hexdigest()


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fails", [False, True], ids=["runs", "raises"])
def test_real_steps_are_undone(optimizer: str, trained: bool, fails: bool) -> None:
    setting = Setting(optimizer, trained=trained)
    before = setting.fingerprint()
    with pytest.raises(ValueError, match="own") if fails else contextlib.nullcontext(), undone(setting.step.declared):
        setting.run()
        setting.model.fails_at = 0 if fails else None
        setting.run()
    assert setting.model.fails_at is None
    assert setting.fingerprint() == before


def test_the_steps_inside_are_those_of_a_fresh_start() -> None:
    setting, plain = Setting("adam", trained=True), Setting("adam", trained=True)
    plain.model.first.weight.grad = None
    seed_all(3)
    plain.run()
    expected = [p.detach().clone() for p in plain.model.parameters()]
    seed_all(3)
    with undone(setting.step.declared):
        setting.run()
        assert all(torch.equal(p, q) for p, q in zip(setting.model.parameters(), expected))


FAULTS: dict[str, Callable[[Setting], Any]] = {
    "a weight": lambda s: s.model.last.bias.data.add_(1e-3),
    "a buffer": lambda s: s.model.norm.running_mean.add_(1e-3),
    "a gradient": lambda s: s.model.first.weight.grad.add_(1e-3),
    "a mode": lambda s: s.model.norm.eval(),
    "a count": lambda s: setattr(s.model, "calls", s.model.calls + 1),
    "a moment": lambda s: s.optimizer.state[s.model.last.bias]["exp_avg"].add_(1e-6),
    "a step count": lambda s: s.optimizer.state[s.model.last.bias]["step"].add_(1),
    "a rate": lambda s: s.optimizer.param_groups[0].update(lr=1.0),
    "a schedule": lambda s: s.schedule.step(),
    "what the loss holds": lambda s: s.held["centre"].add_(1e-3),
    "torch's draws": lambda s: torch.rand(1),
    "Python's draws": lambda s: random.random(),
    "numpy's draws": lambda s: np.random.rand(),
    "a hook": lambda s: s.model.norm.register_forward_hook(lambda *given: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fingerprint_sees(fault: str) -> None:
    setting = Setting("adam", trained=True)
    before = setting.fingerprint()
    FAULTS[fault](setting)
    assert setting.fingerprint() != before
