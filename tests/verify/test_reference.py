"""The ladder of references: the device, else the CPU, else fewer rows; which it was is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.execute.row_counts import RowCounts
from samegrad.measure import counters
from samegrad.measure.laws import fit_laws
from samegrad.measure.probe import Timed, probe_plain
from samegrad.records import Same, Verdict
from samegrad.verify import gradients, reference

from ..contract.plain import cross_entropy, labelled, left_alone, mlp, spread

N = 61
Patch = pytest.MonkeyPatch
ON_DEVICE, ON_CPU = "the plain step on cpu", "the plain step on cpu in float64"


class Elsewhere:
    """Stands for a device that is not the CPU, where all tensors are on the CPU: its free bytes are another number."""

    def __init__(self, monkeypatch: Patch, *, device_bytes: int, host_bytes: int) -> None:
        asked = [0]

        def free_now(device: torch.device) -> tuple[int, str]:
            # The device is asked first, and the host only if that was not enough.
            asked[0] += 1
            return (device_bytes if asked[0] == 1 else host_bytes), "planted"

        monkeypatch.setattr(counters, "free_now", free_now)
        monkeypatch.setattr(gradients, "_is_host", lambda device: False)


def fitting(model: nn.Module, rows: int) -> int:
    """Free bytes under which ``rows`` rows fit and twice as many do not."""
    step = sg.Step(model, cross_entropy, rows=8)
    laws = reference._laws(step.declared, labelled(N), step.declared.layout(labelled(N)))
    return 2 * reference._peak(laws, rows) + 12 * reference._weight_bytes(step.declared)


def verified(loss_fn: Any = cross_entropy, **how: Any) -> Verdict:
    model = mlp()
    with left_alone(model):
        return sg.verify_step(sg.Step(model, loss_fn, rows=8), labelled(N), **how)


def test_the_device_where_the_batch_fits(monkeypatch: Patch) -> None:
    Elsewhere(monkeypatch, device_bytes=2**40, host_bytes=2**40)
    verdict = verified()
    assert (verdict.reference, verdict.rows_checked, verdict.batch_rows) == (ON_DEVICE, N, N)


@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
def test_else_the_cpu_on_the_whole_batch(monkeypatch: Patch, loss_fn: Any) -> None:
    Elsewhere(monkeypatch, device_bytes=fitting(mlp(), 15), host_bytes=2**40)
    verdict = verified(loss_fn)
    assert verdict.same and verdict.rows_checked == N
    assert verdict.reference == f"{ON_CPU} (rounding: {ON_DEVICE}, on as many rows as fit, 15 rows)"
    whole = [check for check in verdict.checks if check.name.endswith("against the cpu")]
    assert {check.tier for check in whole} == {1} and len(whole) == 3


@pytest.mark.parametrize("why", ["memory", "seconds"])
def test_else_as_many_rows_as_fit_on_the_device(monkeypatch: Patch, why: str) -> None:
    Elsewhere(monkeypatch, device_bytes=fitting(mlp(), 15), host_bytes=1000 if why == "memory" else 2**40)
    if why == "seconds":
        monkeypatch.setattr(reference, "timed", lambda *_: Timed(3600.0, 0.0))
    verdict = verified()
    assert verdict.same and (verdict.rows_checked, verdict.batch_rows) == (15, N)
    assert verdict.reference == f"{ON_DEVICE}, on as many rows as fit"


def test_the_cpu_sees_a_fault_that_few_rows_do_not(monkeypatch: Patch) -> None:
    class Wide(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            # Wrong in the planned chunks of a whole batch, right in the uneven ones that few rows are cut into. Only
            # with data, so that nobody sees it who follows the step without.
            return super().forward(x) * (1.01 if len(x) == 20 and type(x) is Tensor else 1.0)

    model = Wide(6, 3).double()
    step = sg.Step(model, cross_entropy, rows=20)
    assert sg.verify_step(step, labelled(N), rows=15).same
    Elsewhere(monkeypatch, device_bytes=fitting(model, 15), host_bytes=2**40)
    verdict = sg.verify_step(step, labelled(N))
    assert verdict.answer is Same.DIFFERS
    failed = [check.name for check in verdict.checks if not check.passed]
    assert failed and all(name.endswith("against the cpu") for name in failed)
    assert "module the model (Wide)" in verdict.fault


def test_a_step_that_draws_has_no_reference_on_another_device(monkeypatch: Patch) -> None:
    def noisy(outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs + torch.rand_like(outputs), batch)

    Elsewhere(monkeypatch, device_bytes=fitting(mlp(), 15), host_bytes=2**40)
    assert verified(noisy).reference == f"{ON_DEVICE}, on as many rows as fit"
    Elsewhere(monkeypatch, device_bytes=2**40, host_bytes=2**40)
    with pytest.raises(sg.UsageError, match="draws random numbers"):
        verified(noisy, reference="cpu")


def test_a_rung_can_be_asked_for(monkeypatch: Patch) -> None:
    assert verified(reference="cpu").reference == ON_CPU
    part = verified(reference="cpu", rows=20)
    assert (part.reference, part.rows_checked) == (ON_CPU, 20)
    Elsewhere(monkeypatch, device_bytes=fitting(mlp(), 15), host_bytes=2**40)
    assert verified(reference="device").rows_checked == 15
    with pytest.raises(sg.UsageError, match="neither 'device' nor 'cpu'"):
        verified(reference="gpu")


def test_the_cpu_that_cannot_be_the_reference_is_refused_by_reason() -> None:
    model = mlp()
    # A forward that closes over the model cannot be given a copy in float64.
    step = sg.Step(model.float(), cross_entropy, rows=8, forward=lambda _, batch: model(batch[0]))
    with pytest.raises(sg.UsageError, match="cannot run"):
        sg.verify_step(step, labelled(N, torch.float32), reference="cpu")


def test_more_rows_than_usual_only_where_they_take_seconds(monkeypatch: Patch) -> None:
    monkeypatch.setattr(reference, "_USUAL_ROWS", 20)
    assert verified().rows_checked == N
    monkeypatch.setattr(reference, "timed", lambda *_: Timed(3600.0, 0.0))
    verdict = verified()
    assert (verdict.rows_checked, verdict.reference) == (20, f"{ON_DEVICE}, on as many rows as take seconds")


class _AboveSixteenRows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z - z.mean(0) if len(x) > 16 else z


def test_code_that_does_something_else_for_many_rows_is_refused() -> None:
    step = sg.Step(_AboveSixteenRows(6, 3).double(), cross_entropy, rows=8)
    with pytest.raises(sg.CannotSplit, match="calls mean on 61 rows"):
        sg.verify_step(step, labelled(61))


def test_and_differs_where_nobody_looked(monkeypatch: Patch) -> None:
    """Trials on eight rows cannot see it."""
    monkeypatch.setattr(RowCounts, "check", lambda *_: None)
    step = sg.Step(_AboveSixteenRows(6, 3).double(), cross_entropy, rows=8)
    assert sg.verify_step(step, labelled(61)).answer is Same.DIFFERS


def test_its_bytes_are_known_without_timing_the_step() -> None:
    model, runs = mlp(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    declared, batch = sg.Step(model, cross_entropy, rows=8).declared, labelled(N)
    layout = declared.layout(batch)
    timed = fit_laws([probe_plain(declared, batch, layout, batch_rows=n) for n in (2, 4, 8)], missing_bytes=0)
    with_timing = len(runs)
    assert reference._laws(declared, batch, layout) == timed
    # One run to set up, and one that is counted for each of three numbers of rows.
    assert len(runs) - with_timing == 4 < with_timing


@pytest.mark.parametrize(("seconds", "possible", "rows"), [(3600.0, False, [2]), (1e-6, True, [2, 8, 8])])
def test_a_cpu_that_takes_too_long_is_seen_on_two_rows(
    monkeypatch: Patch, seconds: float, possible: bool, rows: list[int]
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(reference, "plain_gradients", lambda declared, few: seen.append(len(few[0])))
    monkeypatch.setattr(reference, "timed", lambda run, device: (run(), Timed(seconds, 0.0))[1])
    declared, batch = sg.Step(mlp(), cross_entropy, rows=8).declared, labelled(N)
    assert reference.cpu_is_possible(declared, batch, declared.layout(batch), N) is possible
    assert seen == rows


def summed_in_halves(model: nn.Module, batch: Any) -> Tensor:
    """What the model is, computed by other means: on two parts of the rows."""
    return torch.cat([model(rows) for rows in batch[0].tensor_split(2)])


def half_without_gradient(model: nn.Module, batch: Any) -> Tensor:
    first, second = batch[0].tensor_split(2)
    return torch.cat([model(first), model(second).detach()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_forward_of_other_means_is_compared_with_the_plain_one(dtype: torch.dtype) -> None:
    plan = sg.Plan(levers={}, exactness=sg.Exactness.SAME_SUM, batch_rows=N)
    for forward, same in ((summed_in_halves, True), (half_without_gradient, False)):
        step = sg.Step(
            mlp(dtype), cross_entropy, forward=forward, plain_forward=lambda m, batch: m(batch[0]), plan=plan
        )
        verdict = sg.verify_step(step, labelled(N, dtype))
        assert verdict.same is same
        assert verdict.found is not sg.Exactness.SAME_BITS or verdict.max_relative_error == 0
        assert same or verdict.fault.startswith("forward=")


def test_a_split_of_such_a_forward_is_compared_with_the_plain_one_too() -> None:
    for factor in (1.0, 1.001):
        step = sg.Step(
            mlp(), cross_entropy, rows=8, forward=lambda m, batch, factor=factor: factor * m(batch[0]),
            plain_forward=lambda m, batch: m(batch[0]),
        )  # fmt: skip
        assert sg.verify_step(step, labelled(N)).same is (factor == 1)
