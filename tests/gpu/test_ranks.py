"""Two GPUs under NCCL: DistributedDataParallel, fully_shard, items and centers split over ranks, as on gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import samegrad as sg

from ..exact import test_ddp as ddp
from ..exact import test_loop as loop
from ..exact import test_over_ranks as over
from ..exact.processes import here, on_ranks
from ..recipes import test_score_kernel_ranks as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def _ddp(rank: int) -> dict[str, Any]:
    return {
        "steps": {f"{name}, {cut}": ddp.stepped(name, *ddp.CUTS[cut], rank) for name in ddp.LOSSES for cut in ddp.CUTS},
        "gathered": ddp.gathered(rank),
        "buffers": [ddp.buffers(rank, ranks) for ranks in ((0, 1), (0,), (1,))],
    }


def _sharded(rank: int) -> dict[str, Any]:
    return {
        "steps": {f"{name}, {cut}": loop.compared(name, cut, rank) for name in loop.STEPS for cut in loop.CUTS},
        "planted": loop.planted(rank),
        "transaction": loop.transaction(rank),
        "bfloat16": {kind: loop.in_bfloat16(rank, kind) for kind in ("parameters", "compute")},
        "peaks": peaks(rank),
    }


def _over(rank: int) -> dict[str, Any]:
    return {
        f"{reduce}, order {order}, {counts}": over.compared(reduce, order, counts, rank)
        for reduce in ("sum", "logsumexp")
        for order in (1, 2, 3)
        for counts in over.MINE
    }


def peaks(rank: int) -> dict[str, int]:
    """Peak allocated bytes of a whole step and of one in chunks, of a model whose activations dominate."""
    width, found = 1024, {}
    for name, at_a_time in (("whole", 8192), ("chunks", 512)):
        torch.manual_seed(0)
        layers = [part for _ in range(8) for part in (nn.Linear(width, width), nn.GELU())]
        model = loop.sharded(nn.Sequential(*layers))
        step = sg.Step(model, lambda z, b: z.pow(2).mean(), rows=at_a_time)
        rows = torch.randn(8192 - rank, width, device=here())
        step.backward(rows)
        for parameter in model.parameters():
            parameter.grad = None
        torch.cuda.reset_peak_memory_stats()
        step.backward(rows)
        found[name] = torch.cuda.max_memory_allocated()
    return found


def test_ddp_on_two_gpus() -> None:
    for rank in on_ranks(_ddp, 2, "nccl"):
        for name, step in rank["steps"].items():
            assert step["error"] <= 1, name
            assert step["reductions"] == [1, 2, 3], name
            assert step["equal"], name
        assert rank["gathered"]["error"] <= 1
        assert rank["gathered"]["temperature"] < 1e-13
        for mixture in rank["buffers"]:
            assert mixture["error"] < 1e-13
            assert mixture["same"]


def test_fully_shard_on_two_gpus() -> None:
    for rank in on_ranks(_sharded, 2, "nccl"):
        for name, step in rank["steps"].items():
            assert step["error"] <= 1, name
            assert step["parameters"] < 1e-13, name
        assert rank["planted"] > 1e6
        assert rank["transaction"]["same"]
        assert rank["transaction"]["again"] < 1e-14
        for step in rank["bfloat16"].values():
            assert step["ours"] <= 2 * step["plain"] + 32 * 2**-24
        print(rank["peaks"])
        assert rank["peaks"]["chunks"] < 0.5 * rank["peaks"]["whole"]


def test_items_split_over_two_gpus() -> None:
    for rank in on_ranks(_over, 2, "nccl"):
        for name, step in rank.items():
            assert step["error"] <= 64 * 2**-53, name
            assert step["pattern"], name


def test_centers_over_two_gpus() -> None:
    first, second = on_ranks(kernels.compared, 2, "nccl")
    for found in (first, second):
        assert found["error"] < 1e-12
        assert found["places"] < 1e-13
        assert found["verdicts"] == [True, False]
    assert first["weights"] == second["weights"]
