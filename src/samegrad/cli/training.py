"""What ``run`` needs of a program to train, save and report it; and a user's own step as such a program.

1. Ticks are numbered by optimizer step, from 0, also over a resume.
2. What is saved and read back is everything the next tick depends on: weights, optimizer, random generators,
   position. A user's own scheduler or EMA is not seen by us and is not saved.
3. A resumed iterable is read from its start and what was used is skipped, so its order must follow from the seed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Protocol

import samegrad as sg
from samegrad.errors import BadInput, UsageError
from samegrad.records import Counting, StepResult
from samegrad.report import Picture
from samegrad.store import (
    Checkpoint,
    model_into,
    optimizer_to_tensors,
    rng_from_tensors,
    rng_to_tensors,
    tensors_into_optimizer,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tick:
    """One unit of training done: the step's result, and the validation loss where there was one."""

    result: StepResult
    validation_loss: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished program has to show: its field's metrics, pictures, notes, and the files it wrote."""

    metrics: Mapping[str, float | int | str | None] = dataclasses.field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    troubleshooting: tuple[str, ...] = ()


class Training(Protocol):
    """A program that ``run`` can drive, one tick after the other."""

    title: str
    unit: str
    """What a tick is called: "epoch" or "step"."""
    total: int | None
    """How many ticks there are in all, where that is known."""
    done: int

    @property
    def step(self) -> sg.Step: ...

    @property
    def batch(self) -> Any:
        """The batch that the plan is made for."""

    def ticks(self) -> Iterator[Tick]:
        """The ticks that are not done yet."""

    def tensors(self) -> Mapping[str, Mapping[str, Any]]: ...

    def state(self) -> Mapping[str, Any]: ...

    def restore(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Continues where ``checkpoint`` was taken; returns sentences on what may differ."""

    def finish(self, folder: Path | None) -> Outcome:
        """Evaluates, and writes the program's own files into ``folder``."""


class FunctionTraining:
    """One pass over the batches of a user's own ``(step, batches)``."""

    unit = "step"

    def __init__(self, title: str, step: sg.Step, batches: Iterable[Any]) -> None:
        self.title, self._step, self.done = title, step, 0
        if step.declared.optimizer is None:
            raise UsageError(
                asked=f"train {title}",
                found="the step was declared without an optimizer",
                do="samegrad.Step(model, loss_fn, optimizer=optimizer, ...)",
            )
        self.total = len(batches) if isinstance(batches, Sized) else None
        # One iterator for planning and training: a second one would draw another order from the generators.
        self._rest = iter(batches)
        self._first = self._next(0)

    @property
    def step(self) -> sg.Step:
        return self._step

    @property
    def batch(self) -> Any:
        return self._first

    def ticks(self) -> Iterator[Tick]:
        batches = itertools.chain([self._first], self._rest)
        counter = sg.count_bytes(self._step) if counting_of(self._step) is Counting.TENSOR_BYTES else None
        for result in sg.train(self._step, batches, first_index=self.done, counter=counter):
            self.done = result.index + 1
            yield Tick(result=result)

    def tensors(self) -> Mapping[str, Mapping[str, Any]]:
        optimizer, _ = optimizer_to_tensors(self._optimizer)
        return {"model": self._model.state_dict(), "optimizer": optimizer, "rng": rng_to_tensors()}

    def state(self) -> Mapping[str, Any]:
        return {"done": self.done, "optimizer": optimizer_to_tensors(self._optimizer)[1]}

    def restore(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        self.done = checkpoint.state["done"]
        for index in range(1, self.done + 1):
            self._first = self._next(index)
        model_into(self._model, checkpoint.tensors["model"])
        tensors_into_optimizer(self._optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
        return rng_from_tensors(checkpoint.tensors["rng"])

    def finish(self, folder: Path | None) -> Outcome:
        return Outcome()

    @property
    def _model(self) -> Any:
        return self._step.declared.network

    @property
    def _optimizer(self) -> Any:
        return self._step.declared.optimizer

    def _next(self, index: int) -> Any:
        for batch in self._rest:
            return batch
        raise BadInput(
            asked=f"batch {index} of {self.title}",
            found="no batches" if index == 0 else f"the batches end after {index}",
            do="return an iterable with at least one batch" if index == 0 else
            "nothing is left to train: leave out --resume, or return more batches",
        )  # fmt: skip


def counting_of(step: sg.Step) -> Counting:
    """What bytes mean on the step's device."""
    return Counting.CUDA_ALLOCATOR if step.declared.device.type == "cuda" else Counting.TENSOR_BYTES
