"""SyncBatchNorm over ranks and chunks: two gloo processes with unequal rows, against one process with all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.lockstep import lockstep
from samegrad.exact.rendezvous import rendezvous

from .batchnorm_zoo import ROWS, Left, coupled_loss, made, worst_share
from .processes import on_two_ranks

# torch's own SyncBatchNorm does not run on the CPU, so the reference is one process.
SPLIT = 14
SIZES = {0: [5, 8, 1], 1: [4, 5]}
SCHEMES = ["lockstep", "every second cut", "rendezvous"]


def _within(scheme: str, network: nn.Module, sizes: list[int]) -> AbstractContextManager[Any]:
    if scheme == "rendezvous":
        return rendezvous(network, sizes=sizes)
    return lockstep(network, sizes=sizes, keep_every=2 if scheme == "every second cut" else 1)


def _loss(z: Tensor, weight: Tensor) -> Tensor:
    return (z.pow(2) * weight).sum()


def _left(network: nn.Module, x: Tensor, loss: Tensor) -> Left:
    assert x.grad is not None
    found = {"loss": loss.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
    return found | {f"buffer {n}": b for n, b in network.named_buffers()}


def _reference() -> Left:
    network, x = made("residual")
    x.requires_grad_()
    loss = _loss(network(x), _weights(x))
    loss.backward()
    return _left(network, x, loss)


def _weights(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 2, ROWS, dtype=x.dtype)[:, None]


def _rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, ROWS)
    collectives: list[str] = []
    _note(collectives)
    for scheme in SCHEMES:
        network, x = made("residual")
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        rows = x[mine].clone().requires_grad_()
        collectives.clear()
        with _within(scheme, network, SIZES[rank]):
            loss = _loss(network(rows), _weights(x)[mine])
            loss.backward()
        found[f"collectives, {scheme}"] = list(collectives)
        left = _left(network, rows, loss.clone())
        for key in left:
            # Each rank has its rows' part of what the parameters get; statistics are the same on both.
            if key == "loss" or (key.startswith("gradient") and key != "gradient of x"):
                dist.all_reduce(left[key])
        left["gradient of x"] = _all_rows(left["gradient of x"], rank)
        found[scheme] = worst_share(left, _reference())
        twin, _ = made("residual")
        with _within(scheme, twin, SIZES[rank]):
            coupled_loss(twin(x[mine]))
        collectives.clear()
        found[f"plain BatchNorm, {scheme}"] = len(collectives)
    return found


def _rank_of_steps(rank: int) -> dict[str, float]:
    """The same through Step, where one rank runs its rows whole while the other has chunks."""
    found = {}
    mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, ROWS)
    for name, rows in {"chunks": SIZES[rank], "one rank whole": [5, 8, 1] if rank == 0 else ROWS}.items():
        network, x = made("residual")
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        step = sg.Step(network, lambda z, b: _loss(z, b[1]), rows=rows)
        loss = step.backward((x[mine], _weights(x)[mine]))
        left: Left = {"loss": loss.clone()}
        left |= {f"gradient of {n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
        for value in left.values():
            dist.all_reduce(value)
        left |= {f"buffer {n}": b for n, b in network.named_buffers()}
        plain = _reference()
        found[name] = worst_share(left, {key: plain[key] for key in left})
    return found


def test_a_step_shares_the_statistics_of_all_ranks() -> None:
    found = on_two_ranks(_rank_of_steps)
    assert max(found.values()) <= 1


def _all_rows(mine: Tensor, rank: int) -> Tensor:
    """The rows of both ranks."""
    rows = mine.new_zeros(ROWS, *mine.shape[1:])
    rows[slice(0, SPLIT) if rank == 0 else slice(SPLIT, ROWS)] = mine
    dist.all_reduce(rows)
    return rows


def _note(collectives: list[str]) -> None:
    """Every collective from here on is noted. The process ends with the test."""

    def noting(name: str) -> Callable[..., Any]:
        plain = getattr(dist, name)

        def noted(*args: Any) -> Any:
            collectives.append(name)
            return plain(*args)

        return noted

    for name in ("all_gather", "all_reduce"):
        setattr(dist, name, noting(name))


def test_unequal_ranks_and_chunks_are_one_batch_with_two_collectives_a_layer() -> None:
    found = on_two_ranks(_rank)
    for scheme in SCHEMES:
        assert found[scheme] <= 1, scheme
        # Six layers: forward in order, then backward in order.
        assert found[f"collectives, {scheme}"] == ["all_gather"] * 6 + ["all_reduce"] * 6
        assert found[f"plain BatchNorm, {scheme}"] == 0


def _rank_without_sum(rank: int) -> dict[str, Any]:
    from samegrad.exact import batchnorm

    batchnorm.summed_over_ranks = lambda both, group: list(both)
    return _rank(rank)


def test_a_planted_local_gradient_of_the_statistics_is_caught() -> None:
    found = on_two_ranks(_rank_without_sum)
    assert all(found[scheme] > 100 for scheme in SCHEMES)
