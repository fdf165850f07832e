"""What cannot be split is refused by name, and everything is left as it was."""

from __future__ import annotations

import copy
import dataclasses
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.declared import declare
from samegrad.errors import CannotSplit
from samegrad.execute.ways import find_ways
from samegrad.settle import aliases_for

from .plain import (
    Tally,
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


def _largest(self: Any, z: Tensor) -> None:
    self.kept.copy_(torch.maximum(self.kept, z.amax(0)))


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


def _layers(last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 3), last).to(D)


CLOSED = nn.Parameter(torch.ones(3, dtype=D))
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "one draw for all rows": (lambda: Then(lambda z: z * torch.rand(3)), r"Then\) draws random numbers: torch.rand"),
    "python randomness": (lambda: Then(lambda z: z * random.random()), "generator: python"),
    "numpy randomness": (lambda: Then(lambda z: z * float(np.random.rand())), "generator: numpy"),
    "batch mean": (lambda: Then(lambda z: z - z.mean(0)), "mixes rows"),
    "softmax over rows": (lambda: Then(lambda z: z.softmax(0)), "mixes rows"),
    "divided by its length": (lambda: Then(lambda z: z / len(z)), "how many rows"),
    "its length beside it": (lambda: Then(lambda z: {"logits": z, "count": len(z)}), r"outputs\['count'\]"),
    "an output without rows": (lambda: Then(lambda z: (z, z.mean())), r"outputs\[1\] has shape \(\)"),
    "an output with other rows": (lambda: Then(lambda z: (z, z.T)), r"outputs\[1\] has shape \(3, "),
    "an output class": (lambda: Then(Unseen), "uses outputs, a Unseen, and the tensors inside it"),
    "a largest value seen": (lambda: Keeps(torch.zeros(3, dtype=D), _largest, buffer=True), "changes kept"),
    "a queue": (lambda: Keeps([], _append), "changes kept"),
    "parameters in a list": (Held, r"shape \(3,\)"),
    "a parameter in a closure": (lambda: Then(lambda z: z * CLOSED), r"shape \(3,\)"),
}


def logits_of(outputs: Any) -> Tensor:
    if isinstance(outputs, (Tensor, dict, tuple)):
        return outputs if isinstance(outputs, Tensor) else outputs["logits" if isinstance(outputs, dict) else 0]
    return outputs.logits


