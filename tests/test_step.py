"""``Step``: the gradients of the plain step, whatever the rows, and in the right parameters."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import BadInput, CannotSplit, UsageError
from samegrad.records import Exactness, Plan
from samegrad.verify import tolerance

from .contract import plain
from .contract.plain import (
    assert_bitwise,
    assert_close,
    cross_entropy,
    gradients,
    labelled,
    left_alone,
    mlp,
    plain_step,
    spread,
)

N = 29
X, Y = labelled(N)
D = torch.float64
ROWS: list[Any] = [1, 7, 8, N, [10, 1, 18]]


def row_mean(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs - batch[0][:, :3]).square().mean()


def row_sum(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs - batch[0][:, :3]).square().sum()


# How many rows at a time


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("loss_fn", [cross_entropy, row_mean, row_sum, spread], ids=lambda loss_fn: loss_fn.__name__)
def test_every_split_has_the_plain_loss_and_gradients(loss_fn: Any, rows: Any) -> None:
    model = mlp()
    loss, expected = plain_step(model, loss_fn, (X, Y))
    ours = sg.Step(model, loss_fn, rows=rows).backward((X, Y))
    assert_close(gradients(model), expected)
    assert not ours.requires_grad and ours.shape == ()
    assert abs(ours - loss) <= tolerance.loss_allowed(D) * abs(loss)


WHOLE = Plan(levers={}, exactness=Exactness.SAME_BITS, batch_rows=4)


@pytest.mark.parametrize("given", [{"budget": "1GiB", "rows": 4}, {"rows": 4, "plan": WHOLE}], ids="+".join)
def test_two_ways_to_say_how_many_rows_are_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="= and ".join(given)):
        sg.Step(mlp(), cross_entropy, **given)


@pytest.mark.parametrize("rows", [0, -1, 2.0, True, "8", [], [4, 0], [4, 2.0], [4, True]], ids=str)
def test_rows_that_are_no_positive_whole_numbers_are_refused(rows: Any) -> None:
    with pytest.raises(UsageError, match="positive whole numbers"):
        sg.Step(mlp(), cross_entropy, rows=rows)


def test_rows_may_be_a_number_of_numpy() -> None:
    model = mlp()
    step = sg.Step(model, cross_entropy, rows=np.int64(4))
    step.backward((X, Y))
    assert step.plan is not None and step.plan.levers["split_rows"] == {"rows": 4}


def test_a_list_of_rows_that_does_not_add_up_is_refused_with_both_sums() -> None:
    model = mlp()
    with left_alone(model), pytest.raises(BadInput, match=rf"(?s)add up to 28.*{N} rows"):
        sg.Step(model, cross_entropy, rows=[10, 18]).backward((X, Y))


def test_rows_pinned_where_splitting_is_not_allowed_are_refused() -> None:
    step = sg.Step(mlp(), cross_entropy, rows=4, allow=Exactness.SAME_BITS)
    with pytest.raises(UsageError, match="SAME_BITS at most"):
        step.backward((X, Y))


def test_what_is_not_there_yet_is_refused_and_not_ignored() -> None:
    with pytest.raises(UsageError, match="groups="):
        sg.Step(mlp(), cross_entropy, groups="x")


@pytest.mark.parametrize(("name", "found"), [("x", "no such submodule"), ("1", "it is a Tanh")])
def test_a_head_that_is_no_linear_layer_is_refused_by_name(name: str, found: str) -> None:
    with pytest.raises(UsageError, match=f"(?s)head='{name}'.*{found}.*the last ones are 0, 2"):
        sg.Step(mlp(), cross_entropy, head=name)


# The plain path


def normalised() -> nn.Module:
    """Draws nothing: a step that draws makes keyed draws in every plan."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)).to(D)


