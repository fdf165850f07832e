"""Losses that need the whole batch, through ``rowwise``, ``over`` and ``Step``: the plain gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg

from . import zoo
from .test_rowwise import assert_same, rows

D = torch.float64
SPLITS = [[8, 8, 8, 5], [1, 27, 1], [13, 16]]


def encoder(width: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)).to(D)


def of_all(parameters: Sequence[Tensor], loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(parameters))]


class Contrastive(nn.Module):
    """Symmetric InfoNCE and a sigmoid loss of all pairs, with a learned scale and a learned bias."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=D))
        self.bias = nn.Parameter(torch.tensor(-0.4, dtype=D))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T * self.log_scale.exp() + self.bias
        same = torch.arange(len(a)) % len(b)
        pairs = F.softplus(-logits[torch.arange(len(a)), same]).mean() + F.softplus(logits).mean()
        return F.cross_entropy(logits, same) + F.cross_entropy(logits.T, torch.arange(len(b)) % len(a)) + pairs


@pytest.mark.parametrize("sizes", [(7, 4), (1, 31), (23, 13)])
def test_two_encoders_with_row_counts_of_their_own(sizes: tuple[int, int]) -> None:
    image, text, loss_fn = encoder(5, 0), encoder(3, 1), Contrastive()
    x, y = rows(1, 5, 23), rows(2, 3, 31)
    everything = [*image.parameters(), *text.parameters(), *loss_fn.parameters()]
    fired: list[int] = []
    for p in everything:
        p.register_hook(lambda _: fired.append(1))
    ours = of_all(everything, loss_fn(sg.rowwise(image, rows=sizes[0])(x), sg.rowwise(text, rows=sizes[1])(y)))
    assert len(fired) == len(everything)
    assert_same(ours, of_all(everything, loss_fn(image(x), text(y))))


def accumulated_in_slots(a: nn.Module, b: nn.Module, loss_fn: Contrastive, x: Tensor, y: Tensor, size: int) -> None:
    """The usual way: outputs cached, and the whole loss once a chunk with that chunk's outputs live."""
    with torch.no_grad():
        cached = [(a(p), b(q)) for p, q in zip(x.split(size), y.split(size))]
    for index, (p, q) in enumerate(zip(x.split(size), y.split(size))):
        left = [pair[0] for pair in cached]
        right = [pair[1] for pair in cached]
        left[index], right[index] = a(p), b(q)
        loss_fn(torch.cat(left), torch.cat(right)).backward()


def test_a_temperature_counted_once_a_chunk_would_be_seen() -> None:
    image, text, loss_fn = encoder(5, 0), encoder(3, 1), Contrastive()
    x, y = rows(1, 5, 23), rows(2, 3, 23)
    everything = [*image.parameters(), *text.parameters()]
    reference = of_all([*everything, *loss_fn.parameters()], loss_fn(image(x), text(y)))[1:]
    accumulated_in_slots(image, text, loss_fn, x, y, 8)
    # Encoders are right, what the loss owns is counted three times: that is what hides the fault.
    assert_same([p.grad for p in everything if p.grad is not None], reference[:-2])
    owned = [p.grad for p in loss_fn.parameters() if p.grad is not None]
    torch.testing.assert_close(owned, [3 * g for g in reference[-2:]], rtol=1e-12, atol=0)
    with pytest.raises(AssertionError):
        assert_same(owned, reference[-2:])


