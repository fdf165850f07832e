"""The rows of benchmarks/exact_table.py: each within the contract, and the usual way of each beyond it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
try:
    import _exact_rows
    import exact_table
finally:
    sys.path.remove(BENCHMARKS)


@pytest.mark.parametrize("name", _exact_rows.ROWS)
def test_a_row_is_within_the_contract_and_its_usual_way_is_not(name: str) -> None:
    row = exact_table.measured(_exact_rows.ROWS[name]())
    assert row["share_of_contract"] <= 1
    assert row["naive_share_of_contract"] > 1000


def test_a_row_beyond_its_allowance_makes_the_script_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> _exact_rows.Case:
        case = _exact_rows.mean_over_rows()
        return _exact_rows.dataclasses.replace(case, ours=lambda rows: [g * (1 + 1e-11) for g in case.ours(rows)])

    monkeypatch.setattr(exact_table._results, "write", lambda *_: None)
    monkeypatch.setattr(_exact_rows, "ROWS", {"(a) mean over rows": _exact_rows.mean_over_rows})
    assert exact_table.main() == 0
    monkeypatch.setitem(_exact_rows.ROWS, "(a) a little off", wrong)
    assert exact_table.main() == 1
