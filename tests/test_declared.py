"""What a step may be declared as, and how a batch reaches the model by default."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.declared import Within, checked_loss, declare, default_forward, plain_loss
from samegrad.errors import BadInput, UsageError

from .contract.plain import cross_entropy, labelled, mlp


class Takes(nn.Module):
    """Returns the names and values it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class TakesAll(nn.Module):
    def forward(self, **columns: Any) -> dict[str, Any]:
        return columns


class Pair(NamedTuple):
    images: Tensor
    labels: Tensor


X, Y = labelled(5)


BATCHES = {"tuple": (X, Y), "list": [X, Y], "named tuple": Pair(X, Y), "tensor": X, "one entry": (X,)}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_the_first_entry_or_the_tensor_reaches_the_model(batch: Any) -> None:
    model = mlp()
    assert torch.equal(default_forward(model, batch), model(X))


def test_a_mapping_reaches_the_model_by_keyword_without_labels_and_unknown_columns() -> None:
    batch = {"input_ids": X, "attention_mask": Y, "labels": Y, "idx": Y}
    assert default_forward(Takes(), batch) == {"input_ids": X, "attention_mask": Y, "labels": None}


@pytest.mark.parametrize("key", ["label", "labels", "target", "targets", "y"])
def test_a_model_that_takes_any_keyword_gets_all_but_labels(key: str) -> None:
    assert default_forward(TakesAll(), {"x": X, key: Y}).keys() == {"x"}


@dataclasses.dataclass
class Custom:
    images: Tensor


@pytest.mark.parametrize("batch", [Custom(X), "text", 3, ()], ids=["class", "text", "number", "empty"])
def test_any_other_batch_is_refused_with_the_line_to_paste(batch: Any) -> None:
    with pytest.raises(UsageError, match=r"forward=lambda model, batch: model\(batch") as caught:
        default_forward(mlp(), batch)
    assert type(batch).__name__ in caught.value.found


def test_a_declared_forward_replaces_the_default() -> None:
    step = declare(mlp(), lambda outputs, batch: outputs.sum(), forward=lambda model, batch: model(batch["a"]["b"]))
    assert plain_loss(step, {"a": {"b": X}}) == step.model(X).sum()


def test_data_parallel_is_refused_with_what_to_use() -> None:
    with pytest.raises(UsageError, match="DistributedDataParallel"):
        declare(nn.DataParallel(mlp()), cross_entropy)
    with pytest.raises(UsageError, match=r"whose 0 is an nn\.DataParallel"):
        declare(nn.Sequential(nn.DataParallel(mlp())), cross_entropy)


@pytest.mark.parametrize(("model", "loss_fn"), [(lambda x: x, cross_entropy), (mlp(), 3)])
def test_what_is_no_model_or_no_loss_is_refused(model: Any, loss_fn: Any) -> None:
    with pytest.raises(UsageError, match="Step"):
        declare(model, loss_fn)


@pytest.mark.parametrize("normalise", ["average", 3, ("mean",)])
def test_an_unknown_normalise_is_refused_with_the_three_that_are_known(normalise: Any) -> None:
    with pytest.raises(UsageError, match=r"normalise='mean'.*'sum'.*lambda"):
        declare(mlp(), cross_entropy, normalise=normalise)


@pytest.mark.parametrize("loss", [torch.zeros(3), 0.5, None, (torch.zeros(()),)])
def test_a_loss_that_is_no_single_number_is_refused(loss: Any) -> None:
    with pytest.raises(UsageError, match="scalar"):
        checked_loss(loss)


def test_a_loss_of_one_entry_is_taken_as_a_scalar() -> None:
    assert checked_loss(torch.ones(1, 1, requires_grad=True) * 2).shape == ()


def test_a_loss_without_a_graph_is_refused_with_where_to_look() -> None:
    step = declare(mlp(), lambda outputs, batch: cross_entropy(outputs.detach(), batch))
    with pytest.raises(UsageError, match=r"(?s)no graph.*detach"):
        plain_loss(step, (X, Y))


def test_the_mode_tells_apart_which_layers_train() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))
    step = declare(model, cross_entropy)
    modes = [step.mode()]
    model[1].eval()
    modes.append(step.mode())
    model.eval()
    assert len({*modes, step.mode()}) == 3


def test_the_loss_module_is_part_of_the_mode() -> None:
    class Loss(nn.Module):
        def forward(self, outputs: Tensor, batch: Any) -> Tensor:
            return cross_entropy(outputs, batch)

    loss_fn = Loss()
    step = declare(mlp(), loss_fn)
    before = step.mode()
    loss_fn.eval()
    assert step.mode() != before


def test_parameters_on_two_devices_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(UsageError, match="cpu, meta"):
        declare(model, cross_entropy)


