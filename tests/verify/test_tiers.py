"""Each tier by itself: what it lets pass, what it does not, and that it is said which were compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.declared import declare
from samegrad.exact.undisturbed import ModuleState
from samegrad.records import Same, Verdict
from samegrad.verify import tolerance
from samegrad.verify.compare import (
    Allowance,
    Gradients,
    no_further_from_float64,
    same_finiteness,
    same_function,
    same_parameters,
)
from samegrad.verify.precision import precision_in_use, uses_batch_statistics
from samegrad.verify.state import LeftBehind

from ..contract.plain import cross_entropy, labelled, mlp, spread

N = 61
D = torch.float64


@pytest.mark.parametrize(
    ("dtype", "tiers"), [(D, (0, 1)), (torch.float32, (0, 1, 2, 3)), (torch.bfloat16, (0, 1, 2, 3))], ids=str
)
@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
def test_the_tiers_that_ran_are_those_that_can(dtype: torch.dtype, tiers: tuple[int, ...], loss_fn: Any) -> None:
    verdict = sg.verify_step(sg.Step(mlp(dtype), loss_fn, rows=8), labelled(N, dtype))
    assert verdict.same and verdict.tiers == tiers
    names = {check.name for check in verdict.checks if check.tier == 0}
    bitwise = {"which parameters have a gradient", "whether a scaler would skip", "buffers", "generators"}
    assert names == bitwise | ({"second pass"} if loss_fn is spread else set())


def test_without_float64_only_the_dtype_that_runs_is_compared() -> None:
    model = mlp(torch.bfloat16)
    step = sg.Step(model, cross_entropy, rows=8, forward=lambda _, batch: model(batch[0]))
    verdict = sg.verify_step(step, labelled(N, torch.bfloat16))
    assert verdict.answer is Same.UNPROVEN and verdict.tiers == (0, 2)


def test_float16_is_compared_with_what_subnormal_numbers_lose() -> None:
    verdict = sg.verify_step(sg.Step(mlp(torch.float16), cross_entropy, rows=8), labelled(N, torch.float16))
    assert verdict.same and verdict.dtype == "float16"
    gradient = torch.full((5,), 3e-7)
    plain, ours = (Gradients({"w": g}, 1.0, {"w": torch.full((5,), 1e-7)}) for g in (gradient, gradient + 2**-24))
    # Half a subnormal number in each of 4 chunks is more than the difference, which the u of float16 does not explain.
    for chunks, passes in ((0, False), (4, True)):
        lost = tolerance.subnormal_loss(torch.float16, chunks)
        allowance = Allowance(2, tolerance.precision_of(torch.float16), lost=lost)
        assert all(check.passed for check in same_function(plain, ours, allowance)) == passes
    assert tolerance.subnormal_loss(torch.float16, 4, scale=1024.0) == lost / 1024
    assert tolerance.subnormal_loss(torch.bfloat16, 4) == 0


def side(**gradients: Tensor | None) -> Gradients:
    return Gradients({name: g for name, g in gradients.items() if g is not None}, 1.0)


def test_which_parameters_and_whether_a_scaler_would_skip() -> None:
    one, bad = torch.ones(3), torch.tensor([1.0, torch.inf, 1.0])
    assert same_parameters(side(a=one), side(a=one)).passed
    missing = same_parameters(side(a=one, b=one), side(a=one, b=None))
    assert not missing.passed and missing.worst == "b" and missing.tier == 0
    assert same_finiteness(side(a=bad, b=one), side(a=one, b=bad)).passed
    for sides in ((side(a=one), side(a=bad)), (side(a=bad), side(a=one))):
        assert not same_finiteness(*sides).passed


# State


def after_plain(model: nn.Module) -> LeftBehind:
    declared = declare(model, cross_entropy)
    before = ModuleState(declared.modules)
    model(labelled(N)[0])
    return LeftBehind.after(declared, before)


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)).double()


def failed(left: LeftBehind) -> set[str]:
    return {check.name for check in left.checks(tolerance.precision_of(D)) if not check.passed}


def test_running_statistics_are_sums_and_their_count_is_not() -> None:
    model = normalised()
    left = after_plain(model)
    assert failed(left) == set()
    model[1].running_mean *= 1 + 4 * torch.finfo(D).eps
    assert failed(left) == set()
    model[1].running_mean *= 1.005
    assert failed(left) == {"buffers that are sums, float64"}
    model[1].running_mean /= 1.005
    model[1].num_batches_tracked += 1
    assert failed(left) == {"buffers"}


def test_a_buffer_that_the_plain_step_leaves_alone_may_not_move_a_bit() -> None:
    model = normalised().eval()
    left = after_plain(model)
    variance = model[1].running_var
    variance[0] = torch.nextafter(variance[0], variance[0] + 1)
    assert failed(left) == {"buffers"}


def test_generators_must_end_where_they_do_after_the_plain_step() -> None:
    left = after_plain(normalised())
    state = torch.get_rng_state()
    torch.rand(1)
    assert failed(left) == {"generators"}
    torch.set_rng_state(state)
    assert failed(left) == set()


# Precision


@pytest.fixture
def products() -> Iterator[dict[str, Any]]:
    """The places where torch keeps how float32 products are rounded, as they were afterwards."""
    backends: Any = torch.backends
    places = {"matmul": backends.cuda.matmul, "cudnn.conv": backends.cudnn.conv, "cudnn.rnn": backends.cudnn.rnn}
    before = {name: place.fp32_precision for name, place in places.items()}
    yield places
    for name, place in places.items():
        place.fp32_precision = before[name]


@pytest.mark.parametrize(
    ("make", "setting", "expected"),
    [
        (lambda: nn.Linear(3, 3), "matmul", tolerance.TF32),
        (lambda: nn.Linear(3, 3), "cudnn.conv", tolerance.precision_of(torch.float32)),
        (lambda: nn.Conv1d(3, 3, 1), "cudnn.conv", tolerance.TF32),
        (lambda: nn.LSTM(3, 3), "cudnn.rnn", tolerance.TF32),
        (lambda: nn.Conv1d(3, 3, 1).double(), "cudnn.conv", tolerance.precision_of(D)),
        (lambda: nn.Linear(3, 3), "", tolerance.precision_of(torch.float32)),
    ],
)
def test_products_in_tf32_are_seen_where_the_network_has_them(
    make: Any, setting: str, expected: tolerance.Precision, products: dict[str, Any]
) -> None:
    for name, place in products.items():
        place.fp32_precision = "tf32" if name == setting else "ieee"
    assert precision_in_use(declare(make(), cross_entropy, device="cuda")) == expected
    assert precision_in_use(declare(make(), cross_entropy)) != tolerance.TF32


def test_tf32_and_what_is_narrower_prove_no_logic() -> None:
    proven = {kind for kind in (D, torch.float32, torch.bfloat16, torch.float16) if tolerance.proves_logic(kind)}
    assert proven == {D, torch.float32} and not tolerance.proves_logic(tolerance.TF32)


def test_batch_statistics_are_seen_in_the_mode_that_uses_them() -> None:
    assert uses_batch_statistics(declare(normalised(), cross_entropy))
    assert not uses_batch_statistics(declare(normalised().eval(), cross_entropy))
    assert not uses_batch_statistics(declare(nn.InstanceNorm1d(3, affine=True), cross_entropy))


# What is kept, and what is left alone


def test_a_verdict_of_before_tiers_and_faults_is_still_read() -> None:
    verdict = sg.verify_step(sg.Step(mlp(), cross_entropy, rows=8), labelled(N))
    document = json.loads(verdict.to_json())
    del document["fault"]
    for check in document["checks"]:
        del check["tier"]
    old = Verdict.from_json(json.dumps(document))
    assert old.fault == "" and old.tiers == () and old.same
    assert dataclasses.replace(old, checks=verdict.checks) == verdict


def test_a_forward_that_closes_over_the_model_leaves_no_gradient_there() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3))
    step = sg.Step(model, cross_entropy, rows=8, forward=lambda _, batch: model(batch[0]))
    sg.verify_step(step, (torch.arange(N) % 9, labelled(N)[1]))
    assert all(p.grad is None for p in model.parameters())


def gradients_of(entries: Tensor) -> Gradients:
    return Gradients({"weight": entries}, 1.0, {"weight": entries.abs()})


@pytest.mark.parametrize(
    ("precision", "apart", "passes"),
    [(tolerance.TF32, 5e-3, True), (tolerance.TF32, 0.1, False),
     (tolerance.precision_of(torch.float32), 5e-3, False), (tolerance.precision_of(torch.float32), 1e-6, True)],
    ids=["rounded to TF32", "more than rounded", "in float32", "rounded in float32"],
)  # fmt: skip
def test_a_plain_step_that_rounds_no_product_to_tf32_is_no_bound_for_one_that_does(
    precision: tolerance.Precision, apart: float, passes: bool
) -> None:
    exact = gradients_of(torch.ones(64))
    ours = gradients_of(torch.ones(64) * (1 + apart))
    check = no_further_from_float64(exact, ours, exact, Allowance(tier=2, precision=precision))
    assert check.passed is passes
