"""A step followed under a lever that leaves its chunks as they are holds, to the byte, what the real one holds."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from samegrad.declared import DeclaredStep
from samegrad.execute.apply import applied, standing
from samegrad.measure.events import MemoryEvent, Operation, Trace
from samegrad.measure.target import Target
from samegrad.measure.timing import Limit
from samegrad.measure.trace import plainly, trace_step
from samegrad.measure.trace_reading import peak_by_phase, peak_bytes
from samegrad.records import Category, Exactness, Phase, Plan

from ..contract.plain import left_alone
from .traced import ROWS, Pictures, Words, counted_peaks, declared_on, pictures, words

# BatchNorm that only reads: what the CPU keeps of a narrow batch's statistics, torch's fake tensors have otherwise.
STEPS = {"pictures": (lambda: Pictures().eval(), pictures), "words": (Words, words)}
# Levers, and a knob under which a small step moves something.
LEVERS: dict[str, dict[str, Any]] = {
    "autocast": {},
    "layout": {},
    "offload_saved": {"smallest_bytes": 256},
    "optimizer_state": {},
}
CASES = [(name, lever) for name in STEPS for lever in LEVERS if (name, lever) != ("words", "layout")]
RUNNING = (Phase.FORWARD, Phase.BACKWARD)


def plan_of(*levers: str) -> Plan:
    return Plan(levers={name: LEVERS[name] for name in levers}, exactness=Exactness.ROUNDED, batch_rows=ROWS)


def step_of(name: str, optimizer: str = "AdamW") -> tuple[DeclaredStep, Any]:
    torch.manual_seed(0)
    model, batch_of = STEPS[name]
    return declared_on(model(), optimizer=optimizer), batch_of(ROWS)


def traced(declared: DeclaredStep, batch: Any, plan: Plan, device: str = "cpu") -> Any:
    with applied(plan, declared, ROWS) as execution:
        return trace_step(execution.declared, batch, device=device, stands=functools.partial(standing, plan))


@pytest.mark.parametrize(("name", "lever"), CASES)
def test_what_a_step_under_a_lever_holds_to_the_byte(name: str, lever: str) -> None:
    declared, batch = step_of(name)
    plan = plan_of(lever)
    trace = traced(declared, batch, plan)
    with standing(plan, declared), applied(plan, declared, ROWS) as execution:
        counted = counted_peaks(execution.declared, batch, plainly())
    assert [peak_bytes(trace, step=step) for step in range(2)] == counted
    # The planted twin: the trace of another step is told apart from it. (On the CPU, state on the host saves nothing.)
    assert lever == "optimizer_state" or peak_bytes(traced(*step_of(name), plan_of())) != counted[1]


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("name", STEPS)
def test_state_on_the_host_is_missing_while_the_step_runs_and_back_in_the_optimizers_turn(
    name: str, optimizer: str
) -> None:
    declared, batch = step_of(name, optimizer)
    plain = peak_by_phase(traced(declared, batch, plan_of(), "cuda"))
    trace = traced(declared, batch, plan_of("optimizer_state"), "cuda")
    held = peak_by_phase(trace)
    entries = {"AdamW": 2, "SGD": 1}[optimizer]
    state_bytes = entries * sum(p.nbytes for p in declared.model.parameters() if p.numel() > 1)
    assert {phase: plain[phase] - held[phase] for phase in RUNNING} == dict.fromkeys(RUNNING, state_bytes)
    # Without temporaries the plain turn's first event is a gradient's end.
    assert 0 <= held[Phase.OPTIMIZER] - plain[Phase.OPTIMIZER] <= max(p.nbytes for p in declared.model.parameters())
    # The first step of the two makes it; the second brings it back, and both send it away.
    moved = {step: [o.bus_bytes for o in trace.operations if o.step == step and o.bus_bytes] for step in range(2)}
    assert sum(moved[0]) == -state_bytes and sum(moved[1]) == 0 and sum(map(abs, moved[1])) == 2 * state_bytes


def test_saved_tensors_leave_the_card_and_come_back_over_its_link() -> None:
    torch.manual_seed(0)
    declared, batch = step_of("pictures", "no optimizer")
    plain, trace = (traced(declared, batch, plan, "cuda") for plan in (plan_of(), plan_of("offload_saved")))
    assert peak_bytes(trace) < peak_bytes(plain)
    out = sum(-o.bus_bytes for o in trace.operations if o.step == 1 and o.bus_bytes < 0)
    back = sum(o.bus_bytes for o in trace.operations if o.step == 1 and o.bus_bytes > 0)
    # What nothing holds when it is asked for again comes again.
    assert 0 < out <= back
    roofline = Target.named("H200").roofline
    bound = {moment.limit for moment in roofline.follow(trace.operations) if moment.operation.bus_bytes}
    assert bound <= {Limit.BUS, Limit.LAUNCH}


def test_copies_to_the_host_go_on_beside_the_forward_and_the_backward_waits_for_them() -> None:
    roofline = Target.named("H200").roofline

    def operation(phase: Phase, **changes: Any) -> Operation:
        moved = Operation("aten.relu.default", "", phase, 1, 0, 1, "float32", 1)
        return moved._replace(**changes)

    copy = operation(Phase.FORWARD, name="aten.copy_.default", bus_bytes=-(10**9))
    copying = roofline.device_seconds(copy)[0]
    assert copying > 0.01
    short, backward = operation(Phase.FORWARD), operation(Phase.BACKWARD)

    def seconds(*operations: Operation) -> float:
        return sum(moment.elapsed_seconds for moment in roofline.follow(operations))

    launching = 100e-6
    assert seconds(copy, short) < launching
    assert seconds(copy, copy, short) < launching
    # Two may be on their way; a third waits for the first, and the backward for all.
    assert seconds(copy, copy, copy, short) == pytest.approx(copying, abs=launching)
    assert seconds(copy, copy, copy, short, backward) == pytest.approx(3 * copying, abs=launching)
    # In the optimizer's turn they are on the stream that computes.
    assert seconds(operation(Phase.OPTIMIZER, bus_bytes=-(10**9))) == pytest.approx(copying, abs=launching)


@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_following_under_a_lever_changes_nothing_of_the_users(lever: str, device: str) -> None:
    declared, batch = step_of("pictures")
    declared.loss_fn(declared.model(batch[0]), batch).backward()
    assert declared.optimizer is not None
    declared.optimizer.step()
    hooks = dict(declared.optimizer._optimizer_step_pre_hooks)
    addresses = [p.data_ptr() for p in declared.model.parameters()]
    strides = [p.stride() for p in declared.model.parameters()]
    with left_alone(declared.model, optimizer=declared.optimizer):
        traced(declared, batch, plan_of(lever), device)
    assert [p.data_ptr() for p in declared.model.parameters()] == addresses
    assert [p.stride() for p in declared.model.parameters()] == strides
    assert declared.optimizer._optimizer_step_pre_hooks == hooks


def test_a_trace_can_be_repeated_under_offload_and_leaves_no_memory_behind() -> None:
    declared, batch = step_of("words")
    first, again = (traced(declared, batch, plan_of("offload_saved"), "cuda") for _ in range(2))
    assert first.events == again.events
    # Between steps stands what stood before the first: parameters, the optimizer's state, the batch.
    lasting = {e.category for e in lasting_events(first)}
    assert Category.ACTIVATIONS not in lasting and Category.TEMPORARY not in lasting


def lasting_events(trace: Trace) -> list[MemoryEvent]:
    """What was taken and not given back."""
    living: dict[int, MemoryEvent] = {}
    for event in trace.events:
        if event.change_bytes > 0:
            living[event.storage] = event
        else:
            living.pop(event.storage)
    return list(living.values())
