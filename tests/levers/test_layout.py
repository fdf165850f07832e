"""Channels last: the same values at other places in memory, for weights, gradients and optimizer state, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.errors import UsageError
from samegrad.levers import layout
from samegrad.levers.layout import Layout

from ..contract.lever_zoo import MODELS, cnn, forced, volumes
from ..contract.plain import cross_entropy, gradients, plain_step, same, spread

Patch = pytest.MonkeyPatch
PASSES = pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
KINDS = pytest.mark.parametrize("make", [cnn, volumes], ids=["images", "volumes"])
SPLITS = pytest.mark.parametrize("split", [{}, {"split_rows": {"rows": [6, 1, 4, 2]}}], ids=["whole", "split"])
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def convolved(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() in FORMATS]


def in_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=FORMATS[tensor.dim()])


@KINDS
@PASSES
@SPLITS
def test_the_gradient_is_the_plain_steps_in_the_strides_that_stand(make: Any, loss_fn: Any, split: Any) -> None:
    model, batch = make()
    _, expected = plain_step(model, loss_fn, batch)
    values, keys = copy.deepcopy(model.state_dict()), list(model.state_dict())
    with forced(model, loss_fn, layout={}, **split) as step:
        step.backward(batch)
        assert all(in_channels_last(p) and not p.is_contiguous() for p in convolved(model))
        assert all(p.grad is not None and p.grad.stride() == p.stride() for p in model.parameters())
        assert list(model.state_dict()) == keys and same(model.state_dict(), values)
        check_close(model, expected)
    assert all(p.is_contiguous() and p.grad is not None and p.grad.is_contiguous() for p in model.parameters())
    assert same(model.state_dict(), values)
    check_close(model, expected)


def check_close(model: nn.Module, expected: dict[str, Tensor | None]) -> None:
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-13 * largest)


class NotesStrides(nn.Module):
    seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(in_channels_last(x))
        return x


def strides_seen(model: nn.Sequential, batch: Any, split: Any) -> tuple[list[bool], list[bool]]:
    """Whether channels are last in what the first layer reads, and in what it makes."""
    model = nn.Sequential(NotesStrides(), model[0], NotesStrides(), *model[1:])
    before = batch[0].clone()
    with forced(model, cross_entropy, layout={}, **split) as step:
        step.backward(batch)
        NotesStrides.seen.clear()
        step.backward(batch)
    assert batch[0].is_contiguous() and torch.equal(batch[0], before)
    return NotesStrides.seen[::2], NotesStrides.seen[1::2]


@KINDS
@SPLITS
def test_images_of_few_channels_stay_and_what_a_layer_makes_of_them_has_channels_last(make: Any, split: Any) -> None:
    model, batch = make()
    before_layer, after_layer = strides_seen(model, batch, split)
    # What torch's float64 kernel for volumes returns on the CPU is torch's own choice.
    assert before_layer and not any(before_layer) and (make is volumes or all(after_layer))


@SPLITS
def test_images_of_many_channels_come_with_channels_last(split: Any) -> None:
    model, (images, targets) = cnn()
    wide = nn.Conv2d(6, model[0].out_channels, 3).double()
    before_layer, after_layer = strides_seen(
        nn.Sequential(wide, *model[1:]), (torch.cat([images, images], dim=1), targets), split
    )
    assert before_layer and all(before_layer) and all(after_layer)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "fused": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
}


def trained(name: str, *, lever: bool, load_between: bool = False) -> list[Any]:
    """Weights and state after two plain steps, four steps under the lever or without it, and two plain ones again."""
    model, batch = cnn()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    saved = None
    for index in range(8):
        if index == 2 and lever:
            step = forced(model, cross_entropy, optimizer=optimizer, layout={})
        if index == 6 and lever:
            step.close()
        if lever and 2 <= index < 6:
            step.backward(batch)
        else:
            cross_entropy(model(batch[0]), batch).backward()
        if index == 1:
            saved = copy.deepcopy(optimizer.state_dict())
        if index == 4 and load_between:
            assert saved is not None
            optimizer.load_state_dict(copy.deepcopy(saved))
        optimizer.step()
        optimizer.zero_grad(set_to_none=index % 2 == 0)
    assert all(t.is_contiguous() for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    return [model.state_dict(), [list(state.values()) for state in optimizer.state.values()]]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("load_between", [False, True], ids=["going on", "state loaded meanwhile"])
def test_optimizers_find_their_state_where_the_weights_are(name: str, load_between: bool) -> None:
    plain = trained(name, lever=False, load_between=load_between)
    ours = trained(name, lever=True, load_between=load_between)
    # Adam divides by roots of what may be all rounding.
    torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-6 if "sgd" not in name else 1e-12)


@pytest.mark.parametrize("name", ["fused", "fused sgd"])
def test_planted_state_in_other_strides_than_its_weights_is_caught(name: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(layout, "_align_state", lambda optimizer: None)
    with pytest.raises((AssertionError, RuntimeError)):
        test_optimizers_find_their_state_where_the_weights_are(name, False)


def test_what_shares_memory_with_others_keeps_its_strides() -> None:
    model, batch = cnn()
    weight = model[0].weight
    flat = torch.zeros(weight.numel() + 5, dtype=weight.dtype)
    flat[: weight.numel()] = weight.detach().flatten()
    weight.data = flat[: weight.numel()].view(weight.shape)
    _, expected = plain_step(model, cross_entropy, batch)
    with forced(model, cross_entropy, layout={}) as step:
        step.backward(batch)
        assert weight.data_ptr() == flat.data_ptr() and weight.is_contiguous()
        assert in_channels_last(model[4].weight)
        check_close(model, expected)


def test_a_gradient_that_is_part_of_a_bucket_stays_there() -> None:
    model, batch = cnn()
    weight = model[0].weight
    _, expected = plain_step(model, cross_entropy, batch)
    buckets = {p: torch.zeros(p.numel() + 5, dtype=p.dtype) for p in model.parameters()}

    def in_buckets() -> None:
        for parameter, bucket in buckets.items():
            parameter.grad = bucket[: parameter.numel()].zero_().view(parameter.shape)

    in_buckets()
    with forced(model, cross_entropy, layout={}) as step:
        for _ in range(2):
            # As ranks have them anew after each step.
            in_buckets()
            step.backward(batch)
            assert weight.is_contiguous()
            check_close(model, expected)
    for parameter, bucket in buckets.items():
        assert parameter.is_contiguous() and parameter.grad is not None
        assert parameter.grad.data_ptr() == bucket.data_ptr()


def test_gradients_in_other_strides_than_their_weights_are_not_paired_wrongly() -> None:
    """A fused optimizer goes by places in memory; a user's flat buffer knows nothing of the weights' strides."""
    (model, batch), (plain, _) = cnn(), cnn()
    ours, theirs = (OPTIMIZERS["fused sgd"](list(m.parameters())) for m in (model, plain))
    _, expected = plain_step(plain, cross_entropy, batch)
    with forced(model, cross_entropy, layout={}, optimizer=ours) as step:
        step.backward(batch)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad = parameter.grad.contiguous()
        ours.step()
    for parameter, gradient in zip(plain.parameters(), expected.values(), strict=True):
        parameter.grad = gradient
    theirs.step()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_strides_that_were_there_before_come_back() -> None:
    model, batch = cnn()
    model[0].to(memory_format=torch.channels_last)
    odd = model[4].weight
    odd.data = odd.data.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    before = [p.stride() for p in model.parameters()]
    with forced(model, cross_entropy, layout={}) as step:
        step.backward(batch)
        assert all(in_channels_last(p) for p in convolved(model))
    assert [p.stride() for p in model.parameters()] == before


def test_tied_and_parametrized_weights_are_laid_out_once() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    second.weight = first.weight
    third = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    model = nn.Sequential(first, nn.Tanh(), second, third, nn.Flatten(), nn.Linear(12, 3)).double()
    batch = cnn()[1]
    _, expected = plain_step(model, cross_entropy, batch)
    with forced(model, cross_entropy, layout={}, split_rows={"rows": 5}) as step:
        step.backward(batch)
        assert first.weight is second.weight and in_channels_last(first.weight)
        check_close(model, expected)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "cnn"])
def test_a_model_without_a_convolution_is_refused(kind: str) -> None:
    model, batch = MODELS[kind]()
    assert "no convolution" in (Layout.unsuited(declare(model, cross_entropy)) or "")
    with pytest.raises(UsageError, match="no convolution"):
        forced(model, cross_entropy, layout={}).backward(batch)
    assert Layout.unsuited(declare(cnn()[0], cross_entropy)) is None


def test_an_exception_while_weights_are_laid_out_puts_back_those_that_were(monkeypatch: Patch) -> None:
    model, _ = cnn()
    right, calls = layout._copied, []

    def fails(values: Tensor, stride: tuple[int, ...]) -> Tensor:
        calls.append(stride)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return right(values, stride)

    monkeypatch.setattr(layout, "_copied", fails)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(torch.OutOfMemoryError),
        Layout().standing(declare(model, cross_entropy, optimizer=optimizer)),
    ):
        raise AssertionError("never reached")
    assert all(p.is_contiguous() for p in model.parameters()) and not optimizer._optimizer_step_pre_hooks


def test_linear_weights_alone_are_none_of_its_business() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 35, 3)).double()
    batch = cnn()[1]
    strides = model[2].weight.stride()
    with forced(model, cross_entropy, layout={}) as step:
        step.backward(batch)
        assert model[2].weight.stride() == strides