def test_a_function_within_a_block_is_still_seen_for_what_it_is() -> None:
    class Loss(nn.Module):
        def forward(self, outputs: Tensor, batch: Any) -> Tensor:
            return cross_entropy(outputs, batch)

    entered: list[Any] = []

    @contextlib.contextmanager
    def block(*arguments: Any) -> Iterator[None]:
        entered.append(arguments)
        yield
        entered.append("left")

    step = declare(mlp(), Loss())
    changed = dataclasses.replace(step, loss_fn=Within(Within(step.loss_fn, block), block))
    assert changed.loss_module is step.loss_fn and changed.modules == step.modules
    outputs = torch.zeros(len(Y), 3)
    assert torch.equal(changed.loss_fn(outputs, (X, Y)), cross_entropy(outputs, (X, Y)))
    assert [entry == "left" for entry in entered] == [False, False, True, True]
    assert entered[0][0] is outputs


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), nn.functional.cross_entropy, nn.NLLLoss()], ids=["module", "function", "nll"]
)
def test_a_loss_of_targets_is_refused_with_the_line_to_write(loss: Any) -> None:
    with pytest.raises(UsageError, match=r"(?s)takes outputs and targets.*lambda outputs, batch"):
        declare(mlp(), loss)


def test_a_loss_of_numbers_may_be_meant_as_it_is() -> None:
    model, batch = nn.Linear(6, 6), torch.randn(5, 6)
    assert torch.isfinite(plain_loss(declare(model, nn.MSELoss()), batch))


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(UsageError, match="none of the optimizer's parameters is the model's"):
        declare(mlp(), cross_entropy, optimizer=torch.optim.SGD(mlp().parameters(), 0.1))
    model = mlp()
    # Some of them are trained: that is a choice.
    declare(model, cross_entropy, optimizer=torch.optim.SGD([next(model.parameters())], 0.1))


class TakesTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x) * times
        return outputs


def test_a_model_of_two_arguments_asks_for_a_forward() -> None:
    wanted = r"(?s)TakesTwo\.forward takes x, times.*forward=lambda model, batch: model\(\*batch"
    with pytest.raises(UsageError, match=wanted):
        default_forward(TakesTwo(), (torch.randn(5, 6), torch.ones(5, 1)))


def test_a_type_error_of_the_models_own_is_left_as_it_is() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + "one"  # type: ignore[operator]  # what is wrong with it

    with pytest.raises(TypeError):
        default_forward(Wrong(), (torch.ones(2), torch.ones(2)))


def test_a_loss_that_is_not_returned_says_where_labels_go() -> None:
    with pytest.raises(UsageError, match=r"(?s)NoneType.*forward=lambda model, batch: model\(\*\*batch\)"):
        checked_loss(None)


CALLED_WRONGLY = {
    "a loss of the outputs alone": {"loss_fn": lambda outputs: outputs.sum()},
    "a loss of three": {"loss_fn": lambda outputs, batch, weights: outputs.sum()},
    "a forward of the batch alone": {"forward": lambda batch: batch},
    "an optimizer's name": {"optimizer": "sgd"},
    "an optimizer's class": {"optimizer": torch.optim.SGD},
}


@pytest.mark.parametrize("how", CALLED_WRONGLY.values(), ids=CALLED_WRONGLY)
def test_what_could_never_be_called_is_refused_when_it_is_declared(how: dict[str, Any]) -> None:
    loss = how.get("loss_fn", cross_entropy)
    rest = {name: value for name, value in how.items() if name != "loss_fn"}
    with pytest.raises(UsageError, match=next(iter(how))):
        declare(mlp(), loss, **rest)


def adapted(function: Any) -> Any:
    @functools.wraps(function)
    def called(outputs: Tensor, batch: Any) -> Tensor:
        return function(outputs)

    return called


CALLED_RIGHTLY = {
    "any arguments": lambda *given: given[0].sum(),
    "an adapter of a loss": adapted(lambda outputs: outputs.sum()),
    "a module": nn.MSELoss(),
    "a bound method": mlp().__call__,
    "of C": torch.dot,
    "partial": functools.partial(lambda scale, outputs, batch: outputs.sum(), 2.0),
}


@pytest.mark.parametrize("loss", CALLED_RIGHTLY.values(), ids=CALLED_RIGHTLY)
def test_what_may_be_called_is_not_refused(loss: Any) -> None:
    assert declare(mlp(), loss).loss_fn is loss


@pytest.mark.parametrize("how", [{"rows": 8}, {"budget": "1GiB"}])
def test_a_batch_without_data_is_refused_by_its_place(how: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"batch\[0\] is on meta"):
        sg.Step(mlp(), cross_entropy, **how).backward((X.to("meta"), Y))
    with pytest.raises(UsageError, match="the model is on meta"):
        sg.Step(mlp().to("meta"), cross_entropy, **how).backward((X, Y))


@pytest.mark.parametrize(
    ("how", "needed"),
    [
        ({"plan": "plan.json"}, "not a Plan"),
        ({"plan": {"levers": {}}}, "not a Plan"),
        ({"allow": "rounded"}, "not an Exactness"),
        ({"expected_steps": "many"}, "not a positive whole number"),
        ({"expected_steps": 0}, "not a positive whole number"),
    ],
)
def test_arguments_of_another_kind_are_refused_when_they_are_given(how: dict[str, Any], needed: str) -> None:
    with pytest.raises(UsageError, match=needed):
        sg.Step(mlp(), cross_entropy, **how)
