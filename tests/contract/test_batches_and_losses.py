"""Every nesting of batches and outputs, and every owner of a loss, has the plain gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import CannotSplit, FalseNormalise
from samegrad.verify import tolerance

from .plain import (
    assert_close,
    cross_entropy,
    gradients,
    labelled,
    left_alone,
    mlp,
    plain_step,
)

N = 29
X, Y = labelled(N)
D = torch.float64


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
