"""``Step``: the gradients of the plain step, whatever the rows, the batch, the loss and the loop around it."""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import BadInput, CannotSplit, FalseNormalise, UsageError
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


# How many rows at a time


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
def test_every_split_has_the_plain_loss_and_gradients(loss_fn: Any, rows: Any) -> None:
    model = mlp()
    loss, expected = plain_step(model, loss_fn, (X, Y))
    ours = sg.Step(model, loss_fn, rows=rows).backward((X, Y))
    assert_close(gradients(model), expected)
    assert not ours.requires_grad and ours.shape == ()
    assert abs(ours - loss) <= tolerance.loss_allowed(D) * abs(loss)


@pytest.mark.parametrize(
    "given", [{"budget": "1GiB", "rows": 4}, {"rows": 4, "plan": Plan(levers={}, exactness=Exactness.SAME_BITS, batch_rows=4)}]
)
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


@pytest.mark.parametrize("option", ["groups", "segments", "head"])
def test_what_is_not_there_yet_is_refused_and_not_ignored(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option}="):
        sg.Step(mlp(), cross_entropy, **{option: "x"})


# The plain path


def drawing() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.4), nn.Linear(9, 3), nn.Dropout(0.2)).to(D)


@pytest.mark.parametrize("given", [{"rows": N}, {"rows": 100}, {"budget": "1GiB"}, {}], ids=str)
def test_a_step_that_is_not_split_is_the_plain_call_bit_for_bit(given: dict[str, Any]) -> None:
    model, twin = drawing(), drawing()
    step = sg.Step(model, cross_entropy, **given)
    for _ in range(2):
        torch.manual_seed(11)
        expected = cross_entropy(twin((X)), (X, Y))
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


# Batches and outputs


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor


