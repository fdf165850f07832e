"""What is looked at in backward: hooks and functions that are no sums over rows, by name, and nothing that is one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import CannotSplit
from samegrad.exact.examine_loss import module_hooks

from . import zoo
from .zoo_modules import Alone, Fn, OneWeight, between, linear

D = torch.float64


def nested(hook: Callable[..., Any], kind: str = "full_backward") -> nn.Module:
    """A hook on the second activation of the second of two blocks."""
    blocks = [nn.Sequential(linear(6, 6), nn.Tanh(), linear(6, 6), nn.Tanh()) for _ in range(2)]
    getattr(blocks[1][3], f"register_{kind}_hook")(hook)
    return nn.Sequential(*blocks, linear())


def clip_by_norm(module: nn.Module, given: Any, came: Any) -> Any:
    return (given[0] / given[0].norm().clamp(min=1),)


def _median(gradient: Tensor) -> Tensor:
    return gradient.abs().median()


# Changes of the gradient that a full backward hook makes, and whether chunks may make them.
HOOKS: dict[str, tuple[Callable[..., Any], bool]] = {
    "looks": (lambda module, given, came: None, True),
    "scales": (lambda module, given, came: (given[0] * 3,), True),
    "reverses": (lambda module, given, came: (-given[0],), True),
    "projects each row": (lambda module, given, came: (given[0] - given[0].mean(1, keepdim=True),), True),
    "clips by norm": (clip_by_norm, False),
    "clips entries": (lambda module, given, came: (given[0].clamp(-1e-3, 1e-3),), False),
    "signs": (lambda module, given, came: (given[0].sign(),), False),
    "drops small entries": (lambda module, given, came: (given[0] * (given[0].abs() > 1e-4),), False),
    "keeps the larger half": (lambda module, given, came: (given[0] * (given[0].abs() > _median(given[0])),), False),
    "drops signs": (lambda module, given, came: (given[0].abs(),), False),
    "centres over rows": (lambda module, given, came: (given[0] - given[0].mean(0),), False),
    "divides by the rows": (lambda module, given, came: (given[0] / len(given[0]),), False),
}


@pytest.mark.parametrize("name", HOOKS)
def test_module_hooks_are_refused_by_name_unless_they_are_sums_over_rows(name: str) -> None:
    hook, allowed = HOOKS[name]
    torch.manual_seed(0)
    model, rows = nested(hook), zoo.batch()
    if not allowed:
        with pytest.raises(CannotSplit, match=r"the backward of 1\.3 \(Tanh\) is no sum over rows"):
            zoo.split_step(model, zoo.LOSSES["mse"][0], rows)
        assert all(p.grad is None for p in model.parameters())
        return
    split, layout = zoo.split_step(model, zoo.LOSSES["mse"][0], rows)
    assert split.examination.module_hooks == ("1.3 (Tanh)",)
    _, reference = zoo.plain_gradients(model, zoo.LOSSES["mse"][0], rows)
    assert zoo.worst_error(split, rows, layout, [8, 8, 8, 5], reference) <= 1


def on_output(hook: Callable[[Tensor], Tensor]) -> nn.Module:
    """A tensor hook that the forward registers anew on what a layer gives."""

    def function(self: Any, z: Tensor) -> Tensor:
        if z.requires_grad:
            z.register_hook(hook)
        return z.tanh()

    return nn.Sequential(linear(6, 6), Fn(function))


@pytest.mark.parametrize(("hook", "allowed"), [(lambda g: g * 2, True), (lambda g: g.clamp(-1e-3, 1e-3), False)])
def test_hooks_that_the_forward_registers(hook: Callable[[Tensor], Tensor], allowed: bool) -> None:
    torch.manual_seed(0)
    model, rows = on_output(hook), zoo.batch()
    if not allowed:
        with pytest.raises(CannotSplit, match=r"the backward of 1\.inner \(Linear\) is no sum"):
            zoo.split_step(model, zoo.LOSSES["rmse"][0], rows)
        return
    split, layout = zoo.split_step(model, zoo.LOSSES["rmse"][0], rows)
    _, reference = zoo.plain_gradients(model, zoo.LOSSES["rmse"][0], rows)
    assert zoo.worst_error(split, rows, layout, [8, 8, 8, 5], reference) <= 1


def test_hooks_of_parameters_see_the_total_of_originals() -> None:
    """A copy of a model has no hooks of its parameters: examined and run must be the model itself."""
    torch.manual_seed(0)
    model, rows, seen = zoo.mlp(), zoo.batch(), []
    for parameter in model.parameters():
        parameter.register_hook(lambda g: seen.append(g.clone()) or g.clamp(-1e-3, 1e-3))
    split, layout = zoo.split_step(model, zoo.LOSSES["cross entropy"][0], rows)
    assert not seen
    split.backward(rows, layout, [8, 8, 8, 5])
    _, reference = zoo.plain_gradients(model, zoo.LOSSES["cross entropy"][0], rows)
    assert len(seen) == len(reference)
    for parameter, plain in zip(model.parameters(), reference):
        torch.testing.assert_close(parameter.grad, plain.clamp(-1e-3, 1e-3), rtol=1e-12, atol=1e-15)


class Rolled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g + 1e-10 * g.roll(1, 0)


def test_rows_that_meet_in_backward_alone_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(linear(6, 6), nn.Tanh()), nn.Sequential(Alone(Rolled.apply), linear()))
    with pytest.raises(CannotSplit, match=r"1\.0 \(Alone\) mixes rows in its backward: outputs of rows \[1, 3, 5, 7\]"):
        zoo.split_step(model, zoo.LOSSES["mse"][0], zoo.batch())


def test_the_same_in_rowwise_and_in_a_segment() -> None:
    torch.manual_seed(0)
    block, x = between(Alone(Rolled.apply)), zoo.batch()["x"]
    with pytest.raises(CannotSplit, match=r"1 \(Alone\) mixes rows in its backward"):
        sg.rowwise(block, rows=8)(x)
    model = nn.Sequential(block, Alone(lambda z: z - z.mean(0)))
    with pytest.raises(CannotSplit, match=r"1 \(Alone\) mixes rows in its backward"):
        sg.Step(model, zoo.LOSSES["mse"][0], forward=zoo.forward, segments=["0"], rows=8).backward(zoo.batch())


class Sender(nn.Module):
    """Takes its rows out of autograd by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.from_numpy(np.sort(x.numpy(), axis=1)))


