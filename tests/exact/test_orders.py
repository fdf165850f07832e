"""Derivatives inside the loss: gradient penalties, score matching, steps of a differential equation; in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg

from .test_rowwise import assert_same, net, rows

D = torch.float64
N = 23


def nested(loss_rows: Callable[[], tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]], order: int) -> list[Tensor]:
    """Value, and gradients of parameters and inputs, of a loss with derivatives with respect to inputs inside."""
    y, inputs, parameters = loss_rows()
    loss, level = y.pow(2).mean() + (y.std(0) - 1).pow(2).sum(), y.pow(2).sum()
    for _ in range(order - 1):
        first = torch.autograd.grad(level, inputs, create_graph=True)
        level = sum((g.pow(2).sum() for g in first), torch.zeros((), dtype=D))
        loss = loss + (level + 1).sqrt()
    return [loss.detach(), *torch.autograd.grad(loss, [*parameters, *inputs])]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 8, 20])
def test_pytrees_with_shared_inputs_and_a_module_used_twice(order: int, size: int) -> None:
    model = net()
    back = nn.Linear(3, 5).to(D)

    def function(batch: dict[str, Any]) -> dict[str, Tensor]:
        once = model(batch["x"] * batch["scale"])
        again = model(back(once).tanh() + batch["pair"][0])
        return {"z": torch.cat([once, again], 1), "n": once.pow(2).sum(1)}

    def run(wrapped: Callable[[Any], Any]) -> list[Tensor]:
        def loss_rows() -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
            x, other = rows(1).requires_grad_(), rows(2).requires_grad_()
            scale = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.7], dtype=D, requires_grad=True)
            out = wrapped({"x": x, "pair": (other,), "scale": scale})
            y = torch.cat([out["z"], out["n"][:, None]], 1)
            return y, [x, other, scale], [*model.parameters(), *back.parameters()]

        return nested(loss_rows, order)

    # Five entries of scale, 23 rows: it is shared.
    assert_same(run(sg.rowwise(function, rows=size, shared=[model, back])), run(function))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_tied_weights_and_a_module_in_two_maps(order: int) -> None:
    first, second = net(), net()
    second[2].weight = first[2].weight
    shared = [*first.parameters(), *(p for p in second.parameters() if p is not first[2].weight)]

    def run(f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def loss_rows() -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
            x, y = rows(1).requires_grad_(), rows(2).requires_grad_()
            return f(x) * g(y) + f(y), [x, y], shared

        return nested(loss_rows, order)

    assert_same(run(sg.rowwise(first, rows=8), sg.rowwise(second, rows=5)), run(first, second))


@pytest.mark.parametrize("order", [2, 3])
def test_time_major_rows(order: int) -> None:
    mix, model = nn.Linear(5, 5).to(D), net()

    def function(x: Tensor) -> Tensor:
        """(4, rows, 5): along time, never across rows."""
        return model(x.cumsum(0) + mix(x).tanh().flip(0))

    def run(wrapped: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def loss_rows() -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
            x = rows(count=4 * N).reshape(4, N, 5).requires_grad_()
            return wrapped(x).movedim(1, 0).flatten(1), [x], [*mix.parameters(), *model.parameters()]

        return nested(loss_rows, order)

    assert_same(run(sg.rowwise(function, rows=6, axes=1, shared=[mix, model])), run(function))


@pytest.mark.parametrize("order", [2, 3])
def test_groups(order: int) -> None:
    model, groups = net(), [3, 1, 4, 5, 2, 5, 3]

    def function(x: Tensor, group: Tensor) -> Tensor:
        z = model(x)
        apart = (group[:, None] == group[None]).to(z)
        return z - apart @ z / apart.sum(1, keepdim=True)

    group = torch.repeat_interleave(torch.arange(7), torch.tensor(groups))

    def run(wrapped: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        def loss_rows() -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
            x = rows(count=23).requires_grad_()
            return wrapped(x, group), [x], list(model.parameters())

        return nested(loss_rows, order)

    assert_same(run(sg.rowwise(function, rows=7, groups=groups, shared=[model])), run(function))


@pytest.mark.parametrize("reduce", ["cat", "sum", "logsumexp"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_over_with_pytrees(reduce: Any, order: int) -> None:
    model = net()

    def terms(items: dict[str, Tensor], shared: tuple[nn.Module, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        network, x = shared
        z = network(items["c"] + items["d"])
        return z @ x.T, {"square": z.pow(2) * x.sum()}

    plain = {"cat": lambda t: t, "sum": lambda t: t.sum(0), "logsumexp": lambda t: t.logsumexp(0)}[reduce]

    def run(ours: bool) -> list[Tensor]:
        def loss_rows() -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
            c, d, x = rows(1).requires_grad_(), rows(2).requires_grad_(), rows(3, 3, 9).requires_grad_()
            items = {"c": c, "d": d}
            if ours:
                a, b = sg.over(terms, items, shared=(model, x), reduce=reduce, rows=6)
            else:
                a, b = terms(items, (model, x))
                a, b = plain(a), {"square": plain(b["square"])}
            y = torch.cat([a.flatten(), b["square"].flatten()])[:, None].tanh()
            return y, [c, d, x], list(model.parameters())

        return nested(loss_rows, order)

    assert_same(run(ours=True), run(ours=False))


def test_gradients_of_some_inputs_only_and_twice_from_one_graph() -> None:
    model = net()
    weights = [model[2].weight, model[4].bias]

    def run(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = rows().requires_grad_()
        y = function(x)
        found = list(torch.autograd.grad(y.pow(2).mean(), weights, retain_graph=True))
        found += torch.autograd.grad(y[:, 0].exp().mean(), [x], retain_graph=True)
        # A cotangent that is zero for most rows, and one output row alone.
        found += torch.autograd.grad(y[11].sum(), [*weights, x])
        return found

    assert_same(run(sg.rowwise(model, rows=8)), run(model))
    model[0].weight.requires_grad_(False)
    assert_same(run(sg.rowwise(model, rows=8)), run(model))


def test_a_gradient_penalty_on_points_between_two_batches() -> None:
    """The critic's loss of Gulrajani et al. 2017, arXiv:1704.00028: the penalty is a second derivative."""
    critic = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 1)).to(D)
    real, fake, between = rows(1), rows(2), torch.rand(N, 1, dtype=D, generator=torch.Generator().manual_seed(3))

    def run(function: Callable[[Tensor], Tensor], norm_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        mixed = (between * real + (1 - between) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(function(mixed).sum(), mixed, create_graph=True)
        loss = function(fake).mean() - function(real).mean() + 10 * (norm_of(slope) - 1).pow(2).mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(critic.parameters()))]

    plain = run(critic, lambda g: g.norm(dim=1))
    assert_same(run(sg.rowwise(critic, rows=8), lambda g: g.norm(dim=1)), plain)
    with pytest.raises(AssertionError):
        assert_same(run(sg.rowwise(critic, rows=8), lambda g: g.detach().norm(dim=1)), plain)


