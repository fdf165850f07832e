"""The rows of ``exact_table.py``: one small function each, from which the table makes plain, split and naive."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg

D = torch.float64
N, CLASSES = 29, 7  # primes: no split is even
Batch = dict[str, Tensor]
Outputs = list[Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """``loss(outputs(), batch)`` is the plain step; ``ours(rows)`` its gradients with that many rows at a time.

    outputs: tensors with one entry a row (or item). parameters: what receives gradients through them. own: what the
    loss uses beside them. naive: gradients the usual way; None means the mean of the chunks' losses, eight rows each.
    """

    parameters: Sequence[Tensor]
    outputs: Callable[[], Outputs]
    loss: Callable[[Outputs, Any], Tensor]
    ours: Callable[[int], Sequence[Tensor | None]]
    batch: Batch = dataclasses.field(default_factory=dict)
    own: Sequence[Tensor] = ()
    naive: Callable[[], Sequence[Tensor]] | None = None


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def network(inputs: int = 6, outputs: int = CLASSES, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, outputs)).to(D)


def batch() -> Batch:
    classes = torch.randint(0, CLASSES, (N,), generator=torch.Generator().manual_seed(3))
    # Every chunk keeps a valid target: what a chunk without one does to a mean of means is no number at all.
    ignored = torch.where(torch.arange(N) % 8 < 1 + torch.arange(N) // 5, classes, -100)
    return {"x": draws(1, N, 6), "t": draws(2, N, CLASSES), "y": classes, "some": ignored, "w": draws(4, N).abs()}


RowsLoss = Callable[[Tensor, Batch], Tensor]


def through_step(loss: RowsLoss, in_chunks: RowsLoss | None = None, **declared: Any) -> Case:
    """A row whose loss is that of one model's outputs, run by ``Step``; ``in_chunks`` is the same loss, streamed."""
    model, rows_of = network(), batch()

    def ours(rows: int) -> list[Tensor | None]:
        model.zero_grad()
        step = sg.Step(model, in_chunks or loss, forward=lambda m, b: m(b["x"]), rows=rows, **declared)
        step.backward(rows_of)
        return [p.grad for p in model.parameters()]

    return Case(list(model.parameters()), lambda: [model(rows_of["x"])], lambda o, b: loss(o[0], b), ours, rows_of)


def differentiated(wanted: Sequence[Tensor], loss_of: Callable[[int], Tensor]) -> Callable[[int], Sequence[Tensor]]:
    return lambda rows: torch.autograd.grad(loss_of(rows), list(wanted))


# (a), (b): sums over rows


def mean_over_rows() -> Case:
    return through_step(lambda z, b: F.mse_loss(z, b["t"]))


def ignored_targets() -> Case:
    return through_step(lambda z, b: F.cross_entropy(z, b["some"]))


def class_weights_and_smoothing() -> Case:
    weights = torch.linspace(0.2, 3.0, CLASSES, dtype=D)
    return through_step(
        lambda z, b: F.cross_entropy(z, b["some"], weight=weights, label_smoothing=0.1),
        normalise=lambda b: (weights[b["some"].clamp(min=0)] * (b["some"] >= 0)).sum(),
    )


def two_terms_with_two_counts() -> Case:
    return through_step(lambda z, b: F.cross_entropy(z, b["some"]) + (z.pow(2).sum(1) * b["w"]).sum() / b["w"].sum())


def learned_ratio() -> Case:
    def loss(z: Tensor, b: Batch) -> Tensor:
        gate = z[:, 1].sigmoid()
        return (gate * (z[:, 0] - b["t"][:, 0]).pow(2)).sum() / gate.sum()

    return through_step(loss)


def expert_balance() -> Case:
    """Fedus, Zoph, Shazeer 2021, "Switch Transformers", arXiv:2101.03961, equation 4."""

    def loss(z: Tensor, b: Batch) -> Tensor:
        routed = F.one_hot(z.argmax(1), CLASSES).to(D).mean(0)
        return CLASSES * (routed * z.softmax(1).mean(0)).sum()

    return through_step(loss)


