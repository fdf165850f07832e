"""The peak predicted for a model with blocks that run again is the peak of that step, followed whole again."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import samegrad as sg
from samegrad.measure.events import Trace
from samegrad.measure.units import units_of
from samegrad.plan.chain import plain_stages, predict_chain
from samegrad.plan.heights import Stage, Way
from samegrad.plan.solve import choose_for
from samegrad.unit_tables import UnitTable

tracing = pytest.importorskip("samegrad.measure.trace", reason="steps are not yet followed here")
reading = pytest.importorskip("samegrad.measure.trace_reading")

BLOCKS = 4


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(rows, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, tokens, width)
        x = x + self.out(mixed)
        made: Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return made


class Residual(nn.Module):
    """Its output is needed by its own ReLU as well as by the next block."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)])
        self.beside = nn.Conv2d(inside, outside, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)), inplace=True)))
        return F.relu_(hidden + self.beside(x))


class Chain(nn.Module):
    """Blocks between a front and a head; ``again``: the stretches of blocks that run again in backward."""

    def __init__(self, front: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.front, self.blocks, self.head = front, nn.ModuleList(blocks), head
        self.again: dict[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        x, block = self.front(x), 0
        while block < len(self.blocks):
            last = self.again.get(block)
            stretch = nn.Sequential(*self.blocks[block : block + 1 if last is None else last + 1])
            x = stretch(x) if last is None else checkpoint(stretch, x, use_reentrant=False)
            block += len(stretch)
        made: Tensor = self.head(x)
        return made


def words() -> tuple[nn.Module, Any]:
    front, head = nn.Embedding(97, 32), nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 97))
    return Chain(front, [Attention(32) for _ in range(BLOCKS)], head), (torch.zeros(23, 17, dtype=torch.int64),) * 2


def pictures() -> tuple[nn.Module, Any]:
    widths = [(8, 8), (8, 16), (16, 32), (32, 32)]
    blocks: list[nn.Module] = [Residual(a, b, 2 if b > a else 1) for a, b in widths]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    batch = torch.zeros(11, 3, 27, 27), torch.zeros(11, dtype=torch.int64)
    return Chain(nn.Conv2d(3, 8, 3), blocks, head), batch


MODELS = {"words": words, "pictures": pictures}


def loss(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


@functools.cache
def traced(name: str, again: tuple[tuple[int, int], ...] = ()) -> Trace:
    model, batch = MODELS[name]()
    model.again = dict(again)  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trace: Trace = tracing.trace_step(sg.Step(model, loss, optimizer=optimizer).declared, batch, device="cpu")
    return trace


def followed_peak_bytes(name: str, again: dict[int, int]) -> int:
    peak: int = reading.peak_bytes(traced(name, tuple(again.items())))
    return peak


def table_of(trace: Trace) -> UnitTable:
    blocks = ["front", *(f"blocks.{k}" for k in range(BLOCKS)), "head"]
    return units_of(trace, blocks, [float(operation.moved_bytes) for operation in trace.operations])


def stages_of(table: UnitTable, again: dict[int, int]) -> list[Stage]:
    names = [unit.name for unit in table.units]
    starts = {names.index(f"blocks.{first}"): names.index(f"blocks.{last}") for first, last in again.items()}
    inside = {k for first, last in starts.items() for k in range(first, last + 1)}
    return [
        Stage(k, starts.get(k, k), Way.RECOMPUTE if k in starts else Way.KEEP)
        for k in range(len(names))
        if k in starts or k not in inside
    ]


STRETCHES: list[dict[int, int]] = [{0: 0}, {1: 2}, {0: 3}, {0: 1, 2: 3}, {0: 0, 3: 3}, {k: k for k in range(BLOCKS)}]


@pytest.mark.parametrize("name", MODELS)
def test_the_predicted_peak_is_that_of_the_step_with_blocks_run_again(name: str) -> None:
    table = table_of(traced(name))
    for again in [{}, *STRETCHES]:
        predicted = predict_chain(table.units, stages_of(table, again), resident_bytes=table.resident_bytes)
        assert predicted.peak_bytes == followed_peak_bytes(name, again), again


@pytest.mark.parametrize("name", MODELS)
def test_a_planted_prediction_by_saved_bytes_alone_is_caught(name: str) -> None:
    table = table_of(traced(name))
    plain = predict_chain(table.units, plain_stages(table.units), resident_bytes=table.resident_bytes)
    wrong = []
    for again in STRETCHES:
        saved = sum(
            sum(unit.kept_bytes for unit in table.units[stage.first : stage.last + 1])
            - table.units[stage.last].output_bytes
            for stage in stages_of(table, again)
            if stage.way is Way.RECOMPUTE
        )
        wrong.append(plain.peak_bytes - saved != followed_peak_bytes(name, again))
    assert any(wrong)


@pytest.mark.parametrize("name", MODELS)
def test_a_chosen_plan_holds_its_budget_when_it_is_followed(name: str) -> None:
    table = table_of(traced(name))
    # Only blocks can be run again here, not the front or the head.
    units = [dataclasses.replace(unit, recomputable="blocks." in unit.name) for unit in table.units]
    plain = predict_chain(units, plain_stages(units), resident_bytes=table.resident_bytes)
    names = [unit.name for unit in units]
    shift, held = names.index("blocks.0"), 0
    for percent in (90, 75, 60):
        budget_bytes = table.resident_bytes + (plain.peak_bytes - table.resident_bytes) * percent // 100
        choice = choose_for(units, budget_bytes, resident_bytes=table.resident_bytes)
        if choice is None:
            continue
        again = {s.first - shift: s.last - shift for s in choice.stages if s.way is Way.RECOMPUTE}
        assert followed_peak_bytes(name, again) == choice.peak_bytes <= budget_bytes
        held += 1
    assert held

