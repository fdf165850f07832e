"""Tensors that a function of rows or items holds in a closure and writes: refused by name, and found as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import samegrad as sg
from samegrad.errors import CannotSplit, UsageError
from samegrad.exact import held, item_checks, rowwise

X = torch.linspace(-1, 1, 21 * 3, dtype=torch.float64).view(21, 3)


def in_place() -> tuple[Callable[[Tensor], Tensor], Callable[[], Any]]:
    centre = torch.zeros(3, dtype=torch.float64)

    def fn(rows: Tensor) -> Tensor:
        result = rows - centre
        centre.mul_(0.9).add_(rows.detach().mean(0), alpha=0.1)
        return result

    return fn, lambda: centre.tolist()


def rebound() -> tuple[Callable[[Tensor], Tensor], Callable[[], Any]]:
    centre = torch.zeros(3, dtype=torch.float64)

    def fn(rows: Tensor) -> Tensor:
        nonlocal centre
        result = rows - centre
        centre = centre + rows.detach().mean(0)
        return result

    return fn, lambda: centre.tolist()


def queue() -> tuple[Callable[[Tensor], Tensor], Callable[[], Any]]:
    seen: list[Tensor] = []

    def fn(rows: Tensor) -> Tensor:
        result = rows * (1 + len(seen))
        seen.append(rows.detach())
        return result

    return fn, lambda: len(seen)


def array() -> tuple[Callable[[Tensor], Tensor], Callable[[], Any]]:
    centre = np.zeros(3)

    def fn(rows: Tensor) -> Tensor:
        result = rows - torch.from_numpy(centre.copy())
        centre[...] += rows.detach().mean(0).numpy()
        return result

    return fn, lambda: centre.tolist()


def statistics() -> tuple[Callable[[Tensor], Tensor], Callable[[], Any]]:
    centre = torch.zeros(3, dtype=torch.float64)

    def fn(rows: Tensor) -> Tensor:
        centre.mul_(0.9).add_(rows.detach().mean(0), alpha=0.1)
        return rows * 2

    return fn, lambda: centre.tolist()


WRITERS = [in_place, rebound, queue, array, statistics]


@pytest.mark.parametrize("make", WRITERS)
def test_rowwise_refuses_what_writes_a_held_tensor_and_leaves_it(make: Callable[[], Any]) -> None:
    fn, read = make()
    before = read()
    with pytest.raises(CannotSplit, match=r"fn's (centre|seen)"):
        sg.rowwise(fn, rows=4)(X)
    assert read() == before


@pytest.mark.parametrize("make", WRITERS)
def test_groups_of_rows_refuse_it_too(make: Callable[[], Any]) -> None:
    fn, read = make()
    before = read()
    with pytest.raises(CannotSplit, match=r"fn's (centre|seen)"):
        sg.rowwise(fn, rows=7, groups=[7, 7, 7])(X)
    assert read() == before


@pytest.mark.parametrize("make", WRITERS)
def test_over_refuses_what_writes_a_held_tensor_and_leaves_it(make: Callable[[], Any]) -> None:
    fn, read = make()
    before = read()
    with pytest.raises(CannotSplit, match=r"(centre|seen)"):
        sg.over(lambda items, _: fn(items), X, rows=4)
    assert read() == before


def test_a_large_held_tensor_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_LARGEST_BYTES_EACH_CALL", 8)
    fn, _ = in_place()
    with pytest.raises(UsageError, match="centre is written"):
        sg.over(lambda items, _: fn(items), X, rows=4)


def test_counting_calls_is_nobodys_state() -> None:
    calls = 0
    kept: list[int] = []

    def fn(rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        kept.append(len(rows))
        return rows * 2

    assert torch.equal(sg.rowwise(fn, rows=4)(X), X * 2)
    assert torch.equal(sg.over(lambda items, _: fn(items), X, rows=4), X * 2)
    assert calls == len(kept) > 0


def test_reading_a_held_tensor_is_fine() -> None:
    table, centre = torch.ones(21, 3, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)
    tables = [table]
    assert torch.equal(sg.rowwise(lambda rows: rows - centre + tables[0].sum(), rows=4)(X), X - centre + table.sum())
    assert torch.equal(sg.over(lambda items, _: items - centre, X, rows=4), X - centre)


def test_without_the_check_state_would_silently_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (item_checks, rowwise):
        monkeypatch.setattr(module, "arrays_held_in", lambda *_, **__: held.Held())
    # What never enters the result is not seen when rows run twice.
    plain, in_rows, in_items = (statistics() for _ in range(3))
    plain[0](X)
    sg.rowwise(in_rows[0], rows=4)(X)
    sg.over(lambda items, _: in_items[0](items), X, rows=4)
    assert plain[1]() not in (in_rows[1](), in_items[1]())
