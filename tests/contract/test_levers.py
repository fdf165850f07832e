"""Levers that leave the chunks as they are, forced on small models of every kind: the plain step, and all put back."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact import program
from samegrad.levers import _saved_tensors, autocast, layout, offload_saved
from samegrad.levers._lever import Execution
from samegrad.levers.optimizer_state import _TravellingState

from .lever_zoo import KNOBS, MODELS, ROWS, cnn, forced, mlp
from .plain import Gradients, assert_bitwise, cross_entropy, gradients, left_alone, plain_step, spread

Patch = pytest.MonkeyPatch
BITS = ("offload_saved", "optimizer_state")
CASES = [
    (lever, kind) for lever in ("offload_saved", "optimizer_state", "layout") for kind in MODELS
    if lever != "layout" or kind == "cnn"
]  # fmt: skip
EVERY = pytest.mark.parametrize(("lever", "kind"), CASES, ids=lambda value: value)
PASSES = pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
SPLITS = {"whole": {}, "split": {"rows": 5}, "ragged": {"rows": [6, 1, 4, 2]}, "kept graphs": {"rows": 5, "kept_chunks": 2}}


def taken(lever: str, split: str) -> dict[str, dict[str, Any]]:
    return {lever: KNOBS[lever]} | ({"split_rows": SPLITS[split]} if SPLITS[split] else {})


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def run(model: nn.Module, batch: Any, loss_fn: Any, **levers: dict[str, Any]) -> tuple[Tensor, Gradients]:
    """The loss and the gradients of one step under the levers, which stand no longer afterwards."""
    model.zero_grad()
    torch.manual_seed(5)
    with forced(model, loss_fn, optimizer=optimizer_of(model), **levers) as step:
        loss = step.backward(batch)
    return loss, gradients(model)


@EVERY
@PASSES
@pytest.mark.parametrize("split", SPLITS)
def test_the_gradient_is_the_plain_steps(lever: str, kind: str, loss_fn: Any, split: str) -> None:
    model, batch = MODELS[kind]()
    plain_loss, expected = plain_step(model, loss_fn, batch)
    loss, ours = run(model, batch, loss_fn, **taken(lever, split))
    torch.testing.assert_close(loss, plain_loss)
    if lever in BITS and split == "whole":
        assert_bitwise(ours, expected)
    assert_equal_but_for_rounding(ours, expected)


def assert_equal_but_for_rounding(ours: Gradients, expected: Gradients) -> None:
    """In float64. A bias before a normalisation has a gradient that is all rounding, so nothing is judged by itself."""
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    torch.testing.assert_close(dict(ours), dict(expected), rtol=0, atol=1e-13 * largest)


@EVERY
@PASSES
@pytest.mark.parametrize("split", SPLITS)
def test_with_draws_it_is_that_of_the_same_plan_without_the_lever(
    lever: str, kind: str, loss_fn: Any, split: str
) -> None:
    model, batch = MODELS[kind](dropout=0.4)
    rest = {name: knobs for name, knobs in taken(lever, split).items() if name != lever}
    _, expected = run(model, batch, loss_fn, **rest)
    _, again = run(model, batch, loss_fn, **taken(lever, split))
    (assert_bitwise if lever in BITS else assert_equal_but_for_rounding)(again, expected)


@pytest.mark.parametrize("lever", KNOBS)
@pytest.mark.parametrize("split", SPLITS)
def test_an_exception_in_the_users_forward_leaves_nothing_behind(lever: str, split: str) -> None:
    model, batch = cnn(torch.float32)
    armed = [False]

    def forward(network: nn.Module, rows: Any) -> Tensor:
        outputs = network(rows[0])
        if armed[0]:
            raise ZeroDivisionError
        return outputs

    optimizer = optimizer_of(model)
    levers = taken(lever, split)
    step = sg.Step(model, cross_entropy, forward=forward, plan=forced(model, cross_entropy, **levers).plan,
                   optimizer=optimizer, allow=sg.Exactness.ROUNDED)  # fmt: skip
    step.backward(batch)
    model.zero_grad()
    armed[0] = True
    with left_alone(model, optimizer=optimizer), pytest.raises(ZeroDivisionError):
        step.backward(batch)
    assert not torch.is_autocast_enabled("cpu")
    armed[0] = False
    step.close()
    assert_as_made(model, optimizer)
    _, expected = plain_step(model, cross_entropy, batch)
    cross_entropy(model(batch[0]), batch).backward()
    assert_bitwise(gradients(model), expected)


def assert_as_made(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Nothing of a lever is on the model or the optimizer: no forward of an instance, no strides, no hooks."""
    twin = copy.deepcopy(model)
    for (name, part), fresh in zip(model.named_modules(), twin.modules()):
        assert "forward" not in vars(part), name
        assert vars(part).keys() == vars(fresh).keys()
    assert all(p.is_contiguous() for p in model.parameters())
    assert all(p.grad is None or p.grad.is_contiguous() for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    tensors = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert all(t.is_contiguous() for t in tensors)


def test_all_four_go_together_with_a_split() -> None:
    model, batch = cnn(torch.float32)
    optimizer = optimizer_of(model)
    with forced(model, cross_entropy, optimizer=optimizer, split_rows={"rows": [5, 8]}, **KNOBS) as step:
        step.backward(batch)
    expected = chunked_under_autocast(model, batch, [5, 8])
    for name, gradient in gradients(model).items():
        assert gradient is not None
        torch.testing.assert_close(gradient, expected[name], atol=2e-3, rtol=2e-2)
    optimizer.step()
    assert_as_made(model, optimizer)


# Autocast, against plain PyTorch under torch.autocast


def chunked_under_autocast(
    model: nn.Module, batch: Any, sizes: list[int], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Gradients of the mean of cross entropy, chunk by chunk, written as one writes it by hand.

    Chunks are weighted by their rows and divided at the end, since whole numbers round nothing.
    """
    counts = [float(size) for size in sizes] if len(sizes) > 1 else [1.0]
    twin = copy.deepcopy(model)
    start = 0
    for size, count in zip(sizes, counts):
        rows = batch[0][start : start + size], batch[1][start : start + size]
        with torch.autocast("cpu", dtype=dtype):
            loss = cross_entropy(twin(rows[0]), rows)
        loss.backward(torch.tensor(count, dtype=loss.dtype))
        start += size
    return {name: p.grad / sum(counts) for name, p in twin.named_parameters() if p.grad is not None}


SIZES = pytest.mark.parametrize("sizes", [[ROWS], [5, 5, 3], [6, 1, 4, 2]], ids=str)


class Scaler:
    """Scales by a power of two, as a GradScaler does, without a device."""

    def scale(self, loss: Tensor) -> Tensor:
        return loss * 1024.0


def under_autocast(
    model: nn.Module, batch: Any, sizes: list[int], dtype: str, loss_fn: Any = cross_entropy, **more: Any
) -> dict[str, Tensor]:
    split = {"split_rows": {"rows": sizes}} if len(sizes) > 1 else {}
    scaler = Scaler() if dtype == "float16" else None
    model.zero_grad()
    with forced(model, loss_fn, autocast={"dtype": dtype} | more, **split) as step:
        step.backward(batch, scaler=scaler)
    scale = 1024.0 if scaler else 1.0
    return {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


# torch has no LSTM in float16 on the CPU.
NARROWED = [(kind, dtype) for kind in MODELS for dtype in ("bfloat16", "float16") if (kind, dtype) != ("lstm", "float16")]


@pytest.mark.parametrize(("kind", "dtype"), NARROWED)
@SIZES
def test_autocast_is_autocast_written_by_hand(kind: str, dtype: str, sizes: list[int]) -> None:
    model, batch = MODELS[kind](torch.float32)
    narrow = getattr(torch, dtype)
    ours = under_autocast(model, batch, sizes, dtype)
    expected = chunked_under_autocast(model, batch, sizes, narrow)
    assert ours.keys() == expected.keys()
    # In float16 the scaled backward rounds elsewhere below its smallest normal number.
    atol = 0.0 if dtype == "bfloat16" else 1e-5
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5 if not atol else 1e-2, atol=1e-7 + atol, msg=name)


@SIZES
@pytest.mark.parametrize("kind", MODELS)
def test_autocast_in_two_passes_is_the_whole_step_under_autocast_up_to_its_rounding(kind: str, sizes: list[int]) -> None:
    model, batch = MODELS[kind](torch.float32)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = spread(twin(batch[0]), batch)
    loss.backward()
    ours = under_autocast(model, batch, sizes, "bfloat16", spread)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=0.05, atol=0.02, msg=name)
        if len(sizes) == 1:
            assert torch.equal(ours[name], parameter.grad)


class SeesBackward(torch.autograd.Function):
    """The identity that notes whether backward runs under autocast."""

    seen: list[bool] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        SeesBackward.seen.append(torch.is_autocast_enabled("cpu"))
        return cotangent


class Watched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SeesBackward.apply(x)


def autocast_in_backward(loss_fn: Any, sizes: list[int]) -> set[bool]:
    model, batch = mlp(torch.float32)
    model.insert(2, Watched())
    SeesBackward.seen.clear()
    under_autocast(model, batch, sizes, "bfloat16", loss_fn)
    assert SeesBackward.seen
    return set(SeesBackward.seen)


@PASSES
@SIZES
def test_backward_runs_outside_autocast(loss_fn: Any, sizes: list[int]) -> None:
    assert autocast_in_backward(loss_fn, sizes) == {False}


# Planted levers that are wrong


@PASSES
@SIZES
def test_planted_autocast_that_is_left_on_in_backward_is_caught(loss_fn: Any, sizes: list[int], monkeypatch: Patch) -> None:
    right = autocast.Autocast.apply

    @contextlib.contextmanager
    def wrong(self: Any, execution: Execution) -> Iterator[Execution]:
        with right(self, execution) as inner, torch.autocast("cpu", dtype=torch.bfloat16):
            yield dataclasses.replace(inner, declared=execution.declared)

    monkeypatch.setattr(autocast.Autocast, "apply", wrong)
    monkeypatch.setattr(program, "_no_autocast", lambda _: contextlib.nullcontext())
    assert True in autocast_in_backward(loss_fn, sizes)


def stale(copy_of: Callable[..., Any]) -> Callable[..., Any]:
    first: list[Any] = []

    def wrong(self: Any, tensor: Tensor) -> Any:
        copy = copy_of(self, tensor)
        same = [c for c in first if c.brought_back().nbytes() == copy.brought_back().nbytes()]
        first.append(copy)
        return same[0] if same else copy

    return wrong


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_planted_offload_of_a_stale_tensor_is_caught(kind: str, split: str, monkeypatch: Patch) -> None:
    model, batch = MODELS[kind]()
    _, expected = plain_step(model, cross_entropy, batch)
    saved = _saved_tensors.SavedTensors
    monkeypatch.setattr(saved, "_copy_of", stale(saved._copy_of))
    _, ours = run(model, batch, cross_entropy, **taken("offload_saved", split))
    with pytest.raises(AssertionError):
        assert_equal_but_for_rounding(ours, expected)


@contextlib.contextmanager
def never_put_back(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    vars(module)["forward"] = forward
    yield


@pytest.mark.parametrize("lever", ["autocast", "offload_saved", "layout", "optimizer_state"])
def test_a_planted_lever_that_forgets_to_put_back_is_caught(lever: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(autocast, "forward_replaced", never_put_back)
    monkeypatch.setattr(offload_saved, "forward_replaced", never_put_back)
    monkeypatch.setattr(layout, "_copied", lambda values, stride: values.as_strided(values.shape, stride))
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "remove", lambda self: None)
    knobs = {"autocast": {"full_precision": ["9"]}, "offload_saved": {"modules": ["0"], "smallest_bytes": 0}}
    model, batch = cnn(torch.float32)
    optimizer = optimizer_of(model)
    before = copy.deepcopy(model.state_dict())
    with forced(model, cross_entropy, optimizer=optimizer, **{lever: knobs.get(lever, {})}) as step:
        step.backward(batch)
    with pytest.raises(AssertionError):
        assert_as_made(model, optimizer)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def trained(model: nn.Module, batch: Any, **levers: dict[str, Any]) -> dict[str, Tensor]:
    """Weights after four steps of AdamW under the levers; without any, in plain PyTorch."""
    optimizer = optimizer_of(model)
    step = forced(model, cross_entropy, optimizer=optimizer, **levers) if levers else None
    for _ in range(4):
        if step is None:
            cross_entropy(model(batch[0]), batch).backward()
        else:
            step.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("lever", BITS)
def test_training_under_a_lever_of_the_same_bits_is_plain_training(kind: str, lever: str) -> None:
    expected = trained(*MODELS[kind]())
    assert_bitwise(trained(*MODELS[kind](), **{lever: KNOBS[lever]}), expected)


def test_planted_state_that_is_lost_on_the_way_is_caught(monkeypatch: Patch) -> None:
    right = _TravellingState._returned
    monkeypatch.setattr(_TravellingState, "_returned", lambda self, copies, leaf: right(self, copies, leaf).zero_())
    with pytest.raises(AssertionError):
        assert_bitwise(trained(*mlp(), optimizer_state={}), trained(*mlp()))