class Field(nn.Module):
    """dz/dt = f(z, t), z (rows, 5)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 5)).to(D)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.inner(torch.cat([z, t.expand(len(z), 1)], 1))  # type: ignore[no-any-return]


def euler(field: Field, z: Tensor, t: Tensor, h: float) -> Tensor:
    return z + h * field(z, t)


def heun(field: Field, z: Tensor, t: Tensor, h: float) -> Tensor:
    k = field(z, t)
    return z + h / 2 * (k + field(z + h * k, t + h))


@pytest.mark.parametrize("method", [euler, heun])
@pytest.mark.parametrize("steps", [1, 8])
def test_steps_of_a_differential_equation(method: Any, steps: int) -> None:
    """Each step keeps its rows and nothing inside; the gradient is that of the steps as they were taken."""
    field, h = Field(), 1 / steps
    target = rows(5)

    def run(step: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        start = rows().requires_grad_()
        z = start
        for index in range(steps):
            z = step(z, torch.tensor(index * h, dtype=D))
        # Couples rows: a sorted distance along each axis.
        loss = (z.sort(0).values - target.sort(0).values).pow(2).mean()
        return [loss.detach(), *torch.autograd.grad(loss, [start, *field.parameters()])]

    plain = run(lambda z, t: method(field, z, t, h))
    assert_same(run(sg.rowwise(lambda z, t: method(field, z, t, h), rows=8, shared=[field])), plain)
    if steps > 1 and method is heun:
        # The gradient of another discretisation is near, and another.
        with pytest.raises(AssertionError):
            assert_same(run(lambda z, t: euler(field, z, t, h)), plain)


class Implicit(nn.Module):
    """Per row: probe' (ds/dx) probe + |s|² / 2 of the score s = network(x); Song et al. 2019, arXiv:1905.07088."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, probe: Tensor) -> Tensor:
        # Forward mode needs no leaf of its own and no graph, so rows can also run without one.
        score, along = torch.func.jvp(self.network, (x,), (probe,))
        return (along * probe).sum(1) + 0.5 * score.pow(2).sum(1)  # type: ignore[no-any-return]


def test_sliced_score_matching_with_probes_in_the_batch() -> None:
    torch.manual_seed(0)
    model = Implicit(nn.Sequential(nn.Linear(5, 24), nn.SiLU(), nn.Linear(24, 5)).to(D))
    parameters = list(model.parameters())
    batch = {"x": rows(1), "probe": rows(2)}

    def plain_gradients(draws: Tensor) -> list[Tensor]:
        loss = model(batch["x"], draws).mean()
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    plain = plain_gradients(batch["probe"])
    step = sg.Step(model, lambda out, b: out.mean(), rows=8)
    loss = step.backward(batch)
    assert step.split_for(batch, step.declared.layout(batch)).examination.passes == 1
    assert_same([loss, *(p.grad for p in parameters if p.grad is not None)], plain)
    wrapped = sg.rowwise(model, rows=8)
    value = wrapped(**batch).mean()
    assert_same([value.detach(), *torch.autograd.grad(value, parameters)], plain)
    # Probes drawn chunk by chunk are another sample.
    with pytest.raises(AssertionError):
        assert_same(plain_gradients(torch.cat([rows(seed, 5, 8) for seed in (2, 3, 4)])[:N]), plain)


@pytest.mark.parametrize("size", [1, 8])
def test_implicit_score_matching_as_full_batch_code(size: int) -> None:
    """The whole trace, one dimension after another, around a network that runs in chunks."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 24), nn.SiLU(), nn.Linear(24, 5)).to(D)

    def run(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = rows(1).requires_grad_()
        score = function(x)
        loss = 0.5 * score.pow(2).sum(1).mean()
        for i in range(5):
            (g,) = torch.autograd.grad(score[:, i].sum(), x, create_graph=True)
            loss = loss + g[:, i].mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]

    assert_same(run(sg.rowwise(network, rows=size)), run(network))