@pytest.mark.parametrize("given", [{"rows": N}, {"rows": 100}, {"budget": "1GiB"}, {}], ids=str)
def test_a_step_that_is_not_split_is_the_plain_call_bit_for_bit(given: dict[str, Any]) -> None:
    model, twin = normalised(), normalised()
    step = sg.Step(model, cross_entropy, **given)
    for _ in range(2):
        torch.manual_seed(11)
        expected = cross_entropy(twin(X), (X, Y))
        expected.backward()
        end = torch.get_rng_state()
        torch.manual_seed(11)
        loss = step.backward((X, Y))
        assert torch.equal(torch.get_rng_state(), end)
        assert torch.equal(loss, expected.detach())
        assert_bitwise(gradients(model), gradients(twin))
        assert plain.same(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_the_plain_path_gives_gradients_to_the_batch_as_well() -> None:
    x = X.clone().requires_grad_()
    sg.Step(mlp(), cross_entropy, rows=N).backward((x, Y))
    expected = X.clone().requires_grad_()
    cross_entropy(mlp()(expected), (expected, Y)).backward()
    assert x.grad is not None and expected.grad is not None and torch.equal(x.grad, expected.grad)


def test_a_forward_that_writes_on_its_input_writes_once() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.mul_(2))

    model, x = Doubling(), X.clone()
    _, expected = plain_step(model, cross_entropy, (X.clone(), Y))
    sg.Step(model, cross_entropy, budget="1GiB").backward((x, Y))
    assert torch.equal(x, 2 * X)
    assert_bitwise(gradients(model), expected)
    x = X.clone()
    with pytest.raises(CannotSplit, match=r"writes on its input batch\[0\]"):
        sg.Step(model, cross_entropy, rows=4).backward((x, Y))
    assert torch.equal(x, X)


# Which parameters get a gradient


@pytest.mark.parametrize("rows", [4, N])
def test_what_stands_in_grad_is_added_to(rows: int) -> None:
    model = mlp()
    _, once = plain_step(model, cross_entropy, (X, Y))
    step = sg.Step(model, cross_entropy, rows=rows)
    step.backward((X, Y))
    step.backward((X, Y))
    assert_close(gradients(model), {k: None if g is None else 2 * g for k, g in once.items()})


