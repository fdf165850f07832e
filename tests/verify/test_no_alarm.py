"""Right steps raise no alarm in any tier: the zoo of models that treat rows alone, and deep nets of ReLUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import samegrad as sg
from samegrad.exact import batchnorm
from samegrad.recipes.fewshot_cosine.backbones import make_backbone
from samegrad.recipes.fewshot_cosine.model import EpisodeShape, Head
from samegrad.recipes.fewshot_cosine.objective import EpisodeLoss

from ..contract.lever_zoo import Mean, forced
from ..contract.plain import cross_entropy, spread
from ..crossed import crossed
from ..exact import zoo
from ..exact.module_zoo import BY_PARTS, BY_ROWS
from ..exact.test_module_zoo import batch as zoo_batch
from ..exact.test_module_zoo import forward as zoo_forward
from ..exact.test_module_zoo import loss_on, seeded
from ..exact.test_probes import SAFE

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("name", "loss", "dtype"), crossed(SAFE, ["mse", "info nce"], DTYPES))
def test_models_that_treat_rows_alone(name: str, loss: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    step = sg.Step(SAFE[name]().to(dtype), zoo.LOSSES[loss][0], rows=[8, 8, 8, 5], forward=zoo.forward)
    verdict = sg.verify_step(step, zoo.batch(dtype))
    assert verdict.same and verdict.fault == "", [check for check in verdict.checks if not check.passed]


# torch's own gradients of parts do not go through these, or a constant of theirs is float64.
NOT_IN_FLOAT32 = {"a reentrant checkpoint", "complex weights", "a codebook that follows the rows"}


@pytest.mark.parametrize("name", crossed(name for name in (*BY_ROWS, *BY_PARTS) if name not in NOT_IN_FLOAT32))
def test_every_module_of_the_zoo_in_float32(name: str) -> None:
    seeded(0)
    model = (BY_ROWS[name] if name in BY_ROWS else BY_PARTS[name].make)().to(torch.float32)
    rows = {key: value.float() if value.is_floating_point() else value for key, value in zoo_batch().items()}
    step = sg.Step(model, loss_on("rmse"), rows=[8, 8, 8, 5], forward=zoo_forward)
    verdict = sg.verify_step(step, rows)
    assert verdict.same and verdict.fault == "", [check for check in verdict.checks if not check.passed]


def deep() -> nn.Module:
    torch.manual_seed(0)
    hidden = [layer for i in range(12) for layer in (nn.Linear(32 if i else 16, 32), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(32, 3))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 8, 2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
@pytest.mark.parametrize("make", [deep, convolutions])
def test_units_that_switch_at_zero(make: Callable[[], nn.Module], loss_fn: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(1009, 16, generator=generator).to(dtype), torch.randint(0, 3, (1009,), generator=generator)
    for rows in (30, 400):
        verdict = sg.verify_step(sg.Step(make().to(dtype), loss_fn, rows=rows), batch)
        assert verdict.same, [check for check in verdict.checks if not check.passed]


def normalised(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Kernels of normalisations with channels last take sums over all places one after another."""
    stages = [layer for i in range(3) for layer in (nn.Conv2d(8 if i else 3, 8, 3, padding=1), norm(8), nn.ReLU())]
    return nn.Sequential(*stages, Mean(2, 3), nn.Linear(8, 3))


