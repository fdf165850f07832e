"""``verify_step`` on one GPU: every rung of its ladder of references, every tier, and faults that must be seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import samegrad as sg
from samegrad.exact.split import SplitStep
from samegrad.records import Same
from samegrad.verify import reference

from ..contract.plain import cross_entropy, labelled, mlp, spread

pytestmark = pytest.mark.gpu

N = 61
LOSSES = {"one pass": cross_entropy, "two passes": spread}
ON_CPU = "the plain step on cpu in float64"


@pytest.fixture(params=["ieee", "tf32"])
def products(request: pytest.FixtureRequest) -> Iterator[str]:
    """float32 products in full and in TF32."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = request.param
    yield request.param
    matmul.fp32_precision = before


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_right_step_is_the_same_on_every_rung(
    name: str, dtype: torch.dtype, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = labelled(N, dtype)
    batch = (x, y) if place == "host" else (x.cuda(), y.cuda())
    step = sg.Step(mlp(dtype).cuda(), LOSSES[name], rows=8)
    whole = sg.verify_step(step, batch)
    assert whole.answer is Same.SAME, whole.checks
    assert whole.reference == f"the plain step on {torch.cuda.get_device_name()}"
    assert whole.tiers == ((0, 1) if dtype is torch.float64 else (0, 1, 2, 3))
    asked = sg.verify_step(step, batch, reference="cpu")
    assert asked.same and asked.reference == ON_CPU and asked.rows_checked == N, asked.checks
    monkeypatch.setattr(reference, "_largest_that_fits", lambda laws, wanted, free: 15)
    next_rung = sg.verify_step(step, batch)
    assert next_rung.same and next_rung.reference.startswith(f"{ON_CPU} (rounding: the plain step on ")
    assert next_rung.rows_checked == N
    assert sg.verify_step(step, batch, reference="device").rows_checked == 15


@pytest.mark.parametrize("name", LOSSES)
def test_what_rounds_products_to_tf32_is_said_and_proven_in_float64(name: str, products: str) -> None:
    step = sg.Step(mlp(torch.float32).cuda(), LOSSES[name], rows=8)
    verdict = sg.verify_step(step, labelled(N, torch.float32))
    assert verdict.answer is Same.SAME, verdict.checks
    assert verdict.compared_dtype == "float64"
    assert verdict.dtype == ("float32 with TF32 products" if products == "tf32" else "float32")


@pytest.mark.parametrize("where", ["device", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_a_percent_is_seen_from_both_references(
    where: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = sg.Step(mlp(dtype).cuda(), cross_entropy, rows=8)
    assert sg.verify_step(step, labelled(N, dtype), reference=where).same
    right = SplitStep.totals

    def wrong(self: SplitStep, *args: Any, **kwargs: Any) -> Any:
        totals = right(self, *args, **kwargs)
        totals.totals = [None if t is None else t * 1.005 for t in totals.totals]
        return totals

    monkeypatch.setattr(SplitStep, "totals", wrong)
    verdict = sg.verify_step(step, labelled(N, dtype), reference=where)
    assert verdict.answer is Same.DIFFERS and "lever split_rows" in verdict.fault


def test_a_plan_that_runs_whole_differs_by_no_more_than_plain_does() -> None:
    # The gradient of an embedding is added up by atomics, in any order.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3, 64), nn.Flatten(), nn.Linear(64 * 32, 3)).cuda()
    ids = torch.randint(0, 3, (4096, 32), generator=torch.Generator().manual_seed(0))
    step = sg.Step(model, cross_entropy, rows=4096)
    assert sg.verify_step(step, (ids, labelled(4096)[1])).same