def whole_loss(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(logits_of(outputs), batch[1])


def bare(model: nn.Module) -> nn.Module:
    """``model`` with the weights of its inner layer as its own, so that no part of it treats rows alone."""
    inner = model._modules.pop("inner")
    assert isinstance(inner, nn.Linear)
    model.weight, model.bias = inner.weight, inner.bias
    model.inner = lambda x: F.linear(x, model.weight, model.bias)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_by_name_and_left_as_it_was(name: str) -> None:
    make, message = REFUSED[name]
    model = bare(make())
    step = sg.Step(model, whole_loss, rows=4, optimizer=torch.optim.SGD(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    batch = (X.clone(), Y.clone())
    with left_alone(model), pytest.raises(CannotSplit, match=message) as caught:
        step.backward(batch)
    assert "rows=<the batch's rows>" in caught.value.do
    assert torch.equal(batch[0], X) and torch.equal(batch[1], Y)
    assert CLOSED.grad is None


def _seeded() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


@pytest.mark.parametrize("name", REFUSED)
def test_a_part_of_it_that_treats_rows_alone_is_split_exactly_and_the_rest_sees_all_rows(name: str) -> None:
    make, _ = REFUSED[name]
    model = make()
    twin = copy.deepcopy(model)
    CLOSED.grad = None
    _seeded()
    expected = whole_loss(twin(X), (X, Y))
    expected.backward()
    closed, CLOSED.grad = CLOSED.grad, None
    step = sg.Step(model, whole_loss, rows=4)
    step.prepare((X, Y))
    _seeded()
    if name == "one draw for all rows":
        # Keyed in every plan, so it is another number than torch's own.
        whole = sg.Step(twin, whole_loss, rows=N)
        twin.zero_grad()
        expected = whole.backward((X, Y))
        _seeded()
    loss = step.backward((X, Y))
    assert step.plan is not None and step.plan.levers == {"segments": {"rows": 4, "paths": {"inner": 1}}}
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    assert_close(gradients(model), gradients(twin))
    if closed is not None:
        assert CLOSED.grad is not None
        torch.testing.assert_close(CLOSED.grad, closed, rtol=1e-12, atol=1e-15)
    CLOSED.grad = None


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_runs_whole_when_it_fits(name: str) -> None:
    make, message = REFUSED[name]
    torch.manual_seed(0)
    model = make()

    step = sg.Step(model, whole_loss, budget="1GiB")
    step.backward((X, Y))
    assert step.plan is not None and step.plan.levers == {}
    assert re.search(message, step.plan.reasons["split_rows"])
    assert step.plan.reasons["split_rows"].startswith("not needed: the plain step fits; refused besides: ")
    CLOSED.grad = None


class Cache:
    """What language models return beside their logits: tensors that no nesting shows."""

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept


def test_an_output_that_cannot_be_seen_matters_only_to_a_loss_that_looks_at_it() -> None:
    model = Then(lambda z: {"logits": z, "cache": Cache(z)})
    twin = Then(lambda z: z)
    _, expected = plain_step(twin, cross_entropy, (X, Y))
    for loss_fn in (whole_loss, lambda o, b: whole_loss(o, b) if o["cache"] is not None else None):
        model.zero_grad()
        sg.Step(model, loss_fn, rows=4).backward((X, Y))
        assert_close(gradients(model), expected)
    step = sg.Step(bare(model), lambda o, b: whole_loss(o, b) + o["cache"].kept.square().mean(), rows=4)
    with pytest.raises(CannotSplit, match=r"outputs\['cache'\], a Cache"):
        step.backward((X, Y))


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

    model = bare(Initialised())
    with pytest.raises(CannotSplit, match="changes shift"):
        sg.Step(model, cross_entropy, rows=4).backward((X, Y))
    assert model.shift is None


def test_weights_set_from_the_first_batch_are_refused_and_put_back() -> None:
    class Initialised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3, dtype=D)
            self.ready = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.ready:
                self.inner.bias.data.copy_(-self.inner(x).detach().mean(0))
                self.ready = True
            return self.inner(x)

    model = Initialised()
    with left_alone(model), pytest.raises(CannotSplit, match=r"parameters inner\.bias"):
        sg.Step(model, cross_entropy, rows=4).backward((X, Y))


def test_a_batch_leaf_that_requires_grad_is_refused_by_its_place() -> None:
    x = X.clone().requires_grad_()
    model = mlp()
    with left_alone(model), pytest.raises(CannotSplit, match=r"batch\[0\] carries rows and requires grad"):
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
    tally = Tally()

    def fragile(outputs: Tensor, batch: Any) -> Tensor:
        tally.seen.append(1)
        if len(tally.seen) == limit:
            raise ZeroDivisionError
        return cross_entropy(outputs, batch)

    limit = -1
    model = mlp()
    step = sg.Step(model, fragile, rows=4)
    step.backward((X, Y))
    limit = len(tally.seen) + 3
    with left_alone(model), pytest.raises(ZeroDivisionError):
        step.backward((X, Y))
    model.zero_grad()
    _, expected = plain_step(model, cross_entropy, (X, Y))
    step.backward((X, Y))
    assert_close(gradients(model), expected)


class FixedRows(nn.Module):
    """Takes the whole batch only, and draws."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 3, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x.reshape(N, 6)), 0.5)


@pytest.mark.parametrize("given", [{"rows": N}, {"budget": "1GiB"}, {}], ids=str)
def test_a_model_that_takes_all_rows_only_runs_whole_with_torchs_own_draws(given: dict[str, Any]) -> None:
    model, twin = FixedRows(), FixedRows()
    torch.manual_seed(4)
    expected = cross_entropy(twin(X), (X, Y))
    expected.backward()
    step = sg.Step(model, cross_entropy, **given)
    step.prepare((X, Y))
    torch.manual_seed(4)
    assert torch.equal(step.backward((X, Y)), expected.detach())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters()))


def test_a_model_that_takes_all_rows_only_is_refused_with_what_it_raised() -> None:
    model = FixedRows()
    with left_alone(model), pytest.raises(CannotSplit, match=r"fails on 8 rows of the batch: RuntimeError") as caught:
        sg.Step(model, cross_entropy, rows=4).backward((X, Y))
    assert isinstance(caught.value.__cause__, RuntimeError)


class Collecting(nn.Module):
    """Rows meet after an encoder. Each call of its layer is noted among the outputs, so that chunks of it give more."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)
        self.encoder[0].register_forward_hook(lambda _, __, output: self._seen.append(output))
        self._seen: list[Tensor] = []

    def forward(self, x: Tensor) -> dict[str, Any]:
        z = self.encoder(x)
        seen, self._seen = tuple(self._seen), []
        return {"scores": self.head(z - z.mean(0)), "seen": seen}


def test_a_part_whose_calls_are_counted_among_the_outputs_is_no_segment() -> None:
    model = Collecting().double()
    declared = declare(model, lambda outputs, batch: cross_entropy(outputs["scores"], batch))
    with left_alone(model):
        ways = find_ways(declared, aliases_for(declared), (X, Y), declared.layout((X, Y)))
    assert ways.by_rows is None and not any(lever.name == "segments" for lever in ways.mapped)
    assert ways.refusals["segments"].startswith("outputs['seen'][1] changes")


class Neighbours(nn.Module):
    """Each of (rows, 6) takes from the row that (rows,) numbers name, which fewer rows may not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        scores: Tensor = self.head(x + self.sent(x)[other])
        return scores


def test_a_small_batch_whose_rows_need_each_other_runs_whole_and_is_refused_in_chunks() -> None:
    model, rows = Neighbours().double(), 5
    batch = {"x": X[:rows], "other": torch.arange(rows).flip(0), "labels": Y[:rows]}
    loss = lambda outputs, b: F.cross_entropy(outputs, b["labels"])
    with left_alone(model), pytest.raises(CannotSplit, match=r"the model \(Neighbours\) fails on \d rows of the batch"):
        sg.Step(model, loss, rows=2).backward(batch)
    twin = copy.deepcopy(model)
    expected = loss(twin(batch["x"], batch["other"]), batch)
    expected.backward()
    # Planning probes the real step, on the rows that it takes.
    assert torch.equal(sg.Step(model, loss, budget="1GiB").backward(batch), expected.detach())
    assert_close(gradients(model), gradients(twin))
