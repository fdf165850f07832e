"""``over``: items a few at a time, joined, summed or reduced by a streaming log-sum-exp; any order of derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg

from .test_rowwise import assert_same

D = torch.float64
ITEMS = 50


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 6)).to(D)


def points(count: int, seed: int) -> Tensor:
    return torch.randn(count, 6, dtype=D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def score(centers: Tensor, shared: Any) -> Tensor:
    """Log-density of each x (11) under a Gaussian at each center: (centers, 11)."""
    x, network = shared
    width = F.softplus(network(centers)) + 0.1
    return width.log().sum(1)[:, None] - 0.5 * (((x[None] - centers[:, None]) * width[:, None]) ** 2).sum(-1)


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda scores: scores,
    "sum": lambda scores: scores.sum(0),
    "logsumexp": lambda scores: scores.logsumexp(0),
}


def gradients(value: Callable[[Tensor, Tensor, nn.Module], Tensor], order: int) -> list[Tensor]:
    network, centers, x = net(), points(ITEMS, 1), points(11, 2)
    result = value(centers, x, network)
    loss = result.pow(2).mean()
    if order >= 2:
        (g,) = torch.autograd.grad(result.sum(), x, create_graph=True)
        loss = loss + g.pow(2).mean()
    if order >= 3:
        (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
        loss = loss + h.pow(2).mean()
    loss.backward()
    return [p.grad for p in (*network.parameters(), centers, x) if p.grad is not None]


@pytest.mark.parametrize("reduce", PLAIN)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, ITEMS])
def test_every_reduction_has_the_plain_derivatives(reduce: Any, order: int, rows: int) -> None:
    plain = gradients(lambda c, x, n: PLAIN[reduce](score(c, (x, n))), order)
    ours = gradients(lambda c, x, n: sg.over(score, c, shared=(x, n), reduce=reduce, rows=rows), order)
    assert_same(ours, plain)


def test_a_softmax_restricted_to_a_chunk_would_be_seen() -> None:
    plain = gradients(lambda c, x, n: score(c, (x, n)).logsumexp(0), 1)

    def restricted(centers: Tensor, x: Tensor, network: nn.Module) -> Tensor:
        return torch.stack([score(part, (x, network)).logsumexp(0) for part in centers.split(10)]).mean(0)

    with pytest.raises(AssertionError):
        assert_same(gradients(restricted, 1), plain)


def test_terms_of_minus_infinity_and_large_shifts() -> None:
    scores = torch.tensor([[-torch.inf, -torch.inf], [1000.0, -torch.inf], [999.0, -torch.inf]], dtype=D)
    ours = sg.over(lambda s, _: s, scores, reduce="logsumexp", rows=1)
    assert torch.equal(ours, scores.logsumexp(0))


def test_only_one_chunk_of_items_is_alive_at_a_time() -> None:
    largest: list[int] = []

    def watched(items: Tensor, shared: Tensor) -> Tensor:
        if type(items) is Tensor:
            # Followed without data, it is called for all of them.
            largest.append(len(items))
        return (items[:, None] * shared[None]).sum(-1)

    items, shared = points(ITEMS, 1), points(9, 2)
    sg.over(watched, items, shared=shared, reduce="sum", rows=4).sum().backward()
    assert max(largest) == 4


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda items, _: items.softmax(0), "changes when another item"),
        (lambda items, _: items.sum(0), "changes when another item|is \\(6,\\)"),
        (lambda items, _: items + torch.randn_like(items), "draws random numbers"),
    ],
)
def test_what_is_no_function_of_items_is_refused(function: Any, named: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(sg.CannotSplit, match=named):
        sg.over(function, points(ITEMS, 1), rows=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_in_a_closure_is_refused_until_it_is_shared() -> None:
    network = net()
    with pytest.raises(sg.CannotSplit, match="neither in items nor in shared"):
        sg.over(lambda items, _: network(items), points(ITEMS, 1), rows=5)
    sg.over(lambda items, shared: shared(items), points(ITEMS, 1), shared=network, rows=5)


def test_whole_numbers_beside_floats_come_through() -> None:
    items = points(ITEMS, 1)
    values, signs = sg.over(lambda i, _: (2 * i, i > 0), items, rows=7)
    assert torch.equal(signs, items > 0)
    values.sum().backward()
    assert items.grad is not None and bool((items.grad == 2).all())
    with pytest.raises(sg.CannotSplit, match="output 0 of one item"):
        sg.over(lambda i, _: i < i.mean(0), items, rows=7)


def test_what_is_not_there_yet_or_wrong_is_refused() -> None:
    items = points(ITEMS, 1)
    for wrong in ({"rows": 0}, {"rows": 5, "reduce": "mean"}, {"rows": 5, "process_group": object(), "reduce": "cat"}):
        with pytest.raises(sg.UsageError):
            sg.over(lambda i, _: i, items, **wrong)


def test_a_loss_that_maps_over_items_is_followed_for_a_card() -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 3)

    def loss_fn(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = sg.over(lambda rows, shared: shared(rows), outputs, shared=head, reduce="cat", rows=4)
        return nn.functional.cross_entropy(logits, batch[1])

    model, batch = nn.Linear(6, 6), (torch.randn(10, 6), torch.randint(0, 3, (10,)))
    assert sg.measure_step(sg.Step(model, loss_fn), batch, device="H100 SXM 80GB").peak_allocated_bytes > 0
    # What is seen of values is asked wherever there are some.
    with pytest.raises(sg.CannotSplit, match="changes when another item is there"):
        sg.over(lambda rows, _: rows - rows.mean(0), batch[0], shared=None, reduce="cat", rows=4)


@pytest.mark.parametrize("reduce", ["sum", "cat", "logsumexp"])
def test_a_function_that_returns_nothing_is_refused(reduce: Any) -> None:
    with pytest.raises(sg.UsageError, match="output 0 is a NoneType"):
        sg.over(lambda items, shared: None, torch.randn(5, 2), shared=(), reduce=reduce, rows=2)


def test_what_cannot_be_called_is_no_function_of_rows() -> None:
    with pytest.raises(sg.UsageError, match="fn is a int"):
        sg.rowwise(3, rows=2)  # type: ignore[arg-type]  # what the test is about
