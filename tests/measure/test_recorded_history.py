"""Real allocators, recorded on a GPU: the model follows each of their requests; with a wrong rule it does not."""

from __future__ import annotations

import pytest

from samegrad.errors import BadInput
from samegrad.measure.allocator_rules import AllocatorRules
from samegrad.measure.blocks import ADDRESS_BITS, Block, FreeBlocks
from samegrad.measure.caps import predict_reserved
from samegrad.measure.recorded_history import HistoryComparison, compare_history, read_history, requests_of

from .histories import history_of, random_requests, recorded_history, recorded_names

MIB = 2**20
ORDINARY, EXPANDABLE = AllocatorRules(), AllocatorRules(expandable_segments=True)


def rules_of(name: str) -> AllocatorRules:
    return EXPANDABLE if "expandable" in name else ORDINARY


def compared(name: str, *, recorded_segments: bool = True) -> tuple[HistoryComparison, bool]:
    """The comparison, and whether model and recording agree in what is reserved, in the retries and where blocks lie.

    Without the recorded segments, addresses are the model's own and not compared.
    """
    history, facts = recorded_history(name)
    found = compare_history(history, rules_of(name), cap_bytes=facts["cap_bytes"], recorded_segments=recorded_segments)
    same_peak = found.modelled_peak_reserved_bytes == found.recorded_peak_reserved_bytes == facts["peak_reserved_bytes"]
    same_places = not recorded_segments or found.same_addresses == found.takes
    return found, found.first is None and same_peak and same_places and found.retries == facts["retries"]


@pytest.mark.parametrize("name", recorded_names())
def test_a_recorded_run_is_followed_request_by_request(name: str) -> None:
    found, agrees = compared(name)
    assert agrees, found


def test_most_runs_are_followed_without_knowing_where_the_driver_put_segments() -> None:
    agree = [compared(name, recorded_segments=False)[1] for name in recorded_names()]
    assert sum(agree) >= 0.85 * len(agree)
    free = [compared(name, recorded_segments=False)[0] for name in recorded_names() if name.endswith("free")]
    for found in free:
        assert found.modelled_peak_reserved_bytes == pytest.approx(found.recorded_peak_reserved_bytes, rel=0.03)


def wrong_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal blocks the higher address is taken."""

    def larger_first(self: FreeBlocks, size_bytes: int) -> Block | None:
        fitting = [block for block in self.in_order() if block.size_bytes >= size_bytes]
        return min(fitting, key=lambda block: (block.size_bytes, -block.address), default=None)

    monkeypatch.setattr(FreeBlocks, "smallest_from", larger_first)


def wrong_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def always(self: AllocatorRules, block_bytes: int, *, small: bool) -> int:
        return 512

    monkeypatch.setattr(AllocatorRules, "smallest_remainder_bytes", always)


def wrong_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_large_ones(self: AllocatorRules, block_bytes: int) -> int:
        return -(-block_bytes // (2 * MIB)) * 2 * MIB

    monkeypatch.setattr(AllocatorRules, "segment_bytes", without_large_ones)


def wrong_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def lowest(self: FreeBlocks, size_bytes: int) -> Block | None:
        fitting = [block for block in self.in_order() if block.size_bytes >= size_bytes]
        return min(fitting, key=lambda block: block.address, default=None)

    monkeypatch.setattr(FreeBlocks, "smallest_from", lowest)


@pytest.mark.parametrize("plant", [wrong_ties, wrong_split, wrong_segments, wrong_fit])
def test_a_wrong_rule_is_caught_by_the_recorded_runs(plant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in recorded_names() if "ordinary" in name]
    plant(monkeypatch)  # type: ignore[operator]
    assert not all(compared(name)[1] for name in names)


@pytest.mark.parametrize("rules", [ORDINARY, EXPANDABLE])
@pytest.mark.parametrize("cap", [None, 150 * MIB])
def test_the_models_own_history_is_followed(rules: AllocatorRules, cap: int | None) -> None:
    for seed in range(5):
        history = read_history(history_of(random_requests(seed), rules, cap))
        found = compare_history(history, rules, cap_bytes=cap, recorded_segments=False)
        assert found.first is None
        assert found.same_addresses == found.takes > 0


def test_a_segment_more_than_the_model_takes_is_told_where() -> None:
    entries = history_of(random_requests(1), ORDINARY)
    at = len(entries) // 2
    planted = {"action": "segment_alloc", "addr": 1 << (ADDRESS_BITS - 1), "size": 2 * MIB, "stream": 0}
    history = read_history([*entries[:at], planted, *entries[at:]])
    found = compare_history(history, ORDINARY, recorded_segments=False)
    assert found.first is not None
    assert found.first.recorded_reserved_bytes == found.first.modelled_reserved_bytes + 2 * MIB
    assert found.first.request >= sum(e["action"] in ("alloc", "free_completed") for e in entries[:at])


def test_a_history_that_begins_in_the_middle_is_refused() -> None:
    entries = history_of(random_requests(2), ORDINARY)
    last = max(i for i, entry in enumerate(entries) if entry["action"] == "free_completed")
    with pytest.raises(BadInput, match="before the first allocation"):
        compare_history(read_history(entries[last:]), ORDINARY)
    with pytest.raises(BadInput, match="no requests"):
        read_history([{"action": "snapshot", "addr": 0, "size": 0, "stream": 0}])


@pytest.mark.parametrize("name", [name for name in recorded_names() if name.endswith("free")])
def test_the_caps_of_a_recorded_run_hold_on_the_device(name: str) -> None:
    """The device ran under the steady cap without later retries; the benchmark tried it in a process of its own."""
    history, facts = recorded_history(name)
    predicted = predict_reserved(requests_of(history, facts["step_starts"][1:]), rules_of(name))
    # Blocks that are not split depend on where segments lie, which is the model's guess here.
    assert predicted.free_running.peak_allocated_bytes == pytest.approx(facts["peak_allocated_bytes"], rel=0.01)
    assert facts["peak_requested_bytes"] == predicted.free_running.peak_requested_bytes
    assert predicted.smallest.cap_bytes <= predicted.steady.cap_bytes <= predicted.free_running.lowest_equal_cap_bytes
    under_cap = name.replace("free", "steady")
    if under_cap in recorded_names():
        retries = recorded_history(under_cap)[1]["retries_after_step"]
        assert retries[-1] == retries[1]
