"""Rounding, segment sizes and caps are those of torch's source, case by case."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samegrad.errors import UsageError
from samegrad.measure.allocator_rules import (
    AllocatorRules,
    cap_of_fraction,
    fraction_of_cap,
    parse_allocator_rules,
    read_allocator_rules,
)

KIB, MIB = 2**10, 2**20


@pytest.mark.parametrize(
    ("requested", "rounded"), [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB - 1, MIB), (MIB + 1, MIB + 512)]
)
def test_requests_are_rounded_to_512_bytes(requested: int, rounded: int) -> None:
    assert AllocatorRules().rounded_bytes(requested) == rounded


@pytest.mark.parametrize(
    ("block", "segment"),
    [
        (512, 2 * MIB), (MIB, 2 * MIB), (MIB + 512, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB), (21 * MIB, 22 * MIB),
    ],
)  # fmt: skip
def test_segments_are_small_large_or_their_own(block: int, segment: int) -> None:
    assert AllocatorRules().segment_bytes(block) == segment


def test_powers_of_two_are_divided_as_the_source_says_by_example() -> None:
    # The comment in the source: 1200 with 4 divisions lies between 1024, 1280, 1536 and 1792.
    rules = parse_allocator_rules("roundup_power2_divisions:4")
    assert rules.rounded_bytes(1200 * KIB) == 1280 * KIB
    assert rules.rounded_bytes(1024 * KIB) == 1024 * KIB
    assert rules.rounded_bytes(1793 * KIB) == 2048 * KIB
    # Not for requests of few blocks.
    assert rules.rounded_bytes(4 * 512 - 1) == 4 * 512


@given(st.integers(1, 2**40), st.sampled_from([0, 2, 4, 8, 16]))
def test_a_block_holds_its_request_and_wastes_no_more_than_a_division(requested: int, divisions: int) -> None:
    rounded = AllocatorRules(power2_divisions=(divisions,) * 16).rounded_bytes(requested)
    assert requested <= rounded
    allowed = 512 if divisions < 2 else max(512, requested // divisions)
    assert rounded - requested <= allowed


def test_divisions_by_interval_reach_down_and_up() -> None:
    rules = parse_allocator_rules("roundup_power2_divisions:[4:2,16:8,>:0]")
    assert [rules.divisions_of(size * MIB) for size in (1, 2, 4, 8, 16, 32, 2**20)] == [2, 2, 2, 0, 8, 0, 0]


def test_settings_are_read_as_torch_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "expandable_segments:True,max_split_size_mb:64, garbage_collection_threshold:0.8,large_segment_size_mb:40"
    rules = parse_allocator_rules(f"{text},pinned_use_background_threads:True")
    assert rules == AllocatorRules(
        expandable_segments=True,
        largest_split_bytes=64 * MIB,
        garbage_collection_threshold=0.8,
        large_segment_bytes=40 * MIB,
    )
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert read_allocator_rules().expandable_segments
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    assert not read_allocator_rules().expandable_segments


@pytest.mark.parametrize("text", ["backend:cudaMallocAsync", "max_split_size_mb:lots"])
def test_what_is_not_modelled_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=text.split(":")[1]):
        parse_allocator_rules(text)


@given(st.integers(1, 2**40), st.integers(2**30, 2**40))
def test_a_cap_survives_being_a_fraction(cap: int, device: int) -> None:
    cap = min(cap, device)
    fraction = fraction_of_cap(cap, device)
    assert cap <= cap_of_fraction(fraction, device) <= cap + 1


def test_the_plain_quotient_would_fall_short() -> None:
    device = 150_109_880_320
    caps = [step * 2 * MIB for step in range(1, 3000)]
    short = [cap for cap in caps if cap_of_fraction(cap / device, device) < cap]
    assert short
    assert all(cap_of_fraction(fraction_of_cap(cap, device), device) >= cap for cap in short)