class Output(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Language(nn.Module):
    """Called as language models are: by keyword, labels left out, a mapping returned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8, dtype=D)
        self.mix = nn.Linear(8, 8, dtype=D)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        hidden = (self.mix(self.embed(input_ids)).tanh() * attention_mask[..., None]).cumsum(1)
        return {"logits": hidden @ self.embed.weight.T, "hidden_states": (hidden,), "past": None}


def tokens(lengths: list[int], width: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 11, (len(lengths), width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.to(D), "labels": ids.masked_fill(~mask, -100)}


def token_loss(outputs: dict[str, Any], batch: dict[str, Tensor]) -> Tensor:
    logits, labels = outputs["logits"][:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def by_keyword(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(batch["input_ids"], batch["attention_mask"])


def test_token_mean_is_over_all_tokens_of_the_batch_not_over_micro_batches() -> None:
    batch = tokens([12, 11, 2, 2, 9, 3, 8, 1])
    model = Language()
    _, expected = plain_step(model, token_loss, batch, by_keyword)
    step = sg.Step(model, token_loss, rows=2)
    step.backward(batch)
    assert_close(gradients(model), expected)
    # The mean of micro-batch means, which is what accumulation loops do, is far off.
    means = [token_loss(by_keyword(model, part), part) / 4 for i in range(0, 8, 2) if (part := _part(batch, i, i + 2))]
    naive = torch.autograd.grad(sum(m for m in means if m.isfinite()), model.embed.weight)[0]
    assert (naive - expected["embed.weight"]).norm() > 0.1 * expected["embed.weight"].norm()  # type: ignore[union-attr]


def _part(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {key: leaf[start:stop] for key, leaf in batch.items()}


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_chunk_without_a_valid_target_keeps_loss_and_gradients_finite_and_equal(rows: int) -> None:
    batch = tokens([12, 11, 1, 1, 1, 3, 8, 1])
    model = Language()
    loss, expected = plain_step(model, token_loss, batch, by_keyword)
    ours = sg.Step(model, token_loss, rows=rows).backward(batch)
    assert abs(ours - loss) <= tolerance.loss_allowed(D) * loss
    assert_close(gradients(model), expected)


WEIGHT = torch.tensor([0.1, 2.0, 0.7], dtype=D)
IGNORED = Y.clone()
IGNORED[4:9] = -100
COUNTED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "ignore_index": lambda z, b: F.cross_entropy(z, b[1]),
    "class weights": lambda z, b: F.cross_entropy(z, b[1], weight=WEIGHT),
    "label smoothing": lambda z, b: F.cross_entropy(z, b[1], label_smoothing=0.2),
    "all three": lambda z, b: F.cross_entropy(z, b[1], weight=WEIGHT, label_smoothing=0.2),
    "masked by hand": lambda z, b: (F.cross_entropy(z, b[1], reduction="none")).sum() / (b[1] != -100).sum(),
    "half of it": lambda z, b: 0.5 * F.cross_entropy(z, b[1]),
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_losses_divided_by_a_count_use_the_count_of_the_whole_batch(name: str, rows: int) -> None:
    model, batch = mlp(), (X, IGNORED)
    loss, expected = plain_step(model, COUNTED[name], batch)
    ours = sg.Step(model, COUNTED[name], rows=rows).backward(batch)
    assert_close(gradients(model), expected)
    assert abs(ours - loss) <= tolerance.loss_allowed(D) * loss


class Two(nn.Module):
    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 5, dtype=D), nn.Linear(5, 3, dtype=D)
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).tanh()
        return self.shape(self.head(hidden), hidden)


SHAPES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda a, b: (a, b), lambda o: o),
    "list": (lambda a, b: [a, b], lambda o: (o[0], o[1])),
    "named tuple": (Output, lambda o: (o.logits, o.hidden)),
    "nested": (lambda a, b: {"a": [a], "b": (b, None, 3)}, lambda o: (o["a"][0], o["b"][0])),
    "the same twice": (lambda a, b: (a, a, b), lambda o: (0.5 * (o[0] + o[1]), o[2])),
    "indices as well": (lambda a, b: (a, b, a.argmax(1)), lambda o: (o[0] * (1 + o[2][:, None]), o[1])),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("coupled", [False, True])
def test_outputs_may_be_nested(name: str, coupled: bool) -> None:
    shape, read = SHAPES[name]

    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        logits, hidden = read(outputs)
        return F.cross_entropy(logits, batch[1]) + (hidden.std(0).mean() if coupled else 0)

    model = Two(shape)
    _, expected = plain_step(model, loss_fn, (X, Y))
    sg.Step(model, loss_fn, rows=6).backward((X, Y))
    assert_close(gradients(model), expected)


BATCHES: dict[str, tuple[Any, Callable[[nn.Module, Any], Any] | None, Callable[[Any], Tensor]]] = {
    "named tuple": (Pair(X, Y), None, lambda b: b.targets),
    "list": ([X, Y], None, lambda b: b[1]),
    "nested": ({"views": (X, {"y": Y}), "name": "a"}, lambda m, b: m(b["views"][0]), lambda b: b["views"][1]["y"]),
    "mapping": ({"input": X, "labels": Y, "index": Y}, None, lambda b: b["labels"]),
    "shared leaf": ((X, Y, torch.eye(6, dtype=D)), lambda m, b: m(b[0] @ b[2]), lambda b: b[1]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_may_be_nested(name: str) -> None:
    batch, forward, labels = BATCHES[name]

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, labels(batch))

    model = mlp()
    _, expected = plain_step(model, loss_fn, batch, forward or (lambda m, b: m(X)))
    sg.Step(model, loss_fn, rows=6, forward=forward).backward(batch)
    assert_close(gradients(model), expected)


def test_rows_on_another_axis_are_cut_there() -> None:
    model = mlp()
    batch = (X.T.contiguous(), Y)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0].T)

    _, expected = plain_step(model, cross_entropy, batch, forward)
    sg.Step(model, cross_entropy, rows=4, forward=forward, batch_axes=(1, 0)).backward(batch)
    assert_close(gradients(model), expected)


# Losses that own parameters


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.7, dtype=D))

    def forward(self, outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs * self.scale, batch)


@pytest.mark.parametrize("normalise", [None, "mean"])
def test_a_learned_temperature_gets_its_gradient_once(normalise: Any) -> None:
    model, loss_fn = mlp(), Temperature()
    twin = Temperature()
    cross_entropy(mlp()(X) * twin.scale, (X, Y)).backward()
    fired: list[int] = []
    loss_fn.scale.register_hook(lambda _: fired.append(1))
    _, expected = plain_step(model, Temperature(), (X, Y))
    sg.Step(model, loss_fn, rows=4, normalise=normalise).backward((X, Y))
    assert_close(gradients(model), expected)
    assert_close(gradients(loss_fn), gradients(twin))
    assert len(fired) == 1


def test_a_parameter_in_a_closure_of_the_loss_gets_its_gradient_once() -> None:
    scale = nn.Parameter(torch.tensor(1.7, dtype=D))
    fired: list[int] = []
    twin = Temperature()
    cross_entropy(mlp()(X) * twin.scale, (X, Y)).backward()
    scale.register_hook(lambda _: fired.append(1))
    sg.Step(mlp(), lambda z, b: cross_entropy(z * scale, b), rows=4).backward((X, Y))
    assert_close({"scale": scale.grad}, gradients(twin))
    assert len(fired) == 1


def test_a_declared_single_pass_refuses_a_parameter_it_cannot_hold_back() -> None:
    scale = nn.Parameter(torch.tensor(1.7, dtype=D))
    step = sg.Step(mlp(), lambda z, b: cross_entropy(z * scale, b), rows=4, normalise="mean")
    with left_alone(step.declared.model), pytest.raises(CannotSplit, match="requires grad and is in no module"):
        step.backward((X, Y))
    assert scale.grad is None


@pytest.mark.parametrize("reach", ["through the module", "captured"])
def test_a_model_parameter_that_the_loss_uses_as_well_gets_both_gradients(reach: str) -> None:
    model = mlp()
    weight = model[0].weight

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        used = model[0].weight if reach == "through the module" else weight
        return cross_entropy(outputs, batch) + 0.3 * used.pow(2).sum()

    twin = mlp()
    (cross_entropy(twin(X), (X, Y)) + 0.3 * twin[0].weight.pow(2).sum()).backward()
    sg.Step(model, loss_fn, rows=4).backward((X, Y))
    assert_close(gradients(model), gradients(twin))


def test_a_loss_that_keeps_state_is_called_once_a_step() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, outputs: Tensor, batch: Any) -> Tensor:
            self.calls += 1
            return cross_entropy(outputs, batch)

    model, loss_fn = mlp(), Counting()
    _, expected = plain_step(model, cross_entropy, (X, Y))
    sg.Step(model, loss_fn, rows=4).backward((X, Y))
    assert loss_fn.calls == 1
    assert_close(gradients(model), expected)
    with pytest.raises(FalseNormalise, match="changes calls"):
        sg.Step(mlp(), Counting(), rows=4, normalise="mean").backward((X, Y))


def test_a_loss_that_draws_draws_once_and_as_the_plain_step_does() -> None:
    def noisy(outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs + torch.randn_like(outputs), batch)

    model = mlp()
    torch.manual_seed(5)
    loss, expected = plain_step(model, noisy, (X, Y))
    end = torch.get_rng_state()
    torch.manual_seed(5)
    ours = sg.Step(model, noisy, rows=4).backward((X, Y))
    assert_close(gradients(model), expected)
    assert torch.equal(torch.get_rng_state(), end) and torch.allclose(ours, loss)


def test_a_weight_computed_from_the_whole_batch_is_not_taken_for_a_constant() -> None:
    y = torch.tensor([0] * 14 + [1] * 10 + [2] * 5)

    def balanced(outputs: Tensor, batch: Any) -> Tensor:
        counts = torch.bincount(batch[1], minlength=3).clamp(min=1)
        weights = (1 / counts.to(D))[batch[1]]
        return (F.cross_entropy(outputs, batch[1], reduction="none") * weights / weights.mean()).mean()

    model = mlp()
    _, expected = plain_step(model, balanced, (X, y))
    sg.Step(model, balanced, rows=4).backward((X, y))
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("given", [{"rows": 4}, {"budget": "1GiB"}], ids=str)
def test_a_false_declaration_is_refused_with_the_residual_also_when_nothing_need_be_split(given: Any) -> None:
    model = mlp()
    with left_alone(model), pytest.raises(FalseNormalise, match="gradient differs by"):
        sg.Step(model, cross_entropy, normalise="sum", **given).backward((X, Y))


# The loop around it


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def test_clipping_and_schedulers_stay_as_they_are_over_several_steps() -> None:
    models = mlp(), mlp()
    for model, rows in zip(models, (4, None)):
        optimizer = make_optimizer(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        step = sg.Step(model, cross_entropy, rows=rows, optimizer=optimizer) if rows else None
        for size in (N, 13, 7, 3):
            batch = (X[:size], Y[:size])
            if step is None:
                cross_entropy(model(batch[0]), batch).backward()
            else:
                step.backward(batch)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        assert scheduler.get_last_lr() == [0.125]
    weights = [dict(model.named_parameters()) for model in models]
    assert_close(*weights)


@pytest.mark.parametrize("samples", [9, 10, 11, 33])
def test_a_short_last_micro_batch_weighs_by_its_rows(samples: int) -> None:
    batch = labelled(samples)
    model = mlp()
    _, expected = plain_step(model, cross_entropy, batch)
    sg.Step(model, cross_entropy, rows=8 if samples == 33 else 4).backward(batch)
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
def test_a_scaler_scales_the_gradients_and_not_the_returned_loss(loss_fn: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = mlp()
    loss, expected = plain_step(model, loss_fn, (X, Y))
    ours = sg.Step(model, loss_fn, rows=4).backward((X, Y), scaler=scaler)
    assert torch.allclose(ours, loss, rtol=1e-14)
    assert_close(
        {k: None if g is None else g / 1024 for k, g in gradients(model).items()}, expected
    )  # fmt: skip


def test_a_chunk_that_overflows_skips_one_step_and_lowers_the_scale_once() -> None:
    model = mlp(torch.float32)
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    step = sg.Step(model, lambda z, b: (z * b[1][:, None]).mean(), rows=4)
    weights = torch.ones(N)
    step.backward((X.float(), weights), scaler=scaler)
    optimizer.zero_grad()
    weights[6] = torch.inf
    before = [p.detach().clone() for p in model.parameters()]
    step.backward((X.float(), weights), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
@pytest.mark.parametrize("given", [{"rows": 4}, {"budget": "1GiB"}], ids=str)
def test_autocast_around_the_step_is_part_of_it(loss_fn: Any, given: Any) -> None:
    x, y = X.float(), Y
    model, twin, wide = mlp(torch.float32), mlp(torch.float32), mlp()
    with torch.autocast("cpu", torch.bfloat16):
        reference = loss_fn(twin(x), (x, y))
        assert twin(x).dtype is torch.bfloat16
    reference.backward()
    loss_fn(wide(x.double()), (x.double(), y)).backward()
    step = sg.Step(model, loss_fn, **given)
    with torch.autocast("cpu", torch.bfloat16):
        step.backward((x, y))
    # No further from float64 than the plain step under autocast is: a missing autocast would be nearer to 0.
    for mine, theirs, exact in zip(model.parameters(), twin.parameters(), wide.parameters()):
        own, plain_error = (mine.grad - exact.grad).norm(), (theirs.grad - exact.grad).norm()
        assert own <= tolerance.NOISE_RATIO * plain_error + 32 * 2**-8 * 2**-4 * exact.grad.norm()
        assert own >= 0.1 * plain_error


def test_the_second_forward_under_autocast_sees_the_weights() -> None:
    model, x = mlp(torch.float32), X.float()
    with torch.autocast("cpu", torch.bfloat16):
        step = sg.Step(model, spread, rows=4)
        step.backward((x, Y))
        step.backward((x, Y))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_narrow_parameters_are_summed_wide() -> None:
    batch = labelled(512, torch.bfloat16)
    model, wide = mlp(torch.bfloat16), mlp(torch.bfloat16).double()
    cross_entropy(wide(batch[0].double()), batch).backward()
    whole = plain_step(model, cross_entropy, batch)[1]
    sg.Step(model, cross_entropy, rows=1).backward(batch)
    for (_, p), reference, exact in zip(model.named_parameters(), whole.values(), wide.parameters()):
        assert p.grad is not None and reference is not None and exact.grad is not None
        assert p.grad.dtype is torch.bfloat16
        own, theirs = (p.grad.double() - exact.grad).norm(), (reference.double() - exact.grad).norm()
        assert own <= 2 * theirs + 2**-8 * exact.grad.norm()


# Refusals


class Then(nn.Module):
    """A linear layer, then ``function``."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 3, dtype=D)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.inner(x))


class Keeps(nn.Module):
    """Keeps something between calls: ``change(self, hidden)``."""

    def __init__(self, kept: Any, change: Callable[[Any, Tensor], None], *, buffer: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3, dtype=D)
        if buffer:
            self.register_buffer("kept", kept)
        else:
            self.kept = kept
        self._private = kept if isinstance(kept, int) else 0
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        self.change(self, z.detach())
        return z


def _count_privately(self: Any, z: Tensor) -> None:
    self._private += 1


def _average(self: Any, z: Tensor) -> None:
    self.kept = 0.9 * self.kept + 0.1 * z.mean(0)


def _average_in_place(self: Any, z: Tensor) -> None:
    self.kept.mul_(0.9).add_(z.mean(0))


def _append(self: Any, z: Tensor) -> None:
    self.kept.append(z)


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3, dtype=D)
        self.held = [nn.Parameter(torch.ones(3, dtype=D))]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.held[0]


