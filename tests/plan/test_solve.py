"""The chosen way through a chain is feasible at every position, as fast as the best of all, and monotone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samegrad.errors import EnvironmentProblem
from samegrad.plan.chain import ChainChoice, HostLink, plain_stages, predict_chain
from samegrad.plan.heights import Stage, Way
from samegrad.plan.solve import choose_for, pareto
from samegrad.unit_tables import Unit

from .chains import chains, every_choice, unit

# Of the best time of all, to which the planner promises to come.
WITHIN_FRACTION = 0.02
# What rounding the extra time to ticks may cost, per unit.
TICK_FRACTION = 1 / 4096


def fastest_of_all(
    units: list[Unit], budget_bytes: int, resident_bytes: int = 0, chunk_counts: Sequence[int] = (), link: bool = False
) -> float | None:
    found = (
        predict_chain(units, stages, resident_bytes=resident_bytes)
        for stages in every_choice(units, chunk_counts=chunk_counts, may_offload=link)
    )
    return min((one.seconds for one in found if one.peak_bytes <= budget_bytes), default=None)


def budgets_for(units: list[Unit], resident_bytes: int, count: int = 8) -> list[int]:
    """From too little to more than enough."""
    peak = predict_chain(units, plain_stages(units)).peak_bytes
    return [resident_bytes + peak * k // (count - 1) for k in range(count)] + [resident_bytes + peak - 1]


def assert_holds(units: list[Unit], choice: ChainChoice, budget_bytes: int, resident_bytes: int) -> None:
    found = predict_chain(units, choice.stages, resident_bytes=resident_bytes)
    assert all(position.live_bytes <= budget_bytes for position in found.positions)
    assert choice.peak_bytes == found.peak_bytes
    assert choice.seconds == pytest.approx(found.seconds, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(units=chains(most_units=7), resident_bytes=st.integers(0, 300))
def test_recomputing_is_as_fast_as_the_best_of_all_choices_at_every_budget(
    units: list[Unit], resident_bytes: int
) -> None:
    for budget_bytes in budgets_for(units, resident_bytes):
        best = fastest_of_all(units, budget_bytes, resident_bytes)
        choice = choose_for(units, budget_bytes, resident_bytes=resident_bytes)
        assert (choice is None) == (best is None)
        if choice is not None and best is not None:
            assert_holds(units, choice, budget_bytes, resident_bytes)
            assert best * (1 - 1e-12) <= choice.seconds <= best * (1 + len(units) * TICK_FRACTION)


@settings(max_examples=25, deadline=None)
@given(units=chains(most_units=4))
def test_so_are_chunks_and_a_host_without_limits(units: list[Unit]) -> None:
    for budget_bytes in budgets_for(units, 0, count=5):
        best = fastest_of_all(units, budget_bytes, chunk_counts=(2, 5), link=True)
        choice = choose_for(units, budget_bytes, chunk_counts=(5, 2), link=HostLink())
        assert (choice is None) == (best is None)
        if choice is not None and best is not None:
            assert_holds(units, choice, budget_bytes, 0)
            assert choice.seconds <= best * (1 + WITHIN_FRACTION)


@settings(max_examples=60, deadline=None)
@given(units=chains(most_units=12), chunk_counts=st.sampled_from([(), (2, 8)]))
def test_a_smaller_budget_never_gives_a_larger_peak_or_a_shorter_time(
    units: list[Unit], chunk_counts: tuple[int, ...]
) -> None:
    before: ChainChoice | None = None
    for budget_bytes in sorted(budgets_for(units, 0, count=30)):
        choice = choose_for(units, budget_bytes, chunk_counts=chunk_counts)
        if before is not None:
            assert choice is not None
            assert before.peak_bytes <= choice.peak_bytes
            assert before.seconds >= choice.seconds
        before = choice


@settings(max_examples=40, deadline=None)
@given(units=chains(most_units=10))
def test_the_list_of_budgets_and_times_holds_every_choice_that_a_budget_gives(units: list[Unit]) -> None:
    front = pareto(units, resident_bytes=7, chunk_counts=(3,))
    assert all(a.seconds <= b.seconds and a.peak_bytes > b.peak_bytes for a, b in pairwise(front))
    assert front[0].seconds == pytest.approx(sum(one.forward_seconds + one.backward_seconds for one in units))
    for choice in front:
        assert_holds(units, choice, choice.peak_bytes, 7)
        assert choose_for(units, choice.peak_bytes, resident_bytes=7, chunk_counts=(3,)) == choice
    assert choose_for(units, front[-1].peak_bytes - 1, resident_bytes=7, chunk_counts=(3,)) is None


@settings(max_examples=20, deadline=None)
@given(units=chains(most_units=10))
def test_the_same_chain_gives_the_same_choice(units: list[Unit]) -> None:
    assert pareto(units, chunk_counts=(2, 4)) == pareto(list(units), chunk_counts=(4, 2, 4))


def test_what_fits_plainly_is_left_alone() -> None:
    units = [unit(row_independent=True, forward_seconds=0.0) for _ in range(5)]
    peak = predict_chain(units, plain_stages(units)).peak_bytes
    choice = choose_for(units, peak, chunk_counts=(2,), link=HostLink())
    assert choice is not None
    assert choice.stages == plain_stages(units)


def knapsack_on_saved_bytes(units: list[Unit], budget_bytes: int) -> list[Stage]:
    """The planted fault: recompute what saves most for its time until what is kept fits, and look at no position."""
    stages = list(plain_stages(units))
    kept = sum(one.kept_bytes for one in units)
    worth = sorted(range(len(units)), key=lambda k: (units[k].output_bytes - units[k].kept_bytes, k))
    for k in worth:
        if kept <= budget_bytes:
            break
        stages[k] = Stage(k, k, Way.RECOMPUTE)
        kept -= units[k].kept_bytes - units[k].output_bytes
    return stages


def test_a_planted_knapsack_on_saved_bytes_is_caught_over_the_budget() -> None:
    # The last unit keeps most, and is live whole when its gradient arrives, recomputed or not.
    units = [unit() for _ in range(4)] + [unit(kept_bytes=400, forward_extra_bytes=420, backward_extra_bytes=300,
                                               offloadable_bytes=390, moved_bytes=390)]  # fmt: skip
    budget_bytes = 800
    planted = predict_chain(units, knapsack_on_saved_bytes(units, budget_bytes - 300))
    assert sum(units[k].kept_bytes for k in range(4)) + units[4].output_bytes <= budget_bytes - 300
    assert [p for p in planted.positions if p.live_bytes > budget_bytes] != []
    choice = choose_for(units, budget_bytes)
    assert choice is not None
    assert_holds(units, choice, budget_bytes, 0)


LINKS = [
    HostLink(bytes_per_second=60.0),
    HostLink(bytes_per_second=40.0),
    HostLink(bytes_per_second=60.0, host_bytes=200),
    HostLink(host_bytes=100),
]


def choices_with_link(units: list[Unit], link: HostLink, queues: Sequence[int]) -> list[tuple[int, float]]:
    """Peak and seconds of every choice, any of ``queues`` that it can do with counted as always there."""
    found = []
    for stages in every_choice(units, may_offload=True):
        sent = [units[stage.first].moved_bytes for stage in stages if stage.way is Way.OFFLOAD]
        if link.host_bytes is not None and sum(sent) > link.host_bytes:
            continue
        peak = predict_chain(units, stages).peak_bytes
        for most in [most for most in queues if most >= max(sent) or most == 0] if sent else [0]:
            found.append((peak + most, predict_chain(units, stages, link=link, in_flight_bytes=most).seconds))
    return found


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_a_limited_way_to_the_host_is_used_as_well_as_by_the_best_of_all_choices(link: HostLink) -> None:
    units = [unit(forward_seconds=1 + k % 3, moved_bytes=90 + 5 * k) for k in range(4)]
    everywhere = [0] if link.bytes_per_second == float("inf") else range(90, 391, 5)
    every = choices_with_link(units, link, everywhere)
    used = 0
    for budget_bytes in range(203, 564, 40):
        best = min((seconds for peak, seconds in every if peak <= budget_bytes), default=None)
        choice = choose_for(units, budget_bytes, link=link)
        assert best is None or choice is not None
        if choice is None:
            continue
        found = predict_chain(units, choice.stages, link=link, in_flight_bytes=choice.in_flight_bytes)
        assert found.peak_bytes == choice.peak_bytes <= budget_bytes
        assert found.seconds == pytest.approx(choice.seconds)
        assert link.host_bytes is None or found.host_bytes <= link.host_bytes
        if best is not None:
            assert choice.seconds <= best * (1 + WITHIN_FRACTION)
        used += choice.host_bytes > 0
    assert used, "no budget made the host worth while"


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_with_a_limited_host_a_smaller_budget_is_never_better(link: HostLink) -> None:
    units = [unit(forward_seconds=1 + k % 3, kept_bytes=100 + 7 * k) for k in range(6)]
    before: ChainChoice | None = None
    for budget_bytes in range(100, 760, 30):
        choice = choose_for(units, budget_bytes, link=link)
        assert before is None or (choice is not None and before.seconds >= choice.seconds * (1 - 5e-3))
        before = choice
    front = pareto(units, link=link)
    assert all(a.seconds <= b.seconds and a.peak_bytes > b.peak_bytes for a, b in pairwise(front))


def test_without_scipy_a_limited_host_is_refused_and_all_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [unit() for _ in range(5)]
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert choose_for(units, 300, link=HostLink()) is not None
    with pytest.raises(EnvironmentProblem, match="scipy"):
        choose_for(units, 300, link=HostLink(host_bytes=100))
