"""Stems of single layers among the units of a plan: chosen where they keep much, and the same gradients."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.part_state import PartState
from samegrad.measure.target import Target
from samegrad.measure.trace_reading import CUDA_BLOCK_BYTES, peak_bytes
from samegrad.plan.options import Options
from samegrad.plan.traced import predict_traced, traced_candidates
from samegrad.records import Exactness, Footprint, Plan
from samegrad.settle import aliases_for
from samegrad.settle.followed_step import FollowedStep
from samegrad.settle.following import follow
from samegrad.settle.traced_ways import traced_ways

from .steps import Residual, cross_entropy

CARD, ROWS, WIDTH = "H200", 23, 12
# A plan's prediction may be off by this from the trace of that very plan.
WITHIN = 0.01
STEM = ["conv1", "bn1", "relu", "maxpool"]


class ResNet(nn.Module):
    """The stem of a residual network, four blocks at half its resolution, and a head.

    ``relu``: between BatchNorm and pooling a layer, one that works in place, or a function ("called").
    """

    def __init__(self, relu: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=relu == "in place") if relu != "called" else F.relu
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(*(self.block() for _ in range(4)))
        self.head = nn.Linear(WIDTH, 10)

    @staticmethod
    def block() -> nn.Module:
        layers = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()
        return Residual(*layers, nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH))

    def forward(self, pictures: Tensor) -> Tensor:
        rows = self.blocks(self.maxpool(self.relu(self.bn1(self.conv1(pictures)))))
        made: Tensor = self.head(rows.mean((2, 3)))
        return made


RELUS = ["a layer", "in place", "called"]
# What one choice may hold of the stem: a function between two layers parts them.
WHOLE_STEM = {"a layer": [STEM], "in place": [STEM], "called": [["conv1", "bn1"], "maxpool"]}


def stepped(relu: str, dtype: torch.dtype, **given: Any) -> tuple[sg.Step, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    step = sg.Step(ResNet(relu).to(dtype), cross_entropy, **given)
    return step, (torch.randn(ROWS, 3, 24, 24, dtype=dtype), torch.arange(ROWS) % 10)


@functools.cache
def followed(relu: str) -> tuple[FollowedStep, Footprint]:
    step, batch = stepped(relu, torch.float32)
    return follow(step.declared, aliases_for(step.declared), batch, Target.named(CARD))


def plan_of(blocks: list[Any]) -> Plan:
    return Plan(levers={"recompute": {"blocks": blocks}}, exactness=Exactness.SAME_BITS, batch_rows=ROWS)


def recomputed(footprint: Footprint) -> list[list[Any]]:
    """The blocks of every plan that is worth trying, fastest first."""
    plans = [{lever.name: lever.knobs() for lever in c.levers} for c in traced_candidates(footprint, Options())]
    return [levers["recompute"]["blocks"] for levers in plans if "recompute" in levers]


@pytest.mark.parametrize("relu", RELUS)
def test_a_stem_is_a_candidate_layer_by_layer(relu: str) -> None:
    step, footprint = followed(relu)
    stem = [path for block in step.blocks for path in block if path in STEM]
    assert stem == [path for path in STEM if path != "relu" or relu != "called"]
    assert (("bn1", "relu") in step.blocks) == (relu == "in place")
    # The head keeps little beside what enters it.
    assert ("head",) not in step.blocks and ("blocks.0",) in step.blocks
    chosen = recomputed(footprint)
    for run in WHOLE_STEM[relu]:
        names = [run] if isinstance(run, str) else run
        # Alone, or as the beginning of a run.
        starts = [[entry] if isinstance(entry, str) else entry for blocks in chosen for entry in blocks]
        assert any(entry[: len(names)] == names for entry in starts)


@pytest.mark.parametrize("relu", RELUS)
def test_its_plans_hold_what_they_are_predicted_to(relu: str) -> None:
    step, footprint = followed(relu)
    plans = recomputed(footprint)
    for blocks in [*plans[:: max(1, len(plans) // 4)], plans[-1], WHOLE_STEM[relu], [STEM[-1]]]:
        predicted = predict_traced(footprint, {"recompute": {"blocks": blocks}})
        assert predicted is not None
        real = peak_bytes(step.trace(plan_of(blocks)), round_to=CUDA_BLOCK_BYTES)
        assert abs(predicted.peak_bytes - real) <= WITHIN * real + 16 * CUDA_BLOCK_BYTES


@pytest.mark.parametrize("relu", RELUS)
def test_less_is_needed_than_with_blocks_alone(relu: str) -> None:
    step, footprint = followed(relu)
    blocks = tuple(block for block in step.blocks if block[0].startswith("blocks"))
    alone = dataclasses.replace(step, blocks=blocks)
    ways, _ = traced_ways(alone, alone.trace_whole({}))
    planted = dataclasses.replace(footprint, traced=ways)
    smallest, without = (
        min(candidate.peak_bytes for candidate in traced_candidates(found, Options())) for found in (footprint, planted)
    )
    assert smallest < 0.9 * without
    # And nothing that was offered before is lost.
    for one in traced_candidates(planted, Options()):
        assert any(
            c.peak_bytes <= one.peak_bytes and c.seconds <= one.seconds * 1.001
            for c in traced_candidates(footprint, Options())
        )


@pytest.mark.parametrize(
    ("relu", "blocks", "is_predicted"),
    [
        ("in place", [["bn1", "relu"]], True),
        ("in place", ["bn1"], False),
        ("in place", [["conv1", "bn1"]], False),
        ("in place", [["conv1", "maxpool"]], False),
        ("called", [["conv1", "bn1"]], True),
        # Over the code between them.
        ("called", [["conv1", "bn1", "maxpool"]], False),
    ],
)
def test_only_whole_units_side_by_side_are_predicted(relu: str, blocks: list[Any], is_predicted: bool) -> None:
    found = predict_traced(followed(relu)[1], {"recompute": {"blocks": blocks}})
    assert (found is not None) == is_predicted


ONE_ENTRY = [["conv1", "bn1", "maxpool"]]


@pytest.mark.parametrize(
    ("relu", "blocks"), [*((relu, WHOLE_STEM[relu]) for relu in RELUS), ("called", ONE_ENTRY), ("a layer", None)]
)
def test_gradients_and_statistics_are_those_of_the_plain_step(relu: str, blocks: list[Any] | None) -> None:
    smallest = recomputed(followed(relu)[1])[-1] if blocks is None else blocks
    step, batch = stepped(relu, torch.float64, plan=plan_of(smallest))
    model, twin = step.declared.network, copy.deepcopy(step.declared.network)
    cross_entropy(twin(batch[0]), batch).backward()
    with step:
        assert sg.verify_step(step, batch).same
        step.backward(batch)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters()))
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), twin.buffers()))
    assert int(model.get_buffer("bn1.num_batches_tracked")) == 1


@pytest.mark.parametrize("relu", RELUS)
def test_planted_statistics_that_are_updated_twice_are_caught(relu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartState, "standing", lambda self: contextlib.nullcontext())
    step, batch = stepped(relu, torch.float64, plan=plan_of(WHOLE_STEM[relu]))
    with step:
        verdict = sg.verify_step(step, batch)
    assert not verdict.same and "bn1" in str(verdict)
