"""Saved tensors on the host: the bits and strides that were saved, each storage once, and nothing that is not to go."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.declared import declare
from samegrad.errors import BadInput, UsageError
from samegrad.levers import _saved_tensors
from samegrad.levers._saved_tensors import SavedTensors
from samegrad.levers.offload_saved import OffloadSaved

from ..contract.lever_zoo import MODELS, cnn, forced, mlp
from ..contract.plain import cross_entropy, gradients, plain_step, spread

Patch = pytest.MonkeyPatch
D = torch.float64


@pytest.fixture
def sent(monkeypatch: Patch) -> list[int]:
    """The bytes of every storage that goes to the host."""
    sizes: list[int] = []
    right = _saved_tensors.HostCopy._send

    def noted(self: Any, there: Tensor) -> None:
        sizes.append(there.nbytes)
        right(self, there)

    monkeypatch.setattr(_saved_tensors.HostCopy, "_send", noted)
    return sizes


@contextmanager
def unpacked_as(found: list[Tensor]) -> Iterator[None]:
    """Notes what backward is given."""
    right = _saved_tensors._Travelling.unpacked

    def noted(self: Any) -> Tensor:
        found.append(right(self))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_saved_tensors._Travelling, "unpacked", noted)
        yield


class Keeps(torch.autograd.Function):
    """Twice its input; keeps a tensor as it is given and multiplies by two in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return x * 2

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        assert ctx.saved_tensors
        return cotangent * 2, None


