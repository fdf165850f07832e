"""Plans that round otherwise than declared: the same as the plain step under that rounding, and what it costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.undisturbed import step_undisturbed
from samegrad.records import Exactness, Plan, Same, Verdict
from samegrad.verify.gradients import _planned
from samegrad.verify.rounded import Rounding
from samegrad.verify.sides import Bench, plain_gradients
from samegrad.verify.tiers import _with_reference

from ..contract.lever_zoo import MODELS, forced, plan_with
from ..contract.plain import assert_bitwise, cross_entropy, labelled, mlp, spread

F32 = torch.float32


def by_hand(model: nn.Module, loss_fn: Any, batch: Any, dtype: torch.dtype | None, wide: str = "") -> dict[str, Tensor]:
    """Gradients of an ordinary backward, under autocast where there is a dtype; ``wide`` stays in float32."""
    twin = copy.deepcopy(model)
    if wide:
        part = twin.get_submodule(wide)
        forward = part.forward
        part.register_forward_pre_hook(lambda _, given: tuple(leaf.float() for leaf in given))
        part.forward = torch.autocast("cpu", enabled=False)(forward)  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = loss_fn(twin(batch[0]), batch)
    loss.backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("wide", [False, True], ids=["all narrow", "the head wide"])
def test_the_reference_is_autocast_written_by_hand(kind: str, wide: bool) -> None:
    model, batch = MODELS[kind](F32)
    head = {"mlp": "6", "cnn": "9", "transformer": "3", "lstm": "2"}[kind] if wide else ""
    plan = plan_with(autocast={"dtype": "bfloat16", "full_precision": [head] if head else []})
    step = sg.Step(model, spread)
    with Rounding.of(plan).applied(step.declared) as declared:
        found = plain_gradients(declared, batch)
    assert_bitwise(found.by_name, by_hand(model, spread, batch, torch.bfloat16, head))
    assert not torch.is_autocast_enabled("cpu") and all("forward" not in vars(part) for part in model.modules())


@pytest.mark.parametrize("split", [{}, {"split_rows": {"rows": 5}}], ids=["whole", "split"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_the_lever_costs_is_the_distance_to_the_declared_step(kind: str, split: dict[str, Any]) -> None:
    model, batch = MODELS[kind](F32)
    verdict = sg.verify_step(forced(model, cross_entropy, autocast={}, **split), batch)
    declared = by_hand(model, cross_entropy, batch, None)
    narrow = by_hand(model, cross_entropy, batch, torch.bfloat16)
    size = torch.stack([g.norm() for g in declared.values()]).norm()
    distance = torch.stack([(narrow[name] - g).norm() for name, g in declared.items()]).norm()
    assert verdict.departure is not None
    # In chunks, bfloat16 rounds a little otherwise.
    assert verdict.departure.gradient_norm_fraction == pytest.approx(float(distance / size), rel=0.3 if split else 1e-4)
    assert verdict.reference == "the plain step under autocast in bfloat16 on cpu"
    assert Verdict.from_json(verdict.to_json()) == verdict


def test_a_plan_that_does_not_round_departs_from_nothing() -> None:
    verdict = sg.verify_step(sg.Step(mlp(F32), cross_entropy, rows=8), labelled(61, F32))
    assert verdict.departure is None and verdict.reference == "the plain step on cpu"
    assert (verdict.asked, verdict.found) == (Exactness.SAME_SUM, Exactness.SAME_SUM)


@pytest.mark.parametrize("rows", [None, 8])
def test_autocast_that_the_user_declared_is_part_of_the_step(rows: int | None) -> None:
    plan = plan_with(recompute={"blocks": ["0"]}, **({"split_rows": {"rows": rows}} if rows else {}))
    step = sg.Step(mlp(F32), cross_entropy, plan=plan)
    with torch.autocast("cpu", torch.bfloat16):
        verdict = sg.verify_step(step, labelled(61, F32))
    assert verdict.same and verdict.departure is None and verdict.dtype == "bfloat16"
    assert verdict.found is (Exactness.SAME_SUM if rows else Exactness.SAME_BITS)


@pytest.mark.parametrize(("split", "answer"), [({}, Same.SAME), ({"split_rows": {"rows": 8}}, Same.UNPROVEN)])
def test_bits_prove_what_a_low_precision_alone_does_not(split: dict[str, Any], answer: Same) -> None:
    model = mlp(F32)
    plan = plan_with(autocast={}, **split)
    # A forward that closes over the model cannot be given a copy in float64.
    step = sg.Step(
        model, cross_entropy, plan=plan, forward=lambda _, batch: model(batch[0]), allow=Exactness.ROUNDED
    )  # fmt: skip
    verdict = sg.verify_step(step, labelled(61, F32))
    assert verdict.answer is answer
    assert verdict.found is (Exactness.ROUNDED if answer is Same.SAME else None)


def test_the_cpu_in_float64_stands_for_the_declared_step_and_for_the_rounded_one() -> None:
    verdict = sg.verify_step(forced(mlp(F32), cross_entropy, autocast={}, split_rows={"rows": 8}), labelled(61, F32),
                             reference="cpu")  # fmt: skip
    assert verdict.same and verdict.reference == "the plain step on cpu in float64"
    assert verdict.found is Exactness.ROUNDED


# float16


class Tiny(nn.Module):
    """Gradients of 1e-8, which float16 does not hold without a loss scale."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = mlp(F32), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).float() * self.factor


@pytest.mark.parametrize(("factor", "largest"), [(1e-6, 2.0**16), (3e2, 2.0**10)], ids=["tiny", "large"])
def test_float16_is_compared_under_a_loss_scale_that_leaves_gradients_finite(factor: float, largest: float) -> None:
    model, batch = Tiny(factor), labelled(61, F32)

    def sum_of_squares(outputs: Tensor, batch: Any) -> Tensor:
        return outputs.square().sum() / factor

    step = forced(model, sum_of_squares, autocast={"dtype": "float16"}, split_rows={"rows": 8})
    verdict = sg.verify_step(step, batch)
    assert verdict.same and verdict.dtype == "float16", [check for check in verdict.checks if not check.passed]
    planned = _planned(step, batch, step.declared.layout(batch), step.sizes_for(batch))
    with step_undisturbed(step.declared) as (generators, state):
        scaled, plain = _with_reference(planned, Bench(generators, state, batch))
    assert 1 < scaled.loss_scale <= largest
    unscaled = by_hand(model, sum_of_squares, batch, None)
    for name, gradient in plain.by_name.items():
        assert gradient is not None
        torch.testing.assert_close(gradient, unscaled[name], rtol=0.05, atol=0.02 * float(unscaled[name].abs().max()))


def test_the_scaler_of_both_sides_is_no_scaler_of_the_users() -> None:
    plan: Plan = plan_with(autocast={"dtype": "float16"}, split_rows={"rows": 8})
    step = sg.Step(mlp(F32), cross_entropy, plan=plan, allow=Exactness.ROUNDED)
    assert sg.verify_step(step, labelled(61, F32)).same
    with pytest.raises(sg.UsageError, match="no scaler="):
        step.backward(labelled(61, F32))
