"""What is predicted for a choice is what counting one unit after the other gives, at every position."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samegrad.errors import BadInput
from samegrad.plan.chain import HostLink, Moment, chain_peak_bytes, plain_stages, predict_chain
from samegrad.plan.heights import Chain, Stage, Way
from samegrad.unit_tables import Unit

from .chains import chains, counted_bytes, every_choice, unit

KEEP, OFFLOAD, RECOMPUTE, CHUNKED = Way.KEEP, Way.OFFLOAD, Way.RECOMPUTE, Way.CHUNKED


def positions_of(units: list[Unit], stages: list[Stage]) -> list[tuple[int, str, int]]:
    found = predict_chain(units, stages, link=HostLink())
    return [(p.unit, p.moment.value, p.live_bytes) for p in found.positions]


@settings(max_examples=60, deadline=None)
@given(units=chains(most_units=4))
def test_every_position_of_every_choice_is_the_counted_one(units: list[Unit]) -> None:
    for stages in every_choice(units, chunk_counts=(2, 3), may_offload=True):
        assert positions_of(units, stages) == counted_bytes(units, stages), stages


@pytest.mark.parametrize("column", ["incoming", "crossing", "arrival_extra", "output", "later_gradients"])
def test_a_planted_column_of_zeros_is_caught_by_counting(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [unit(crossing_bytes=10, gradient_bytes=5, row_independent=True, arrival_extra_bytes=5 * (3 - k) + 2)
             for k in range(4)]  # fmt: skip
    honest = Chain.of

    def forgetful(units: Any) -> Chain:
        chain = honest(units)
        return dataclasses.replace(chain, **{column: 0 * getattr(chain, column)})

    monkeypatch.setattr(Chain, "of", forgetful)
    choices = list(every_choice(units, chunk_counts=(2,)))
    assert any(positions_of(units, stages) != counted_bytes(units, stages) for stages in choices)


def test_the_plain_step_adds_up_by_hand() -> None:
    units = [unit(), unit(kept_bytes=200), unit(name="", recomputable=False)]
    found = predict_chain(units, plain_stages(units), resident_bytes=1000)
    assert [p.live_bytes for p in found.positions] == [
        1000 + 110, 1100 + 110, 1300 + 110, 1400 + 10 + 30, 1300 + 10 + 30, 1100 + 10 + 30
    ]  # fmt: skip
    assert [p.moment for p in found.positions] == [Moment.FORWARD] * 3 + [Moment.BACKWARD] * 3
    assert found.peak_bytes == 1440
    assert found.seconds == pytest.approx(9.0)


def test_saving_bytes_can_raise_the_peak() -> None:
    # Much stands when the last gradient arrives, and the recomputed forward comes on top of it.
    units = [unit(), unit(arrival_extra_bytes=-200, incoming_bytes=500, backward_extra_bytes=0)]
    plain = predict_chain(units, plain_stages(units))
    saving = predict_chain(units, [Stage(0, 0, KEEP), Stage(1, 1, RECOMPUTE)])
    assert saving.peak_bytes > plain.peak_bytes
    assert max(saving.positions, key=lambda p: p.live_bytes).moment is Moment.RECOMPUTE


@settings(max_examples=60, deadline=None)
@given(units=chains(), counts=st.lists(st.integers(2, 40), min_size=2, max_size=2, unique=True))
def test_more_chunks_never_hold_more_and_take_longer(units: list[Unit], counts: list[int]) -> None:
    few, many = sorted(counts)
    units = [dataclasses.replace(one, recomputable=True, row_independent=True) for one in units]
    stage = Stage(0, len(units) - 1, CHUNKED, few)
    less, more = (predict_chain(units, [dataclasses.replace(stage, chunks=n)]) for n in (few, many))
    assert more.peak_bytes <= less.peak_bytes
    assert more.seconds > less.seconds


def by_small_steps(seconds: list[float], moved: list[int], rate: float, most: float) -> tuple[list[float], float]:
    """The same queue, a thousandth of a second at a time."""
    step, queued, waited, standing = 1e-3, 0.0, 0.0, []
    for duration, arriving in zip(seconds, moved):
        standing.append(queued)
        for _ in range(round(duration / step)):
            queued = max(0.0, queued - rate * step)
        while arriving and queued > 0 and queued + arriving > most:
            queued = max(0.0, queued - rate * step)
            waited += step
        queued += arriving
    return standing, waited + queued / rate


@pytest.mark.parametrize("most", [90, 130, 1000])
@pytest.mark.parametrize("rate", [20.0, 45.0, 400.0])
def test_the_step_waits_for_the_host_as_a_queue_in_small_steps_does(rate: float, most: int) -> None:
    units = [unit(forward_seconds=1 + k % 3, backward_seconds=2 - k % 2, moved_bytes=90 + k) for k in range(6)]
    stages = [Stage(k, k, OFFLOAD if k in (0, 1, 3) else KEEP) for k in range(6)]
    moved = [one.moved_bytes if stage.way is OFFLOAD else 0 for one, stage in zip(units, stages)]
    found = predict_chain(units, stages, link=HostLink(bytes_per_second=rate), in_flight_bytes=most)
    _, out = by_small_steps([one.forward_seconds for one in units], moved, rate, most)
    _, back = by_small_steps([one.backward_seconds for one in units], moved, rate, most)
    assert found.stall_seconds == pytest.approx(out + back, abs=0.02)
    running = sum(one.forward_seconds + one.backward_seconds for one in units)
    assert found.seconds == pytest.approx(running + out + back, abs=0.02)
    assert found.host_bytes == sum(moved)


def test_what_is_on_its_way_still_stands() -> None:
    units = [unit(moved_bytes=95), unit(), unit()]
    stages = [Stage(0, 0, OFFLOAD), Stage(1, 1, KEEP), Stage(2, 2, KEEP)]
    at = {p[:2]: p.live_bytes for p in predict_chain(units, stages).positions}
    slow = predict_chain(units, stages, link=HostLink(bytes_per_second=60.0))
    later = {p[:2]: p.live_bytes - at[p[:2]] for p in slow.positions}
    # Unit 1 runs a second forward and two backward: 95 bytes stand beside it, 35 and none beside unit 2.
    assert [later[k, Moment.FORWARD] for k in range(3)] == [0, 95, 35]
    assert [later[k, Moment.BACKWARD] for k in range(3)] == [0, 95, 0]
    assert slow.stall_seconds == 0.0


@settings(max_examples=60, deadline=None)
@given(units=chains(most_units=4))
def test_the_peak_alone_is_that_of_all_positions(units: list[Unit]) -> None:
    chain = Chain.of(units)
    for stages in every_choice(units):
        expected = predict_chain(chain, stages, resident_bytes=1000).peak_bytes
        assert chain_peak_bytes(chain, stages, resident_bytes=1000) == expected


def test_no_link_at_all_is_one_that_takes_no_time() -> None:
    units = [unit(), unit()]
    stages = [Stage(0, 0, OFFLOAD), Stage(1, 1, KEEP)]
    assert predict_chain(units, stages) == predict_chain(units, stages, link=HostLink(bytes_per_second=math.inf))


@pytest.mark.parametrize(
    ("stages", "found"),
    [
        ([Stage(0, 0, KEEP)], "after 1 of 3"),
        ([Stage(0, 0, KEEP), Stage(2, 2, KEEP)], "unit 1 comes next"),
        ([Stage(0, 1, KEEP), Stage(2, 2, KEEP)], "together"),
        ([Stage(0, 0, KEEP), Stage(1, 2, RECOMPUTE)], "cannot run again"),
        ([Stage(0, 0, CHUNKED, 2), Stage(1, 1, KEEP), Stage(2, 2, KEEP)], "does not treat rows alone"),
        ([Stage(0, 0, RECOMPUTE, 2), Stage(1, 1, KEEP), Stage(2, 2, KEEP)], "2 chunks"),
        ([Stage(0, 0, KEEP), Stage(1, 1, KEEP), Stage(2, 5, RECOMPUTE)], "units 2 to 5"),
    ],
)
def test_a_choice_that_the_units_cannot_go_is_refused(stages: list[Stage], found: str) -> None:
    units = [unit(), unit(), unit(name="", recomputable=False)]
    with pytest.raises(BadInput, match=found):
        predict_chain(units, stages)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"offloadable_bytes": 95, "moved_bytes": 95}, "95 bytes to the host"),
        ({"moved_bytes": 1}, "moves 1 bytes to free 90"),
        ({"forward_seconds": -1.0}, "-1.0"),
        ({"backward_seconds": math.nan}, "nan"),
        ({"recomputable": False, "row_independent": True}, "cannot run again"),
    ],
)
def test_a_table_that_cannot_be_is_refused_with_its_unit(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(BadInput, match=f"unit 1 .*{found}"):
        Chain.of([unit(), unit(**changes)])


@pytest.mark.parametrize("link", [{"bytes_per_second": 0.0}, {"bytes_per_second": math.nan}, {"host_bytes": -1}])
def test_a_link_that_cannot_be_is_refused(link: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="bytes a second and room for"):
        HostLink(**link)


def test_a_chain_of_no_units_is_refused() -> None:
    with pytest.raises(BadInput, match="no units"):
        Chain.of([])
