"""Fifty out-of-memory errors in one run on a GPU: nothing stays allocated, and the weights are the calm run's."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.execute import recover
from samegrad.execute.kept_plans import Kept
from samegrad.measure import counters
from samegrad.measure.allocator_rules import fraction_of_cap
from samegrad.records import Plan
from samegrad.trees import extents_of

pytestmark = pytest.mark.gpu

ROWS = 2048
FAILURES = 50
DEVICE = torch.device("cuda", 0)
Batch = tuple[Tensor, Tensor]


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Dropout(0.1), nn.Linear(2048, 512)) for _ in range(4)]
    model = nn.Sequential(*layers, nn.Linear(512, 10)).to(DEVICE)
    # With hooks of the user's nothing is captured: what is tried here are plans in chunks below the plain step.
    model.register_forward_hook(lambda *_: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # There from the start, so that the first step needs what the others need.
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return model, optimizer


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(ROWS, 512, generator=generator), torch.randint(0, 10, (ROWS,), generator=generator))
        for _ in range(count)
    ]


def one_pass(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def two_passes(outputs: Tensor, batch: Batch) -> Tensor:
    return one_pass(outputs, batch) + outputs.float().std(0).sum()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def calm(loss_fn: object, plans: list[Plan]) -> list[Tensor]:
    """The weights of the run that has the plan of each of its steps from the start."""
    model, optimizer = made()
    torch.manual_seed(7)
    for batch, plan in zip(batches(FAILURES), plans, strict=True):
        with sg.Step(model, loss_fn, plan=plan, optimizer=optimizer) as step:  # type: ignore[arg-type]
            step.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("loss_fn", [one_pass, two_passes])
@pytest.mark.parametrize("way", ["cap", "ballast"])
def test_fifty_failures_leave_nothing(loss_fn: object, way: str) -> None:
    """Each step begins under the plan of the whole budget, runs out, and ends under the plan below it."""
    gc.collect()
    torch.cuda.empty_cache()
    model, optimizer = made()
    torch.manual_seed(7)
    standing: list[tuple[int, ...]] = []
    taken: list[Plan] = []
    with sg.Step(model, loss_fn, budget="4GiB", optimizer=optimizer) as step:  # type: ignore[arg-type]
        first = batches(1)[0]
        plan = step.prepare(first)
        layout = step.declared.layout(first)
        kind = step._examined.kind_of(first, layout)
        assert step.footprint is not None
        kept = Kept(plan, step.footprint, extents_of(first, layout))
        room = _room_between(step, plan)
        for batch in batches(FAILURES):
            step._plans.keep(kind, kept)
            with _short_of_memory(way, room):
                step.backward(batch)
            # Predictions are of what is allocated, the cap is on segments: the plan below may need more than the room.
            assert 1 <= len(step.recoveries) <= 2 and step.recoveries[0].taken != plan.levers
            optimizer.step()
            optimizer.zero_grad()
            assert step.plan is not None
            taken.append(step.plan)
            torch.cuda.synchronize()
            standing.append((torch.cuda.memory_allocated(), step._prefetcher.pinned_bytes))
        assert len(set(standing)) == 1, standing
        mine = weights(model)
    del model, optimizer, step
    for one, other in zip(mine, calm(loss_fn, taken), strict=True):
        assert torch.equal(one, other)


def _room_between(step: sg.Step, plan: Plan) -> int:
    """Bytes that the plan below needs and ``plan`` does not have enough of."""
    from samegrad.settle import smaller_plans

    assert step.footprint is not None
    below = next(smaller_plans(step.footprint, plan, step.allow))
    assert plan.predicted_peak_bytes is not None and below.predicted_peak_bytes is not None
    return (plan.predicted_peak_bytes + below.predicted_peak_bytes) // 2


def _free_blocks() -> list[int]:
    """Sizes of what the allocator holds and does not use, the largest first; small blocks are of another kind."""
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]  # torch has no types here
    blocks = [block for segment in segments for block in segment["blocks"]]
    return sorted((b["size"] for b in blocks if b["state"] == "inactive" and b["size"] > 2**20), reverse=True)


class _short_of_memory:
    """The allocator may hold ``room_bytes``, by a cap alone or by a cap and a ballast under it.

    What lies free in segments that cannot be given back (another test's tensors are in them) is no room.
    """

    def __init__(self, way: str, room_bytes: int) -> None:
        self._way, self._room_bytes = way, room_bytes
        self._ballast: list[Tensor] = []

    def __enter__(self) -> None:
        torch.cuda.empty_cache()
        for free_bytes in _free_blocks():
            self._ballast.append(torch.empty(free_bytes, dtype=torch.uint8, device=DEVICE))
        if self._way == "ballast":
            self._ballast.append(torch.empty(512 * 2**20, dtype=torch.uint8, device=DEVICE))
        extra = sum(ballast.nbytes for ballast in self._ballast)
        total = torch.cuda.mem_get_info(DEVICE)[1]
        torch.cuda.set_per_process_memory_fraction(fraction_of_cap(self._room_bytes + extra, total), DEVICE)

    def __exit__(self, *_: object) -> None:
        self._ballast.clear()
        counters.uncap_allocator(DEVICE)


def test_the_cache_is_emptied_when_the_attempt_is_dead() -> None:
    """After the error nothing of the attempt is reserved: the retry finds the whole room."""
    model, optimizer = made()
    batch = batches(1)[0]
    seen: list[int] = []
    released = recover.counters.release_cached

    def release(device: torch.device) -> int:
        before = torch.cuda.memory_allocated()
        given = released(device)
        seen.append(before)
        return given

    with sg.Step(model, one_pass, budget="4GiB", optimizer=optimizer) as step:
        plan = step.prepare(batch)
        # What stands from step to step is there after the first: places of rows, workspaces of libraries.
        step.backward(batch)
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        with pytest.MonkeyPatch.context() as monkeypatch, _short_of_memory("cap", _room_between(step, plan)):
            # With what fills free places of segments that cannot be given back.
            level = torch.cuda.memory_allocated()
            monkeypatch.setattr(recover.counters, "release_cached", release)
            step.backward(batch)
        assert step.recoveries
        # The prefetcher keeps its two places of a chunk from step to step.
        assert seen and max(seen) <= level + step._prefetcher.device_bytes, (seen, level)
