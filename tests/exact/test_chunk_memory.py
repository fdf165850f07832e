"""Reductions over items hold one chunk of them: counted bytes against plain, and as the items grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.softmax_mean import Streamed
from samegrad.measure.counting import ByteCounter

D = torch.float64
CHUNKS, ROWS, WIDTH, SAMPLES = 64, 16, 8, 12


def kernels(centers: Tensor, shared: tuple[Tensor, nn.Module]) -> tuple[Tensor, Tensor]:
    """Scores (items, 12) and values (items, 12, 8) of Gaussians with learned precisions (items, 8, 8)."""
    x, network = shared
    factor = network(centers).reshape(-1, WIDTH, WIDTH)
    inner = torch.einsum("jik,jbk->jbi", factor, x[None] - centers[:, None])
    return -0.5 * inner.pow(2).sum(-1), inner


def plain(reduce: str, fn: Any, items: Tensor, shared: Any) -> Any:
    scores, values = fn(items, shared)
    if reduce == "softmax_mean":
        return scores.logsumexp(0), (scores.softmax(0)[..., None] * values).sum(0)
    return (scores.sum(0), values.sum(0)) if reduce == "sum" else (scores.logsumexp(0), values.logsumexp(0))


def in_chunks(reduce: Any, fn: Any, items: Tensor, shared: Any) -> Any:
    return sg.over(fn, items, shared=shared, reduce=reduce, rows=ROWS)


def peak_bytes(way: Callable[..., Any], reduce: str, items: int) -> int:
    """The most bytes alive at once in forward and backward; items, samples and network were there before."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, WIDTH * WIDTH)).to(D)
    centers = torch.randn(items, WIDTH, dtype=D, generator=generator).requires_grad_()
    x = torch.randn(SAMPLES, WIDTH, dtype=D, generator=generator).requires_grad_()
    # Looked at before it is counted.
    way(reduce, kernels, centers, (x, network))
    with ByteCounter(torch.device("cpu")) as counter:
        first, second = way(reduce, kernels, centers, (x, network))
        (first.sum() + F.softplus(second).sum()).backward()
    assert centers.grad is not None and x.grad is not None
    return counter.peak_bytes


@pytest.mark.parametrize("reduce", ["sum", "logsumexp", "softmax_mean"])
def test_only_one_chunk_is_alive_and_more_items_cost_their_own_gradient(reduce: str) -> None:
    items = CHUNKS * ROWS
    ours, more = peak_bytes(in_chunks, reduce, items), peak_bytes(in_chunks, reduce, 2 * items)
    assert ours < peak_bytes(plain, reduce, items) / 10
    # Their gradient, joined; one item is 8 numbers of 8 bytes.
    gradient_bytes = items * WIDTH * 8
    assert gradient_bytes <= more - ours <= 1.01 * gradient_bytes


def test_a_pass_that_keeps_its_chunks_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    merged = Streamed.merged

    def hoarding(self: Streamed, other: Streamed) -> Streamed:
        kept.append(other)
        return merged(self, other)

    monkeypatch.setattr(Streamed, "merged", hoarding)
    items = CHUNKS * ROWS
    ours, more = (peak_bytes(in_chunks, "softmax_mean", n) for n in (items, 2 * items))
    assert more - ours > 1.01 * items * WIDTH * 8


def derivative_bytes(order: int, items: int, rows: int | None) -> int:
    """The most bytes alive at once for a loss of the derivatives up to ``order`` with respect to the rows."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(D)
    x = torch.randn(items, 4, dtype=D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    function = network if rows is None else sg.rowwise(network, rows=rows)
    if rows is not None:
        # Examined before it is counted.
        function(x)
    with ByteCounter(torch.device("cpu")) as counter:
        value = function(x)
        loss = value.square().mean()
        for _ in range(order - 1):
            (value,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
            loss = loss + value.square().mean()
        loss.backward()
    return counter.peak_bytes


@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_of_any_order_hold_one_chunk(order: int) -> None:
    items = CHUNKS * ROWS
    ours, more = derivative_bytes(order, items, ROWS), derivative_bytes(order, 2 * items, ROWS)
    assert ours < derivative_bytes(order, items, None) / 8
    # What every row leaves is a few numbers: its value, its derivatives, and their cotangents.
    assert more - ours <= items * 32 * 8 * order
