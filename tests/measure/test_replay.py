"""Steps that repeat: what the second step left and found is what later ones find and leave."""

from __future__ import annotations

import dataclasses

import pytest

from samegrad.errors import UsageError
from samegrad.measure.allocator_rules import AllocatorRules
from samegrad.measure.events import Trace
from samegrad.measure.replay import EMPTIES_CACHE, Request, repeat_steps, replay
from samegrad.records import Category, Phase

from .traces import MIB, TraceWriter, chain

WEIGHTS = [3 * MIB + 5, MIB, 12 * MIB, 700_000]
ACTIVATIONS = [30 * MIB, 5 * MIB + 17, 41 * MIB, 2 * MIB]


def live_after(requests: tuple[Request, ...], step: int) -> list[int]:
    """Sizes that are live at the end of a step, and that every request is sensible."""
    live: dict[int, int] = {}
    for storage, size, _, of_step, *_ in requests:
        if of_step > step:
            break
        if size == EMPTIES_CACHE:
            continue
        if size:
            assert storage not in live
            live[storage] = size
        else:
            del live[storage]
    return sorted(live.values())


@pytest.mark.parametrize("keeps_gradients", [False, True])
def test_every_step_leaves_what_the_second_left(keeps_gradients: bool) -> None:
    trace = chain(WEIGHTS, ACTIVATIONS, keeps_gradients=keeps_gradients)
    requests = repeat_steps(trace, 5)
    ends = [live_after(requests, step) for step in range(5)]
    assert ends[1:] == [ends[1]] * 4
    held = [*WEIGHTS, *WEIGHTS, *WEIGHTS, *(WEIGHTS if keeps_gradients else [])]
    assert ends[1] == sorted(held)
    assert [sum(r.step == k for r in requests) for k in (2, 3, 4)] == [sum(r.step == 1 for r in requests)] * 3


def test_the_first_two_steps_are_the_trace_itself() -> None:
    trace = chain(WEIGHTS, ACTIVATIONS, keeps_gradients=True)
    requests = repeat_steps(trace)
    own = [(event.storage, max(event.change_bytes, 0)) for event in trace.events]
    assert [(r.storage, r.size_bytes) for r in requests if r.step < 2 and r.size_bytes != EMPTIES_CACHE] == own


def test_the_cache_is_given_back_once_before_the_turn_that_makes_the_optimizers_state() -> None:
    trace = chain(WEIGHTS, ACTIVATIONS)
    requests = repeat_steps(trace)
    [at] = [index for index, request in enumerate(requests) if request.size_bytes == EMPTIES_CACHE]
    assert requests[at].step == 0
    phases = [trace.operations[event.operation].phase if event.operation >= 0 else None for event in trace.events]
    assert Phase.OPTIMIZER not in phases[:at] and phases[at] is Phase.OPTIMIZER
    # State that was there before the first step is room that nobody looks for.
    there = tuple(
        event._replace(operation=-1) if event.category is Category.OPTIMIZER_STATE else event for event in trace.events
    )
    assert all(r.size_bytes != EMPTIES_CACHE for r in repeat_steps(dataclasses.replace(trace, events=there)))
    # New state lies in segments of its own, and the activations of later steps find theirs whole.
    without = [request for request in requests if request.size_bytes != EMPTIES_CACHE]
    assert replay(requests).segments_taken > replay(without).segments_taken


def test_what_a_step_keeps_without_having_found_the_like_is_kept_once() -> None:
    writer = TraceWriter()
    for step in range(2):
        writer.operation(step, Phase.FORWARD)
        if step:
            writer.take(2 * MIB, Category.BUFFERS)
        writer.give_back(writer.take(MIB))
    requests = repeat_steps(writer.trace(), 6)
    assert live_after(requests, 5) == [2 * MIB]


def test_what_a_step_ends_for_good_is_ended_once() -> None:
    writer = TraceWriter()
    old = writer.take(7 * MIB, Category.BUFFERS)
    for step in range(2):
        writer.operation(step, Phase.FORWARD)
        if step:
            writer.give_back(old)
        writer.give_back(writer.take(MIB))
    assert live_after(repeat_steps(writer.trace(), 4), 3) == []


def test_less_than_the_traces_two_steps_is_refused() -> None:
    with pytest.raises(UsageError, match="1 steps"):
        repeat_steps(chain(WEIGHTS, ACTIVATIONS), 1)