IMAGES = torch.randn(3, 4, 5, 6, dtype=D)
VIEWS = {
    "contiguous": lambda: IMAGES.clone(),
    "transposed": lambda: torch.randn(5, 7, dtype=D).t(),
    "expanded": lambda: torch.randn(5, 1, dtype=D).expand(5, 7),
    "strided part": lambda: torch.randn(9, 8, dtype=D)[1::3, 2::2],
    "channels_last": lambda: IMAGES.contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
    "overlapping": lambda: torch.randn(12).as_strided((4, 5), (2, 1)),
    "scalar": lambda: torch.randn((), dtype=D),
    "bool": lambda: torch.rand(7) > 0.5,
    "int8": lambda: torch.arange(11, dtype=torch.int8),
    "bfloat16": lambda: torch.randn(13).bfloat16(),
    "complex": lambda: torch.randn(5, dtype=torch.complex128),
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_comes_back_is_what_was_saved_with_its_strides(name: str, sent: list[int]) -> None:
    kept = VIEWS[name]()
    expected = (kept.clone(), kept.stride(), kept.storage_offset(), kept.dtype)
    x = torch.ones(3, dtype=D, requires_grad=True)
    found: list[Tensor] = []
    with SavedTensors(0, []).travelling():
        y = Keeps.apply(x, kept)
    gone = weakref.ref(kept.untyped_storage())
    del kept
    gc.collect()
    assert gone() is None and len(sent) == 1
    with unpacked_as(found):
        y.sum().backward()
    [back] = found
    assert torch.equal(back, expected[0])
    assert (back.stride(), back.storage_offset(), back.dtype) == expected[1:]


LEFT_ALONE = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "conjugate": lambda: torch.randn(5, dtype=torch.complex64).conj(),
    "negated": lambda: torch.randn(5, dtype=torch.complex64).conj().imag,
    "empty": lambda: torch.empty(0, 3),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_tensors_that_are_more_than_numbers_at_places_are_left_alone(name: str, sent: list[int]) -> None:
    x = torch.ones(3, requires_grad=True)
    with SavedTensors(0, []).travelling():
        y = Keeps.apply(x, LEFT_ALONE[name]())
    y.sum().backward()
    assert sent == [] and x.grad is not None


def test_a_storage_that_is_saved_several_times_travels_once(sent: list[int]) -> None:
    x = torch.randn(30, 20, dtype=D, requires_grad=True)
    with SavedTensors(0, [x]).travelling():
        y = x * 2
        z = (y * y).sum() + (y.t() @ y).sum() + y[3:7].exp()[0].sum() + y.view(-1).sin().sum()
    # exp keeps its own result, and the sine is kept by none.
    assert sorted(sent) == [4 * 20 * 8, 30 * 20 * 8]
    z.backward()


def test_it_comes_back_once_while_something_holds_it_and_the_original_is_used_while_it_is_there() -> None:
    x = torch.randn(30, dtype=D, requires_grad=True)
    found: list[Tensor] = []
    with SavedTensors(0, [x]).travelling():
        held = x.exp()
        y = held.sin().sum() + held.cos().sum()
    with unpacked_as(found):
        y.backward(retain_graph=True)
        assert {t.data_ptr() for t in found} == {held.data_ptr()}
        found.clear()
        del held
        y.backward()
    assert len(found) == 3 and len({t.data_ptr() for t in found}) == 1


def test_small_ones_and_what_is_resident_stay(sent: list[int]) -> None:
    model, batch = mlp(D)
    step = declare(model, cross_entropy)
    layout = step.layout(batch)
    hidden = 13 * 17 * 8
    for smallest, expected in ((hidden + 1, 0), (hidden, hidden)):
        sent.clear()
        with forced(model, cross_entropy, offload_saved={"smallest_bytes": smallest}) as run:
            run.backward(batch)
        assert set(sent) == ({expected} if expected else set()), layout
    # Neither weights nor the batch are among what travels when everything does.
    sent.clear()
    with forced(model, cross_entropy, offload_saved={"smallest_bytes": 0}) as run:
        run.backward(batch)
    resident = {p.nbytes for p in model.parameters()} | {batch[0].nbytes}
    assert sent and not resident & set(sent)


def test_only_the_named_modules_tensors_travel(sent: list[int]) -> None:
    model, batch = mlp(D)
    knobs = {"smallest_bytes": 0, "modules": ["1"]}
    _, expected = plain_step(model, cross_entropy, batch)
    with forced(model, cross_entropy, offload_saved=knobs) as step:
        step.backward(batch)
    assert sent == [13 * 17 * 8]
    assert all(torch.equal(value, expected[name]) for name, value in gradients(model).items())


@pytest.mark.parametrize("inside", ["the users", "ours"])
@pytest.mark.parametrize("modules", [None, ["0"], ["0.1"], ["0", "0.0"]], ids=str)
def test_a_block_that_runs_again_in_backward_is_given_its_own(inside: str, modules: list[str] | None) -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Sigmoid(), nn.Dropout(0.0))
    model = nn.Sequential(block, nn.Linear(9, 3)).double()
    batch = mlp(D)[1]
    _, expected = plain_step(model, spread, batch)

    def forward(network: nn.Module, rows: Any) -> Tensor:
        if inside == "ours":
            return network(rows[0])
        return network[1](checkpoint(network[0], rows[0], use_reentrant=False))

    recompute = {"recompute": {"blocks": ["0"]}} if inside == "ours" else {}
    plan = forced(model, spread, offload_saved={"smallest_bytes": 0, "modules": modules}, **recompute).plan
    with sg.Step(model, spread, plan=plan, forward=forward) as step:
        step.backward(batch)
    assert all(torch.equal(value, expected[name]) for name, value in gradients(model).items())


# What is modified in place


