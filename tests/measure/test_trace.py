"""A trace counts what the real step takes, to the byte on the CPU, where both can be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep, declare
from samegrad.errors import CannotTrace
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.mapped import MappedStep
from samegrad.exact.split import sliced_chunks
from samegrad.exact.step_draws import StepDraws
from samegrad.execute.apply import applied, chunked_step
from samegrad.execute.ways import find_ways
from samegrad.measure import trace_reading
from samegrad.measure.recorder import Recorder
from samegrad.measure.trace import LossScale, Run, in_chunks, plainly, trace_step
from samegrad.measure.units import units_of
from samegrad.records import Category, Exactness, Phase, Plan

from .traced import (
    OPTIMIZERS,
    ROWS,
    SIZES,
    Pictures,
    Words,
    blocks,
    counted_peaks,
    cross_entropy,
    declared_on,
    pictures,
    split,
    traced_peaks,
    words,
)

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "BatchNorm and dropout": (Pictures, pictures),
    "BatchNorm that only reads": (lambda: Pictures().eval(), pictures),
    "tied weights": (Words, words),
    "tied weights and dropout": (lambda: Words(0.2), words),
    "bfloat16": (lambda: Words().bfloat16(), words),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def spread(outputs: Tensor, batch: Any) -> Tensor:
    """Couples all rows: two passes."""
    return outputs.std(0).sum() + cross_entropy(outputs, batch)


def ignoring(outputs: Tensor, batch: Any) -> Tensor:
    """Divided by a count that is known when all chunks have run."""
    return nn.functional.cross_entropy(outputs.flatten(0, -2), batch[1].flatten(), ignore_index=7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_the_plain_step_to_the_byte(name: str, optimizer: str) -> None:
    model, batch_of = MODELS[name]
    declared, batch = declared_on(model(), optimizer=optimizer), batch_of(ROWS)
    # Traced first: then the real first step is the one that makes the optimizer's state.
    assert traced_peaks(declared, batch, plainly()) == counted_peaks(declared, batch, plainly())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "BatchNorm and dropout"])
def test_one_pass_in_chunks_to_the_byte(name: str, optimizer: str) -> None:
    model, batch_of = MODELS[name]
    declared, batch = declared_on(model(), optimizer=optimizer), batch_of(ROWS)
    step = split(declared, batch)
    assert step.examination.passes == 1
    traced = traced_peaks(declared, batch, in_chunks(step, SIZES))
    assert traced == counted_peaks(declared, batch, in_chunks(step, SIZES))


@pytest.mark.parametrize("kept", [0, 2])
def test_two_passes_to_the_byte(kept: int) -> None:
    declared, batch = declared_on(Words(0.2), spread), words(ROWS)
    step = split(declared, batch, kept)
    assert step.examination.passes == 2
    traced = traced_peaks(declared, batch, in_chunks(step, SIZES))
    assert traced == counted_peaks(declared, batch, in_chunks(step, SIZES))


@pytest.mark.parametrize(
    "options",
    [{"loss_fn": ignoring}, {"normalise": lambda batch: torch.ones_like(batch[1]).sum()}],
    ids=["loss_fn", "normalise"],
)
def test_counts_that_cannot_be_read_do_not_stop_a_trace(options: dict[str, Any]) -> None:
    declared, batch = declared_on(Words(), **options), words(ROWS)
    step = split(declared, batch)
    traced = traced_peaks(declared, batch, in_chunks(step, SIZES))
    assert traced == counted_peaks(declared, batch, in_chunks(step, SIZES))


@pytest.mark.parametrize("number", [0, 1], ids=["recomputed", "lockstep"])
def test_parts_of_the_model_in_chunks_to_the_byte(number: int) -> None:
    declared, batch = declared_on(blocks()), pictures(ROWS)
    aliases = ParameterAliases({"": declared.network})
    ways = find_ways(declared, aliases, batch, declared.layout(batch))

    def run() -> Run:
        return in_chunks(MappedStep(declared, aliases, ways.mapped_examination(), ways.mapped[number].scheme()), SIZES)

    assert traced_peaks(declared, batch, run()) == counted_peaks(declared, batch, run())
    assert traced_peaks(declared, batch, run(), device="cuda")


def test_the_plain_step_under_keyed_draws_to_the_byte() -> None:
    declared, batch = declared_on(Words(0.2)), words(ROWS)
    sites = split(declared, batch).examination.sites
    assert sites is not None
    traced = traced_peaks(declared, batch, plainly(StepDraws(sites)))
    assert traced == counted_peaks(declared, batch, plainly(StepDraws(sites)))


def test_state_and_gradients_that_exist_are_there_from_the_start() -> None:
    declared, batch = declared_on(Words()), words(ROWS)
    counted_peaks(declared, batch, plainly())
    plainly()(declared, batch)
    trace = trace_step(declared, batch, device="cpu")
    before = {event.category for event in trace.events if event.operation == -1}
    assert {Category.OPTIMIZER_STATE, Category.GRADIENTS} <= before
    traced = [trace_reading.peak_bytes(trace, step=step) for step in (0, 1)]
    assert traced == counted_peaks(declared, batch, plainly())


def test_a_plan_in_force_is_followed_as_it_runs() -> None:
    declared, batch = declared_on(Words(0.2)), words(ROWS)
    ways = find_ways(declared, ParameterAliases({"": declared.network}), batch, declared.layout(batch))
    plan = Plan(levers={"split_rows": {"rows": 4}}, exactness=Exactness.SAME_SUM, batch_rows=ROWS)

    def run(declared: DeclaredStep, batch: Any) -> object:
        with applied(plan, declared, ROWS) as execution:
            assert execution.sizes is not None
            aliases = ParameterAliases({"": declared.network})
            step = chunked_step(execution, aliases, ways, sliced_chunks)
            return step.backward(batch, declared.layout(batch), execution.sizes)

    assert traced_peaks(declared, batch, run) == counted_peaks(declared, batch, run)
    assert ParameterAliases({"": declared.network}).parameters == list(declared.network.parameters())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_loss_scale_is_followed_without_the_users_scaler(chunked: bool) -> None:
    declared, batch = declared_on(Words()), words(ROWS)
    step = split(declared, batch)
    run = in_chunks(step, SIZES, LossScale()) if chunked else plainly(scaler=LossScale())
    names = [operation.name for operation in trace_step(declared, batch, run=run).operations]
    without = trace_step(declared, batch, run=in_chunks(step, SIZES) if chunked else plainly()).operations
    assert names.count("aten.mul.Tensor") == sum(o.name == "aten.mul.Tensor" for o in without) + 2 * (2 - chunked)


def test_a_planted_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    declared, batch = declared_on(Words()), words(ROWS)
    kept: list[Any] = []
    note = Recorder._note

    def keeping(self: Recorder, func: Any, *rest: Any) -> None:
        kept.append(rest[-1])
        note(self, func, *rest)

    monkeypatch.setattr(Recorder, "_note", keeping)
    assert traced_peaks(declared, batch, plainly()) != counted_peaks(declared, batch, plainly())


def test_a_tensor_that_the_step_makes_on_the_host_is_named_by_its_line() -> None:
    declared = declared_on(Words(), lambda outputs, _: cross_entropy(outputs, (0, torch.zeros(ROWS * 11).long())))
    with pytest.raises(CannotTrace, match=r"(?s)traced\.py:\d+\) takes a tensor of the host.*device=x\.device"):
        trace_step(declared, words(ROWS))
    trace_step(declared, words(ROWS), device="cpu")


class HandedStep(nn.Module):
    """A step without weights: the network is handed to it."""

    def forward(self, network: nn.Module, x: Tensor) -> Tensor:
        return x + network(x)


class Integration(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.steps = nn.ModuleList(HandedStep() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(self.network, x)
        return x


def test_a_network_that_is_handed_on_is_written_down_behind_the_module_it_runs_for() -> None:
    declared = declare(Integration(), lambda outputs, batch: outputs.std(0).sum())
    trace = trace_step(declared, torch.randn(5, 6))
    names = [f"steps.{k}" for k in range(3)]
    linear = {f"{name}.network.{k}" for name in names for k in (0, 2)}
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        assert linear <= {operation.module for operation in trace.operations if operation.phase is phase}
    assert not any(operation.module.startswith("network") for operation in trace.operations)
    units = units_of(trace, names, [1.0] * len(trace.operations)).units
    assert [(unit.name, unit.recomputable) for unit in units if unit.name] == [(name, True) for name in names]