@dataclasses.dataclass
class Unseen:
    logits: Tensor


CLOSED = nn.Parameter(torch.ones(3, dtype=D))
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch normalisation": (lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).to(D), r"1 \(BatchNorm1d in training"),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)).to(D), r"1 \(Dropout\) draws"),
    "functional dropout": (lambda: Then(lambda z: F.dropout(z, 0.5)), r"the model \(Then\) draws"),
    "python randomness": (lambda: Then(lambda z: z * random.random()), "generator: python"),
    "numpy randomness": (lambda: Then(lambda z: z * float(np.random.rand())), "generator: numpy"),
    "batch mean": (lambda: Then(lambda z: z - z.mean(0)), "mixes rows"),
    "softmax over rows": (lambda: Then(lambda z: z.softmax(0)), "mixes rows"),
    "divided by its length": (lambda: Then(lambda z: z / len(z)), "how many rows"),
    "its length beside it": (lambda: Then(lambda z: {"logits": z, "count": len(z)}), r"outputs\['count'\]"),
    "an output without rows": (lambda: Then(lambda z: (z, z.mean())), r"outputs\[1\] has shape \(\)"),
    "an output with other rows": (lambda: Then(lambda z: (z, z.T)), r"outputs\[1\] has shape \(3, "),
    "an output class": (lambda: Then(Unseen), "Unseen, and the tensors inside it"),
    "a counter buffer": (lambda: Keeps(torch.zeros(()), lambda s, z: s.kept.add_(1), buffer=True), "changes kept"),
    "an average buffer": (lambda: Keeps(torch.zeros(3, dtype=D), _average_in_place, buffer=True), "changes kept"),
    "an average that is no buffer": (lambda: Keeps(torch.zeros(3, dtype=D), _average), "changes kept"),
    "an average in place that is no buffer": (lambda: Keeps(torch.zeros(3, dtype=D), _average_in_place), "changes kept"),
    "a counter": (lambda: Keeps(0, lambda s, z: setattr(s, "kept", s.kept + 1)), "changes kept"),
    "a private counter": (lambda: Keeps(0, _count_privately), "changes _private"),
    "a queue": (lambda: Keeps([], _append), "changes kept"),
    "parameters in a list": (Held, r"shape \(3,\)"),
    "a parameter in a closure": (lambda: Then(lambda z: z * CLOSED), r"shape \(3,\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_by_name_and_left_as_it_was(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    step = sg.Step(model, cross_entropy, rows=4, optimizer=torch.optim.SGD(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    batch = (X.clone(), Y.clone())
    with left_alone(model), pytest.raises(CannotSplit, match=message) as caught:
        step.backward(batch)
    assert "rows=<the batch's rows>" in caught.value.do
    assert torch.equal(batch[0], X) and torch.equal(batch[1], Y)
    assert CLOSED.grad is None


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_runs_whole_when_it_fits(name: str) -> None:
    make, _ = REFUSED[name]
    torch.manual_seed(0)
    model = make()

    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        logits = outputs
        for read in (lambda o: o["logits"], lambda o: o.logits, lambda o: o[0]):
            if not isinstance(logits, Tensor):
                with warnings.catch_warnings():
                    try:
                        logits = read(outputs)
                    except (TypeError, KeyError, AttributeError):
                        continue
        return F.cross_entropy(logits, batch[1])

    step = sg.Step(model, loss_fn, budget="1GiB")
    step.backward((X, Y))
    assert step.plan is not None and step.plan.levers == {}
    assert "refused" in step.plan.reasons["split_rows"]


def test_a_table_that_is_built_at_the_first_call_is_no_state() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3, dtype=D)
            self._table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self._table is None:
                self._table = torch.arange(6, dtype=x.dtype, device=x.device)
            return self.inner(x + self._table)

    model = Positions()
    _, expected = plain_step(model, cross_entropy, (X, Y))
    sg.Step(model, cross_entropy, rows=4).backward((X, Y))
    assert_close(gradients(model), expected)


def test_statistics_taken_from_the_first_batch_only_are_refused() -> None:
    class Initialised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3, dtype=D)
            self.shift: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            z = self.inner(x)
            if self.shift is None:
                self.shift = -z.detach().mean(0)
            return z + self.shift

    model = Initialised()
    with pytest.raises(CannotSplit, match="changes shift"):
        sg.Step(model, cross_entropy, rows=4).backward((X, Y))
    assert model.shift is None