class Overwrites(nn.Module):
    """A model that writes on what its backward needs."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).exp()
        out = self.second(hidden)
        if self.place == "output":
            hidden.add_(1)
        if self.place == "view":
            hidden[2:4].mul_(2)
        if self.place == "detached":
            hidden.detach().zero_()
        return out


@pytest.mark.parametrize("place", ["output", "view", "detached"])
@pytest.mark.parametrize("smallest_bytes", [0, 2**30], ids=["travelling", "staying"])
@pytest.mark.parametrize("rows", [None, 5], ids=["whole", "split"])
def test_what_autograd_refuses_is_refused(place: str, smallest_bytes: int, rows: int | None) -> None:
    model, batch = Overwrites(place).double(), mlp(D)[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(model(batch[0]), batch).backward()
    model.zero_grad()
    split = {} if rows is None else {"split_rows": {"rows": rows}}
    with (
        forced(model, cross_entropy, offload_saved={"smallest_bytes": smallest_bytes}, **split) as step,
        pytest.raises((UsageError, RuntimeError), match="modified") as caught,
    ):
        step.backward(batch)
    # Splitting tries the plain forward first, where autograd itself refuses.
    assert rows is not None or isinstance(caught.value, UsageError)
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_is_written_before_backward_is_refused() -> None:
    weight = nn.Parameter(torch.randn(4, 4, dtype=D))
    x = torch.randn(4, 4, dtype=D, requires_grad=True)
    with SavedTensors(0, [weight]).travelling():
        y = x @ weight
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(UsageError, match=r"shape \(4, 4\).*version 1, saved at 0"):
        y.sum().backward()


def test_planted_hooks_without_versions_are_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(_saved_tensors, "_check_unwritten", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        test_what_autograd_refuses_is_refused("output", 0, None)


def test_what_is_written_between_two_saves_travels_twice(sent: list[int]) -> None:
    x = torch.randn(8, dtype=D, requires_grad=True)
    scale = torch.full((8,), 2.0, dtype=D)
    with SavedTensors(0, [x]).travelling():
        first = (x * scale).sum()
        with torch.no_grad():
            scale.add_(1)
        second = (x * scale).sum()
    assert sent == [64, 64]
    second.backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 3.0))
    with pytest.raises(UsageError, match="modified in place"):
        first.backward()


def test_parts_of_a_storage_whose_writes_are_counted_apart_are_kept_apart() -> None:
    def gates(x: Tensor) -> Tensor:
        one, other = (x * 1).unsafe_chunk(2, 1)
        return (one.sigmoid_() * other.tanh_()).sum()

    x = torch.randn(5, 8, dtype=D, requires_grad=True)
    [expected] = torch.autograd.grad(gates(x), x)
    with SavedTensors(0, [x]).travelling():
        y = gates(x)
    [ours] = torch.autograd.grad(y, x)
    assert torch.equal(ours, expected)


def test_planted_copies_shared_over_counts_are_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(_saved_tensors.HostCopy, "is_of", lambda self, storage, counted: True)
    monkeypatch.setattr(_saved_tensors, "id", lambda counted: 0, raising=False)
    with pytest.raises(AssertionError):
        test_parts_of_a_storage_whose_writes_are_counted_apart_are_kept_apart()


def test_derivatives_of_second_order_go_through() -> None:
    def second(x: Tensor) -> Tensor:
        [first] = torch.autograd.grad((x.exp() * x.sin()).sum(), x, create_graph=True)
        [result] = torch.autograd.grad(first.pow(2).sum(), x)
        return result

    x = torch.randn(9, dtype=D, requires_grad=True)
    expected = second(x)
    with SavedTensors(0, [x]).travelling():
        assert torch.equal(second(x), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_of_a_forward_is_held_on_the_device(kind: str) -> None:
    model, batch = MODELS[kind](D)
    storages: list[weakref.ref[Any]] = []
    # Every output but the last layer's, which the loss holds.
    layers = list(model.children())[:-1]
    notes = [layer.register_forward_hook(lambda *given: storages.append(weakref.ref(given[2].untyped_storage())))
             for layer in layers]  # fmt: skip
    resident = [*model.parameters(), batch[0]]
    with SavedTensors(0, resident).travelling():
        loss = model(batch[0]).sum()
    gc.collect()
    assert storages and [ref for ref in storages if ref() is not None] == []
    loss.backward()
    for note in notes:
        note.remove()


# Refusals


WRONG = [{"smallest_bytes": -1}, {"smallest_bytes": 1.5}, {"smallest_bytes": True}, {"modules": ["nowhere"]}]


@pytest.mark.parametrize("knobs", WRONG, ids=str)
def test_knobs_that_cannot_be_are_refused_by_name(knobs: dict[str, Any]) -> None:
    model, batch = cnn(D)
    with pytest.raises(BadInput, match="offload_saved"):
        forced(model, cross_entropy, offload_saved=knobs).backward(batch)


def test_on_the_cpu_there_is_nothing_to_save() -> None:
    step = declare(mlp()[0], cross_entropy)
    assert "on the CPU" in (OffloadSaved.unsuited(step) or "")
    assert OffloadSaved.unsuited(dataclasses.replace(step, device=torch.device("cuda"))) is None
