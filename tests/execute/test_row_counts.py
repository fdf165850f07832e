"""Code that asks how many rows there are: refused with its place before a chunk runs, and no other code is."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import samegrad as sg
from samegrad.execute.row_counts import RowCounts
from samegrad.measure import follow_calls
from samegrad.records import Same

from ..contract.plain import assert_close, cross_entropy, gradients, labelled, left_alone, plain_step, spread

N = 61
SEEN: dict[Any, Any] = {}


class Fn(nn.Module):
    """``function(self, x)`` between two linear layers."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.function = nn.Linear(6, 6), nn.Linear(6, 3), function
        self.kept: Any = None
        self.holder = Holder()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self, self.first(x)))


class Holder:
    """An object of the user's own."""


def model_of(function: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return Fn(function).double()


def _halved_by_sixteen(self: Any, x: Tensor) -> Tensor:
    for _ in range(1 + len(x) // 16):
        x = x * 0.5
    return x


def _detached(self: Any, x: Tensor) -> Tensor:
    return x.detach() if len(x) > 16 else x


def _without_gradient(self: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(len(x) <= 16):
        return x * 2


def _written(self: Any, x: Tensor) -> Tensor:
    z = x.clone()
    if x.shape[0] > 16:
        z[0] = 0
    return z


ASKS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    # What the refusal says of each.
    "a mean of many": (lambda self, x: x - x.mean(0) if len(x) > 16 else x, "calls mean on 61 rows"),
    "a threshold": (lambda self, x: x * max(len(x), 16), "calls mul with a tensor, 61 on 61 rows"),
    "a fraction": (lambda self, x: x / (len(x) if x.shape[0] > 16 else 1), "calls div"),
    "another function": (lambda self, x: x.tanh() if x.size(0) > 16 else x.sin(), "calls tanh on 61 rows and sin on"),
    "two numbers": (lambda self, x: F.leaky_relu(x, 0.1 if x.numel() > 100 else 0.2), "calls leaky_relu with"),
    "the first sixteen": (lambda self, x: x - x[16:].sum(0), "calls __getitem__, which gives (45, 6) on 61 rows"),
    "a loop": (_halved_by_sixteen, "calls mul on 61 rows"),
    "no gradient": (_detached, "calls detach on 61 rows"),
    "gradients off": (_without_gradient, "calls _set_grad_enabled with False"),
    "written": (_written, "calls __setitem__ on 61 rows"),
    "half as wide": (lambda self, x: x.float().to(x.dtype) if len(x) > 16 else x, "calls float on 61 rows"),
}


@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
@pytest.mark.parametrize("name", ASKS)
def test_a_model_that_asks_is_refused_with_its_line(name: str, loss_fn: Any) -> None:
    function, words = ASKS[name]
    model, batch = model_of(function), labelled(N)
    step = sg.Step(model, loss_fn, rows=8)
    with left_alone(model), pytest.raises(sg.CannotSplit) as caught:
        step.backward(batch)
    assert words in caught.value.found and caught.value.found.startswith("the model (Fn), test_row_counts.py:")
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(sg.CannotSplit):
        step.backward(batch)


@pytest.mark.parametrize("name", ASKS)
def test_it_would_be_another_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused above is seen by nothing else before the step, and is not the plain step."""
    monkeypatch.setattr(RowCounts, "check", lambda *_: None)
    step = sg.Step(model_of(ASKS[name][0]), cross_entropy, rows=8)
    assert sg.verify_step(step, labelled(N)).answer is Same.DIFFERS


def _twice_above(outputs: Tensor, batch: Any) -> Tensor:
    return cross_entropy(outputs, batch) * (2 if len(outputs) > 16 else 1)


def test_a_loss_that_asks_is_refused_where_it_runs_in_chunks() -> None:
    model = nn.Linear(6, 3).double()
    with pytest.raises(sg.CannotSplit, match=r"the loss, test_row_counts\.py:\d+, calls mul with a tensor, 2 on"):
        sg.Step(model, _twice_above, rows=8).backward(labelled(N))


def test_and_runs_where_it_sees_all_rows() -> None:
    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        return spread(outputs, batch) * (2 if len(outputs) > 16 else 1)

    model, batch = nn.Linear(6, 3).double(), labelled(N)
    _, plain = plain_step(model, loss_fn, batch)
    sg.Step(model, loss_fn, rows=8).backward(batch)
    assert_close(gradients(model), plain)


def test_what_the_batch_is_too_small_to_show_is_no_reason() -> None:
    model, batch = model_of(ASKS["a mean of many"][0]), labelled(15)
    _, plain = plain_step(model, cross_entropy, batch)
    step = sg.Step(model, cross_entropy, rows=4)
    step.backward(batch)
    assert_close(gradients(model), plain)
    with pytest.raises(sg.CannotSplit, match="calls mean on 17 rows"):
        step.backward(labelled(17))


# Code that knows its rows, and is the same function for any number of them


@functools.lru_cache(maxsize=4)
def _mask(length: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(length, length, dtype=dtype).tril()


def _in_an_attribute(self: Any, x: Tensor) -> Tensor:
    if self.kept is None or len(self.kept) < len(x):
        self.kept = torch.ones(len(x), 1, dtype=x.dtype)
    return x * self.kept[: len(x)]


def _in_a_global(self: Any, x: Tensor) -> Tensor:
    if len(x) not in SEEN:
        SEEN[len(x)] = torch.full_like(x, 2)
    return x * SEEN[len(x)]


def _in_an_object(self: Any, x: Tensor) -> Tensor:
    if getattr(self.holder, "scale", x[:0]).shape != x.shape:
        self.holder.scale = torch.full_like(x, 2)
    return x * self.holder.scale


def _row_by_row(self: Any, x: Tensor) -> Tensor:
    rows = []
    for i in range(len(x)):
        row = x[i]
        rows.append(row.tanh() * 2 + row)
    return torch.stack(rows)


def _written_by_column(self: Any, x: Tensor) -> Tensor:
    z = x.new_zeros(len(x), 6)
    for j in range(6):
        z[:, j] = x[:, j] * j
    return z


KNOWS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a view": lambda self, x: x.view(len(x), 3, 2).transpose(1, 2).reshape(x.shape[0], -1),
    "flat": lambda self, x: x.reshape(-1).tanh().view(x.size(0), 6),
    "places": lambda self, x: x * (torch.arange(len(x), device=x.device) >= 0).unsqueeze(1),
    "zeros beside": lambda self, x: torch.cat([x, x.new_zeros(len(x) + 1, 6)])[: len(x)],
    "a hidden state": lambda self, x: x + torch.zeros(2, len(x), 6, dtype=x.dtype)[0],
    "multiplied and divided": lambda self, x: x * len(x) / len(x),
    "a mask kept by length": lambda self, x: x @ _mask(x.shape[1], x.dtype),
    "kept in an attribute": _in_an_attribute,
    "kept in a global": _in_a_global,
    "kept in an object": _in_an_object,
    "row by row": _row_by_row,
    "rows unbound": lambda self, x: torch.stack([row.sin() for row in x]),
    "written by column": _written_by_column,
    "a checkpoint": lambda self, x: checkpoint(lambda z: z.view(len(z), 6).cos(), x, use_reentrant=False),
}


@pytest.mark.parametrize("rows", [1, 8, 20])
@pytest.mark.parametrize("name", KNOWS)
def test_code_that_is_the_same_for_any_number_of_rows_runs(
    name: str, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    SEEN.clear()
    _mask.cache_clear()
    model, batch = model_of(KNOWS[name]), labelled(N)
    _, plain = plain_step(model, cross_entropy, batch)
    SEEN.clear()
    _mask.cache_clear()
    with caplog.at_level(logging.WARNING, logger="samegrad"):
        step = sg.Step(model, cross_entropy, rows=rows)
        for _ in range(2):
            model.zero_grad()
            step.backward(batch)
    assert_close(gradients(model), plain)
    assert caplog.text == ""
    # What the code keeps beside the model has data.
    model(batch[0])
    assert all(type(value) is Tensor for value in SEEN.values())


def test_a_model_may_hold_any_object() -> None:
    """Such as a type with arguments, whose attributes are those of a class."""
    model = model_of(KNOWS["a view"])
    model.kind = list[int]  # type: ignore[assignment]
    sg.Step(model, cross_entropy, rows=8).backward(labelled(N))
    assert all(p.grad is not None for p in model.parameters())


def test_autocast_and_layers_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Fn(KNOWS["a view"]), nn.BatchNorm1d(3)).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sg.Step(model, cross_entropy, rows=8).backward(labelled(N, torch.float32))
    assert all(p.grad is not None for p in model.parameters())


# What cannot be followed


def _value(self: Any, x: Tensor) -> Tensor:
    return x * 2 if float(x.detach().abs().sum()) >= 0 else x


def test_what_needs_values_is_said_and_never_silent(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = model_of(_value), labelled(N)
    _, plain = plain_step(model, cross_entropy, batch)
    step = sg.Step(model, cross_entropy, rows=20)
    with caplog.at_level(logging.WARNING, logger="samegrad"):
        for _ in range(2):
            model.zero_grad()
            step.backward(batch)
    assert_close(gradients(model), plain)
    assert caplog.text.count("above 20 rows was not seen") == 1
    assert "above 20 rows was not seen" in step.explain()


def test_what_comes_before_a_value_is_compared() -> None:
    def asks_first(self: Any, x: Tensor) -> Tensor:
        return _value(self, x.sin() if len(x) > 16 else x.cos())

    with pytest.raises(sg.CannotSplit, match="calls sin on 61 rows and cos"):
        sg.Step(model_of(asks_first), cross_entropy, rows=8).backward(labelled(N))


def test_what_comes_after_a_value_shows_in_the_rows_of_a_chunk() -> None:
    def asks_last(self: Any, x: Tensor) -> Tensor:
        z = _value(self, x)
        return z.sin() if len(x) > 16 else z.cos()

    with pytest.raises(sg.CannotSplit, match="of the first 8 rows are others when 20 rows run with them"):
        sg.Step(model_of(asks_last), cross_entropy, rows=20).backward(labelled(N))


def test_a_plan_is_looked_at_once_for_a_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def counted(declared: Any, batch: Any, layout: Any, rows: Any, **how: Any) -> Any:
        asked.append(list(rows))
        return follow_calls.follow_calls(declared, batch, layout, rows, **how)

    monkeypatch.setattr("samegrad.execute.row_counts.follow_calls", counted)
    step = sg.Step(model_of(KNOWS["a view"]), cross_entropy, rows=8)
    for rows in (N, N, 31, N, 31):
        step.backward(labelled(rows))
    assert asked == [[5, 8, 61], [7, 31]]


def test_segments_are_looked_at_and_what_sees_the_whole_batch_is_not() -> None:
    class Coupled(nn.Module):
        def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
            super().__init__()
            self.part = Fn(function)

        def forward(self, x: Tensor) -> Tensor:
            z = self.part(x)
            return z - z.mean(0) / 2 if len(x) > 4 else z * 2

    batch = labelled(N)
    model = Coupled(KNOWS["a view"]).double()
    _, plain = plain_step(model, cross_entropy, batch)
    sg.Step(model, cross_entropy, rows=8, segments=["part"]).backward(batch)
    assert_close(gradients(model), plain)
    model = Coupled(ASKS["another function"][0]).double()
    with pytest.raises(sg.CannotSplit, match=r"part \(Fn\)"):
        sg.Step(model, cross_entropy, rows=8, segments=["part"]).backward(batch)


class Normalised(nn.Module):
    """A BatchNorm, and code that no record can hold, so that chunks meet at it."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.head = Fn(function), nn.BatchNorm1d(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(x.view(len(x), 6))))


@pytest.mark.parametrize("rows", [1, 8])
def test_chunks_that_meet_at_batchnorm_are_looked_at(rows: int) -> None:
    batch = labelled(N)
    step = sg.Step(Normalised(KNOWS["row by row"]).double(), spread, rows=rows)
    assert sg.verify_step(step, batch).same
    assert step.plan is not None and step.plan.levers["exact_batchnorm"]["scheme_name"] == "rendezvous"
    model = Normalised(ASKS["another function"][0]).double()
    with pytest.raises(sg.CannotSplit, match=r"inner \(Fn\), test_row_counts\.py:\d+, calls tanh on 61 rows"):
        sg.Step(model, spread, rows=rows).backward(batch)