# (c): losses of the whole batch


def info_nce(tiled: bool = False) -> Case:
    a, b, log_scale = network(6, 5, 0), network(3, 5, 1), torch.tensor(1.5, dtype=D, requires_grad=True)
    x, y = draws(1, N, 6), draws(2, N, 3)
    parameters = [*a.parameters(), *b.parameters()]

    def loss(outputs: Outputs, _: Batch) -> Tensor:
        first, second = (F.normalize(z, dim=1) for z in outputs)
        logits, same = first @ second.T * log_scale.exp(), torch.arange(len(first))
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

    def by_tiles(outputs: Outputs, rows: int) -> Tensor:
        first, second = (F.normalize(z, dim=1) for z in outputs)
        shared = (second, log_scale)
        logits = lambda items, s: items @ s[0].T * s[1].exp()  # noqa: E731
        along = sg.over(lambda i, s: logits(i, s).logsumexp(1), first, shared=shared, rows=rows)
        across = sg.over(logits, first, shared=shared, reduce="logsumexp", rows=rows)
        return ((along + across) / 2 - (first * second).sum(1) * log_scale.exp()).mean()

    def ours(rows: int) -> Tensor:
        outputs = [sg.rowwise(a, rows=rows)(x), sg.rowwise(b, rows=max(1, rows // 2))(y)]
        return by_tiles(outputs, rows) if tiled else loss(outputs, {})

    return Case(
        parameters, lambda: [a(x), b(y)], loss, differentiated([*parameters, log_scale], ours), own=[log_scale]
    )


def sliced_wasserstein(by_directions: bool = False) -> Case:
    directions = F.normalize(draws(7, 50, CLASSES), dim=1)

    def costs(items: Tensor, shared: tuple[Tensor, Tensor]) -> Tensor:
        a, b = shared
        return ((a @ items.T).sort(0).values - (b @ items.T).sort(0).values).pow(2).mean(0)

    def few_at_a_time(z: Tensor, b: Batch) -> Tensor:
        return sg.over(costs, directions, shared=(z, b["t"]), reduce="sum", rows=7) / 50

    return through_step(
        lambda z, b: ((z @ directions.T).sort(0).values - (b["t"] @ directions.T).sort(0).values).pow(2).mean(),
        few_at_a_time if by_directions else None,
    )


def vicreg(by_moments: bool = False) -> Case:
    """Bardes, Ponce, LeCun 2022, arXiv:2105.04906."""
    model, x = network(), draws(1, N, 6)
    views = (x, x + 0.1 * draws(2, N, 6))
    parameters = list(model.parameters())

    def terms(n: int, difference: Tensor, covariances: Sequence[Tensor]) -> Tensor:
        loss = 25 * difference / n
        for covariance in covariances:
            variance = covariance.diagonal()
            loss = loss + 25 * F.relu(1 - (variance + 1e-4).sqrt()).mean()
            loss = loss + (covariance.pow(2).sum() - variance.pow(2).sum()) / len(variance)
        return loss

    def loss(outputs: Outputs, _: Batch) -> Tensor:
        n = len(outputs[0])
        centred = [z - z.mean(0) for z in outputs]
        return terms(n, (outputs[0] - outputs[1]).pow(2).sum(), [c.T @ c / (n - 1) for c in centred])

    def moments(items: tuple[Tensor, Tensor], net: nn.Module) -> Any:
        z = [net(view) for view in items]
        return (z[0] - z[1]).pow(2).sum(1), z, [part[:, :, None] * part[:, None] for part in z]

    def ours(rows: int) -> Tensor:
        if not by_moments:
            encode = sg.rowwise(model, rows=rows)
            return loss([encode(view) for view in views], {})
        difference, means, seconds = sg.over(moments, views, shared=model, reduce="sum", rows=rows)
        return terms(N, difference, [(s - torch.outer(m, m) / N) / (N - 1) for m, s in zip(means, seconds)])

    return Case(parameters, lambda: [model(view) for view in views], loss, differentiated(parameters, ours))


def self_similarity(by_tiles: bool = False) -> Case:
    def tile(items: tuple[Tensor, Tensor], everyone: Tensor) -> Tensor:
        mine, own = items
        similar = 5 * mine @ everyone.T
        return similar.logsumexp(1) - similar.gather(1, own[:, None])[:, 0] + similar.tanh().pow(2).mean(1)

    def loss(z: Tensor, b: Batch) -> Tensor:
        similar = 5 * F.normalize(z, dim=1) @ F.normalize(z, dim=1).T
        return (similar.logsumexp(1) - similar.diagonal()).mean() + similar.tanh().pow(2).mean()

    def tiled(z: Tensor, b: Batch) -> Tensor:
        unit, own = F.normalize(z, dim=1), torch.arange(len(z))
        return sg.over(tile, (unit, own), shared=unit, reduce="sum", rows=min(8, len(z))) / len(z)

    return through_step(loss, tiled if by_tiles else None)


def prototypes() -> Case:
    """Snell, Swersky, Zemel 2017, arXiv:1703.05175. The usual saving keeps the prototypes out of the graph."""
    model, rows_of, support = network(), batch(), draws(5, 4 * 5, 6)
    rows_of["y"] = rows_of["y"] % 4
    parameters = list(model.parameters())
    means = lambda: model(support).reshape(4, 5, -1).mean(1)  # noqa: E731

    def loss(z: Tensor, b: Batch) -> Tensor:
        return F.cross_entropy(-(z[:, None] - b["p"][None]).pow(2).sum(-1), b["y"])

    def ours(rows: int) -> list[Tensor | None]:
        model.zero_grad()
        step = sg.Step(model, loss, forward=lambda m, b: m(b["x"]), rows=rows, normalise="mean")
        step.backward({"x": rows_of["x"], "y": rows_of["y"], "p": means()})
        return [p.grad for p in parameters]

    def whole(o: Outputs, b: Batch) -> Tensor:
        return loss(o[0], {**b, "p": o[1]})

    def naive() -> Sequence[Tensor]:
        return torch.autograd.grad(loss(model(rows_of["x"]), {**rows_of, "p": means().detach()}), parameters)

    return Case(parameters, lambda: [model(rows_of["x"]), means()], whole, ours, rows_of, naive=naive)


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
        scores = lambda i, s: (fn(i, s)[0], ())  # noqa: E731
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

    plain = lambda: [integrated(heun)]  # noqa: E731
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
    "(a) mean over rows": mean_over_rows,
    "(b) ignored targets": ignored_targets,
    "(b) class weights and smoothing": class_weights_and_smoothing,
    "(b) two terms with two counts": two_terms_with_two_counts,
    "(b') numerator and denominator learned": learned_ratio,
    "(b'') expert balance": expert_balance,
    "(c) InfoNCE with temperature": info_nce,
    "(c) InfoNCE by tiles": lambda: info_nce(tiled=True),
    "(c) sliced Wasserstein": sliced_wasserstein,
    "(c) sliced Wasserstein by directions": lambda: sliced_wasserstein(by_directions=True),
    "(c) VICReg": vicreg,
    "(c) VICReg by moments": lambda: vicreg(by_moments=True),
    "(c) self-similarity": self_similarity,
    "(c) self-similarity by row tiles": lambda: self_similarity(by_tiles=True),
    "(c) prototypes, a shared leaf": prototypes,
    "(d) log-sum-exp over centers": log_sum_exp,
    "(d) log-sum-exp over centers, first order": log_sum_exp_in_one_pass,
    "(f) eight Heun steps": heun_steps,
    "(i) sliced score matching": sliced_score_matching,
    "(i) implicit score matching": implicit_score_matching,
    "(i) score matching of a density, closed form": score_matching_in_closed_form,
    "(i) score matching of a density, third order": score_matching_by_double_backward,
}
