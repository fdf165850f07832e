"""Rows (a) to (c) of ``exact_table.py``: sums over rows, counted losses, losses of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _exact_case import CLASSES, Batch, Case, D, N, Outputs, batch, differentiated, draws, network, through_step
from torch import Tensor, nn

import samegrad as sg

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
        logits = lambda items, s: items @ s[0].T * s[1].exp()
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
    means = lambda: model(support).reshape(4, 5, -1).mean(1)

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
}
