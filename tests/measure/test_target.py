"""A card that is not at hand: its budget, its words, and what a trace reserves and takes on it."""

from __future__ import annotations

import pytest
import torch

from samegrad.declared import declare
from samegrad.errors import UsageError
from samegrad.measure.target import Target
from samegrad.measure.trace import trace_step
from samegrad.measure.trace_reading import CUDA_BLOCK_BYTES, peak_bytes
from samegrad.records import Counting

from .traced import Words, cross_entropy, words


@pytest.mark.parametrize("name", ["H200", "RTX 4090 Laptop", "T4"])
def test_a_card_is_found_by_name_and_says_on_what_it_rests(name: str) -> None:
    target = Target.named(name)
    assert target.card.name in target.in_words() and "library workspaces" in target.in_words()


def test_no_card_of_that_name_is_an_error() -> None:
    with pytest.raises(UsageError, match="RTX 9999"):
        Target.named("RTX 9999")


def test_an_empty_cards_budget_leaves_room_for_the_driver_and_a_share_is_of_its_memory() -> None:
    target = Target.named("T4")
    empty = target.budget(None)
    assert empty.counting is Counting.CUDA_ALLOCATOR and "for the driver" in empty.source
    assert 0.8 * target.card.memory_bytes < empty.total_bytes < target.card.memory_bytes
    assert target.budget("50%").total_bytes == target.card.memory_bytes // 2
    assert target.budget("6GiB").total_bytes == 6 * 2**30
    assert target.budget("6GiB", host="1GiB").host_bytes == 2**30


def test_a_trace_reserves_more_than_it_holds_and_takes_longer_on_a_slower_card() -> None:
    model = Words()
    trace = trace_step(declare(model, cross_entropy, optimizer=torch.optim.Adam(model.parameters())), words(20_000))
    fast, slow = Target.named("H200"), Target.named("T4")
    for target in (fast, slow):
        reserved = target.reserve(trace)
        assert reserved.free_running.peak_reserved_bytes >= reserved.free_running.peak_allocated_bytes
        assert reserved.free_running.peak_allocated_bytes >= peak_bytes(trace, round_to=CUDA_BLOCK_BYTES)
        assert reserved.smallest.cap_bytes <= reserved.steady.cap_bytes
        assert len(target.seconds_of(trace)) == len(trace.operations)
    assert sum(slow.seconds_of(trace)) > sum(fast.seconds_of(trace))
