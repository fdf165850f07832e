"""Levers that leave the chunks as they are, forced on small models of every kind: the plain step, and all put back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad import step as step_module
from samegrad.levers import _parts, _saved_tensors, layout
from samegrad.levers._state_pieces import Piece

from .lever_zoo import KNOBS, MODELS, cnn, forced, mlp, plan_with, stale
from .plain import Gradients, assert_bitwise, cross_entropy, gradients, left_alone, plain_step, spread

Patch = pytest.MonkeyPatch
BITS = ("offload_saved", "optimizer_state")
CASES = [
    (lever, kind) for lever in ("offload_saved", "optimizer_state", "layout") for kind in MODELS
    if lever != "layout" or kind == "cnn"
]  # fmt: skip
EVERY = pytest.mark.parametrize(("lever", "kind"), CASES, ids=lambda value: value)
PASSES = pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
SPLITS: dict[str, dict[str, Any]] = {
    "whole": {},
    "split": {"rows": 5},
    "ragged": {"rows": [6, 1, 4, 2]},
    "kept graphs": {"rows": 5, "kept_chunks": 2},
}


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


def test_a_step_that_is_planned_anew_is_measured_as_the_user_made_it(monkeypatch: Patch) -> None:
    model, batch = cnn()
    optimizer = optimizer_of(model)
    seen: list[bool] = []
    right = step_module.plan_here

    def noting(*given: Any) -> Any:
        seen.append(model[0].weight.is_contiguous() and not optimizer._optimizer_step_pre_hooks)
        return right(*given)

    monkeypatch.setattr(step_module, "plan_here", noting)
    step = sg.Step(model, cross_entropy, budget="1GiB", optimizer=optimizer)
    step.backward(batch)
    step._standing.bring(plan_with(layout={}, optimizer_state={}))
    assert not model[0].weight.is_contiguous()
    step.backward(tuple(torch.cat([leaf, leaf]) for leaf in batch))
    assert seen == [True, True]
    assert_as_made(model, optimizer)


# Planted levers that are wrong


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_planted_offload_of_a_stale_tensor_is_caught(kind: str, split: str, monkeypatch: Patch) -> None:
    model, batch = MODELS[kind]()
    _, expected = plain_step(model, cross_entropy, batch)
    saved = _saved_tensors.SavedTensors
    monkeypatch.setattr(saved, "_copy_of", stale(saved._copy_of, []))
    _, ours = run(model, batch, cross_entropy, **taken("offload_saved", split))
    with pytest.raises(AssertionError):
        assert_equal_but_for_rounding(ours, expected)


@contextlib.contextmanager
def never_put_back(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    vars(module)["forward"] = forward
    yield


@pytest.mark.parametrize("lever", ["autocast", "offload_saved", "layout", "optimizer_state"])
def test_a_planted_lever_that_forgets_to_put_back_is_caught(lever: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(_parts, "forward_replaced", never_put_back)
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
    right = Piece.returned

    def lost(piece: Piece) -> Piece:
        back = right(piece)
        back.memory.zero_()
        return back

    monkeypatch.setattr(Piece, "returned", lost)
    with pytest.raises(AssertionError):
        assert_bitwise(trained(*mlp(), optimizer_state={}), trained(*mlp()))