def test_a_batch_leaf_that_requires_grad_is_refused_by_its_place() -> None:
    x = X.clone().requires_grad_()
    model = mlp()
    with left_alone(model), pytest.raises(CannotSplit, match=r"batch\[0\] requires grad"):
        sg.Step(model, cross_entropy, rows=4).backward((x, Y))
    assert x.grad is None


def test_a_forward_that_starts_to_draw_later_changes_nothing_when_it_is_refused() -> None:
    model = Then(lambda z: z)
    for loss_fn in (cross_entropy, spread):
        model.function = lambda z: z
        step = sg.Step(model, loss_fn, rows=4)
        step.backward((X, Y))
        model.function = lambda z: F.dropout(z, 0.5)
        with left_alone(model), pytest.raises(sg.SamegradError):
            step.backward((X, Y))


def test_an_exception_in_the_user_code_leaves_the_step_untouched_and_usable() -> None:
    calls: list[int] = []

    def fragile(outputs: Tensor, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == limit:
            raise ZeroDivisionError
        return cross_entropy(outputs, batch)

    limit = -1
    model = mlp()
    step = sg.Step(model, fragile, rows=4)
    step.backward((X, Y))
    limit = len(calls) + 3
    with left_alone(model), pytest.raises(ZeroDivisionError):
        step.backward((X, Y))
    model.zero_grad()
    _, expected = plain_step(model, cross_entropy, (X, Y))
    step.backward((X, Y))
    assert_close(gradients(model), expected)


# Plans


def tight_budget(model: nn.Module, loss_fn: Any, batch: Any) -> int:
    """A budget between the smallest plan's peak and the plain step's."""
    footprint = sg.measure_step(sg.Step(model, loss_fn), batch)
    low = footprint.predicted_peak_bytes(rows=1)
    high = footprint.predicted_peak_bytes(rows=footprint.batch_rows)
    assert low < high
    return (low + high) // 2


LARGE = labelled(1024)


@pytest.fixture(scope="module")
def planned() -> tuple[sg.Step, sg.Plan]:
    step = sg.Step(mlp(), cross_entropy, budget=tight_budget(mlp(), cross_entropy, LARGE))
    return step, step.prepare(LARGE)


def test_a_tight_budget_splits_and_keeps_the_gradients(planned: tuple[sg.Step, sg.Plan]) -> None:
    step, plan = planned
    assert 1 <= plan.levers["split_rows"]["rows"] < 1024
    model = step.declared.model
    model.zero_grad()
    _, expected = plain_step(model, cross_entropy, LARGE)
    step.backward(LARGE)
    assert_close(gradients(model), expected)


def test_planning_changes_nothing_of_the_users() -> None:
    model = drawing()
    optimizer = torch.optim.Adam(model.parameters())
    cross_entropy(model(X), (X, Y)).backward()
    optimizer.step()
    with left_alone(model, optimizer=optimizer):
        sg.Step(model, cross_entropy, budget="1GiB", optimizer=optimizer).prepare(LARGE)


def test_training_with_a_planner_is_training_without_one_bit_for_bit() -> None:
    weights = []
    for planner in (False, True):
        model = drawing()
        optimizer = torch.optim.Adam(model.parameters())
        step = sg.Step(model, cross_entropy, budget="1GiB", optimizer=optimizer) if planner else None
        torch.manual_seed(9)
        for size in (N, 20, 11):
            batch = (X[:size], Y[:size])
            if step is None:
                cross_entropy(model(batch[0]), batch).backward()
            else:
                step.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.state_dict())
    assert plain.same(*weights)


