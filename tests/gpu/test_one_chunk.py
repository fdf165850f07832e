"""Steps whose rows cannot be split, captured on all rows: bits, statistics, draws, refusals, and what they leave."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import CannotSplit
from samegrad.records import Same

from ..contract.lever_zoo import plan_with
from ..contract.plain import assert_bitwise, gradients

pytestmark = pytest.mark.gpu

ROWS = 12
Batch = tuple[Tensor, Tensor]


def coupled(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch[1]) + 0.1 * (outputs @ outputs.t()).logsumexp(dim=1).mean()


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(0.2)
        )

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.body(x)
        return x + changed


def made(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).to("cuda", dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.randn(ROWS, 3, 10, 10, device="cuda", dtype=dtype), torch.randint(0, 5, (ROWS,), device="cuda"))
            for _ in range(4)]  # fmt: skip


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def trained(dtype: torch.dtype, taken: dict[str, Any], *, scaled: bool = False) -> tuple[list[Any], nn.Module]:
    """Losses, gradients and buffers of four steps in a row with an optimizer's turn after each."""
    model = made(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda") if scaled else None
    torch.manual_seed(3)
    found = []
    with sg.Step(model, coupled, plan=plan_with(**taken), allow=sg.Exactness.ROUNDED) as step:
        for batch in batches(dtype):
            loss = step.backward(batch, scaler=scaler)
            found.append((loss, gradients(model), {name: b.clone() for name, b in model.named_buffers()}))
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    return found, model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beside", [{}, {"recompute": {"blocks": ["1", "2"]}}], ids=["alone", "recomputed"])
def test_replayed_it_has_the_plain_steps_bits(dtype: torch.dtype, beside: dict[str, Any]) -> None:
    plain, plain_model = trained(dtype, {})
    replayed, model = trained(dtype, beside | {"graphs": {}})
    for (loss, mine, buffers), (plain_loss, theirs, plain_buffers) in zip(replayed, plain):
        assert torch.equal(loss, plain_loss)
        assert_bitwise(mine, theirs)
        assert all(torch.equal(buffer, plain_buffers[name]) for name, buffer in buffers.items())
    assert int(model[1].body[1].num_batches_tracked) == 4 == int(plain_model[1].body[1].num_batches_tracked)


@pytest.mark.parametrize("beside", [{}, {"recompute": {"blocks": ["1", "2"]}}], ids=["alone", "recomputed"])
def test_under_autocast_and_a_scaler_too(beside: dict[str, Any]) -> None:
    rounded = {"autocast": {"dtype": "float16", "full_precision": []}}
    plain, _ = trained(torch.float32, rounded, scaled=True)
    replayed, _ = trained(torch.float32, rounded | beside | {"graphs": {}}, scaled=True)
    for (loss, mine, _), (plain_loss, theirs, _) in zip(replayed, plain):
        assert torch.equal(loss, plain_loss)
        assert_bitwise(mine, theirs)


def test_its_verdict_is_same_and_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made(), batches()[0]
    with sg.Step(model, coupled, plan=plan_with(recompute={"blocks": ["1"]}, graphs={})) as step:
        verdict = sg.verify_step(step, batch)
        assert verdict.answer is Same.SAME, [check for check in verdict.checks if not check.passed]
    from samegrad.exact import one_chunk

    right = one_chunk._WholeForward._run

    def wrong(self: Any, *given: Any) -> Any:
        return right(self, *given) * 1.005

    monkeypatch.setattr(one_chunk._WholeForward, "_run", wrong)
    with sg.Step(model, coupled, plan=plan_with(recompute={"blocks": ["1"]}, graphs={})) as step:
        assert sg.verify_step(step, batch).answer is Same.DIFFERS


class Waits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().sum()) > 0 else -x


class Counts(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@pytest.mark.parametrize(("part", "why"), [(Waits, "waits for the device"), (Counts, "in Python")])
def test_what_a_replay_would_not_do_is_refused_and_nothing_changes(part: type[nn.Module], why: str) -> None:
    model, batch = made(), batches()[0]
    model.append(part())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with sg.Step(model, coupled, plan=plan_with(graphs={})) as step, pytest.raises(CannotSplit, match=why):
        step.backward(batch)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters()) and getattr(model[-1], "calls", 0) == 0


def test_planning_takes_it_where_launches_are_what_takes_the_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *[Block(8) for _ in range(24)], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(8, 5)).cuda()
    batch = batches()[0]
    with sg.Step(model, coupled, budget="1GiB") as step:
        plan = step.prepare(batch)
        assert "graphs" in plan.levers and "taken: measured" in plan.reasons["graphs"], plan.reasons
        verdict = sg.verify_step(step, batch)
        assert verdict.answer is Same.SAME, [check for check in verdict.checks if not check.passed]


def segments() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]  # torch has no types here
    return found


def test_its_pool_is_made_of_segments_that_grow_and_nothing_else_is() -> None:
    model, batch = made(), batches()[0]
    with sg.Step(model, coupled, plan=plan_with(graphs={})) as step:
        step.backward((batch[0].repeat(40, 1, 8, 8), batch[1].repeat(40)))
        mine = [segment for segment in segments() if tuple(segment["segment_pool_id"]) != (0, 0)]
        assert mine and all(segment["is_expandable"] for segment in mine)
    later = torch.empty(64 * 2**20, device="cuda")
    [own] = [s for s in segments() if s["address"] <= later.data_ptr() < s["address"] + s["total_size"]]
    assert not own["is_expandable"]


def test_under_a_plan_with_growing_segments_all_that_is_new_grows_and_the_bits_are_the_same() -> None:
    plain, _ = trained(torch.float32, {})
    grown, _ = trained(torch.float32, {"expandable_segments": {}})
    for (loss, mine, _), (plain_loss, theirs, _) in zip(grown, plain):
        assert torch.equal(loss, plain_loss)
        assert_bitwise(mine, theirs)
    torch.cuda.empty_cache()
    with sg.Step(made(), coupled, plan=plan_with(expandable_segments={})) as step:
        step.backward(batches()[0])
        wide = torch.empty(64 * 2**20, device="cuda")
        [own] = [s for s in segments() if s["address"] <= wide.data_ptr() < s["address"] + s["total_size"]]
        assert own["is_expandable"]
