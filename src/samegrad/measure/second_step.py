"""The second step of a trace written down after the first without being run, where a step is known to repeat itself.

Forward and backward are copied, storage by storage. The optimizer's turn is another one, since its state is there: it
runs, on tensors that stand in for the gradients. A first step that took more than it gave back, or gave back what was
older, is not copied: then the second one runs too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from samegrad.declared import DeclaredStep
from samegrad.measure.events import BEFORE_THE_STEPS, Operation, Trace
from samegrad.measure.recorder import Recorder
from samegrad.measure.repeated_blocks import Block, Event
from samegrad.module_walk import parameters_of
from samegrad.records import Phase

# run(declared, batch): forward, loss and backward, as ``trace.Run``.
_Run = Callable[[DeclaredStep, Any], object]


def repeats_itself(trace: Trace) -> bool:
    """Whether both steps of ``trace`` did the same up to the optimizer's turn, operation by operation."""
    first, second = (list(_until_the_turn(trace, step)) for step in range(2))
    return first == second and _changes(trace, 0) == _changes(trace, 1)


def _until_the_turn(trace: Trace, step: int) -> Iterator[Operation]:
    for operation in trace.operations:
        if operation.step == step and operation.phase is not Phase.OPTIMIZER:
            yield operation._replace(step=0)


def _changes(trace: Trace, step: int) -> list[int]:
    """In the order of the step."""
    return [
        event.change_bytes
        for event in trace.events
        if event.operation != BEFORE_THE_STEPS
        and (operation := trace.operations[event.operation]).step == step
        and operation.phase is not Phase.OPTIMIZER
    ]


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """Of ``parameter``, within the storage of ``number``."""

    parameter: Tensor
    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Again:
    """``run``, once for the first step, and copied for the second."""

    def __init__(self, recorder: Recorder, run: _Run) -> None:
        self._recorder, self._run = recorder, run
        self._first: tuple[Block, list[_Gradient]] | None = None

    def __call__(self, declared: DeclaredStep, batch: Any) -> object:
        if self._recorder.step == 0:
            with self._recorder.written.block() as blocks:
                found = self._run(declared, batch)
            self._first = blocks[0], list(self._gradients(declared))
            return found
        copied = None if self._first is None else self._copied(*self._first)
        return self._run(declared, batch) if copied is None else copied

    def _gradients(self, declared: DeclaredStep) -> Iterator[_Gradient]:
        for parameter in parameters_of(declared.modules):
            gradient = parameter.grad
            number = None if gradient is None else self._recorder.number_of(gradient)
            if gradient is not None and number is not None:
                yield _Gradient(
                    parameter, number, gradient.dtype, tuple(gradient.shape), gradient.stride(),
                    int(gradient.storage_offset()),
                )  # fmt: skip

    def _copied(self, block: Block, gradients: list[_Gradient]) -> list[Tensor] | None:
        """What stands in for what the first step left beside gradients; None, and nothing, where it is not copied."""
        written = self._recorder.written
        events = written.events[block.first_event : block.end_event]
        left = _left(events)
        ended = [number for number, change, _ in written.events[block.end_event :] if change < 0]
        of_gradients = {gradient.number for gradient in gradients}
        if left is None or not of_gradients <= left or not left <= set(ended):
            return None
        names = self._write(block, events)
        standing = {number: self._recorder.stand_in(names[number]) for number in ended if number in left}
        with self._recorder.unseen():
            for gradient in gradients:
                whole = standing[gradient.number].view(gradient.dtype)
                gradient.parameter.grad = whole.as_strided(gradient.shape, gradient.strides, gradient.offset)
        # They end where their likes did: gradients in the optimizer's turn, the others after it.
        return [tensor for number, tensor in standing.items() if number not in of_gradients]

    def _write(self, block: Block, events: list[Event]) -> dict[int, int]:
        """The numbers of the second step's storages by those of the first's."""
        written, step = self._recorder.written, self._recorder.step
        shift = len(written.operations) - block.first_operation
        operations = itertools.islice(written.operations, block.first_operation, block.end_operation)
        written.operations += [operation._replace(step=step) for operation in operations]
        names: dict[int, int] = {}
        for number, change, index in events:
            if change > 0:
                names[number] = written.number(change, written.categories[number])
            written.events.append((names[number], change, index + shift))
        return names


def _left(events: list[Event]) -> set[int] | None:
    """The storages that are there at the end; None where one is older than ``events``."""
    born: set[int] = set()
    for number, change, _ in events:
        if change > 0:
            born.add(number)
        elif number not in born:
            return None
        else:
            born.discard(number)
    return born