class Partly(nn.Module):
    """One layer is frozen, one is never used, the last is tied to the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(6, 6, dtype=D)
        self.frozen = nn.Linear(6, 6, dtype=D).requires_grad_(False)
        self.unused = nn.Linear(6, 6, dtype=D)
        self.tied = nn.Linear(6, 6, dtype=D)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.frozen(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
def test_tied_frozen_and_unused_parameters_end_as_in_the_plain_step(loss_fn: Any) -> None:
    model = Partly()
    _, expected = plain_step(model, loss_fn, (X, Y))
    sg.Step(model, loss_fn, rows=8).backward((X, Y))
    found = gradients(model)
    assert_close(found, expected)
    assert found["unused.weight"] is None and found["frozen.weight"] is None
    assert model.tied.weight.grad is model.first.weight.grad


def test_an_expert_that_only_some_chunks_use_gets_its_gradient() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.even, self.odd = nn.Linear(6, 3, dtype=D), nn.Linear(6, 3, dtype=D)

        def forward(self, x: Tensor) -> Tensor:
            first = x[:, :1] > 0
            out = x.new_zeros(len(x), 3)
            for chosen, expert in ((first[:, 0], self.even), (~first[:, 0], self.odd)):
                if chosen.any():
                    out = out.index_add(0, chosen.nonzero()[:, 0], expert(x[chosen]))
            return out

    x = torch.cat([X[X[:, 0] > 0], X[X[:, 0] <= 0]])
    model = Experts()
    _, expected = plain_step(model, cross_entropy, (x, Y))
    sg.Step(model, cross_entropy, rows=5).backward((x, Y))
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
def test_parameter_hooks_fire_once_and_see_the_total(loss_fn: Any) -> None:
    model = mlp()
    _, expected = plain_step(model, loss_fn, (X, Y))
    seen: list[Tensor] = []
    accumulated: list[Tensor] = []
    weight = model[0].weight
    weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.clone()))
    sg.Step(model, loss_fn, rows=4).backward((X, Y))
    assert len(seen) == len(accumulated) == 1
    for found in (seen[0], accumulated[0]):
        assert_close({"w": found}, {"w": expected["0.weight"]})


def test_a_clamp_hook_clamps_the_total_and_not_the_parts() -> None:
    model, twin = mlp(), mlp()
    _, unclamped = plain_step(model, cross_entropy, (X, Y))
    bound = float(unclamped["0.weight"].abs().max()) / 3  # type: ignore[union-attr]
    for m in (model, twin):
        m[0].weight.register_hook(lambda gradient: gradient.clamp(-bound, bound))
    cross_entropy(twin(X), (X, Y)).backward()
    sg.Step(model, cross_entropy, rows=4).backward((X, Y))
    assert_close(gradients(model), gradients(twin))
    assert float(twin[0].weight.grad.abs().max()) == bound


def test_layers_frozen_and_thawed_between_steps_are_followed() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    step = sg.Step(model, cross_entropy, rows=8)
    model[0].requires_grad_(True)
    model[2].requires_grad_(False)
    _, expected = plain_step(model, cross_entropy, (X, Y))
    step.backward((X, Y))
    assert_close(gradients(model), expected)
    model.zero_grad()
    model[2].requires_grad_(True)
    _, expected = plain_step(model, cross_entropy, (X, Y))
    step.backward((X, Y))
    assert_close(gradients(model), expected)


def test_a_layer_thawed_after_declaring_is_planned_with() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    step = sg.Step(model, cross_entropy, budget="1GiB")
    model[0].requires_grad_(True)
    step.backward((X, Y))
    assert step.footprint is not None and "split_rows" not in step.footprint.refusals


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("rows", [5, 1000])
def test_backward_where_gradients_are_off_is_refused_and_not_silently_empty(block: Any, rows: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    batch = (torch.randn(24, 6), torch.randn(24, 3))
    step = sg.Step(model, lambda o, b: nn.functional.mse_loss(o, b[1]).sqrt(), rows=rows)
    with block(), pytest.raises(UsageError, match="gradients are switched off"):
        step.backward(batch)
    assert all(p.grad is None for p in model.parameters())
    step.backward(batch)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("coupled", [False, True])
def test_sparse_gradients_are_the_plain_ones_and_are_measured_and_verified(coupled: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Flatten(), nn.Linear(32, 3)).double()
    twin = copy.deepcopy(model)
    ids, y = torch.randint(0, 50, (29, 4)), torch.randint(0, 3, (29,))

    def loss_fn(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(outputs, batch[1])
        return loss.sqrt() if coupled else loss

    loss_fn(twin(ids), (ids, y)).backward()
    step = sg.Step(model, loss_fn, rows=5)
    step.backward((ids, y))
    for mine, reference in zip(model.parameters(), twin.parameters()):
        assert mine.grad is not None and reference.grad is not None
        assert mine.grad.is_sparse == reference.grad.is_sparse
        torch.testing.assert_close(mine.grad.to_dense(), reference.grad.to_dense(), rtol=1e-12, atol=1e-16)
    assert sg.verify_step(step, (ids, y)).same
    assert sg.measure_step(step, (ids, y)).peak_allocated_bytes > 0


def test_a_step_says_what_it_is() -> None:
    step = sg.Step(mlp(), cross_entropy, rows=4)
    assert repr(step) == "Step(Sequential, rows=4: no plan yet)"
    step.backward(labelled(13))
    assert "split_rows" in repr(step)


@pytest.mark.parametrize("how", [{"rows": 8}, {"budget": "1GiB"}])
def test_an_error_on_few_rows_tells_of_a_leaf_of_another_length(how: dict[str, Any]) -> None:
    model = nn.Linear(6, 3)
    step = sg.Step(model, lambda out, batch: nn.functional.cross_entropy(out, batch[1]), **how)
    with pytest.raises(ValueError, match="batch_size") as raised:
        step.backward((torch.randn(64, 6), torch.zeros(63, dtype=torch.int64)))
    assert ["batch[1] has 63 entries where the batch has 64 rows" in note for note in raised.value.__notes__] == [True]
    # A table that is much shorter or longer than the rows is no mistake.
    with pytest.raises(ValueError, match="batch_size") as other:
        step.backward((torch.randn(64, 6), torch.zeros(5, dtype=torch.int64)))
    assert not hasattr(other.value, "__notes__")
