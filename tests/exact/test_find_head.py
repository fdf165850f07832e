"""The head is found where only a loss takes its logits, and refused by name elsewhere; nothing is left changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.errors import CannotSplit, UsageError
from samegrad.exact.find_head import Head, find_head

from ..contract.plain import left_alone
from . import head_zoo as zoo
from .head_zoo import CLASSES, LENGTH, LOSSES, WIDTH, Words, of_batch, words


def found(model: nn.Module, loss: Any, batch: Any = None, **options: Any) -> Head:
    declared = declare(model, loss, **options)
    batch = words(20) if batch is None else batch
    with left_alone(model):
        return find_head(declared, batch, declared.layout(batch))


@pytest.mark.parametrize("name", LOSSES)
def test_the_head_of_a_language_model_is_found(name: str) -> None:
    head = found(Words(dropout=0.3), of_batch(LOSSES[name]))
    assert (head.path, head.classes, head.width) == ("head", CLASSES, WIDTH)
    if name in ("flat", "sum", "transformers"):
        assert head.positions_per_row == LENGTH
    if name == "next token":
        assert head.positions_per_row == LENGTH - 1


def test_an_accuracy_beside_the_loss_is_no_reason_to_refuse() -> None:
    seen = []

    def loss(logits: Tensor, batch: zoo.Batch) -> Tensor:
        with torch.no_grad():
            seen.append((logits.argmax(-1) == batch[1]).double().mean())
        return zoo.flat(logits, batch[1])

    assert found(Words(), loss).path == "head"


class Valued(Words):
    """With a layer after the head, and one that stands aside."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.aside = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 99)

    def forward(self, tokens: Tensor) -> Any:
        hidden = self.body(self.embed(tokens))
        return self.head(hidden), self.value(hidden).mean()


def test_a_layer_after_the_head_is_looked_past() -> None:
    loss = lambda outputs, batch: zoo.flat(outputs[0], batch[1]) + outputs[1] ** 2
    assert found(Valued(), loss).path == "head"
    assert found(Valued(), loss, head="head").path == "head"
    with pytest.raises(CannotSplit, match="value: its logits meet mean"):
        found(Valued(), loss, head="value")
    with pytest.raises(CannotSplit, match="aside: it is not called"):
        found(Valued(), loss, head="aside")


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "z-loss": (lambda z, y: zoo.flat(z, y) + z.logsumexp(-1).pow(2).mean(), "head: its logits meet logsumexp"),
    "probabilities": (
        lambda z, y: F.cross_entropy(z.mT, F.one_hot(y.clamp(min=0), CLASSES).mT.to(z.dtype)),
        "head: its logits meet cross_entropy",
    ),
    "softmax": (lambda z, y: F.nll_loss(z.softmax(-1).log().mT, y), "head: its logits meet softmax"),
    "written to": (
        lambda z, y: zoo.flat(z.index_fill(-1, torch.tensor([3]), -9.0), y), "head: its logits meet index_fill",
    ),
    "no loss": (lambda z, y: z.square().mean(), "head: its logits meet square"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_meets_the_logits_is_named(name: str) -> None:
    loss, message = REFUSED[name]
    with pytest.raises(CannotSplit, match=message):
        found(Words(), of_batch(loss))


def test_logits_written_in_place_are_refused() -> None:
    def loss(logits: Tensor, batch: zoo.Batch) -> Tensor:
        logits[..., 0] = -9.0
        return zoo.flat(logits, batch[1])

    with pytest.raises(CannotSplit, match="changed in place"):
        found(Words(), loss)


def test_small_heads_and_models_without_one_are_refused_without_a_trial() -> None:
    batch = torch.randn(9, 6), torch.arange(9) % 3
    loss = lambda z, b: F.cross_entropy(z, b[1])
    with pytest.raises(CannotSplit, match="no more classes than its input is wide"):
        found(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), loss, batch)
    with pytest.raises(CannotSplit, match=r"found: no nn\.Linear is called"):
        found(nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 6), nn.Flatten()), loss, batch)
    # Named, it is taken at its word.
    assert found(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), loss, batch, head="1").positions_per_row == 1


class Adapted(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * 2


def test_a_head_with_a_forward_of_its_own_is_refused() -> None:
    model = Words(tied=False)
    model.head = Adapted(WIDTH, CLASSES)
    with pytest.raises(CannotSplit, match="head: a Adapted with a forward of its own"):
        found(model, of_batch(zoo.flat))


def test_a_compiled_model_is_refused() -> None:
    model = Words()
    model.body = torch.compile(model.body, backend="eager")
    with pytest.raises(CannotSplit, match="compiled"):
        found(model, of_batch(zoo.flat), head="head")
    model = Words()
    model.body.compile(backend="eager")
    with pytest.raises(CannotSplit, match="compiled"):
        found(model, of_batch(zoo.flat), head="head")


@pytest.mark.parametrize(("name", "why"), [("tail", "no such submodule"), ("embed", "it is a Embedding")])
def test_a_name_that_is_no_linear_layer_is_a_usage_error(name: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"(?s)head='{name}'.*{why}.*head"):
        found(Words(), of_batch(zoo.flat), head=name)


def test_nothing_is_left_when_the_loss_raises() -> None:
    def loss(logits: Tensor, batch: zoo.Batch) -> Tensor:
        raise ZeroDivisionError

    model = Words(dropout=0.5)
    declared = declare(model, loss)
    with left_alone(model), pytest.raises(ZeroDivisionError):
        find_head(declared, words(), declared.layout(words()))
    assert "forward" not in vars(model.head)
