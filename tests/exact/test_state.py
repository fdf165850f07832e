"""State that a forward changes: after a split step it is the plain step's, and it is written once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.errors import CannotSplit
from samegrad.exact.state import Reducer, StateTransaction

from ..contract.plain import Tally
from . import zoo

D = torch.float64


class Keeps(nn.Module):
    """A linear layer that changes what it keeps: ``change(self, hidden)``; what is kept may enter the output."""

    def __init__(self, kept: Any, change: Callable[[Any, Tensor], None], *, buffer: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, zoo.CLASSES, dtype=D)
        if buffer:
            self.register_buffer("kept", kept)
        else:
            self.kept = kept
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        before = self.kept.clone() if isinstance(self.kept, Tensor) else self.kept
        self.change(self, z.detach())
        return z if before is None or isinstance(before, bool) else z * (1 + 0.01 * before)


def _in_place(self: Any, z: Tensor) -> None:
    self.kept.mul_(0.9).add_(0.1 * z.mean(0))


def _replaced(self: Any, z: Tensor) -> None:
    self.kept = 0.9 * self.kept + 0.1 * z.mean(0)


def _decayed_counts(self: Any, z: Tensor) -> None:
    self.kept.mul_(0.99).add_(F.one_hot(z.argmax(1), zoo.CLASSES).sum(0).to(D), alpha=0.01)


def _sums(self: Any, z: Tensor) -> None:
    self.kept += z.abs().sum(0)


def _rows_seen(self: Any, z: Tensor) -> None:
    self.kept = self.kept + len(z)


def _counts(self: Any, z: Tensor) -> None:
    self.kept += 1


def _throws(self: Any, z: Tensor) -> None:
    self.kept = True


def _zeros() -> Tensor:
    return torch.zeros(zoo.CLASSES, dtype=D)


MODULES: dict[str, tuple[Callable[[], nn.Module], Reducer]] = {
    "average in place": (lambda: Keeps(_zeros(), _in_place), Reducer.MEAN),
    "average replaced": (lambda: Keeps(_zeros(), _replaced), Reducer.MEAN),
    "average that is no buffer": (lambda: Keeps(_zeros() + 1, _replaced, buffer=False), Reducer.MEAN),
    "average in float32": (lambda: Keeps(torch.zeros(zoo.CLASSES), _in_place), Reducer.MEAN),
    "decayed counts from zero": (lambda: Keeps(_zeros(), _decayed_counts), Reducer.SUM),
    "decayed counts": (lambda: Keeps(_zeros() + 3, _decayed_counts), Reducer.SUM),
    "sums": (lambda: Keeps(_zeros(), _sums), Reducer.SUM),
    "rows seen": (lambda: Keeps(0, _rows_seen, buffer=False), Reducer.SUM),
    "rows seen, a buffer": (lambda: Keeps(torch.zeros((), dtype=torch.int64), _rows_seen), Reducer.SUM),
    "calls": (lambda: Keeps(0, _counts, buffer=False), Reducer.IDENTICAL),
    "calls, a buffer": (lambda: Keeps(torch.zeros((), dtype=torch.int64), _counts), Reducer.IDENTICAL),
    "a switch": (lambda: Keeps(False, _throws, buffer=False), Reducer.IDENTICAL),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, zoo.CLASSES, dtype=D))),
        Reducer.IDENTICAL,
    ),
    # torch writes these statistics without moving the version of the buffers.
    "instance norm": (lambda: _instance_norm(0.1), Reducer.MEAN),
    "instance norm in float32": (lambda: _instance_norm(0.1).to(torch.float32), Reducer.MEAN),
    # torch takes no momentum for none here: written, and never changed.
    "instance norm without momentum": (lambda: _instance_norm(None), Reducer.IDENTICAL),
}


def _instance_norm(momentum: float | None) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.InstanceNorm1d(4, momentum=momentum, track_running_stats=True)
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 1), norm, nn.Flatten(), nn.Linear(12, zoo.CLASSES)
    ).to(D)


def state_of(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = dict(model.named_buffers())
    kept = getattr(model, "kept", None)
    return state if kept is None else state | {"kept": kept}


def assert_same_state(mine: nn.Module, plain: nn.Module) -> None:
    for name, value in state_of(plain).items():
        now = state_of(mine)[name]
        if isinstance(value, Tensor):
            assert now.dtype == value.dtype
            eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
            torch.testing.assert_close(now, value, rtol=16 * eps, atol=16 * eps)
        else:
            assert now == value


@pytest.mark.parametrize("loss", ["mse", "rmse"])
@pytest.mark.parametrize("name", MODULES)
def test_state_and_gradients_after_split_steps_are_the_plain_ones(name: str, loss: str) -> None:
    make, reducer = MODULES[name]
    torch.manual_seed(0)
    model, loss_fn = make(), zoo.LOSSES[loss][0]
    dtype = next(model.parameters()).dtype
    rows, unit = zoo.batch(dtype), torch.finfo(dtype).eps
    twin = copy.deepcopy(model)
    split, layout = zoo.split_step(model, loss_fn, rows)
    assert {rule.reducer for rule in split.examination.rules} == {reducer}
    for sizes in ([8, 8, 13], [1, 27, 1], [29]):
        model.zero_grad()
        twin.zero_grad()
        split.backward(rows, layout, sizes)
        loss_fn(twin(rows["x"]), rows).backward()
        assert_same_state(model, twin)
        for mine, plain in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(mine.grad, plain.grad, rtol=5000 * unit, atol=50 * unit)


def test_a_power_iteration_that_has_converged_goes_on_when_the_weights_move() -> None:
    """In float32 it then writes the bits that stand there: a rule must be learnt from what changes nothing."""
    torch.manual_seed(0)
    layer = nn.Linear(6, zoo.CLASSES)
    with torch.no_grad():
        # Far apart, so that bits settle: near singular values keep the last one moving.
        layer.weight.copy_(torch.eye(zoo.CLASSES)[:, :6] * 0.5 ** torch.arange(6))
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=40))
    rows, loss_fn = zoo.batch(torch.float32), zoo.LOSSES["rmse"][0]
    for _ in range(5):
        model(rows["x"])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(rows["x"])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    twin = copy.deepcopy(model)
    split, layout = zoo.split_step(model, loss_fn, rows)
    for _ in range(3):
        split.backward(rows, layout, [8, 8, 13])
        loss_fn(twin(rows["x"]), rows).backward()
        assert_same_state(model, twin)
        for mine, plain in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-6)
        for network in (model, twin):
            torch.optim.SGD(network.parameters(), lr=0.5).step()
            network.zero_grad()
        with torch.no_grad():
            # The same weights on both sides, far from where the iteration stood.
            for mine, plain in zip(model.parameters(), twin.parameters()):
                mine.copy_(plain)
    assert not all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("name", ["average in place", "decayed counts", "calls"])
def test_state_updated_once_a_chunk_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: chunks that work on the state itself."""
    model, rows = MODULES[name][0](), zoo.batch()
    twin = copy.deepcopy(model)
    split, layout = zoo.split_step(model, zoo.LOSSES["mse"][0], rows)

    @contextlib.contextmanager
    def nothing_apart(self: StateTransaction, share: float | None) -> Iterator[None]:
        yield

    monkeypatch.setattr(StateTransaction, "chunk", nothing_apart)
    monkeypatch.setattr(type(split), "_check_untouched", lambda *_: None)
    split.backward(rows, layout, [8, 8, 13])
    twin(rows["x"])
    with pytest.raises(AssertionError):
        assert_same_state(model, twin)


