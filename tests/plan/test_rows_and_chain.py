"""Rows at a time and a choice for the chain: what is listed fits, is not beaten, and adds up chunk by chunk."""

from __future__ import annotations

import pytest

from samegrad.errors import BadInput
from samegrad.plan.chain import plain_stages, predict_chain
from samegrad.plan.rows_and_chain import RowsAndChain, split_with_chain
from samegrad.plan.solve import pareto
from samegrad.unit_tables import Unit

from .chains import unit

BATCH_ROWS = 37
ROWS = [1, 4, 10, 18, 37]


def units_of_rows(rows: int) -> list[Unit]:
    """Bytes by the row; a block takes a tenth of a second whatever its rows."""
    return [
        unit(
            kept_bytes=(20 + 7 * k) * rows, output_bytes=3 * rows, forward_extra_bytes=(25 + 7 * k) * rows,
            backward_extra_bytes=5 * rows + 11, arrival_extra_bytes=2 * rows, incoming_bytes=5 * rows,
            forward_seconds=0.1 + 0.01 * rows, backward_seconds=0.2 + 0.02 * rows, offloadable_bytes=0, moved_bytes=0,
        )
        for k in range(5)
    ]  # fmt: skip


def split(budget_bytes: int, *, forwards: int = 1, chunk_seconds: float = 0.5) -> list[RowsAndChain]:
    return split_with_chain(
        BATCH_ROWS, ROWS, units_of_rows, 100, budget_bytes, chunk_seconds, forwards, accumulator_bytes=40
    )


def peak_and_seconds(one: RowsAndChain, forwards: int, chunk_seconds: float) -> tuple[int, float]:
    """Chunk after chunk."""
    sizes = [min(one.rows, BATCH_ROWS - start) for start in range(0, BATCH_ROWS, one.rows)]
    resident_bytes = 100 + (40 if len(sizes) > 1 else 0)
    peaks, seconds = [], 0.0
    for rows in sizes:
        units = units_of_rows(rows)
        found = predict_chain(units, one.choice.stages, resident_bytes=resident_bytes)
        peaks.append(found.peak_bytes)
        seconds += found.seconds + chunk_seconds + (forwards - 1) * sum(one.forward_seconds for one in units)
    return max(peaks), seconds


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("budget_bytes", [400, 900, 2000, 10_000])
def test_what_is_listed_fits_and_adds_up(budget_bytes: int, forwards: int) -> None:
    front = split(budget_bytes, forwards=forwards)
    assert front
    for one in front:
        peak, seconds = peak_and_seconds(one, forwards, 0.5)
        assert one.peak_bytes == peak <= budget_bytes
        assert one.seconds == pytest.approx(seconds)
    assert [one.seconds for one in front] == sorted(one.seconds for one in front)
    assert [one.peak_bytes for one in front] == sorted((one.peak_bytes for one in front), reverse=True)


def test_no_rows_with_any_choice_beat_what_is_listed() -> None:
    front = split(1500)
    for rows in ROWS:
        for choice in pareto(units_of_rows(rows), resident_bytes=100 + 40 * (rows < BATCH_ROWS)):
            peak, seconds = peak_and_seconds(RowsAndChain(rows, choice, 0, 0.0), 1, 0.5)
            if peak <= 1500:
                assert any(one.peak_bytes <= peak and one.seconds <= seconds * (1 + 1e-12) for one in front)


def test_a_batch_that_fits_whole_runs_whole() -> None:
    best = split(100_000)[0]
    assert (best.rows, best.choice.stages) == (BATCH_ROWS, plain_stages(units_of_rows(1)))


def test_both_are_used_where_that_is_fastest() -> None:
    used = {(one.rows < BATCH_ROWS, one.choice.stages != plain_stages(units_of_rows(1))) for one in split(100_000)}
    assert {(False, True), (True, True)} <= used


def test_a_smaller_budget_lists_the_smaller_part_of_the_same_list() -> None:
    every = split(100_000)
    assert split(1200) == [one for one in every if one.peak_bytes <= 1200]


def test_too_little_for_one_row_lists_nothing() -> None:
    assert split(141) == []


def test_rows_beyond_the_batch_are_refused() -> None:
    with pytest.raises(BadInput, match="the batch has 37 rows"):
        split_with_chain(BATCH_ROWS, [38], units_of_rows, 0, 100, 0.0, 1)
