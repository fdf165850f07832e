"""A step followed under a lever that leaves its chunks as they are holds, to the byte, what the real one holds."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep
from samegrad.execute.apply import applied, standing
from samegrad.levers import _host_copies
from samegrad.measure.copies_beside import CopiesBeside
from samegrad.measure.events import MemoryEvent, Operation, Trace
from samegrad.measure.target import Target
from samegrad.measure.timing import Limit
from samegrad.measure.trace import plainly, trace_step
from samegrad.measure.trace_reading import peak_by_phase, peak_bytes
from samegrad.records import Category, Exactness, Phase, Plan

from ..contract.plain import left_alone
from .traced import ROWS, Pictures, Words, counted_peaks, declared_on, pictures, words


def of_six_channels() -> nn.Module:
    """Of so many that they are copied to have them last.

    BatchNorm only reads: what the CPU keeps of a narrow batch's statistics, torch's fake tensors have otherwise.
    """
    model = Pictures().eval()
    model.stem = nn.Conv2d(6, 7, 3, bias=False)
    return model


def with_six_channels(rows: int) -> tuple[Tensor, Tensor]:
    colours, targets = pictures(rows)
    return torch.cat([colours, colours], dim=1), targets


STEPS = {"pictures": (of_six_channels, with_six_channels), "words": (Words, words)}
# Levers, and a knob under which a small step moves something.
LEVERS: dict[str, dict[str, Any]] = {
    "autocast": {},
    "layout": {},
    "offload_saved": {"smallest_bytes": 256},
    "optimizer_state": {},
}
# State does not leave a model's device where that is the host, and there are no pictures among words.
CASES = [
    (name, lever)
    for name in STEPS
    for lever in LEVERS
    if lever != "optimizer_state" and (name, lever) != ("words", "layout")
]
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
    # The planted twin: the trace of another step is told apart from it.
    assert peak_bytes(traced(*step_of(name), plan_of())) != counted[1]


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
    sizes = [p.nbytes for p in declared.model.parameters() if p.numel() > 1]
    state_bytes = entries * sum(sizes)
    assert {phase: plain[phase] - held[phase] for phase in RUNNING} == dict.fromkeys(RUNNING, state_bytes)
    # Without temporaries the plain turn's first event is a gradient's end.
    assert 0 <= held[Phase.OPTIMIZER] - plain[Phase.OPTIMIZER] <= max(p.nbytes for p in declared.model.parameters())
    # The first step of the two makes it; the second brings it back, and both send it away.
    moved = {step: [o.bus_bytes for o in trace.operations if o.step == step and o.bus_bytes] for step in range(2)}
    assert sum(moved[0]) == -state_bytes and sum(moved[1]) == 0
    # Once away it travels as it lies, with less than an entry of 64 bytes between two tensors.
    assert 0 <= sum(map(abs, moved[1])) - 2 * state_bytes < 2 * 64 * entries * len(sizes)
    # In few pieces: one of each dtype here.
    assert len(moved[1]) == 2


def deep_step() -> tuple[DeclaredStep, Any]:
    """Many layers of one width and few weights, so that most of what it holds are storages of ``HIDDEN_BYTES``."""
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(6, 6), nn.Tanh())]
    batch = torch.randn(ROWS, 40, 6), torch.randint(0, 5, (ROWS,))
    return declared_on(nn.Sequential(*layers, nn.Flatten(), nn.Linear(240, 5)), optimizer="no optimizer"), batch


HIDDEN_BYTES = ROWS * 40 * 6 * 4
GRADIENT_BYTES = 12 * (6 + 1) * 6 * 4


def test_saved_tensors_leave_the_card_and_come_back_over_its_link() -> None:
    declared, batch = deep_step()
    plain, trace = (traced(declared, batch, plan, "cuda") for plan in (plan_of(), plan_of("offload_saved")))
    out = [o.bus_bytes for o in trace.operations if o.step == 1 and o.bus_bytes < 0]
    back = [o.bus_bytes for o in trace.operations if o.step == 1 and o.bus_bytes > 0]
    # Each layer's input is the tanh's output before it: saved by both, it travels once.
    assert out == [-HIDDEN_BYTES] * 12 and back == [HIDDEN_BYTES] * 12
    # Of twelve, three are on the device: one that is used, and two ahead. (At the peaks gradients are not the same.)
    saved_bytes = peak_by_phase(plain)[Phase.BACKWARD] - peak_by_phase(trace)[Phase.BACKWARD]
    assert saved_bytes == pytest.approx((12 - 3) * HIDDEN_BYTES, abs=GRADIENT_BYTES)
    roofline = Target.named("H200").roofline
    bound = {moment.limit for moment in roofline.follow(trace.operations) if moment.operation.bus_bytes}
    assert bound <= {Limit.BUS, Limit.LAUNCH}


def test_what_comes_ahead_is_in_the_traced_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    declared, batch = deep_step()
    trace = traced(declared, batch, plan_of("offload_saved"), "cuda")
    monkeypatch.setattr(_host_copies, "MOST_AHEAD", 0)
    on_demand = traced(declared, batch, plan_of("offload_saved"), "cuda")
    ahead_bytes = peak_by_phase(trace)[Phase.BACKWARD] - peak_by_phase(on_demand)[Phase.BACKWARD]
    assert ahead_bytes == pytest.approx(2 * HIDDEN_BYTES, abs=GRADIENT_BYTES)


def operation(phase: Phase, **changes: Any) -> Operation:
    moved = Operation("aten.relu.default", "", phase, 1, 0, 1, "float32", 1)
    return moved._replace(**changes)


def copied(phase: Phase, bus_bytes: int) -> Operation:
    return operation(phase, name="aten.copy_.default", bus_bytes=bus_bytes)


ROOFLINE = Target.named("H200").roofline
LAUNCHING = 200e-6


def seconds(*operations: Operation) -> float:
    return sum(moment.elapsed_seconds for moment in ROOFLINE.follow(operations))


def test_copies_to_the_host_go_on_beside_the_forward_and_the_backward_waits_for_them() -> None:
    copy = copied(Phase.FORWARD, -(10**9))
    copying = ROOFLINE.device_seconds(copy)[0]
    assert copying > 0.01
    short, backward = operation(Phase.FORWARD), operation(Phase.BACKWARD)
    assert seconds(copy, short) < LAUNCHING
    assert seconds(copy, copy, short) < LAUNCHING
    # Two may be on their way; a third waits for the first, and the backward for all.
    assert seconds(copy, copy, copy, short) == pytest.approx(copying, abs=LAUNCHING)
    assert seconds(copy, copy, copy, short, backward) == pytest.approx(3 * copying, abs=LAUNCHING)
    # In the optimizer's turn they are on the stream that computes.
    assert seconds(operation(Phase.OPTIMIZER, bus_bytes=-(10**9))) == pytest.approx(copying, abs=LAUNCHING)


@pytest.mark.parametrize("share", [0.2, 0.9, 1.1, 3.0])
def test_forward_and_backward_take_the_longer_of_what_they_compute_and_what_travels(share: float) -> None:
    """``share``: of a copy's seconds, what is computed for each storage that is saved, in either direction."""
    copying = ROOFLINE.device_seconds(copied(Phase.FORWARD, -(10**9)))[0]
    moved_bytes = round(share * copying * 1e12)
    rate = moved_bytes / ROOFLINE.device_seconds(operation(Phase.FORWARD, moved_bytes=moved_bytes))[0]

    def computed(phase: Phase) -> Operation:
        return operation(phase, moved_bytes=round(share * copying * rate))

    count = 20
    forward = [computed(Phase.FORWARD), copied(Phase.FORWARD, -(10**9))] * count
    back, compute = copied(Phase.BACKWARD, 10**9), computed(Phase.BACKWARD)
    # As they are issued: the first, two ahead, and one more each time that one is used.
    backward = [back] * 3 + [compute, back] * (count - 3) + [compute] * 3
    longer = count * copying * max(1.0, share)
    # At either end a copy has nothing to hide behind.
    assert seconds(*forward, computed(Phase.BACKWARD)) == pytest.approx(longer, abs=2.1 * copying * max(1.0, share))
    both = seconds(*forward, *backward, operation(Phase.LOSS))
    assert 2 * longer <= both <= 2 * longer + 4 * copying * max(1.0, share)


def test_planted_copies_on_the_stream_that_computes_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CopiesBeside, "takes", staticmethod(lambda one: one.bus_bytes and one.phase is Phase.FORWARD))
    with pytest.raises(AssertionError):
        test_forward_and_backward_take_the_longer_of_what_they_compute_and_what_travels(1.1)


def test_what_comes_back_in_the_optimizers_turn_or_is_awaited_at_once_hides_behind_nothing() -> None:
    back, compute = copied(Phase.BACKWARD, 10**9), operation(Phase.BACKWARD)
    copying = ROOFLINE.device_seconds(back)[0]
    assert seconds(back, compute) == pytest.approx(copying, abs=LAUNCHING)
    in_turn = [copied(Phase.OPTIMIZER, 10**9), operation(Phase.OPTIMIZER)] * 2
    assert seconds(*in_turn) == pytest.approx(2 * copying, abs=LAUNCHING)


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
