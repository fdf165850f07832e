"""The optimizer's state on the host between steps: the bits of plain training, whatever is done with it meanwhile."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.declared import declare
from samegrad.errors import UsageError
from samegrad.levers import _state_pieces, _travelling_state
from samegrad.levers._state_pieces import Piece
from samegrad.levers.optimizer_state import OptimizerState

from ..contract.lever_zoo import cnn, forced, mlp, plan_with
from ..contract.plain import assert_bitwise, cross_entropy, same

Patch = pytest.MonkeyPatch
Make = Callable[[nn.Module], torch.optim.Optimizer]


def in_groups(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = model.parameters()
    return torch.optim.AdamW([{"params": [first], "lr": 0.1}, {"params": rest, "weight_decay": 0.3}], amsgrad=True)


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "foreach": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, foreach=True),
    "fused": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, fused=True),
    "groups": in_groups,
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=3, history_size=2),
}
EVERY = pytest.mark.parametrize("name", OPTIMIZERS)


class Training:
    """Steps of plain PyTorch, or under the lever."""

    def __init__(self, name: str, *, lever: bool, model: nn.Module | None = None) -> None:
        made, self.batch = cnn()
        self.model = made if model is None else model
        self.optimizer = OPTIMIZERS[name](self.model)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.step: sg.Step | None = None
        if lever:
            self.step = forced(self.model, cross_entropy, optimizer=self.optimizer, optimizer_state={})

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        if self.step is not None:
            return self.step.backward(self.batch)
        loss = cross_entropy(self.model(self.batch[0]), self.batch)
        loss.backward()
        return loss.detach()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if isinstance(self.optimizer, torch.optim.LBFGS):
                self.optimizer.step(self.closure)
            else:
                self.closure()
                self.optimizer.step()
            self.schedule.step()


def contents(training: Training) -> list[Any]:
    """Weights and state, in copies."""
    return copy.deepcopy([training.model.state_dict(), training.optimizer.state_dict()])


@EVERY
def test_training_is_plain_training_bit_for_bit_and_so_is_the_state_at_any_time(name: str) -> None:
    plain, ours = Training(name, lever=False), Training(name, lever=True)
    for _ in range(4):
        plain.run(1)
        ours.run(1)
        assert same(contents(ours), contents(plain))
    assert ours.step is not None
    ours.step.close()
    assert same(contents(ours), contents(plain))
    plain.run(1)
    ours.model.zero_grad()
    ours.step = None
    ours.run(1)
    assert same(contents(ours), contents(plain))


@EVERY
def test_a_checkpoint_taken_between_steps_is_plains_and_is_loaded_between_steps(name: str) -> None:
    plain, ours = Training(name, lever=False), Training(name, lever=True)
    plain.run(2)
    ours.run(2)
    file = io.BytesIO()
    torch.save(ours.optimizer.state_dict(), file)
    weights = copy.deepcopy(ours.model.state_dict())
    taken = contents(plain)
    plain.run(2)
    ours.run(2)
    assert not same(contents(ours), taken) and same(contents(ours), contents(plain))
    ours.model.load_state_dict(weights)
    file.seek(0)
    ours.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert same(contents(ours), taken)
    ours.run(2)
    if name != "lbfgs":  # its own counters of calls go on
        assert same(ours.model.state_dict(), plain.model.state_dict())


def test_what_was_taken_from_the_state_stays_what_it_was() -> None:
    ours = Training("adam", lever=True)
    ours.run(2)
    taken = moments(ours)
    ours.closure()
    taken += moments(ours)
    before = [t.clone() for t in taken]
    ours.optimizer.step()
    ours.run(2)
    assert all(torch.equal(a, b) for a, b in zip(taken, before))


def moments(training: Training) -> list[Tensor]:
    return [t for state in training.optimizer.state.values() for t in state.values() if t.dim()]


@EVERY
def test_an_exception_in_the_optimizers_step_loses_nothing(name: str) -> None:
    plain, ours = Training(name, lever=False), Training(name, lever=True)
    plain.run(2)
    ours.run(2)

    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    handle = ours.optimizer.register_step_pre_hook(fails)
    ours.closure()
    with pytest.raises(ZeroDivisionError):
        ours.optimizer.step(ours.closure) if name == "lbfgs" else ours.optimizer.step()
    handle.remove()
    ours.optimizer.zero_grad()
    plain.run(1)
    ours.run(1)
    assert same(contents(ours), contents(plain))


def test_a_parameter_that_is_added_and_state_that_is_put_there_are_looked_after() -> None:
    plain, ours = Training("momentum", lever=False), Training("momentum", lever=True)
    for training in (plain, ours):
        training.run(2)
        extra = nn.Parameter(torch.ones(5, dtype=torch.float64))
        extra.grad = torch.full_like(extra, 0.5)
        training.optimizer.add_param_group({"params": [extra]})
        training.optimizer.state[extra]["momentum_buffer"] = torch.full((5,), 2.0, dtype=torch.float64)
        extra.grad = None
        training.run(2)
    assert same(contents(ours), contents(plain))


def test_memory_that_tensors_share_is_not_parted() -> None:
    model = mlp()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second, third, fourth, *_ = model.parameters()
    flat = torch.arange(24.0)
    optimizer.state[first]["part"] = flat[:12]
    optimizer.state[second]["part"] = flat[12:]
    optimizer.state[third]["slow"] = third.detach()
    shared = torch.randn(7)
    optimizer.state[fourth]["one"] = optimizer.state[first]["same"] = shared
    step = declare(model, cross_entropy, optimizer=optimizer)
    with OptimizerState().standing(step) as around, around():
        assert optimizer.state[first]["part"].data_ptr() == flat.data_ptr()
        assert optimizer.state[third]["slow"].data_ptr() == third.data_ptr()
        assert optimizer.state[fourth]["one"] is optimizer.state[first]["same"] is not shared
    assert optimizer.state[fourth]["one"] is optimizer.state[first]["same"]
    assert torch.equal(optimizer.state[fourth]["one"], shared)


def test_it_stands_from_the_first_backward_until_another_plan_or_close() -> None:
    model, batch = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    step = forced(model, cross_entropy, optimizer=optimizer, optimizer_state={})
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    step.prepare(batch)
    assert not any(hooks)
    for _ in range(3):
        step.backward(batch)
        assert [len(hook) for hook in hooks] == [1, 1]
    step.close()
    assert not any(hooks)


def test_state_leaves_once_a_backward_and_never_in_the_optimizers_own_turn(monkeypatch: Patch) -> None:
    left: list[str] = []
    packed, sent = Piece.packed, Piece.sent

    def seen_packed(leaves: Sequence[Tensor]) -> Piece:
        left.append("packed")
        return packed(leaves)

    def seen_sent(piece: Piece) -> Piece:
        left.append("sent")
        return sent(piece)

    monkeypatch.setattr(Piece, "packed", seen_packed)
    monkeypatch.setattr(Piece, "sent", seen_sent)
    Training("adam", lever=True).run(3)
    assert left == ["packed", "sent"]
    left.clear()
    # Its closure calls backward while it has its state in hand.
    Training("lbfgs", lever=True).run(2)
    assert not left


class Stream:
    """One whose copies arrive when they are waited for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.under_way = 0

    def record_event(self) -> Stream:
        self.under_way += 1
        return self

    def synchronize(self) -> None:
        self.under_way = 0


