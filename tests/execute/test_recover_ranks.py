"""One rank of two runs out of memory: both undo the attempt and run the batch under the next plan, or both stop."""

from __future__ import annotations

import datetime
import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import samegrad as sg
from samegrad.errors import CannotSplit
from samegrad.exact.out_of_memory import OutOfMemory
from samegrad.execute import recover

from ..exact.processes import on_ranks
from .failing_memory import KINDS, FailsAt, Levers, Rerun, batch_of, plan

SPLIT, WHOLE, LOCKSTEP = "single pass, state, scaler", "whole", "exact_batchnorm"


class OnRank(Rerun):
    """A step under DistributedDataParallel, each rank with rows of its own."""

    def __init__(self, kind: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank, self.reductions = rank, 0
        super().__init__(KINDS[kind], monkeypatch)

    def rows(self) -> Any:
        return batch_of(seed=self.rank)

    def wrapped(self, model: Any) -> Any:
        # Buffers of BatchNorm are each rank's own.
        ddp = DistributedDataParallel(model, broadcast_buffers=False)

        # DDP compares annotations with types, and here they are text: leave them out.
        def hook(state, bucket):  # type: ignore[no-untyped-def]
            self.reductions += 1
            work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        ddp.register_comm_hook(None, hook)
        return ddp

    def attempt(self, at: int | None, error: BaseException | None = None) -> dict[str, Any]:
        """What this rank finds where rank 1 fails at operation ``at``."""
        self.reductions = 0
        try:
            left, _ = self.run(at if self.rank == 1 else None, error)
        except (sg.SamegradError, ValueError) as raised:
            return {"raised": type(raised).__name__, "found": str(raised), "recoveries": len(self.step.recoveries)}
        assert self.step.plan is not None
        recoveries = [(r.rank, r.taken) for r in self.step.recoveries]
        return {
            "different": left.differing(self.expected),
            "plan": self.step.plan.levers,
            "recoveries": recoveries,
            "gradients": {name: None if g is None else g.tolist() for name, g in left.gradients.items()},
            "reductions": self.reductions,
        }


def one_rank_runs_out(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # Every recovery collects garbage; what stands now need not be looked through each time.
    gc.freeze()
    for kind in (SPLIT, WHOLE, LOCKSTEP):
        with pytest.MonkeyPatch.context() as monkeypatch:
            rerun = OnRank(kind, rank, monkeypatch)
            rerun.run(None)
            # Before the hand-over: what is reduced cannot be taken back.
            for at in (3, 15, 30):
                found[f"{kind} {at}"] = rerun.attempt(at)
            found[f"{kind} raises"] = rerun.attempt(20, ValueError("theirs") if rank else None)
            if kind == SPLIT:
                rerun.smaller = [plan(KINDS[kind].taken, 800)] if rank == 0 else []
                found["no more"] = rerun.attempt(20)
                rerun.smaller = [plan(KINDS[kind].taken, 800)]
                found[f"{SPLIT} again"] = rerun.attempt(20)
                # The planted fault: the rank that ran out retries alone.
                monkeypatch.setattr(recover, "Ranks", lambda groups, device: None)
                found["alone"] = rerun.attempt(20)
    return found


def a_sharded_step_runs_out(rank: int) -> dict[str, Any]:
    torch.manual_seed(3)
    model = KINDS["single pass"].make()
    # Dropout is not keyed in sharded steps.
    model[1] = torch.nn.Identity()
    # What a user would set: how long the other rank waits.
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=4))
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    step = KINDS["single pass"].step(model, rows=2)
    batch = batch_of(seed=rank)
    step.backward(batch)
    model.zero_grad()
    try:
        with FailsAt(40 if rank == 1 else None):
            step.backward(batch)
    except OutOfMemory as error:
        return {"raised": "OutOfMemory", "do": error.do, "recoveries": step.recoveries}
    except RuntimeError as error:
        return {"raised": type(error).__name__}
    return {"raised": ""}


def test_ranks_go_on_together_or_not_at_all() -> None:
    first, second = on_ranks(one_rank_runs_out, 2)
    for name, mine in first.items():
        other = second[name]
        if name.endswith("raises"):
            assert mine["raised"] == CannotSplit.__name__ and "rank 1 raised an error" in mine["found"], name
            assert other["raised"] == "ValueError" and other["found"] == "theirs"
        elif name == "alone":
            assert mine["plan"] != other["plan"] and mine["recoveries"] != other["recoveries"]
        elif name == "no more":
            assert mine["raised"] == other["raised"] == "OutOfMemory" and not mine["recoveries"]
            assert "another rank has no smaller plan" in mine["found"] and "planted" in other["found"]
        else:
            taken: Levers = KINDS[name.rpartition(" ")[0]].taken
            assert mine["plan"] == other["plan"] == taken, name
            assert mine["recoveries"] == other["recoveries"] == [(1, taken)], name
            assert not mine["different"] and not other["different"], (name, mine["different"], other["different"])
            assert mine["reductions"] == other["reductions"] == 1, name
            assert mine["gradients"] == other["gradients"], name


@pytest.mark.slow
def test_a_sharded_step_stops() -> None:
    first, second = on_ranks(a_sharded_step_runs_out, 2)
    assert second["raised"] == "OutOfMemory" and "sharded over ranks" in second["do"] and second["recoveries"] == ()
    # The other one is told by the group that was left.
    assert first["raised"]