def test_a_step_that_fails_leaves_the_state_as_it_was() -> None:
    model, rows = Keeps(_zeros() + 2, _in_place), zoo.batch()
    tally = Tally()

    def fragile(z: Tensor, b: Any) -> Tensor:
        tally.seen.append(1)
        if len(tally.seen) == limit:
            raise ZeroDivisionError
        return F.mse_loss(z, b["t"])

    limit = -1
    split, layout = zoo.split_step(model, fragile, rows)
    limit = len(tally.seen) + 3
    buffer, before = model.kept, model.kept.clone()
    with pytest.raises(ZeroDivisionError):
        split.backward(rows, layout, [8, 8, 13])
    assert model.kept is buffer and torch.equal(buffer, before)


def test_a_buffer_written_in_place_stays_the_same_tensor() -> None:
    model, rows = Keeps(_zeros(), _in_place), zoo.batch()
    split, layout = zoo.split_step(model, zoo.LOSSES["mse"][0], rows)
    buffer = model.kept
    split.backward(rows, layout, [8, 8, 13])
    assert model.kept is buffer and buffer.any()


def test_chunks_that_no_longer_agree_are_refused_before_anything_is_handed_over() -> None:
    def later(self: Any, z: Tensor) -> None:
        # The same number for the first rows, another one for larger values.
        self.kept = self.kept + (1 if z.abs().max() < 50 else 2)

    model, rows = Keeps(torch.zeros((), dtype=D), later), zoo.batch()
    split, layout = zoo.split_step(model, zoo.LOSSES["mse"][0], rows)
    rows["x"][20] = 1e4
    with pytest.raises(CannotSplit, match="kept"):
        split.backward(rows, layout, [8, 8, 13])
    assert not model.kept.any() and all(p.grad is None for p in model.parameters())


def test_a_loss_with_state_of_its_own_is_as_before_when_the_step_fails() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("center", _zeros())

        def forward(self, z: Tensor, b: Any) -> Tensor:
            loss = (z - self.center).square().mean().sqrt()
            self.center.mul_(0.9).add_(0.1 * z.detach().mean(0))
            return loss

    class Armed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, zoo.CLASSES, dtype=D)
            self.armed = [0.0]

        def forward(self, x: Tensor) -> Tensor:
            self.armed[0] *= 2
            return self.inner(x) + self.armed[0]

    model, rows, loss_fn = Armed(), zoo.batch(), Centred()
    twin = copy.deepcopy((model, loss_fn))
    split, layout = zoo.split_step(model, loss_fn, rows)
    split.backward(rows, layout, [8, 8, 13])
    twin[1](twin[0](rows["x"]), rows)
    torch.testing.assert_close(loss_fn.center, twin[1].center, rtol=1e-13, atol=0)
    before = loss_fn.center.clone()
    model.armed[0] = 1e-3
    with pytest.raises(Exception, match="differ"):
        split.backward(rows, layout, [8, 8, 13])
    assert torch.equal(loss_fn.center, before)
