"""Gradients that are added to sums: gone once they are added, but for shared ones and those made in forward."""

from __future__ import annotations

from samegrad.measure.events import MemoryEvent, Operation, Trace
from samegrad.measure.summed_gradients import with_summed_gradients
from samegrad.measure.trace_reading import loss_peak_bytes, peak_bytes
from samegrad.records import Category, Phase


def operation(phase: Phase, module: str) -> Operation:
    return Operation("aten.mm.default", module, phase, 1, 0, 0, "float32", 1)


OPERATIONS = (
    operation(Phase.FORWARD, "first"),
    operation(Phase.FORWARD, "last"),
    operation(Phase.FORWARD, ""),
    operation(Phase.BACKWARD, ""),
    operation(Phase.BACKWARD, "last"),
    operation(Phase.BACKWARD, "first"),
    operation(Phase.OPTIMIZER, ""),
)


def trace(*events: MemoryEvent) -> Trace:
    return Trace(OPERATIONS, events, "cuda", 8, (8,))


def taken(storage: int, size_bytes: int, at: int, category: Category = Category.GRADIENTS) -> MemoryEvent:
    return MemoryEvent(storage, size_bytes, at, category)


def given(event: MemoryEvent, at: int) -> MemoryEvent:
    return event._replace(change_bytes=-event.change_bytes, operation=at)


def test_a_gradient_goes_after_the_operation_that_made_it() -> None:
    late, early = taken(1, 100, 4), taken(2, 40, 5)
    plain = trace(late, early, given(late, 6), given(early, 6))
    found = with_summed_gradients(plain)
    assert found.events == (late, given(late, 4), early, given(early, 5))
    assert peak_bytes(plain) == 140 and peak_bytes(found) == 100


def test_shared_gradients_wait_and_what_is_no_gradient_stays() -> None:
    shared, kept = taken(1, 100, 4), taken(2, 30, 0, Category.ACTIVATIONS)
    plain = trace(kept, shared, given(shared, 6), given(kept, 6))
    assert with_summed_gradients(plain, lasting_bytes={100}) == plain
    assert with_summed_gradients(plain) != plain


def test_a_gradient_made_in_forward_stands_until_backward_begins() -> None:
    made = taken(1, 100, 1)
    assert with_summed_gradients(trace(made)).events == (made, given(made, 3))


def test_the_losss_peak_is_what_lies_between_the_modules_forwards_and_backwards() -> None:
    sizes = {1: 70, 2: 9, 3: 5}
    before, loss, cotangent = (taken(at, size, at, Category.ACTIVATIONS) for at, size in sizes.items())
    late = taken(4, 1000, 4)
    assert loss_peak_bytes(trace(before, loss, cotangent, given(loss, 3), late)) == 14
    # Planted: a loss that also pairs rows shows.
    assert loss_peak_bytes(trace(before, loss._replace(change_bytes=64), cotangent, late)) == 69
