"""``over`` and shared leaves on one GPU: float32 against float64, memory of a chunk, errors of the device thread."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg

pytestmark = pytest.mark.gpu

ITEMS, SAMPLES, WIDTH, ROWS = 4096, 64, 32, 64


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 128), nn.SiLU(), nn.Linear(128, WIDTH * WIDTH)).cuda()


def points(count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)).cuda().requires_grad_()


def kernels(centers: Tensor, shared: tuple[Tensor, nn.Module]) -> tuple[Tensor, Tensor]:
    x, net = shared
    factor = net(centers).reshape(-1, WIDTH, WIDTH)
    inner = torch.einsum("jik,jbk->jbi", factor, x[None] - centers[:, None])
    return -0.5 * inner.pow(2).sum(-1), inner


def plain(fn: Any, items: Tensor, shared: Any) -> tuple[Tensor, Tensor]:
    scores, values = fn(items, shared)
    return scores.logsumexp(0), (scores.softmax(0)[..., None] * values).sum(0)


def streamed(fn: Any, items: Tensor, shared: Any) -> tuple[Tensor, Tensor]:
    lse, mean = sg.over(fn, items, shared=shared, reduce="softmax_mean", rows=ROWS)
    return lse, mean


def gradients(way: Callable[..., tuple[Tensor, Tensor]], net: nn.Module, dtype: torch.dtype) -> Tensor:
    net = copy.deepcopy(net).to(dtype)
    centers, x = (points(n, s).detach().to(dtype).requires_grad_() for n, s in ((ITEMS, 1), (SAMPLES, 2)))
    lse, mean = way(kernels, centers, (x, net))
    (lse.mean() + mean.pow(2).mean()).backward()
    found = [p.grad.double().flatten() for p in (*net.parameters(), centers, x) if p.grad is not None]
    return torch.cat(found)


def test_softmax_means_are_as_near_to_float64_as_plain_ones() -> None:
    net = network()
    oracle = gradients(plain, net, torch.float64)
    assert (gradients(streamed, net, torch.float64) - oracle).norm() <= 1e-12 * oracle.norm()
    distance = (gradients(plain, net, torch.float32) - oracle).norm()
    assert (gradients(streamed, net, torch.float32) - oracle).norm() <= 2 * distance + 1e-6 * oracle.norm()


@pytest.mark.parametrize("reduce", ["sum", "logsumexp", "softmax_mean"])
def test_sixty_four_chunks_need_a_small_part_of_the_memory(reduce: Any) -> None:
    def peak(way: Callable[..., Any]) -> int:
        net, centers, x = network(), points(ITEMS, 1), points(SAMPLES, 2)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        first, second = way(kernels, centers, (x, net))
        (first.mean() + second.tanh().mean()).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    peak(streamed)  # library handles and workspaces
    ours = peak(lambda fn, items, shared: sg.over(fn, items, shared=shared, reduce=reduce, rows=ROWS))
    assert ours < peak(plain) / 10


def test_a_second_derivative_is_refused_from_the_devices_thread() -> None:
    centers, x = points(ITEMS, 1), points(SAMPLES, 2)
    lse, _ = streamed(kernels, centers, (x, network()))
    (first,) = torch.autograd.grad(lse.sum(), x, create_graph=True)
    with pytest.raises(sg.UsageError, match="first order"):
        first.pow(2).sum().backward()


@pytest.mark.parametrize("place", ["host", "device"])
def test_prototypes_of_a_support_set_have_the_plain_gradient(place: str) -> None:
    def nearest(z: Tensor, b: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(-(z[:, None] - b[2][None]).pow(2).sum(-1), b[1])

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, 16)).double().cuda()
    queries, support = (points(n, s).detach().double() for n, s in ((509, 1), (20, 2)))
    classes = torch.arange(509) % 4
    means = lambda: encoder(support).reshape(4, 5, -1).mean(1)
    nearest(encoder(queries), (queries, classes.cuda(), means())).backward()
    reference = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    rows = (queries, classes.cuda()) if place == "device" else (queries.cpu(), classes)
    sg.Step(encoder, nearest, rows=64, normalise="mean").backward((*rows, means()))
    for p, plain_gradient in zip(encoder.parameters(), reference):
        assert p.grad is not None
        assert (p.grad - plain_gradient).norm() <= 1e-12 * max(g.norm() for g in reference)
