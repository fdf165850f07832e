"""Rows (d), (f) and (i) of ``exact_table.py``: reductions over items, steps of an equation, derivatives inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _exact_case import Batch, Case, N, Outputs, differentiated, draws, network
from torch import Tensor, nn

import samegrad as sg

# (d): reductions over items


class Precisions(nn.Module):
    """Centers (items, d) to lower triangular factors of precisions (items, d, d) and log-weights (items,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.width = network(width, width * width + 1), width

    def forward(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner(centers)
        square = out[:, :-1].reshape(-1, self.width, self.width)
        return 0.5 * square.tril(-1) + torch.diag_embed(F.softplus(square.diagonal(dim1=1, dim2=2)) + 0.3), out[:, -1]


def kernels(centers: Tensor, shared: tuple[Tensor, nn.Module]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Log-density of x at each center (items, B), with its gradient (items, B, d) and |gradient|² + Laplacian."""
    x, precisions = shared
    factor, weight = precisions(centers)
    inner = torch.einsum("jki,jbk->jbi", factor, x[None] - centers[:, None])
    gradient = -torch.einsum("jki,jbi->jbk", factor, inner)
    scores = (weight + factor.diagonal(dim1=1, dim2=2).log().sum(1))[:, None] - 0.5 * inner.pow(2).sum(-1)
    return scores, (gradient, gradient.pow(2).sum(-1) - factor.pow(2).sum((1, 2))[:, None])


def over_centers(loss: Callable[[Outputs, Any], Tensor], ours: Callable[[Any, Tensor, Any, int], Tensor]) -> Case:
    precisions = Precisions(4)
    centers, x = draws(1, 203, 4).requires_grad_(), draws(2, 17, 4).requires_grad_()
    wanted = [*precisions.parameters(), centers, x]

    def outputs() -> Outputs:
        scores, (gradient, rest) = kernels(centers, (x, precisions))
        return [scores, gradient, rest]

    return Case(wanted, outputs, loss, differentiated(wanted, lambda n: ours(kernels, centers, (x, precisions), n)))


def log_sum_exp() -> Case:
    def ours(fn: Any, items: Tensor, shared: Any, rows: int) -> Tensor:
        return -sg.over(lambda i, s: fn(i, s)[0], items, shared=shared, reduce="logsumexp", rows=rows).mean()

    return over_centers(lambda o, _: -o[0].logsumexp(0).mean(), ours)


def log_sum_exp_in_one_pass() -> Case:
    def ours(fn: Any, items: Tensor, shared: Any, rows: int) -> Tensor:
        scores = lambda i, s: (fn(i, s)[0], ())
        return -sg.over(scores, items, shared=shared, reduce="softmax_mean", rows=rows)[0].mean()

    return over_centers(lambda o, _: -o[0].logsumexp(0).mean(), ours)


def score_matching_in_closed_form() -> Case:
    """Implicit score matching (Hyvärinen 2005, JMLR 6) of a kernel density, from two softmax-weighted means."""

    def loss(o: Outputs, _: Batch) -> Tensor:
        shares = o[0].softmax(0)
        score, rest = (shares[..., None] * o[1]).sum(0), (shares * o[2]).sum(0)
        return (rest - 0.5 * score.pow(2).sum(1)).mean()

    def ours(fn: Any, items: Tensor, shared: Any, rows: int) -> Tensor:
        _, (score, rest) = sg.over(fn, items, shared=shared, reduce="softmax_mean", rows=rows)
        return (rest - 0.5 * score.pow(2).sum(1)).mean()

    return over_centers(loss, ours)


def score_matching_by_double_backward() -> Case:
    """The same number from derivatives of the streamed log-sum-exp with respect to x, up to the third order.

    Its plain step is the closed form, so that the identity of the two is measured as well.
    """

    def ours(fn: Any, items: Tensor, shared: Any, rows: int) -> Tensor:
        x = shared[0]
        density = sg.over(lambda i, s: fn(i, s)[0], items, shared=shared, reduce="logsumexp", rows=rows)
        (score,) = torch.autograd.grad(density.sum(), x, create_graph=True)
        traces = [torch.autograd.grad(score[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
        return (torch.stack(traces).sum(0) + 0.5 * score.pow(2).sum(1)).mean()

    return dataclasses.replace(score_matching_in_closed_form(), ours=over_centers(lambda o, _: o[0].sum(), ours).ours)


# (f), (i): steps of an equation, derivatives of the model


def heun_steps(steps: int = 8) -> Case:
    """The usual saving integrates the adjoint equation backwards, with the same steps."""
    field, start, target, h = network(6, 6), draws(1, N, 6), draws(5, N, 6), 1 / steps
    parameters = list(field.parameters())

    def heun(z: Tensor, h: float = h) -> Tensor:
        k = field(z)
        return z + h / 2 * (k + field(z + h * k))

    def integrated(step: Callable[[Tensor], Tensor]) -> Tensor:
        z = start
        for _ in range(steps):
            z = step(z)
        return z

    def loss(o: Outputs, b: Batch) -> Tensor:
        return (o[0].sort(0).values - b["t"].sort(0).values).pow(2).mean()

    def ours(rows: int) -> Tensor:
        return loss([integrated(sg.rowwise(heun, rows=rows, shared=[field]))], {"t": target})

    def adjoint() -> Sequence[Tensor]:
        z = integrated(heun).detach().requires_grad_()
        (a,) = torch.autograd.grad(loss([z], {"t": target}), z)
        totals = [torch.zeros_like(p) for p in parameters]

        def slope(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            z = z.detach().requires_grad_()
            value = field(z)
            return (value.detach(), *torch.autograd.grad(value, [z, *parameters], a))

        z = z.detach()
        for _ in range(steps):
            first = slope(z, a)
            second = slope(z - h * first[0], a + h * first[1])
            z, a = z - h / 2 * (first[0] + second[0]), a + h / 2 * (first[1] + second[1])
            totals = [t + h / 2 * (f + s) for t, f, s in zip(totals, first[2:], second[2:])]
        return totals

    plain = lambda: [integrated(heun)]
    return Case(parameters, plain, loss, differentiated(parameters, ours), {"t": target}, naive=adjoint)


class Sliced(nn.Module):
    """Per row v' (ds/dx) v + |s|² / 2; Song, Garg, Shi, Ermon 2019, arXiv:1905.07088."""

    def __init__(self) -> None:
        super().__init__()
        self.score = network(6, 6)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        score, along = torch.func.jvp(self.score, (x,), (v,))
        return (along * v).sum(1) + 0.5 * score.pow(2).sum(1)


def sliced_score_matching() -> Case:
    model, rows_of = Sliced(), {"x": draws(1, N, 6), "v": draws(2, N, 6)}
    parameters = list(model.parameters())

    def ours(rows: int) -> list[Tensor | None]:
        model.zero_grad()
        sg.Step(model, lambda o, b: o.mean(), rows=rows).backward(rows_of)
        return [p.grad for p in parameters]

    def redrawn() -> Sequence[Tensor]:
        again = torch.cat([draws(20 + k, len(part), 6) for k, part in enumerate(rows_of["v"].split(8))])
        return torch.autograd.grad(model(rows_of["x"], again).mean(), parameters)

    return Case(parameters, lambda: [model(**rows_of)], lambda o, _: o[0].mean(), ours, rows_of, naive=redrawn)


def implicit_score_matching() -> Case:
    """The whole trace, one dimension after another, around a network that runs in chunks."""
    model, x = network(6, 6), draws(1, N, 6)
    parameters = list(model.parameters())

    def per_row(function: Callable[[Tensor], Tensor]) -> Tensor:
        points = x.clone().requires_grad_()
        score = function(points)
        total = 0.5 * score.pow(2).sum(1)
        for i in range(6):
            total = total + torch.autograd.grad(score[:, i].sum(), points, create_graph=True)[0][:, i]
        return total

    ours = differentiated(parameters, lambda rows: per_row(sg.rowwise(model, rows=rows)).mean())
    return Case(parameters, lambda: [per_row(model)], lambda o, _: o[0].mean(), ours)


# Names as in the table; rows to come are added here.
ROWS: dict[str, Callable[[], Case]] = {
    "(d) log-sum-exp over centers": log_sum_exp,
    "(d) log-sum-exp over centers, first order": log_sum_exp_in_one_pass,
    "(f) eight Heun steps": heun_steps,
    "(i) sliced score matching": sliced_score_matching,
    "(i) implicit score matching": implicit_score_matching,
    "(i) score matching of a density, closed form": score_matching_in_closed_form,
    "(i) score matching of a density, third order": score_matching_by_double_backward,
}