def test_peaks_are_those_of_the_events() -> None:
    trace = chain(WEIGHTS, ACTIVATIONS)
    done = replay(repeat_steps(trace))
    live = peak = 0
    for event in trace.events:
        live += event.change_bytes
        peak = max(peak, live)
    assert done.peak_requested_bytes == peak
    assert peak <= done.peak_allocated_bytes <= done.peak_reserved_bytes
    assert (done.runs, done.steady, done.retries) == (True, True, 0)


def test_out_of_memory_is_told_by_its_operation() -> None:
    requests = repeat_steps(chain(WEIGHTS, ACTIVATIONS))
    done = replay(requests, cap_bytes=80 * MIB)
    failed = done.out_of_memory_at
    assert failed is not None
    assert failed.size_bytes > 0
    assert not done.runs
    assert done.peak_reserved_bytes <= 80 * MIB
    # What it asked for with what was live does not fit whole segments under the cap.
    assert replay(requests[: requests.index(failed)], cap_bytes=80 * MIB).runs


def test_retries_are_counted_by_step() -> None:
    requests = repeat_steps(chain(WEIGHTS, ACTIVATIONS))
    free = replay(requests)
    done = replay(requests, cap_bytes=free.peak_reserved_bytes - 2 * MIB)
    assert len(done.retries_by_step) == 4
    assert done.retries == sum(done.retries_by_step) > 0


def test_a_trace_without_a_second_step_is_as_it_is() -> None:
    trace = chain(WEIGHTS, ACTIVATIONS)
    first = tuple(o for o in trace.operations if o.step == 0)
    events = tuple(e for e in trace.events if e.operation < len(first))
    short: Trace = dataclasses.replace(trace, operations=first, events=events)
    assert [r.storage for r in repeat_steps(short) if r.size_bytes != EMPTIES_CACHE] == [e.storage for e in events]
    assert replay(repeat_steps(short), AllocatorRules(expandable_segments=True)).runs


def _after_pieces(pieces: tuple[int, ...], activation: int) -> tuple[Request, ...]:
    """Steps with weights of 52 MiB, laid out as one from ``pieces``, and a head of 4 MiB that is moved after them."""
    writer = TraceWriter()
    flat, _ = writer.take(52 * MIB, Category.PARAMETERS), writer.take(4 * MIB, Category.PARAMETERS)
    for step in range(2):
        writer.operation(step, Phase.FORWARD)
        writer.give_back(writer.take(activation))
    return repeat_steps(dataclasses.replace(writer.trace(), pieces={flat: pieces} if pieces else {}))


def test_weights_that_came_in_pieces_leave_gaps_where_the_next_ones_stand() -> None:
    pieces = (16 * MIB, 16 * MIB, 16 * MIB, 4 * MIB)
    whole, laid_out = (replay(_after_pieces(came, activation=12 * MIB)) for came in ((), pieces))
    # The head has a segment of its own, or one that a piece had; beside it there is room in both.
    assert whole.peak_reserved_bytes == (52 + 20) * MIB
    assert laid_out.peak_reserved_bytes == (52 + 16) * MIB
    assert whole.peak_allocated_bytes == laid_out.peak_allocated_bytes


def test_what_stood_before_the_steps_only_is_under_no_cap() -> None:
    # 104 MiB stand while the pieces do.
    requests = _after_pieces((26 * MIB, 26 * MIB), activation=24 * MIB)
    found = replay(requests, cap_bytes=102 * MIB)
    assert found.steady
    assert found.peak_reserved_bytes == 102 * MIB
    assert not replay(requests, cap_bytes=100 * MIB).runs


def test_streams_and_pools_of_events_have_memory_of_their_own() -> None:
    trace = chain(WEIGHTS, ACTIVATIONS)
    apart = tuple(
        event._replace(stream=int(event.category is Category.TEMPORARY), pool=int(event.category is Category.GRADIENTS))
        for event in trace.events
    )
    together, divided = (
        replay(repeat_steps(dataclasses.replace(trace, events=events))) for events in (trace.events, apart)
    )
    assert divided.peak_requested_bytes == together.peak_requested_bytes
    assert divided.peak_reserved_bytes > together.peak_reserved_bytes
