"""A trace changes nothing of the user's, also when the user's code raises."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samegrad.declared import DeclaredStep
from samegrad.errors import CannotTrace
from samegrad.measure.trace import plainly, trace_step

from .traced import (
    ROWS,
    Pictures,
    Words,
    cross_entropy,
    declared_on,
    pictures,
    words,
)


def fingerprint(declared: DeclaredStep, extra: Any) -> str:
    """Of all that a step could change."""
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        for part in parts:
            digest.update(part.detach().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())

    for module in declared.modules:
        for path, part in module.named_modules():
            add(path, part.training, sorted(part._forward_hooks), list(part._parameters), list(part._modules))
            add(*(f"{key} {id(value)}" for key, value in (*part._parameters.items(), *part._buffers.items())))
        for name, parameter in module.named_parameters():
            add(name, parameter, parameter.requires_grad, id(parameter.grad))
            add(*([] if parameter.grad is None else [parameter.grad]))
        for name, buffer in module.named_buffers():
            add(name, buffer, buffer._version)
    optimizer = declared.optimizer
    if optimizer is not None:
        add(len(optimizer.state), [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        for state in optimizer.state.values():
            for key, value in state.items():
                add(key, value)
    add(torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True), extra)
    return digest.hexdigest()


class Stateful(nn.Module):
    """Counts, draws in Python and numpy, switches modes and keeps what it saw."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.part, self.recurrent = Pictures(), nn.LSTM(5, 5, batch_first=True)
        self.calls, self.last, self.fails = 0, None, fails
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        made = self.part(x) * random.random() * np.random.rand()
        self.seen.append(made)
        self.last = made
        self.part.eval()
        for parameter in self.part.head.parameters():
            parameter.requires_grad_(False)
        if self.fails:
            raise ValueError("the user's own")
        return self.recurrent(made[:, None])[0][:, 0]


@contextmanager
def trained(fails: bool) -> Iterator[tuple[DeclaredStep, Any, dict[str, Any]]]:
    """A step with optimizer state and a gradient, whose loss keeps a moving centre, and what to look at besides."""
    model, held = Stateful(False), {"centre": torch.ones(5), "calls": []}

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        held["centre"].mul_(0.9).add_(outputs.detach().mean(0), alpha=0.1)
        held["calls"].append(outputs)
        return cross_entropy(outputs - held["centre"], batch)

    declared = declared_on(model, loss_fn)
    batch = pictures(6)
    plainly()(declared, batch)
    assert declared.optimizer is not None
    declared.optimizer.step()
    model.part.register_forward_hook(lambda module, given, made: held["calls"].append(made))
    model.fails = fails
    yield declared, batch, held


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("fails", [False, True], ids=["runs", "raises"])
def test_nothing_of_the_users_changes(fails: bool, device: str) -> None:
    with trained(fails) as (declared, batch, held):
        model = declared.network

        def now() -> str:
            mine = (held["centre"].tolist(), len(held["calls"]), model.calls, len(model.seen), id(model.last))
            return fingerprint(declared, (mine, [t.tolist() for t in batch]))

        before, dispatch = now(), dict(vars(torch._subclasses.FakeTensor))
        if fails:
            with pytest.raises(CannotTrace, match="the user's own") as caught:
                trace_step(declared, batch, device=device)
            assert isinstance(caught.value.__cause__, ValueError)
        else:
            trace_step(declared, batch, device=device)
        assert now() == before
        assert dict(vars(torch._subclasses.FakeTensor)) == dispatch
        assert nn.functional.dropout(torch.ones(3), 0.0).tolist() == [1, 1, 1]


class Forks(nn.Module):
    """Keeps torch's generators as they were, as checkpoints do, on a machine that has used CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng():
            state = torch.get_rng_state().clone()
            torch.set_rng_state(state)
            return checkpoint(self.layer, x, use_reentrant=False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_generator_is_set_to_what_has_no_data(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a generator was touched")

    declared = declared_on(Forks(), lambda outputs, batch: outputs.sum())
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setattr(torch.cuda, "set_rng_state", never)
    assert trace_step(declared, torch.ones(4, 6), device=device).operations
    monkeypatch.undo()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_planted_change_is_seen() -> None:
    with trained(False) as (declared, _, _):
        before = fingerprint(declared, None)
        with torch.no_grad():
            declared.network.part.head.weight[0, 0] += 1
        assert fingerprint(declared, None) != before


def test_a_parameter_reached_past_its_slot_keeps_its_gradient() -> None:
    hidden = [nn.Parameter(torch.ones(5))]
    declared = declared_on(nn.Linear(6, 5), lambda outputs, batch: (outputs * hidden[0]).sum())
    trace_step(declared, torch.ones(4, 6), device="cpu")
    assert hidden[0].grad is None
    hidden[0].grad = given = torch.full((5,), 2.0)
    trace_step(declared, torch.ones(4, 6))
    assert hidden[0].grad is given and given.tolist() == [2.0] * 5


def test_the_next_real_step_is_the_one_it_would_have_been() -> None:
    model = Words(0.2)
    twin = copy.deepcopy(model)
    declared, batch = declared_on(model), words(ROWS)
    for device in ("cpu", "cuda"):
        trace_step(declared, batch, device=device)
    torch.manual_seed(5)
    cross_entropy(model(batch[0]), batch).backward()
    torch.manual_seed(5)
    cross_entropy(twin(batch[0]), batch).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)
