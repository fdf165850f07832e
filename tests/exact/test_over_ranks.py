"""``over(process_group=)``: items split over gloo ranks, unequally, against one process that holds all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact import ranks
from samegrad.exact.softmax_mean import Streamed
from samegrad.verify import tolerance

from .processes import here, on_ranks
from .test_over import ITEMS, PLAIN, net, points, score
from .test_softmax_mean import USES, kernels
from .test_softmax_mean import plain as plain_softmax

D = torch.float64
MINE = ([31, 19], [45, 5])
Value = Callable[[Tensor, Tensor, nn.Module], Tensor]


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = net(), nn.Linear(2, 2, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def gradients(value: Value, centers: Tensor, order: int) -> list[Tensor | None]:
    """Of the network, x and the centers, of a loss of derivatives up to ``order``."""
    network = WithUnused().to(centers.device)
    x = points(11, 2).detach().to(centers.device).requires_grad_()
    result = value(centers, x, network)
    loss = result.pow(2).mean()
    if order >= 2:
        (g,) = torch.autograd.grad(result.sum(), x, create_graph=True)
        loss = loss + g.pow(2).mean()
    if order >= 3:
        (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
        loss = loss + h.pow(2).mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in network.parameters()), x.grad, centers.grad]


def compared(reduce: str, order: int, counts: list[int], rank: int) -> dict[str, Any]:
    start = sum(counts[:rank])
    mine = slice(start, start + counts[rank])
    everything = points(ITEMS, 1)
    plain = gradients(lambda c, x, n: PLAIN[reduce](score(c, (x, n))), everything, order)
    centers = everything.detach()[mine].clone().to(here()).requires_grad_()
    # Ranks run 4 and 7 items at a time, so their chunk counts differ as well.
    rows = (4, 7)[rank]

    def split(c: Tensor, x: Tensor, n: nn.Module) -> Tensor:
        value: Tensor = sg.over(score, c, shared=(x, n), reduce=reduce, rows=rows, process_group=dist.group.WORLD)  # type: ignore[arg-type]
        return value

    ours = gradients(split, centers, order)
    plain[-1] = plain[-1][mine]  # type: ignore[index]
    return {
        "pattern": [g is None for g in ours] == [g is None for g in plain],
        "error": max(_error(a, b) for a, b in zip(ours, plain) if a is not None and b is not None),
    }


def _error(ours: Tensor, plain: Tensor) -> float:
    return float((ours.cpu() - plain).abs().max() / plain.abs().max())


def softmax_compared(use: str, counts: list[int], rank: int) -> float:
    """The largest error of values and gradients of a softmax mean over both ranks' items."""
    everything, start = points(ITEMS, 1).detach(), sum(counts[:rank])
    mine = slice(start, start + counts[rank])

    def gradients(reduced: Callable[..., Any], centers: Tensor) -> list[Tensor | None]:
        network, x = net().to(here()), points(11, 2).detach().to(here()).requires_grad_()
        loss = USES[use](*reduced(kernels, centers, (x, network)))
        loss.backward()
        return [loss.detach(), *(p.grad for p in network.parameters()), x.grad, centers.grad]

    def split(fn: Any, centers: Tensor, shared: Any) -> Any:
        group = dist.group.WORLD
        return sg.over(fn, centers, shared=shared, reduce="softmax_mean", rows=(4, 7)[rank], process_group=group)

    plain = gradients(plain_softmax, everything.clone().to(here()).requires_grad_())
    ours = gradients(split, everything[mine].clone().to(here()).requires_grad_())
    plain[-1] = plain[-1][mine]  # type: ignore[index]
    assert [g is None for g in ours] == [g is None for g in plain]
    return max(_error(a, b.cpu()) for a, b in zip(ours, plain) if a is not None and b is not None)


def restricted(rank: int) -> float:
    """A softmax over each rank's own items, only added up afterwards."""
    right = Streamed.of_all_ranks
    Streamed.of_all_ranks = lambda self, group: self  # type: ignore[method-assign]
    try:
        return softmax_compared("all", MINE[0], rank)
    finally:
        Streamed.of_all_ranks = right  # type: ignore[method-assign]