def test_a_plan_saved_as_json_is_applied_again(planned: tuple[sg.Step, sg.Plan]) -> None:
    _, plan = planned
    again = sg.Plan.from_json(plan.to_json())
    assert again == plan
    model = mlp()
    _, expected = plain_step(model, cross_entropy, LARGE)
    step = sg.Step(model, cross_entropy, plan=again)
    step.backward(LARGE)
    assert_close(gradients(model), expected)
    assert step.sizes_for(LARGE)[0] == plan.levers["split_rows"]["rows"]


def test_a_plan_for_another_kind_of_batch_is_refused(planned: tuple[sg.Step, sg.Plan]) -> None:
    _, plan = planned
    step = sg.Step(mlp(torch.float32), cross_entropy, plan=plan)
    with pytest.raises(CannotSplit, match="float32"):
        step.backward(labelled(64, torch.float32))


def test_a_given_plan_is_never_exchanged_for_another(planned: tuple[sg.Step, sg.Plan]) -> None:
    _, plan = planned
    step = sg.Step(mlp(), cross_entropy, plan=plan)
    step.backward(labelled(64))
    with pytest.raises(CannotSplit, match="1025 rows"):
        step.backward(labelled(1025))
    assert step.plan is plan


@pytest.mark.parametrize(
    "levers", [{"split_rows": {"rows": 0}}, {"split_rows": {"rows": "8"}}, {"split_rows": {"rows": [4, -1]}},
               {"split_rows": {"lines": 4}}, {"magic": {}}],
    ids=str,
)  # fmt: skip
def test_a_plan_that_was_edited_wrongly_is_refused_by_its_lever(levers: dict[str, Any]) -> None:
    step = sg.Step(mlp(), cross_entropy, plan=Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=N))
    with pytest.raises(BadInput, match=next(iter(levers))):
        step.backward((X, Y))