# Every kind of layer in every dtype, whole and split, each loss and offset in half of them; all where there is time.
@pytest.mark.parametrize(
    ("norm", "rows", "loss_fn", "dtype", "offset"),
    crossed(("batch", "group", "instance"), (None, 5), (cross_entropy, spread), DTYPES[:2], (0.0, 5.0), every=3),
)
def test_kernels_that_add_up_in_another_order(
    norm: str, rows: int | None, loss_fn: Any, dtype: torch.dtype, offset: float
) -> None:
    made = {
        "batch": nn.BatchNorm2d,
        "group": lambda width: nn.GroupNorm(2, width),
        "instance": lambda width: nn.InstanceNorm2d(width, affine=True),
    }[norm]
    split: dict[str, Any] = {"exact_batchnorm" if norm == "batch" else "split_rows": {"rows": rows}} if rows else {}
    for seed in range(3):
        torch.manual_seed(seed)
        model = normalised(made).to(dtype)
        batch = (offset + torch.randn(13, 3, 11, 9)).to(dtype), torch.randint(0, 3, (13,))
        verdict = sg.verify_step(forced(model, loss_fn, layout={}, **split), batch)
        assert verdict.same, [check for check in verdict.checks if not check.passed]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_what_other_kernels_may_round_hides_no_fault(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = normalised(norm)
    batch = torch.randn(13, 3, 11, 9), torch.randint(0, 3, (13,))
    forward = nn.Conv2d.forward
    monkeypatch.setattr(
        nn.Conv2d, "forward",
        lambda self, x: forward(self, x) * (1 if self.weight.is_contiguous() else 1 + 1e-5),
    )  # fmt: skip
    verdict = sg.verify_step(forced(model, spread, layout={}), batch)
    assert not verdict.same and verdict.fault.startswith("lever layout")


@pytest.mark.parametrize("pixels", [16, 28])
def test_batchnorm_in_chunks_under_a_loss_with_parameters(pixels: int) -> None:
    """Rows around zero, so that running means are what is left of values that cancel; so are some gradients."""
    torch.manual_seed(0)
    shape = EpisodeShape(n_way=3, k_shot=2, n_query=3)
    model = make_backbone("Conv4", channels=1).double()
    head = Head(shape, 64 * (pixels // 16) ** 2, method="FSCT_cosine").double()
    rows = torch.randn(shape.images, 1, pixels, pixels).double()
    verdict = sg.verify_step(sg.Step(model, EpisodeLoss(head, shape, weights=(1.0, 0.5, 0.1)), rows=[7, 8]), rows)
    assert verdict.same, [check for check in verdict.checks if not check.passed]


def signs_on_paper(count: int, pixels: int) -> torch.Tensor:
    """Pictures of which most places are of one colour, where one rounding is made again and again."""
    rows = torch.full((count, 1, pixels, pixels), -0.483)
    rows[:, :, 8:-8, 8:-8] += torch.randn(count, 1, pixels - 16, pixels - 16).clamp_min(0)
    return rows.double()


def batchnorm_net() -> nn.Module:
    layers = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, momentum=0.9), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten()).double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_statistics_that_the_plain_kernel_adds_up_one_after_another(dtype: torch.dtype) -> None:
    """Those of a step in float32 are looked at in float64 as well."""
    torch.manual_seed(0)
    step = sg.Step(
        batchnorm_net().to(dtype), lambda outputs, batch: outputs.square().mean().log(), rows=[20, 20, 13]
    )
    verdict = sg.verify_step(step, signs_on_paper(53, 40).to(dtype))
    assert verdict.same, [check for check in verdict.checks if not check.passed]


@pytest.mark.parametrize("rows", [signs_on_paper(15, 24), torch.randn(15, 1, 24, 24).double()], ids=["paper", "noise"])
@pytest.mark.parametrize("what", ["mean", "variance"])
def test_what_batchnorm_in_chunks_may_round_hides_no_fault(
    what: str, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    statistics = batchnorm.RunningMoments.statistics

    def off(self: batchnorm.RunningMoments, *given: Any) -> Any:
        found = statistics(self, *given)
        return dataclasses.replace(found, **{what: getattr(found, what) + 1e-6})

    step = sg.Step(batchnorm_net(), lambda outputs, batch: outputs.square().mean().log(), rows=[7, 8])
    step.split_for(rows, step.declared.layout(rows))
    monkeypatch.setattr(batchnorm.RunningMoments, "statistics", off)
    assert not sg.verify_step(step, rows).same
