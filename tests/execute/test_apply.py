"""A plan in force, and undone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from samegrad.declared import declare
from samegrad.errors import CannotSplit
from samegrad.exact.mapped import MappedStep
from samegrad.exact.split import SplitStep
from samegrad.execute.apply import applied, chunked_step
from samegrad.execute.ways import Ways
from samegrad.records import Exactness, Plan

from ..contract.plain import cross_entropy, mlp


def plan(**levers: dict[str, object]) -> Plan:
    return Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=10)


def test_a_plan_without_levers_is_the_plain_call() -> None:
    with applied(plan(), declare(mlp(), cross_entropy), 10) as execution:
        assert execution.sizes is None and not execution.rows_on_host


def test_levers_in_force_say_how_the_batch_at_hand_is_run() -> None:
    step = declare(mlp(), cross_entropy)
    with applied(plan(split_rows={"rows": 4}, host_rows={}), step, 10) as execution:
        assert execution.sizes == (4, 4, 2) and execution.rows_on_host and execution.declared is step
    with applied(plan(split_rows={"rows": 4}), step, 3) as execution:
        assert execution.sizes == (3,) and not execution.rows_on_host


def test_an_exception_inside_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError), applied(plan(split_rows={"rows": 4}), declare(mlp(), cross_entropy), 10):
        raise ZeroDivisionError


RECOMPUTE = {"recompute": {"blocks": ["0"]}}


def ways(refusal: CannotSplit | None = None) -> Ways:
    return Ways(None if refusal else SimpleNamespace(), refusal)  # type: ignore[arg-type]


def run_by(ways: Ways, aliases: Any = None, **levers: dict[str, object]) -> MappedStep | SplitStep:
    with applied(plan(**levers), declare(mlp(), cross_entropy), 10) as execution:
        return chunked_step(execution, aliases or SimpleNamespace(sharded=False), ways, lambda *_: ())


def test_recomputation_runs_inside_whatever_else_the_plan_takes() -> None:
    whole, split = run_by(ways(), **RECOMPUTE), run_by(ways(), **RECOMPUTE, split_rows={"rows": 4})
    assert isinstance(whole, MappedStep) and isinstance(split, SplitStep) and split.inside is not None
    assert isinstance(run_by(ways(), **RECOMPUTE, split_rows={"rows": 10}), MappedStep)
    assert isinstance(run_by(ways(), **RECOMPUTE, segments={"rows": 4, "paths": {"0": 1}}), MappedStep)
    alone = run_by(ways(), split_rows={"rows": 4})
    assert isinstance(alone, SplitStep) and alone.inside is None


def test_what_excludes_recomputation_says_so() -> None:
    refused = CannotSplit(asked="split", found="rows meet", do="nothing")
    with pytest.raises(CannotSplit, match="rows meet"):
        run_by(ways(refused), **RECOMPUTE, split_rows={"rows": 4})
    assert isinstance(run_by(ways(refused), **RECOMPUTE), MappedStep)
    with pytest.raises(CannotSplit, match="beside exact_batchnorm"):
        run_by(ways(refused), **RECOMPUTE, exact_batchnorm={"rows": 4})
    with pytest.raises(CannotSplit, match="fully_shard"):
        run_by(ways(), SimpleNamespace(sharded=True), **RECOMPUTE, split_rows={"rows": 4})
