"""Recomputed blocks as a lever: knobs, and what they are beside the levers that split."""

from __future__ import annotations

from typing import Any

import pytest

from samegrad.declared import declare
from samegrad.errors import BadInput
from samegrad.execute.apply import applied
from samegrad.levers.recompute import Recompute
from samegrad.records import Exactness, Plan

from ..contract.plain import cross_entropy, mlp

ROWS = 10


def plan(**levers: dict[str, Any]) -> Plan:
    return Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=ROWS)


@pytest.mark.parametrize("blocks", [[], "0", None, [[]], [3], [["0", 1]], ["0", None]], ids=str)
def test_knobs_that_name_no_blocks_are_refused(blocks: Any) -> None:
    with pytest.raises(BadInput, match="recompute with blocks="):
        Recompute(blocks)


def test_blocks_and_runs_of_blocks_come_back_through_a_saved_plan() -> None:
    blocks = ["stem", ["layers.0", "layers.1"]]
    saved = Plan.from_json(plan(recompute={"blocks": blocks}).to_json())
    assert Recompute(**saved.levers["recompute"]) == Recompute(blocks)


def test_alone_it_runs_the_whole_batch_and_inside_chunks_their_sizes_stay() -> None:
    step = declare(mlp(), cross_entropy)
    recompute = {"blocks": ["0"]}
    with applied(plan(recompute=recompute), step, ROWS) as alone:
        assert alone.sizes == (ROWS,) and alone.inside is not None and alone.scheme is None
        assert alone.maps and not alone.splits and not alone.runs_whole
    with applied(plan(recompute=recompute, split_rows={"rows": 4}), step, ROWS) as split:
        assert split.sizes == (4, 4, 2) and split.inside is not None and split.scheme is None
    with applied(plan(recompute=recompute, segments={"rows": 4, "paths": {"0": 1}}), step, ROWS) as parts:
        assert parts.sizes == (4, 4, 2) and parts.inside is not None and parts.scheme is not None