def test_a_plan_that_is_less_exact_than_allowed_is_refused() -> None:
    plan = Plan(levers={}, exactness=Exactness.ROUNDED, batch_rows=N)
    with pytest.raises(UsageError, match=r"allow=Exactness\.ROUNDED"):
        sg.Step(mlp(), cross_entropy, plan=plan).backward((X, Y))


def test_a_plan_cannot_claim_to_be_more_exact_than_its_levers() -> None:
    plan = Plan(levers={"split_rows": {"rows": 4}}, exactness=Exactness.SAME_BITS, batch_rows=N)
    with pytest.raises(UsageError, match="SAME_BITS at most"):
        sg.Step(mlp(), cross_entropy, plan=plan, allow=Exactness.SAME_BITS).backward((X, Y))


def test_a_smaller_batch_keeps_the_plan_and_a_larger_one_is_planned_again() -> None:
    step = sg.Step(mlp(), cross_entropy, budget=tight_budget(mlp(), cross_entropy, LARGE))
    step.backward(labelled(64))
    first = step.plan
    step.backward(labelled(40))
    assert step.plan is first and first is not None and first.levers == {}
    step.backward(LARGE)
    assert step.plan is not None and step.plan.levers and step.plan.batch_rows == 1024


def test_each_shape_of_batch_is_planned_once_and_for_its_own_rows() -> None:
    step = sg.Step(mlp(), lambda z, b: F.cross_entropy(z, b[1]), budget=tight_budget(mlp(), cross_entropy, LARGE))
    with_weights = (*labelled(16), torch.ones(16))
    step.backward(LARGE)
    large = step.plan
    step.backward(with_weights)
    step.backward(LARGE)
    assert step.plan is large
    # Sixteen rows fit whole; that says nothing of a thousand.
    step.backward((*labelled(1024), torch.ones(1024)))
    assert step.plan is not None and step.plan.levers and step.plan.batch_rows == 1024


