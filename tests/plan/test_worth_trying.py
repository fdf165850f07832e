"""Which plans of a ladder are worth trying: an allocator may need more for the one whose tensors need less."""

from __future__ import annotations

from typing import NamedTuple

from samegrad.plan.traced import worth_trying
from samegrad.records import Counting


class One(NamedTuple):
    levers: str
    peak_bytes: int


def tried(counting: Counting, *plans: One) -> list[One]:
    found = worth_trying(plans, counting, kind=lambda one: frozenset(one.levers), peak_bytes=lambda one: one.peak_bytes)
    return list(found)


FASTEST_FIRST = (One("a", 100), One("a", 100), One("b", 110), One("b", 120), One("a", 90), One("c", 116), One("b", 80))


def test_counted_bytes_are_what_they_are() -> None:
    assert tried(Counting.TENSOR_BYTES, *FASTEST_FIRST) == [One("a", 100), One("a", 90), One("b", 80)]


def test_where_an_allocator_judges_a_plan_of_other_levers_must_be_clearly_larger_to_be_left_out() -> None:
    # A seventh more than the smallest before it; within the same levers every byte counts.
    expected = [One("a", 100), One("b", 110), One("a", 90), One("b", 80)]
    assert tried(Counting.CUDA_ALLOCATOR, *FASTEST_FIRST) == expected
