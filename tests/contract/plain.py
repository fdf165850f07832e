"""The plain step, written in plain PyTorch, and what a comparison with it may find."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.verify import tolerance

Gradients = Mapping[str, Tensor | None]
Batch = tuple[Tensor, Tensor]


class Tally:
    """What a test notes of calls. Objects with slots are not looked into, so it is no state of the step."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen: list[int] = []


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    """6 features to 3 classes, 10 hidden; no draws and no state."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)


def labelled(rows: int, dtype: torch.dtype = torch.float64) -> Batch:
    """(rows, 6) floats and (rows,) class indices of 3."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (rows,), generator=generator)


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def spread(outputs: Tensor, batch: Any) -> Tensor:
    """A loss that couples all rows: two passes."""
    return outputs.std(0).sum() + F.cross_entropy(outputs, batch[1])


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def plain_step(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any, forward: Any = None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss and the gradients of one ordinary backward on a copy of ``model``; the model is left alone."""
    twin, twin_loss = copy.deepcopy((model, loss_fn))
    outputs = forward(twin, batch) if forward else twin(batch[0])
    loss = twin_loss(outputs, batch)
    loss.backward()
    return loss.detach(), gradients(twin)


def assert_close(ours: Gradients, plain: Gradients) -> None:
    """Equal up to the rounding the contract allows, and None in the same places."""
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        found = ours[name]
        assert (found is None) == (expected is None), name
        if expected is not None and found is not None:
            found, expected = found.detach(), expected.detach()
            # What rows give before they cancel is not known here; of these models it is no smaller.
            largest = max(float(expected.abs().max()), 1e-2)
            error = float((found.double() - expected.double()).abs().max())
            assert error <= tolerance.entry_allowed(expected.dtype) * largest, (name, error)


def assert_bitwise(ours: Gradients, plain: Gradients) -> None:
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        found = ours[name]
        assert (found is None and expected is None) or (
            found is not None and expected is not None and torch.equal(found, expected)
        ), name


def fingerprint(*modules: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
    """Everything a step must leave alone when it does not run: weights, gradients, buffers, attributes, generators."""
    tensors = [t.detach().clone() for m in modules for t in m.state_dict().values()]
    grads = [None if p.grad is None else p.grad.clone() for m in modules for p in m.parameters()]
    simple = (int, float, str, bool, list)
    attributes = [
        (name, key, copy.copy(value) if isinstance(value, simple) else value.clone())
        for m in modules
        for name, part in m.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, (*simple, Tensor)) and key != "_flat_weights" and key != "_flat_weight_refs"
    ]
    state = [] if optimizer is None else [copy.deepcopy(optimizer.state_dict())]
    return [tensors, grads, attributes, state, torch.get_rng_state(), random.getstate(), np.random.get_state()]


def same(a: Any, b: Any) -> bool:
    """Equality through lists, tuples and dicts, tensors and arrays bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return bool(a == b)


@contextmanager
def left_alone(*modules: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Asserts that the block changes nothing of the modules, the optimizer and the generators."""
    before = fingerprint(*modules, optimizer=optimizer)
    yield
    after = fingerprint(*modules, optimizer=optimizer)
    parts = ("weights", "grad", "attributes", "optimizer", "torch", "python", "numpy")
    for part, was, now in zip(parts, before, after):
        assert same(was, now), part
