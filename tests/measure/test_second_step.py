"""The second step of a trace, written down without being run, is what running it writes down."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep, declare
from samegrad.measure import recorder
from samegrad.measure.events import Trace
from samegrad.measure.second_step import repeats_itself
from samegrad.measure.target import Target
from samegrad.measure.trace import trace_step
from samegrad.records import Category, Exactness, Phase, Plan
from samegrad.settle import aliases_for
from samegrad.settle.followed_step import FollowedStep
from samegrad.settle.following import follow

from ..settle.steps import CASES

LEVERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "blocks again": {"recompute": {}},
    "chunks": {"split_rows": {}},
    "both": {"split_rows": {}, "recompute": {}},
    "the head in chunks": {"chunk_loss": {"rows": 512}},
    "narrower": {"autocast": {}},
    "another layout": {"layout": {}},
    "saved on the host": {"offload_saved": {"smallest_bytes": 256}},
    "state on the host": {"optimizer_state": {}},
}
# Of each step, those that it may take.
TAKEN = [
    ("words", "blocks again"), ("words", "chunks"), ("words", "both"), ("words", "the head in chunks"),
    ("words", "narrower"), ("words", "saved on the host"), ("words", "state on the host"), ("pictures", "nothing"),
    ("pictures", "another layout"), ("pictures", "blocks again"), ("contrast", "chunks"),
    ("words with dropout", "both"),
]  # fmt: skip


@functools.cache
def followed(name: str) -> FollowedStep:
    declared = CASES[name].step("meta", torch.optim.AdamW).declared
    return follow(declared, aliases_for(declared), CASES[name].batch("meta"), Target.named("H200"))[0]


def plan_of(step: FollowedStep, named: str) -> Plan:
    levers = {name: dict(knobs) for name, knobs in LEVERS[named].items()}
    if "recompute" in levers:
        levers["recompute"]["blocks"] = [list(paths) for paths in step.blocks][:2]
    if "split_rows" in levers:
        levers["split_rows"]["rows"] = -(-step.layout.rows // 3)
    if "chunk_loss" in levers:
        assert not isinstance(step.look.head, str)
        levers["chunk_loss"]["head"] = step.look.head.path
    return Plan(levers=levers, exactness=Exactness.ROUNDED, batch_rows=step.layout.rows)


@pytest.fixture
def run_twice(monkeypatch: pytest.MonkeyPatch) -> list[Phase]:
    """The phases of a second step, once for each operation that ran."""
    seen: list[Phase] = []
    old = recorder.Recorder._note

    def note(self: Any, func: Any, *rest: Any) -> None:
        if self.step == 1:
            seen.append(self.phase)
        old(self, func, *rest)

    monkeypatch.setattr(recorder.Recorder, "_note", note)
    return seen


@pytest.mark.parametrize(("name", "levers"), TAKEN)
def test_what_is_written_is_what_running_both_steps_writes(
    name: str, levers: str, run_twice: list[Phase]
) -> None:
    step = followed(name)
    plan = plan_of(step, levers)
    assert step.repeats
    run_twice.clear()
    found, ran = step.trace(plan), set(run_twice)
    assert found == dataclasses.replace(step, repeats=False).trace(plan)
    # Between steps some things stand otherwise, and come and go.
    assert (ran == {Phase.OPTIMIZER}) is (levers not in ("state on the host", "another layout"))


def test_blocks_that_run_again_leave_no_module_behind() -> None:
    """A run ends as soon as it made what is asked for, in the middle of a module."""
    step = followed("words")
    trace = step.trace(plan_of(step, "blocks again"))
    known = {name for part in step.declared.modules for name, _ in part.named_modules()}
    assert {operation.module for operation in trace.operations} <= known


def test_gradients_that_are_written_down_alone_end_in_the_optimizers_turn() -> None:
    trace = followed("words").trace(plan_of(followed("words"), "nothing"))
    events = [event for event in trace.events if event.category is Category.GRADIENTS]
    second = {e.storage for e in events if e.change_bytes > 0 and trace.operations[e.operation].step == 1}
    ends = [trace.operations[e.operation].phase for e in events if e.change_bytes < 0 and e.storage in second]
    assert ends and set(ends) == {Phase.OPTIMIZER}


class Linear(nn.Linear):
    """Beside its product what ``beside`` does with it."""

    def __init__(self, beside: Callable[[Linear, Tensor], None]) -> None:
        super().__init__(4, 4)
        self.beside, self.calls, self.last = beside, 0, None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.calls += 1
        self.beside(self, out)
        return out


def counting(layer: Linear, out: Tensor) -> None:
    if layer.calls == 2:
        out.exp()


def keeping(layer: Linear, out: Tensor) -> None:
    layer.last = out.detach().clone()


def traced(beside: Callable[[Linear, Tensor], None], repeats: bool) -> Trace:
    model = Linear(beside)
    declared: DeclaredStep = declare(
        model, lambda out, batch: out.square().mean(), optimizer=torch.optim.AdamW(model.parameters())
    )
    return trace_step(declared, torch.ones(3, 4), device="cpu", repeats=repeats)


def test_a_step_that_does_something_else_the_second_time_is_told() -> None:
    assert repeats_itself(traced(lambda *_: None, False))
    assert not repeats_itself(traced(counting, False))


def test_a_step_that_leaves_what_the_next_one_gives_back_runs_twice(run_twice: list[Phase]) -> None:
    assert traced(keeping, True) == traced(keeping, False)
    run_twice.clear()
    traced(keeping, True)
    assert Phase.FORWARD in run_twice


def test_the_planted_twin_what_is_wrongly_said_to_repeat_is_another_trace() -> None:
    assert traced(counting, True) != traced(counting, False)
