"""Chunks that repeat are written down without being run, and what is written is what running them writes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from samegrad.declared import DeclaredStep
from samegrad.execute.apply import applied, standing
from samegrad.measure import recorder
from samegrad.measure.events import Operation, Trace
from samegrad.measure.repeated_blocks import Repetition, Written
from samegrad.measure.trace import plainly, trace_step
from samegrad.records import Category, Exactness, Phase, Plan

from .traced import Words, declared_on, words

ROWS = 13
# Positions of logits at a time, of 13 rows of 11: eighteen chunks, the last one smaller; six; two.
AT_A_TIME = [8, 28, 80]


def of_words(outputs: Tensor, batch: Any, reduction: str) -> Tensor:
    losses = F.cross_entropy(outputs.flatten(0, 1), batch[0].flatten(), reduction=reduction)
    return losses if losses.dim() == 0 else losses.square().sum()


def traced(declared: DeclaredStep, batch: Any, at_a_time: int) -> Trace:
    levers = {"chunk_loss": {"head": "head", "rows": at_a_time}}
    plan = Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=ROWS)
    with applied(plan, declared, ROWS) as execution:
        return trace_step(
            execution.declared, batch, device="cpu", run=plainly(), stands=functools.partial(standing, plan)
        )


def in_order(trace: Trace) -> list[tuple[int, int, int, Category]]:
    """The events, storages numbered as they come."""
    numbers: dict[int, int] = {}
    return [(numbers.setdefault(e.storage, len(numbers)), *e[1:4]) for e in trace.events]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each operation that was dispatched."""
    seen: list[int] = []
    old = recorder.Recorder._note

    def note(self: Any, func: Any, *rest: Any) -> None:
        seen.append(1)
        old(self, func, *rest)

    monkeypatch.setattr(recorder.Recorder, "_note", note)
    return seen


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("at_a_time", AT_A_TIME)
def test_what_is_written_is_what_running_all_chunks_writes(
    at_a_time: int, reduction: str, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batch = Words(), words(ROWS)
    declared = declared_on(model, functools.partial(of_words, reduction=reduction))
    found = traced(declared, batch, at_a_time)
    ran, runs[:] = len(runs), []
    monkeypatch.setattr(recorder.Recorder, "stands_in", lambda *_: False)
    whole = traced(declared, batch, at_a_time)
    assert found.operations == whole.operations
    assert in_order(found) == in_order(whole)
    # Of five chunks and more, two of those between the first and the last.
    assert (ran < len(runs)) == (at_a_time <= ROWS * 11 // 5)


def operation(name: str) -> Operation:
    return Operation(name, "", Phase.FORWARD, 0, 1, 2, "float32", 1)


class Loop:
    """A loop by hand: each chunk is given as its operations, storages it takes and storages it gives back."""

    def __init__(self) -> None:
        self.written = Written()
        self.repetition = Repetition(self.written)

    def chunk(self, *changes: int | tuple[str, int], name: str = "aten.mm.default") -> list[int]:
        """``changes``: bytes of a storage that is taken, or ("free", its number)."""
        taken = []
        with self.repetition.block():
            self.written.operations.append(operation(name))
            index = len(self.written.operations) - 1
            for change in changes:
                if isinstance(change, tuple):
                    number = change[1]
                    self.written.events.append((number, -self.written.sizes_bytes[number], index))
                else:
                    taken.append(self.written.number(change, Category.TEMPORARY))
                    self.written.events.append((taken[-1], change, index))
        return taken


def test_what_a_chunk_leaves_for_the_next_is_handed_on() -> None:
    loop = Loop()
    [first] = loop.chunk(64)
    [second] = loop.chunk(64, ("free", first))
    [third] = loop.chunk(64, ("free", second))
    assert loop.repetition.written_again(2) == {third: 4}
    assert loop.written.events == [
        (0, 64, 0), (1, 64, 1), (0, -64, 1), (2, 64, 2), (1, -64, 2), (3, 64, 3), (2, -64, 3), (4, 64, 4), (3, -64, 4)
    ]  # fmt: skip
    assert len(loop.written.operations) == 5


def grows(loop: Loop) -> None:
    """Each chunk leaves one more storage."""
    loop.chunk(64)
    loop.chunk(64)


def of_another_size(loop: Loop) -> None:
    [first] = loop.chunk(64)
    [second] = loop.chunk(64, ("free", first))
    loop.chunk(128, ("free", second))


def of_another_operation(loop: Loop) -> None:
    [first] = loop.chunk(64)
    loop.chunk(64, ("free", first), name="aten.add.Tensor")


def frees_what_is_older(loop: Loop) -> None:
    older = [loop.written.number(32, Category.TEMPORARY) for _ in range(2)]
    loop.chunk(("free", older[0]))
    loop.chunk(("free", older[1]))


def apart(loop: Loop) -> None:
    """Something happens between the two."""
    loop.chunk()
    loop.written.operations.append(operation("aten.add.Tensor"))
    loop.chunk()


@pytest.mark.parametrize("does", [grows, of_another_size, of_another_operation, frees_what_is_older, apart])
def test_chunks_that_do_something_else_all_run(does: Any) -> None:
    loop = Loop()
    does(loop)
    events, operations = list(loop.written.events), list(loop.written.operations)
    assert loop.repetition.written_again(3) is None
    assert (loop.written.events, loop.written.operations) == (events, operations)


def test_a_loop_inside_a_chunk_is_a_loop_of_its_own() -> None:
    loop = Loop()
    for _ in range(2):
        with loop.repetition.block():
            for _ in range(2):
                loop.chunk()
            assert loop.repetition.written_again(1) == {}
    assert loop.repetition.written_again(2) == {}
    assert len(loop.written.operations) == 4 * 3
