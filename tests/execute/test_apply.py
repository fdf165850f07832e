"""A plan in force, and undone."""

from __future__ import annotations

import pytest

from samegrad.declared import declare
from samegrad.execute.apply import applied
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
