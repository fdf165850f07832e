"""Splitting rows: sizes that add up, the most rows that fit, nothing over the budget."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samegrad.errors import BadInput
from samegrad.levers._variants import chunk_sizes
from samegrad.levers.split_rows import SplitRows
from samegrad.records import Phase

from ..plan.test_choose import BYTES, MIB, footprint, law


@given(st.integers(1, 500), st.integers(1, 600))
def test_chunks_add_up_and_only_the_last_is_shorter(batch_rows: int, rows: int) -> None:
    sizes = chunk_sizes(rows, batch_rows)
    assert sum(sizes) == batch_rows and set(sizes[:-1]) <= {rows} and 1 <= sizes[-1] <= rows


def test_a_list_is_taken_as_it_is_and_must_add_up() -> None:
    assert chunk_sizes([3, 1, 3], 7) == (3, 1, 3)
    with pytest.raises(BadInput, match=r"(?s)add up to 7.*8 rows"):
        chunk_sizes([3, 1, 3], 8)


@pytest.mark.parametrize("rows", [0, -3, 1.5, True, "4", [], [3, 0], [3, "4"], None], ids=str)
def test_knobs_that_are_no_rows_are_refused(rows: Any) -> None:
    with pytest.raises(BadInput, match="split_rows"):
        SplitRows(rows)


@given(st.integers(2, 2000), BYTES, BYTES, st.integers(1, 2**40))
def test_candidates_shrink_to_one_row_and_none_is_over_the_budget(
    batch_rows: int, per_row: float, kept: float, budget_bytes: int
) -> None:
    step = footprint(laws=(law(Phase.BACKWARD, 21 * MIB, per_row, kept),), batch_rows=batch_rows, refusals={})
    rows = [lever.rows for lever in SplitRows.candidates(step, budget_bytes)]
    assert rows == sorted(set(rows), reverse=True) and all(isinstance(n, int) and 1 <= n < batch_rows for n in rows)
    for n in rows:
        assert step.predicted_peak_bytes(rows=n) <= budget_bytes + 1
    if rows:
        assert rows[-1] == 1
    else:
        assert step.predicted_peak_bytes(rows=1) >= budget_bytes


def test_the_prediction_is_the_laws_at_the_largest_chunk() -> None:
    step = footprint(refusals={})
    for lever, rows in ((SplitRows(40), 40), (SplitRows([10, 70, 20]), 70)):
        predicted = lever.predict(step)
        assert predicted.peak_allocated_bytes == step.predicted_peak_bytes(rows=rows)
        assert predicted.by_phase[Phase.BACKWARD] == predicted.peak_allocated_bytes
        assert predicted.seconds == step.predicted_seconds(rows=rows)
