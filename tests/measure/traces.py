"""Traces of two steps, made by hand: a chain of layers that keeps activations, with gradients and optimizer state."""

from __future__ import annotations

import dataclasses

from samegrad.measure.events import MemoryEvent, Operation, Trace
from samegrad.records import Category, Phase

MIB = 2**20


@dataclasses.dataclass
class TraceWriter:
    """Operations and events in order; ``take`` returns the number of the storage."""

    operations: list[Operation] = dataclasses.field(default_factory=list)
    events: list[MemoryEvent] = dataclasses.field(default_factory=list)
    sizes: dict[int, tuple[int, Category]] = dataclasses.field(default_factory=dict)

    def operation(self, step: int, phase: Phase, name: str = "aten.relu.default", dtype: str = "float32") -> None:
        self.operations.append(Operation(name, "", phase, step, 0, 0, dtype, 1))

    def take(self, size: int, category: Category = Category.ACTIVATIONS) -> int:
        number = len(self.sizes)
        self.sizes[number] = size, category
        self.events.append(MemoryEvent(number, size, len(self.operations) - 1, category))
        return number

    def give_back(self, number: int) -> None:
        size, category = self.sizes[number]
        self.events.append(MemoryEvent(number, -size, len(self.operations) - 1, category))

    def trace(self) -> Trace:
        return Trace(tuple(self.operations), tuple(self.events), "cuda", 8, (8,))


def chain(weights: list[int], activations: list[int], *, keeps_gradients: bool = False) -> Trace:
    """Adam on a chain: layer k takes ``activations[k]``; state comes in the first step, gradients go before the next.

    ``keeps_gradients``: they are given back by the next backward, one by one, in place of at the end of the step.
    """
    writer = TraceWriter()
    for size in weights:
        writer.take(size, Category.PARAMETERS)
    gradients: list[int] = []
    for step in range(2):
        kept = []
        for size in activations:
            writer.operation(step, Phase.FORWARD)
            kept.append(writer.take(size))
            writer.give_back(writer.take(size // 3 + 1, Category.TEMPORARY))
        found = []
        for size, number in zip(reversed(weights), reversed(kept)):
            writer.operation(step, Phase.BACKWARD)
            found.append(writer.take(size, Category.GRADIENTS))
            if gradients:
                writer.give_back(gradients.pop(0))
            writer.give_back(number)
        for size in weights:
            writer.operation(step, Phase.OPTIMIZER)
            if step == 0:
                writer.take(size, Category.OPTIMIZER_STATE)
                writer.take(size, Category.OPTIMIZER_STATE)
        if keeps_gradients:
            gradients = found
        else:
            for number in found:
                writer.give_back(number)
    return writer.trace()