@pytest.mark.parametrize("fails", [False, True], ids=["as it is", "after an exception"])
def test_a_checkpoint_in_the_middle_of_a_backward_waits_for_what_is_under_way(fails: bool, monkeypatch: Patch) -> None:
    """As a signal's handler saves one."""
    stream, seen = Stream(), list[tuple[int, int]]()
    monkeypatch.setattr(_travelling_state, "_streams_of", lambda devices: [stream] if devices else [])
    ours = Training("adam", lever=True)
    ours.run(2)
    assert stream.under_way == 0

    def in_forward(*_: Any) -> None:
        before = stream.under_way
        ours.optimizer.state_dict()
        seen.append((before, stream.under_way))
        if fails:
            raise ZeroDivisionError

    handle = ours.model.register_forward_pre_hook(in_forward)
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        ours.closure()
    handle.remove()
    # Under way until it was asked for.
    assert seen == [(1, 0)] and stream.under_way == 0
    ours.optimizer.step()
    assert ours.step is not None
    ours.step.close()
    assert not ours.optimizer._optimizer_state_dict_pre_hooks


def test_without_a_checkpoint_it_is_waited_for_at_the_end_of_the_backward(monkeypatch: Patch) -> None:
    stream, inside = Stream(), list[int]()
    monkeypatch.setattr(_travelling_state, "_streams_of", lambda devices: [stream] if devices else [])
    ours = Training("adam", lever=True)
    ours.run(2)
    ours.model.register_forward_pre_hook(lambda *_: inside.append(stream.under_way))
    ours.closure()
    assert inside == [1] and stream.under_way == 0


def test_steps_that_cannot_take_it_are_refused_with_the_reason() -> None:
    model, batch = mlp()
    step = declare(model, cross_entropy)
    assert "on the CPU" in (OptimizerState.unsuited(step) or "")
    with pytest.raises(UsageError, match="optimizer="):
        sg.Step(model, cross_entropy, plan=plan_with(optimizer_state={})).backward(batch)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["sent", "returned"])
def test_planted_state_that_is_lost_on_its_way_is_caught(method: str, monkeypatch: Patch) -> None:
    right = getattr(Piece, method)

    def lost(piece: Piece) -> Piece:
        moved: Piece = right(piece)
        moved.memory.zero_()
        return moved

    monkeypatch.setattr(Piece, method, lost)
    plain, ours = Training("adam", lever=False), Training("adam", lever=True)
    plain.run(3)
    ours.run(3)
    with pytest.raises(AssertionError):
        assert_bitwise(ours.model.state_dict(), plain.model.state_dict())