class Rows(nn.Module):
    """The same loss on one model's outputs, as ``Step`` calls it."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, z: Tensor, b: Any) -> Tensor:
        return self.loss(z[:, :3], z[:, 3:6])  # type: ignore[no-any-return]


@pytest.mark.parametrize("sizes", SPLITS)
def test_what_the_loss_owns_gets_its_gradient_once(sizes: list[int]) -> None:
    model, batch, loss_fn = zoo.mlp(), zoo.batch(), Rows(Contrastive())
    own = list(loss_fn.parameters())
    reference = of_all([*model.parameters(), *own], loss_fn(model(batch["x"]), batch))
    split, layout = zoo.split_step(model, loss_fn, batch)
    loss = split.backward(batch, layout, sizes)
    assert_same([loss, *(p.grad for p in (*model.parameters(), *own) if p.grad is not None)], reference)


@pytest.mark.parametrize("at_a_time", [1, 9])
def test_info_nce_without_the_square_of_logits(at_a_time: int) -> None:
    """Row tiles of the logits: their log-sum-exp over columns joined, and over rows streamed."""
    image, text = encoder(5, 0), encoder(3, 1)
    x, y = rows(1, 5, 29), rows(2, 3, 29)
    log_scale = torch.tensor(1.5, dtype=D, requires_grad=True)
    everything = [*image.parameters(), *text.parameters(), log_scale]

    def plain(a: Tensor, b: Tensor) -> Tensor:
        logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T * log_scale.exp()
        return F.cross_entropy(logits, torch.arange(29)) + F.cross_entropy(logits.T, torch.arange(29))

    def tiled(a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        logits = lambda items, shared: items @ shared[0].T * shared[1].exp()
        shared = (b, log_scale)
        along = sg.over(lambda i, s: logits(i, s).logsumexp(1), a, shared=shared, rows=at_a_time)
        across = sg.over(logits, a, shared=shared, reduce="logsumexp", rows=at_a_time)
        return (along + across - 2 * (a * b).sum(1) * log_scale.exp()).mean()  # type: ignore[no-any-return]

    ours = of_all(everything, tiled(sg.rowwise(image, rows=8)(x), sg.rowwise(text, rows=5)(y)))
    assert_same(ours, of_all(everything, plain(image(x), text(y))))


def sliced_wasserstein(z: Tensor, target: Tensor, directions: Tensor) -> Tensor:
    return ((z @ directions.T).sort(0).values - (target @ directions.T).sort(0).values).pow(2).mean()


def by_directions(z: Tensor, target: Tensor, directions: Tensor, at_a_time: int) -> Tensor:
    def costs(items: Tensor, shared: tuple[Tensor, Tensor]) -> Tensor:
        a, b = shared
        return ((a @ items.T).sort(0).values - (b @ items.T).sort(0).values).pow(2).mean(0)

    total: Tensor = sg.over(costs, directions, shared=(z, target), reduce="sum", rows=at_a_time)
    return total / len(directions)


@pytest.mark.parametrize("at_a_time", [1, 9, 50])
def test_sliced_wasserstein_a_few_directions_at_a_time_inside_the_loss(at_a_time: int) -> None:
    model, batch = zoo.mlp(), zoo.batch()
    directions = F.normalize(rows(7, zoo.CLASSES, 50), dim=1)
    _, reference = zoo.plain_gradients(model, lambda z, b: sliced_wasserstein(z, b["t"], directions), batch)
    split, layout = zoo.split_step(model, lambda z, b: by_directions(z, b["t"], directions, at_a_time), batch)
    assert split.examination.form.name == "COUPLED"
    for sizes in SPLITS:
        assert zoo.worst_error(split, batch, layout, sizes, reference) <= 1


def test_learned_directions_have_the_plain_gradient() -> None:
    model, batch, raw = encoder(6), zoo.batch(), rows(7, 4, 50).requires_grad_()
    everything = [*model.parameters(), raw]
    target = rows(9, 4, zoo.ROWS)
    plain = of_all(everything, sliced_wasserstein(model(batch["x"]), target, F.normalize(raw, dim=1)))
    z = sg.rowwise(model, rows=8)(batch["x"])
    assert_same(of_all(everything, by_directions(z, target, F.normalize(raw, dim=1), 7)), plain)


def vicreg(n: int, difference: Tensor, means: Sequence[Tensor], seconds: Sequence[Tensor]) -> Tensor:
    """VICReg from sums over rows: Bardes, Ponce, LeCun 2022, arXiv:2105.04906, equations 1 to 6."""
    loss = 25 * difference / n
    for mean, second in zip(means, seconds):
        covariance = (second - torch.outer(mean, mean) / n) / (n - 1)
        variance = covariance.diagonal()
        loss = loss + 25 * F.relu(1 - (variance + 1e-4).sqrt()).mean()
        loss = loss + (covariance.pow(2).sum() - variance.pow(2).sum()) / len(mean)
    return loss


def vicreg_plain(a: Tensor, b: Tensor) -> Tensor:
    loss = 25 * (a - b).pow(2).sum() / len(a)
    for z in (a, b):
        covariance = (z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1)
        variance = covariance.diagonal()
        loss = loss + 25 * F.relu(1 - (variance + 1e-4).sqrt()).mean()
        loss = loss + (covariance.pow(2).sum() - variance.pow(2).sum()) / z.shape[1]
    return loss


def test_vicreg_by_representations_and_by_moments() -> None:
    model, x = encoder(), rows(1, 5, 29)
    views = (x, x + 0.1 * rows(2, 5, 29))
    plain = of_all(list(model.parameters()), vicreg_plain(model(views[0]), model(views[1])))
    encode = sg.rowwise(model, rows=8)
    assert_same(of_all(list(model.parameters()), vicreg_plain(encode(views[0]), encode(views[1]))), plain)

    def moments(items: tuple[Tensor, Tensor], network: nn.Module) -> dict[str, Any]:
        z = [network(view) for view in items]
        second = [part[:, :, None] * part[:, None, :] for part in z]
        return {"difference": (z[0] - z[1]).pow(2).sum(1), "means": z, "seconds": second}

    for at_a_time in (1, 8, 13):
        sums = sg.over(moments, views, shared=model, reduce="sum", rows=at_a_time)
        assert_same(of_all(list(model.parameters()), vicreg(29, **sums)), plain)


def self_similarity(z: Tensor, temperature: Tensor) -> Tensor:
    similar = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / temperature
    return (similar.logsumexp(1) - similar.diagonal()).mean() + similar.tanh().pow(2).mean()


def by_row_tiles(z: Tensor, temperature: Tensor, at_a_time: int) -> Tensor:
    unit = F.normalize(z, dim=1)

    def tile(items: tuple[Tensor, Tensor], shared: tuple[Tensor, Tensor]) -> Tensor:
        mine, own = items
        similar = mine @ shared[0].T / shared[1]
        return similar.logsumexp(1) - similar.gather(1, own[:, None])[:, 0] + similar.tanh().pow(2).mean(1)

    items = (unit, torch.arange(len(z)))
    total: Tensor = sg.over(tile, items, shared=(unit, temperature), reduce="sum", rows=at_a_time)
    return total / len(z)


@pytest.mark.parametrize("at_a_time", [1, 8, 28])
def test_self_similarity_by_row_tiles(at_a_time: int) -> None:
    """Rows are items and, all of them, shared: both ways of the gradient must arrive."""
    model, x = encoder(), rows(1, 5, 29)
    temperature = torch.tensor(0.3, dtype=D, requires_grad=True)
    everything = [*model.parameters(), temperature]
    plain = of_all(everything, self_similarity(model(x), temperature))
    ours = of_all(everything, by_row_tiles(sg.rowwise(model, rows=8)(x), temperature, at_a_time))
    assert_same(ours, plain)
    with pytest.raises(AssertionError):
        z = sg.rowwise(model, rows=8)(x)
        tiles = [self_similarity(part, temperature) * len(part) / 29 for part in z.split(8)]
        assert_same(of_all(everything, torch.stack(tiles).sum()), plain)


def dice(z: Tensor, b: Any) -> Tensor:
    p, y = z.sigmoid(), (b["t"] > 0).to(z.dtype)
    return 1 - ((2 * (p * y).sum(0) + 1) / (p.sum(0) + y.sum(0) + 1)).mean()


def expert_balance(z: Tensor, b: Any) -> Tensor:
    """E Σ f_e P_e: Fedus, Zoph, Shazeer 2021, "Switch Transformers", arXiv:2101.03961, equation 4."""
    experts = z.shape[1]
    routed = F.one_hot(z.argmax(1), experts).to(z.dtype).mean(0)
    return experts * (routed * z.softmax(1).mean(0)).sum()


def learned_ratio(z: Tensor, b: Any) -> Tensor:
    """Both the sum and what divides it are learned: (b') of a mean whose count is a gate."""
    gate = z[:, 1].sigmoid()
    return (gate * (z[:, 0] - b["t"][:, 0]).pow(2)).sum() / gate.sum()


def most_similar(z: Tensor, b: Any) -> Tensor:
    """Each target row against the most similar output row of the batch."""
    similar = F.normalize(b["t"], dim=1) @ F.normalize(z, dim=1).T
    return -similar.max(1).values.mean()


def two_counts(z: Tensor, b: Any) -> Tensor:
    return F.cross_entropy(z, b["y_ignored"]) + (z.pow(2).sum(1) * (b["w"] > 0.7)).sum() / (b["w"] > 0.7).sum()


LOSSES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "rmse": lambda z, b: F.mse_loss(z, b["t"]).sqrt(),
    "dice": dice,
    "expert balance": expert_balance,
    "learned ratio": learned_ratio,
    "most similar": most_similar,
    "two counts": two_counts,
    "correlation": lambda z, b: -torch.corrcoef(torch.stack([z[:, 0], b["t"][:, 0]]))[0, 1],
    "entropy of the mean": lambda z, b: -(z.softmax(1).mean(0) * z.softmax(1).mean(0).log()).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_through_step_and_through_rowwise(name: str) -> None:
    model, batch, loss_fn = zoo.mlp(), zoo.batch(), LOSSES[name]
    loss, reference = zoo.plain_gradients(model, loss_fn, batch)
    split, layout = zoo.split_step(model, loss_fn, batch)
    assert split.examination.form.name == "COUPLED", split.examination.reason
    for sizes in SPLITS:
        assert zoo.worst_error(split, batch, layout, sizes, reference) <= 1
    ours = of_all(list(model.parameters()), loss_fn(sg.rowwise(model, rows=8)(batch["x"]), batch))
    assert_same(ours, [loss, *reference])


@pytest.mark.parametrize("name", LOSSES)
def test_a_mean_of_the_chunks_losses_is_another_gradient(name: str) -> None:
    """What each of these losses would get from ordinary accumulation, weighted by rows."""
    model, batch, loss_fn = zoo.mlp(), zoo.batch(), LOSSES[name]
    parts = [slice(0, 7), slice(7, 20), slice(20, 29)]
    losses = [
        loss_fn(model(batch["x"][part]), {k: v[part] for k, v in batch.items()}) * (part.stop - part.start) / 29
        for part in parts
    ]
    with pytest.raises(AssertionError):
        assert_same(
            of_all(list(model.parameters()), torch.stack(losses).sum())[1:],
            zoo.plain_gradients(model, loss_fn, batch)[1],
        )


def test_numerator_and_denominator_as_sums_of_over() -> None:
    """(b') with two numbers of state: both sums stream, their quotient is ordinary code."""
    model, batch = zoo.mlp(), zoo.batch()

    def sums(items: tuple[Tensor, Tensor], network: nn.Module) -> tuple[Tensor, Tensor]:
        z = network(items[0])
        gate = z[:, 1].sigmoid()
        return gate * (z[:, 0] - items[1][:, 0]).pow(2), gate

    above, below = sg.over(sums, (batch["x"], batch["t"]), shared=model, reduce="sum", rows=8)
    loss, reference = zoo.plain_gradients(model, learned_ratio, batch)
    assert_same(of_all(list(model.parameters()), above / below), [loss, *reference])
