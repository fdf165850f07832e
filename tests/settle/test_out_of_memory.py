"""Memory that runs out while a plan is made or verified: fewer rows are tried, or it is said what did not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import samegrad as sg
from samegrad.errors import SamegradError
from samegrad.exact.out_of_memory import OutOfMemory
from samegrad.exact.step_draws import StepDraws
from samegrad.execute.ways import find_ways
from samegrad.levers.layout import Layout
from samegrad.measure import probe_sets, within_memory
from samegrad.measure.laws import peak_of
from samegrad.measure.within_memory import WithinMemory
from samegrad.records import Budget, Counting, Exactness, Plan, Same
from samegrad.settle import aliases_for, measure, probed_ways

from ..contract.plain import left_alone
from ..execute.failing_memory import FailsAt
from ..measure.traced import cross_entropy
from . import test_probed_ways
from .test_probed_ways import pictures

ROWS, D = 37, torch.float64
LACKS = [torch.OutOfMemoryError("planted"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), MemoryError("none")]


class Lacks(FailsAt):
    """Counts and fails operations that take memory; views and writes in place, such as a restored buffer's, do not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view or func._schema.name.endswith("_"):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class FailsAbove(TorchDispatchMode):
    """An allocator without room for the products of more than ``most`` rows; ``seen``: the rows that ran."""

    def __init__(self, most: int, error: BaseException = LACKS[0]) -> None:
        super().__init__()
        self._most, self._error = most, error
        self.failures, self.seen = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.default:
            if len(made) > self._most:
                self.failures += 1
                raise self._error
            self.seen.add(len(made))
        return made


def apart() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 5))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5))


def coupled(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.std(0).sum() + cross_entropy(outputs, batch)


STEPS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "one pass": (apart, cross_entropy), "two passes": (apart, coupled), "BatchNorm": (normalised, cross_entropy)
}  # fmt: skip


def made(kind: str, **options: Any) -> tuple[sg.Step, Any]:
    torch.manual_seed(0)
    model, loss_fn = STEPS[kind][0]().to(D), STEPS[kind][1]
    batch = torch.randn(ROWS, 4, dtype=D), torch.arange(ROWS) % 5
    return sg.Step(model, loss_fn, optimizer=torch.optim.SGD(model.parameters(), 0.1), **options), batch


def tight(kind: str) -> Budget:
    """A budget that does not hold the plain step, so that levers are probed and rungs measured."""
    step, batch = made(kind)
    plain = measure(step.declared, batch, aliases_for(step.declared)).footprint.predicted_peak_bytes(rows=ROWS)
    return Budget(total_bytes=int(0.92 * plain), device="cpu", counting=Counting.TENSOR_BYTES, source="given")


def planned(kind: str, budget: Budget, at: int | None) -> Lacks:
    """A plan made while operation ``at`` runs out of memory; nothing of the user's may change."""
    step, batch = made(kind)
    assert step.declared.optimizer is not None
    with (
        left_alone(step.declared.network, optimizer=step.declared.optimizer),
        Lacks(at) as failing,
        # Another error than samegrad's own goes on and fails the test.
        contextlib.suppress(SamegradError),
    ):
        plan, _ = sg.settle_plan(step, batch, budget=budget)
        assert plan.predicted_peak_bytes is not None and plan.predicted_peak_bytes <= budget.total_bytes
    return failing


def verified(kind: str, at: int | None) -> Lacks:
    step, batch = made(kind, rows=10)
    step.prepare(batch)
    with Lacks(at) as failing, contextlib.suppress(SamegradError):
        assert sg.verify_step(step, batch, rows=12).answer is Same.SAME
    return failing


def places(run: Callable[[int | None], Lacks], number: int) -> Iterator[int]:
    count = run(None).count
    yield from range(0, count, max(1, count // number))


@pytest.mark.parametrize("kind", STEPS)
def test_wherever_memory_runs_out_planning_and_verifying_raise_no_raw_error(kind: str) -> None:
    budget = tight(kind)
    for at in places(lambda at: planned(kind, budget, at), 3):
        assert planned(kind, budget, at).failed_in
    for at in places(lambda at: verified(kind, at), 2):
        assert verified(kind, at).failed_in


@pytest.mark.slow
@pytest.mark.parametrize("kind", STEPS)
def test_at_every_place_close_by(kind: str) -> None:
    budget = tight(kind)
    for at in places(lambda at: planned(kind, budget, at), 150):
        assert planned(kind, budget, at).failed_in
    for at in places(lambda at: verified(kind, at), 60):
        assert verified(kind, at).failed_in


def test_planted_without_the_block_the_error_is_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(within_memory, "is_out_of_memory", lambda error: False)
    budget = tight("one pass")
    with pytest.raises(torch.OutOfMemoryError, match=r"^planted$"):
        planned("one pass", budget, 300)


def test_another_error_stays_what_it_is() -> None:
    step, batch = made("one pass")
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with Lacks(300, other), pytest.raises(RuntimeError, match="mat1"):
        sg.settle_plan(step, batch, budget=tight("one pass"))


# Every kind of error in a step of its own kind; each in all of them where there is time.
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        pytest.param(kind, error, marks=[pytest.mark.slow] * (at != which), id=f"{kind}-{type(error).__name__}")
        for at, kind in enumerate(STEPS)
        for which, error in enumerate(LACKS)
    ],
)
def test_probes_have_fewer_rows_where_more_do_not_fit_and_predict_the_same(kind: str, error: BaseException) -> None:
    step, batch = made(kind)
    expected = measure(step.declared, batch, aliases_for(step.declared)).footprint
    with FailsAbove(3, error) as failing:
        found = measure(step.declared, batch, aliases_for(step.declared)).footprint
    assert failing.failures > 0 and max(failing.seen) == 3
    assert found.predicted_peak_bytes(rows=ROWS) == expected.predicted_peak_bytes(rows=ROWS)
    ways = [(found.laws, expected.laws)] if expected.laws else []
    ways += [(mine.laws, theirs.laws) for mine, theirs in zip(found.variants, expected.variants, strict=True)]
    assert ways and all(peak_of(mine, 5, ROWS) == peak_of(theirs, 5, ROWS) for mine, theirs in ways)
    # Planted: an allocator with room for them all sees more rows.
    with FailsAbove(ROWS) as roomy:
        measure(step.declared, batch, aliases_for(step.declared))
    assert roomy.failures == 0 and max(roomy.seen) > 3


