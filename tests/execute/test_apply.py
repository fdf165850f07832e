"""A plan in force, and undone."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from samegrad.declared import DeclaredStep, declare
from samegrad.errors import CannotSplit, UsageError
from samegrad.exact.mapped import MappedStep
from samegrad.exact.split import SplitStep
from samegrad.execute.apply import Standing, applied, chunked_step, in_force
from samegrad.execute.ways import Ways
from samegrad.records import Exactness, Plan

from ..contract.lever_zoo import cnn
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


def convolved() -> tuple[DeclaredStep, torch.optim.Optimizer]:
    model, _ = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return declare(model, cross_entropy, optimizer=optimizer), optimizer


def stands(step: DeclaredStep, optimizer: torch.optim.Optimizer) -> tuple[bool, int]:
    """Whether weights have their channels last, and how many hooks the optimizer has."""
    [weight] = [p for name, p in step.model.named_parameters() if name == "0.weight"]
    return not weight.is_contiguous(), len(optimizer._optimizer_step_pre_hooks)


def test_what_stands_stays_until_a_plan_that_needs_other_comes_or_it_is_closed() -> None:
    step, optimizer = convolved()
    standing = Standing(step)
    standing.bring(plan(layout={}, optimizer_state={}))
    assert stands(step, optimizer) == (True, 2)
    hooks = list(optimizer._optimizer_step_pre_hooks)
    standing.bring(plan(layout={}, optimizer_state={}, split_rows={"rows": 3}))
    assert list(optimizer._optimizer_step_pre_hooks) == hooks
    standing.bring(plan(optimizer_state={}))
    assert stands(step, optimizer) == (False, 1)
    standing.bring(plan(split_rows={"rows": 3}))
    assert stands(step, optimizer) == (False, 0)
    standing.bring(plan(layout={}))
    for _ in range(2):
        standing.close()
        assert stands(step, optimizer) == (False, 0)


def test_workspaces_are_taken_once_however_often_plans_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through all of the process's objects and gives the cache back, which no step may pay for again.

    A step without levers that stand has only those taken anew that cuBLAS keeps already.
    """
    taken: list[str] = []
    for how in ("take_workspaces", "retake_workspaces"):
        monkeypatch.setattr(f"samegrad.execute.apply.counters.{how}", lambda _, how=how: taken.append(how))
    for first, second, how in (({}, {"layout": {}}, "retake_workspaces"), ({"layout": {}}, {}, "take_workspaces")):
        places = Standing(declare(cnn()[0], cross_entropy))
        for _ in range(3):
            places.bring(plan(**first))
            places.bring(plan(**second))
        places.close()
        assert taken == [how]
        taken.clear()


def test_what_cannot_stand_leaves_nothing_standing_and_is_tried_again() -> None:
    model, _ = cnn()
    standing = Standing(declare(model, cross_entropy))
    for _ in range(2):
        with pytest.raises(UsageError, match="optimizer="):
            standing.bring(plan(layout={}, optimizer_state={}))
        assert all(p.is_contiguous() for p in model.parameters())


def test_in_force_is_both_and_is_undone_after_an_exception() -> None:
    step, optimizer = convolved()
    with pytest.raises(ZeroDivisionError), in_force(plan(layout={}, split_rows={"rows": 4}), step, 10) as execution:
        assert execution.sizes == (4, 4, 2) and execution.declared is not step
        assert stands(step, optimizer) == (True, 1)
        raise ZeroDivisionError
    assert stands(step, optimizer) == (False, 0)


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


LEFT_OPEN = """
import torch
from torch import nn
import samegrad as sg

model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(36, 5))
batch = torch.randn(4, 3, 4, 4), torch.randint(0, 5, (4,))
plan = sg.Plan(levers={"layout": {}}, exactness=sg.Exactness.SAME_SUM, batch_rows=4)
loss = lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1])
step = sg.Step(model, loss, forward=lambda net, batch: net(batch[0]), plan=plan)
step.backward(batch)
assert not model[0].weight.is_contiguous()
"""


def test_a_process_that_leaves_its_step_open_ends_well() -> None:
    """Strides were put back while the interpreter took tensors apart, which ended in a core dump."""
    ended = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-500:]
