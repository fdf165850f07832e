"""Recomputed blocks under DistributedDataParallel: plain DDP's step, reduced once, in other chunks on each rank."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import samegrad as sg

from . import recompute_zoo as zoo
from .processes import here, on_ranks
from .test_ddp import equal_on_ranks, wrapped

ROWS = (11, 7)
RUNS: Any = [["wte", "drop"], ["h.0", "h.1"], "h.2"]
PLANS: dict[str, dict[str, Any]] = {
    "whole": {"recompute": {"blocks": RUNS}},
    "in chunks": {"split_rows": {"rows": 3}, "recompute": {"blocks": RUNS}},
}


def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1]) + outputs.std(0).sum()


def batch_of(rank: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS[rank], 6, dtype=zoo.D, generator=torch.Generator().manual_seed(rank))
    return x.to(here()), (torch.arange(ROWS[rank]) % zoo.CLASSES).to(here())


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def on_rank(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    network, batch = zoo.GPT(drop=0.0).to(zoo.D), batch_of(rank)
    plain = DistributedDataParallel(copy.deepcopy(network).to(here()))
    loss_fn(plain(batch[0]), batch).backward()
    found = {}
    for name, levers in PLANS.items():
        model, reductions = wrapped(copy.deepcopy(network))
        plan = sg.Plan(levers=levers, exactness=sg.Exactness.SAME_SUM, batch_rows=len(batch[0]))
        sg.Step(model, loss_fn, forward=lambda m, b: m(b[0]), plan=plan).backward(batch)
        apart = max(float((a - b).abs().max()) for a, b in zip(gradients(model), gradients(plain), strict=True))
        found[name] = {"apart": apart, "reductions": reductions[0], "equal": equal_on_ranks(model)}
    return found


def test_every_rank_has_the_gradient_of_plain_ddp_by_one_reduction() -> None:
    for found in on_ranks(on_rank, 2):
        for name in PLANS:
            assert found[name]["apart"] < 1e-12 and found[name]["equal"] and found[name]["reductions"] == 1, found