class Infinite(nn.Module):
    """Rows of no numbers, and gradients of none: zeros times infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.where(x[:, :1] > 0.3, x * torch.inf, x).square().sqrt())


class Cleared(torch.autograd.Function):
    """Gives up what it saved as soon as it is used: a graph of it runs backward once."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.saved = [z.sign()]
        return z.abs()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved.pop()


QUIET: dict[str, Callable[[], nn.Module]] = {
    "rows that go through numpy": Sender,
    "what is no number": Infinite,
    "graphs that run once": lambda: OneWeight(Cleared.apply),
    "nothing that trains": lambda: zoo.mlp().requires_grad_(False),
    "outputs without a graph": lambda: Fn(lambda self, z: (z, z.detach(), z.argmax(1))),
    "in half precision inside": lambda: Fn(lambda self, z: (z.half() * 0.1).sin().to(D)),
    "in bfloat16 inside": lambda: between(Alone(lambda z: z.bfloat16().sin().to(D))),
    "complex inside": lambda: Fn(lambda self, z: torch.fft.rfft(z).abs()[:, :1] * z),
    "a gradient of zero": lambda: between(Alone(lambda z: z * 0)),
}


@pytest.mark.parametrize("name", QUIET)
def test_no_alarm(name: str) -> None:
    torch.manual_seed(0)
    split, layout = zoo.split_step(QUIET[name](), lambda z, b: _first(z).square().mean(), zoo.batch())
    if name != "nothing that trains":
        split.backward(zoo.batch(), layout, [8, 8, 8, 5])


def _first(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_alarm_in_autocast_and_in_narrow_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for layers in ([nn.LayerNorm(8)], [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()], [nn.Tanh()]):
        narrow = between(*layers).to(dtype)
        zoo.split_step(narrow, zoo.LOSSES["mse"][0], zoo.batch(dtype))
        with torch.autocast("cpu", dtype):
            zoo.split_step(between(*layers).float(), zoo.LOSSES["mse"][0], zoo.batch(torch.float32))


def test_hooks_that_only_chunks_would_double_are_listed() -> None:
    model = between(nn.Tanh())
    model[1].register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model[2].register_full_backward_pre_hook(lambda *_: None)
    assert module_hooks(model) == ("1 (Tanh)", "2 (Linear)")