def test_a_budget_no_plan_fits_says_what_the_floor_is_made_of() -> None:
    model = mlp()
    with left_alone(model), pytest.raises(sg.BudgetTooSmall, match="parameters"):
        sg.Step(model, cross_entropy, budget=2000).backward((X, Y))


def test_no_budget_means_what_is_free_now_and_says_where_that_was_read() -> None:
    step = sg.Step(mlp(), cross_entropy)
    step.prepare((X, Y))
    assert step.budget is not None and "free now" in step.budget.source
    assert step.budget.source in step.explain()


def test_before_the_first_batch_there_is_nothing_to_explain() -> None:
    assert "No plan yet" in sg.Step(mlp(), cross_entropy).explain()


def test_explain_names_module_hooks_and_the_cost_of_two_passes() -> None:
    model = mlp()
    model[1].register_forward_hook(lambda *_: None)
    step = sg.Step(model, spread, budget="1GiB")
    step.prepare((X, Y))
    text = step.explain()
    assert "1 (Tanh)" in text and "two passes" in text and "normalise='mean'" in text


def test_enforcing_a_budget_is_harmless_where_there_is_no_allocator() -> None:
    model = mlp()
    _, expected = plain_step(model, cross_entropy, (X, Y))
    with sg.Step(model, cross_entropy, budget="1GiB", enforce=True) as step:
        step.backward((X, Y))
    assert_close(gradients(model), expected)


def test_a_closed_step_is_refused_and_closing_twice_is_harmless() -> None:
    with sg.Step(mlp(), cross_entropy, rows=4) as step:
        step.backward((X, Y))
    step.close()
    with pytest.raises(UsageError, match="closed"):
        step.backward((X, Y))


def test_leaving_the_block_by_an_exception_closes_the_step() -> None:
    with pytest.raises(ZeroDivisionError), sg.Step(mlp(), cross_entropy, rows=4) as step:
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="closed"):
        step.prepare((X, Y))


def test_a_batch_that_does_not_fit_the_model_raises_the_models_own_error() -> None:
    model = mlp()
    with left_alone(model), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sg.Step(model, cross_entropy, rows=4).backward((X[:, :5], Y))