def test_planted_copies_that_are_written_again_are_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Piece, "returned", lambda piece: piece)
    with pytest.raises(AssertionError):
        test_what_was_taken_from_the_state_stays_what_it_was()


def test_many_tensors_travel_in_few_pieces_and_large_ones_in_one_of_their_own(monkeypatch: Patch) -> None:
    packed = Piece.packed
    pieces: list[list[int]] = []

    def seen(leaves: Sequence[Tensor]) -> Piece:
        pieces.append([leaf.nbytes for leaf in leaves])
        piece = packed(leaves)
        assert all((part.data_ptr() - piece.memory.data_ptr()) % 64 == 0 for part in piece.parts)
        return piece

    monkeypatch.setattr(Piece, "packed", seen)
    ours = Training("adam", lever=True)
    ours.run(3)
    # All at once, and after that as they lie.
    assert len(pieces) == 1
    [sizes] = pieces
    monkeypatch.setattr(_state_pieces, "_PIECE_BYTES", max(sizes))
    # What is loaded is packed anew.
    ours.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    ours.run(2)
    assert sorted(size for piece in pieces[1:] for size in piece) == sorted(sizes)
    assert 1 < len(pieces[1:]) < len(sizes) and all(sum(piece) <= max(sizes) for piece in pieces[1:])


@pytest.mark.parametrize("name", ["momentum", "adam", "groups"])
def test_the_pieces_that_planning_counts_are_those_that_travel(name: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(_state_pieces, "_PIECE_BYTES", 2000)
    packed, pieces = Piece.packed, list[int]()

    def seen(leaves: Sequence[Tensor]) -> Piece:
        pieces.append(sum(leaf.nbytes for leaf in leaves))
        return packed(leaves)

    monkeypatch.setattr(Piece, "packed", seen)
    ours = Training(name, lever=True)
    ours.run(2)
    parameters = list(ours.model.parameters())
    state = [t for entry in ours.optimizer.state.values() for t in entry.values() if isinstance(t, Tensor) and t.dim()]
    assert list(OptimizerState.pieces_of(sum(t.nbytes for t in state), parameters)) == pieces and len(pieces) > 1
    assert OptimizerState.pieces_of(0, parameters) == OptimizerState.pieces_of(0, []) == ()


def test_what_is_saved_of_state_shares_no_memory_and_travels_when_it_is_loaded() -> None:
    ours = Training("adam", lever=True)
    ours.run(2)
    file = io.BytesIO()
    torch.save(ours.optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)["state"]
    loaded = [t for entry in saved.values() for t in entry.values() if t.dim()]
    assert len({t.untyped_storage().data_ptr() for t in loaded}) == len(loaded)
    ours.closure()
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in moments(ours))
    assert ours.step is not None
    ours.step.close()
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in moments(ours))


def test_a_part_that_a_user_takes_of_state_that_came_back_keeps_it_there() -> None:
    ours = Training("adam", lever=True)
    ours.run(1)
    state = next(s for s in ours.optimizer.state.values() if s["exp_avg"].dim() > 1)
    handle = ours.optimizer.register_step_pre_hook(lambda *_: state.update(first=state["exp_avg"][0]))
    ours.run(1)
    handle.remove()
    assert state["first"].untyped_storage().data_ptr() == state["exp_avg"].untyped_storage().data_ptr()
    assert torch.equal(state["first"], state["exp_avg"][0])


@pytest.mark.parametrize("when", ["between steps", "in a step"])
def test_what_is_laid_elsewhere_by_its_data_is_what_travels(when: str) -> None:
    plain, ours = Training("adam", lever=False), Training("adam", lever=True)
    for training in (plain, ours):
        training.run(2)
        moments = [s["exp_avg"] for s in training.optimizer.state.values()]
        if when == "between steps":
            moments[0].data = torch.full_like(moments[0], 0.25)
            training.run(2)
            continue

        def lays_elsewhere(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            first = next(iter(optimizer.state.values()))["exp_avg"]
            first.data = torch.full_like(first, 0.25)

        handle = training.optimizer.register_step_pre_hook(lays_elsewhere)
        training.run(1)
        handle.remove()
        training.run(2)
    assert same(contents(ours), contents(plain))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.complex64, torch.bool]
)
def test_tensors_of_every_dtype_travel_each_in_memory_of_its_own(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = torch.randint(0, 2, (3, 4, 5)).to(dtype), torch.randint(0, 2, (7,)).to(dtype)
    leaves = [made[0].permute(2, 0, 1), made[1]]
    there = Piece.packed(leaves).sent().returned()
    for part, leaf in zip(there.parts, leaves):
        assert part.dtype == dtype and part.stride() == leaf.stride()
        # Not all dtypes can be compared.
        assert torch.equal(part.contiguous().view(torch.uint8), leaf.contiguous().view(torch.uint8))
        assert part.untyped_storage().nbytes() == leaf.nbytes
    assert there.is_whole({id(part) for part in there.parts})
