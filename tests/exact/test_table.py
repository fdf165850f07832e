"""The rows of benchmarks/exact_table.py: each within the contract, and the usual way of each beyond it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
try:
    import _exact_losses
    import exact_table
    from _exact_case import Case
finally:
    sys.path.remove(BENCHMARKS)


# Errors of a few units in the last place hang on the network and the batch by as much.
OF_ANOTHER_NETWORK = 4


@pytest.mark.parametrize("name", exact_table.ROWS)
def test_a_row_is_within_the_contract_and_its_usual_way_is_not(name: str) -> None:
    row = exact_table.measured(exact_table.ROWS[name]())
    assert row["share_of_contract"] <= 1
    assert row["naive_share_of_contract"] > 1000
    assert row["error"] <= OF_ANOTHER_NETWORK * exact_table.PROTOTYPE_ERRORS.get(name, float("inf"))


def test_a_row_beyond_its_allowance_makes_the_script_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> Case:
        case = _exact_losses.mean_over_rows()
        return dataclasses.replace(case, ours=lambda rows: [g * (1 + 1e-11) for g in case.ours(rows)])

    monkeypatch.setattr(exact_table._results, "write", lambda *_: None)
    monkeypatch.setattr(exact_table, "ROWS", {"(a) mean over rows": _exact_losses.mean_over_rows})
    assert exact_table.main() == 0
    monkeypatch.setitem(exact_table.ROWS, "(a) a little off", wrong)
    assert exact_table.main() == 1


def test_every_kind_that_was_tried_by_hand_is_in_the_table() -> None:
    assert exact_table.PROTOTYPE_ERRORS.keys() <= exact_table.ROWS.keys()


def test_a_planted_error_in_the_last_digits_is_beyond_what_was_found_by_hand() -> None:
    case = _exact_losses.mean_over_rows()
    off = dataclasses.replace(case, ours=lambda rows: [g * (1 + 1e-14) for g in case.ours(rows)])
    assert exact_table.measured(off)["error"] > OF_ANOTHER_NETWORK * exact_table.PROTOTYPE_ERRORS["(a) mean over rows"]
