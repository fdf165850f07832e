"""Models that couple this rank's rows under DistributedDataParallel: its plain step, reduced once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import coupled_zoo as zoo
from .batchnorm_zoo import worst_share
from .coupled_zoo import left_by, made, plain_of, step_of
from .processes import here, on_ranks
from .test_ddp import equal_on_ranks, wrapped

# Rows of each rank, and how many of them at a time: other numbers of chunks on each.
ROWS, AT_A_TIME = (29, 17), (8, 9)


def without_draws(name: str) -> nn.Module:
    model = made(name)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def batches(rank: int) -> list[Any]:
    return [zoo.batch(ROWS[rank], seed=10 * rank + index) for index in range(3)]


def steps(name: str, rank: int) -> dict[str, Any]:
    """Three steps of plain DDP and of ``Step`` on the same rows of this rank."""
    plain = DistributedDataParallel(without_draws(name).to(here()))
    expected = left_by(plain, plain_of(plain, name), batches(rank))
    model, reductions = wrapped(without_draws(name))
    step = step_of(model, name, rows=AT_A_TIME[rank])
    ours = left_by(model, step.backward, batches(rank))
    for left in (*expected, *ours):
        left.pop("generator")
    shares = [worst_share(mine, theirs) for mine, theirs in zip(ours, expected, strict=True)]
    return {"worst": max(shares), "reductions": reductions[0], "equal": equal_on_ranks(model),
            "levers": list(step.plan.levers) if step.plan else []}  # fmt: skip


def on_rank(rank: int) -> dict[str, Any]:
    return {"raising": raising(rank)} | {name: steps(name, rank) for name in NAMES}


def raising(rank: int) -> dict[str, Any]:
    """Both ranks raise before anything is reduced, and go on together."""
    model, reductions = wrapped(without_draws("codebook"))
    step = step_of(model, "codebook", rows=AT_A_TIME[rank])
    step.backward(batches(rank)[0])
    armed = [True]

    def hook(_: nn.Module, args: Any) -> None:
        if armed:
            raise ZeroDivisionError

    model.module.decoder[1].register_forward_pre_hook(hook)
    # DDP begins every step with rank 0's buffers on all ranks.
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    for buffer in buffers.values():
        dist.broadcast(buffer, 0)
    with pytest.raises(ZeroDivisionError):
        step.backward(batches(rank)[1])
    same = all(torch.equal(buffers[n], b) for n, b in model.named_buffers())
    armed.clear()
    step.backward(batches(rank)[1])
    return {"same": same, "reductions": reductions[0]}


NAMES = {"mlp with batchnorm": "exact_batchnorm", "codebook": "segments", "experts with room": "segments"}


def test_every_rank_has_the_gradient_of_plain_ddp_by_one_reduction_a_step() -> None:
    for found in on_ranks(on_rank, 2):
        for name, lever in NAMES.items():
            assert found[name]["levers"] == [lever]
            assert found[name]["worst"] <= 1, (name, found[name])
            assert found[name]["reductions"] == 3 and found[name]["equal"]
        # What raises before the reduction leaves ranks in step.
        assert found["raising"] == {"same": True, "reductions": 2}