def raised(run: Callable[[], Any]) -> str:
    try:
        run()
    except sg.SamegradError as found:
        return f"{type(found).__name__}: {found}"
    return "nothing was raised"


def refused(rank: int) -> dict[str, str]:
    x = points(11, 2)
    detached = x if rank == 0 else x.detach()
    frozen = net().requires_grad_(rank == 0)

    def tried(centers: Tensor, network: nn.Module, **options: Any) -> str:
        given = {"reduce": "logsumexp", "rows": 5, "process_group": dist.group.WORLD, **options}
        return raised(lambda: sg.over(score, centers, shared=(x, network), **given))

    def meeting(centers: Tensor, shared: Any) -> Tensor:
        dist.all_reduce(centers.detach().clone())
        return score(centers, shared)

    return {
        "cat": tried(points(4, 3), net(), reduce="cat"),
        "no items on one rank": tried(points(4 if rank == 0 else 0, 3), net()),
        "frozen on one rank": tried(points(4, 3), frozen),
        "detached on one rank": raised(
            lambda: sg.over(
                score, points(4, 3), shared=(detached, net()), reduce="sum", rows=2, process_group=dist.group.WORLD
            )
        ),
        "collective": raised(lambda: sg.over(meeting, points(4, 3), shared=(x, net()), reduce="sum", rows=2)),
    }


def planted(rank: int) -> float:
    """Gradients of what is shared left as each rank's own."""
    right = ranks._apply
    ranks._apply = lambda function, group, tensors: (  # type: ignore[assignment]
        right(function, group, tensors) if torch.is_grad_enabled() else tuple(tensors)
    )
    try:
        return float(compared("logsumexp", 1, MINE[0], rank)["error"])
    finally:
        ranks._apply = right


def infinities(rank: int) -> bool:
    """Every term of one rank -inf, as masked ones are: its share is nothing."""
    scores = torch.full((3, 2), -torch.inf, dtype=D) if rank == 0 else torch.arange(6, dtype=D).reshape(3, 2)
    ours = sg.over(lambda i, _: i, scores, reduce="logsumexp", rows=2, process_group=dist.group.WORLD)
    return torch.allclose(ours, torch.arange(6, dtype=D).reshape(3, 2).logsumexp(0), rtol=1e-15)


def _rank(rank: int) -> dict[str, Any]:
    found = {
        f"{reduce}, order {order}, {counts}": compared(reduce, order, counts, rank)
        for reduce in ("sum", "logsumexp")
        for order in (1, 2, 3)
        for counts in MINE
    }
    return {
        "same": found,
        "softmax": {(use, tuple(counts)): softmax_compared(use, counts, rank) for use in USES for counts in MINE},
        "restricted": restricted(rank),
        "refused": refused(rank),
        "planted": planted(rank),
        "infinities": infinities(rank),
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_ranks(_rank, 2)


def test_split_items_give_the_values_and_gradients_of_all_items_to_any_order(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for name, step in rank["same"].items():
            assert step["error"] <= tolerance.entry_allowed(D), (name, step)
            assert step["pattern"], name
        assert rank["infinities"]


def test_softmax_means_over_ranks_are_those_of_all_items(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert max(rank["softmax"].values()) <= tolerance.entry_allowed(D), rank["softmax"]
        assert rank["restricted"] > 1e-3


def test_a_forgotten_sum_over_ranks_is_outside_the_contract(found: list[dict[str, Any]]) -> None:
    assert all(rank["planted"] > 1e-3 for rank in found)


def test_what_cannot_be_reduced_over_ranks_is_refused_on_all_of_them(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["refused"]["cat"].startswith("UsageError")
        assert "other numbers of tensors and trainable parameters: 1 to 5" in rank["refused"]["frozen on one rank"]
        assert "shared value 0 requires grad on some ranks" in rank["refused"]["detached on one rank"]
        assert "calls a collective (c10d::allreduce_)" in rank["refused"]["collective"]
    assert "rank 1 raised an error" in found[0]["refused"]["no items on one rank"]
    assert found[1]["refused"]["no items on one rank"].startswith("BadInput")