@pytest.mark.parametrize("kind", STEPS)
def test_where_not_two_rows_fit_it_is_said(kind: str) -> None:
    step, batch = made(kind)
    with FailsAbove(1), pytest.raises(OutOfMemory) as refused:
        measure(step.declared, batch, aliases_for(step.declared))
    assert "2 rows" in refused.value.asked and refused.value.found.startswith("out of memory in the step of 0 (")
    assert "planted" in refused.value.found and "free memory" in refused.value.do
    assert refused.value.__context__ is None and refused.value.__cause__ is None


def test_the_ways_of_a_step_are_found_on_fewer_rows() -> None:
    step, batch = made("BatchNorm")
    layout, aliases = step.declared.layout(batch), aliases_for(step.declared)
    with FailsAbove(4) as failing:
        few = find_ways(step.declared, aliases, batch, layout)
    all_rows = find_ways(step.declared, aliases, batch, layout)
    assert failing.failures == 1 and few.mapped and [w.name for w in few.mapped] == [w.name for w in all_rows.mapped]
    assert few.refusals == all_rows.refusals


def test_a_step_under_a_lever_is_timed_on_half_the_rows_that_laws_promised() -> None:
    step, batch = pictures()
    plan = Plan(levers={Layout.name: Layout().knobs()}, exactness=Exactness.SAME_SUM, batch_rows=ROWS)
    timed = step.declared, batch, plan, (4, 36), StepDraws(None)
    with FailsAbove(10) as failing:
        assert probed_ways._slower_on_rows_that_fit(*timed) > 0
    assert failing.seen == {9} and failing.failures == 2
    with FailsAbove(3), pytest.raises(OutOfMemory, match="time the step under layout on 4 rows"):
        probed_ways._slower_on_rows_that_fit(*timed)


def test_a_lever_that_ran_out_of_memory_is_refused_and_the_others_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> float:
        raise OutOfMemory(asked="time it", found="out of memory in backward", do="free memory")

    monkeypatch.setattr(probed_ways, "_slower", full)
    step, batch, _, limit = test_probed_ways.measured()
    plan, footprint = sg.settle_plan(step, batch, budget=limit)
    assert "split_rows" in plan.levers and footprint.refusals[Layout.name] == "out of memory in backward"


def test_a_verification_takes_the_rows_that_fit() -> None:
    step, batch = made("one pass", rows=10)
    step.prepare(batch)
    with FailsAbove(20) as failing:
        verdict = sg.verify_step(step, batch)
    assert failing.failures > 0 and verdict.answer is Same.SAME
    assert verdict.rows_checked == 18 and verdict.reference.endswith("on as many rows as fit")
    assert sg.verify_step(step, batch).rows_checked == ROWS


class _Large:
    """Weakly referable, and held by a frame."""


def _runs_out(held: list[weakref.ref[_Large]]) -> None:
    large = _Large()
    held.append(weakref.ref(large))
    raise torch.OutOfMemoryError("planted")


def test_nothing_of_the_error_stays_when_the_block_has_ended() -> None:
    step, _ = made("one pass")
    held: list[weakref.ref[_Large]] = []
    gc.disable()
    try:
        line = _runs_out.__code__.co_firstlineno + 3
        with WithinMemory(step.declared) as memory:
            try:
                _runs_out(held)
            except torch.OutOfMemoryError as error:
                # As code does that cleans up and goes on: a cycle of frame and error.
                kept = error
                raise
        assert memory.found == f"out of memory in the step (test_out_of_memory.py:{line}): OutOfMemoryError: planted"
        assert held[0]() is None
        # Planted: an error that is only caught keeps what its frames hold.
        with contextlib.suppress(torch.OutOfMemoryError):
            try:
                _runs_out(held)
            except torch.OutOfMemoryError as error:
                kept = error
                raise
        assert held[1]() is not None
    finally:
        del kept
        gc.enable()


def test_fewer_rows_than_two_are_never_measured_where_there_are_more() -> None:
    step, batch = made("BatchNorm")
    layout = dataclasses.replace(step.declared.layout(batch), rows=1)
    assert probe_sets.fewest_rows(step.declared.layout(batch)) == 2 and probe_sets.fewest_rows(layout) == 1
