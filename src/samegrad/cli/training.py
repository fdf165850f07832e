"""What ``run`` needs of a program to train, save and report it; and a user's own step as such a program.

1. Ticks are numbered by optimizer step, from 0, also over a resume.
2. What is saved and read back is everything the next tick depends on: weights, optimizer, its schedulers, random
   generators, position. A user's own EMA is not seen by us and is not saved.
3. A resumed iterable is read from its start and what was used is skipped, so its order must follow from the seed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

import samegrad as sg
from samegrad.cli.boundary import known_error
from samegrad.cli.data_workers import told_in
from samegrad.cli.run_story import PictureFile
from samegrad.cli.schedulers import scheduler_states, set_schedulers
from samegrad.errors import BadInput
from samegrad.measure.child_signals import Later, children_heard_later
from samegrad.measure.counting import sample_bytes
from samegrad.records import Counting, Footprint, Plan, StepResult
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
    """One unit of training done: its optimizer steps, the validation loss where there was one, and whether it is last.

    ``validation_parts``: what that loss is made of, by name, where the program says it.
    After the last tick a program may put its best weights in place, so what resumes is saved at that tick.
    """

    results: tuple[StepResult, ...]
    validation_loss: float | None = None
    last: bool = False
    validation_parts: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished program has to show: its field's metrics, picture files it wrote, and sentences for people."""

    metrics: Mapping[str, float | int | str | None] = dataclasses.field(default_factory=dict)
    pictures: tuple[PictureFile, ...] = ()
    notes: tuple[str, ...] = ()
    troubleshooting: tuple[str, ...] = ()


class Training(Protocol):
    """A program that ``run`` can drive, one tick after the other.

    ``unit`` is what is counted, one or more of them a tick; ``total`` is how many there are where that is known,
    ``done`` how many are done and ``steps_done`` how many optimizer steps that was. ``batch`` is the one the plan is
    made for, later the latest; ``budget`` is set where the command line gave one that the step does not know.
    ``declared_here``: whoever runs it wrote the step's declaration and can change it.
    """

    title: str
    unit: str
    declared_here: bool
    budget: str | None

    step: sg.Step

    @property
    def batch(self) -> Any: ...

    @property
    def total(self) -> int | None: ...

    @property
    def done(self) -> int: ...

    @property
    def steps_done(self) -> int: ...

    def told_of(self, plan: Plan, footprint: Footprint) -> Sequence[str]:
        """What the program has to say of its plan, in lines for people."""

    def told_of_pins(self) -> Sequence[str]:
        """What its options make part of the step itself, which no plan shows, in lines for people."""

    def limit(self, units: int) -> None:
        """Makes the tick that brings the unit number ``units`` the last one."""

    def ticks(self) -> Iterator[Tick]:
        """The ticks that are not done yet."""

    def tensors(self) -> Mapping[str, Mapping[str, Any]]: ...

    def state(self) -> Mapping[str, Any]: ...

    def restore(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Continues where ``checkpoint`` was taken; returns sentences on what may differ."""

    def finish(self, folder: Path) -> Outcome:
        """Evaluates, and writes the program's own files into ``folder``."""


class FunctionTraining:
    """One pass over the batches of a user's own ``(step, batches)``."""

    unit, declared_here = "step", True

    def __init__(self, title: str, step: sg.Step, batches: Iterable[Any], *, budget: str | None = None) -> None:
        self.title, self.step, self.budget, self._done = title, step, budget, 0
        self._total = _length(batches)
        # One iterator for planning and training: a second one would draw another order from the generators.
        rest = _read(batches, title)
        found = list(itertools.islice(rest, 1))
        if not found:
            raise BadInput(asked=title, found="no batches", do="return an iterable with at least one batch")
        self._latest, self._upcoming = found[0], _one_then(found.pop(), rest)

    @property
    def batch(self) -> Any:
        return self._latest

    @property
    def total(self) -> int | None:
        return self._total

    @property
    def done(self) -> int:
        return self._done

    @property
    def steps_done(self) -> int:
        return self._done

    def told_of(self, plan: Plan, footprint: Footprint) -> Sequence[str]:
        return ()

    def told_of_pins(self) -> Sequence[str]:
        return ()

    def limit(self, units: int) -> None:
        self._total = units if self._total is None else min(units, self._total)

    def ticks(self) -> Iterator[Tick]:
        left = None if self._total is None else max(0, self._total - self._done)
        counter = sample_bytes(self.step) if counting_of(self.step) is Counting.TENSOR_BYTES else None
        with children_heard_later() as later:
            batches = self._noticed(itertools.islice(self._upcoming, left), later)
            for result in sg.train(self.step, batches, first_index=self._done, counter=counter):
                self._done = result.index + 1
                yield Tick(results=(result,), last=self._done == self._total)

    def _noticed(self, batches: Iterator[Any], later: Later) -> Iterator[Any]:
        """The batches, each of them the latest. Only here is a data worker's death raised: between two steps."""
        while True:
            with later.now():
                try:
                    self._latest = next(batches)
                except StopIteration:
                    return
            yield self._latest

    def tensors(self) -> Mapping[str, Mapping[str, Any]]:
        optimizer, _ = optimizer_to_tensors(self._optimizer)
        return {"model": self._model.state_dict(), "optimizer": optimizer, "rng": rng_to_tensors()}

    def state(self) -> Mapping[str, Any]:
        return {
            "done": self._done,
            "optimizer": optimizer_to_tensors(self._optimizer)[1],
            "schedulers": scheduler_states(self._optimizer),
        }

    def restore(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        self._done = checkpoint.state["done"]
        skipped = sum(1 for _ in itertools.islice(self._upcoming, self._done))
        if skipped < self._done:
            raise BadInput(
                asked=f"continue {self.title} after {self._done} batches",
                found=f"there are only {skipped} batches now",
                do="return the batches of the earlier run, in the same order",
            )
        model_into(self._model, checkpoint.tensors["model"])
        tensors_into_optimizer(self._optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
        # A checkpoint of an earlier version names none.
        if (states := checkpoint.state.get("schedulers")) is not None:
            set_schedulers(self._optimizer, states, title=self.title)
        return rng_from_tensors(checkpoint.tensors["rng"])

    def finish(self, folder: Path) -> Outcome:
        return Outcome()

    @property
    def _model(self) -> Any:
        return self.step.declared.network

    @property
    def _optimizer(self) -> Any:
        return self.step.declared.optimizer


def _length(batches: Iterable[Any]) -> int | None:
    """How many there are, where that is known: a DataLoader has a length that an iterable data set may not have."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None


def _read(batches: Iterable[Any], title: str) -> Iterator[Any]:
    """The batches. Raises BadInput where reading them fails in a library that the user's own code did not call."""
    rest = None
    while True:
        try:
            rest = iter(batches) if rest is None else rest
            yield next(rest)
        except StopIteration:
            return
        except Exception as error:  # of many types; what is known already goes on as it is
            if known_error(error) is not None:
                raise
            raise BadInput(
                asked=f"read the batches of {title}",
                found=told_in(error) or f"{type(error).__name__}: {error}",
                do="see that the batches can be iterated over, and that the items of a dataset can be made one batch "
                "(collate_fn=); --debug shows the traceback",
            ) from error


def _one_then(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    """``first`` and what follows. Unlike itertools.chain it lets go of ``first``, whose bytes every step would pay."""
    yield first
    del first
    yield from rest


def counting_of(step: sg.Step) -> Counting:
    """What bytes mean on the step's device."""
    return Counting.CUDA_ALLOCATOR if step.declared.device.type == "cuda" else Counting.TENSOR_BYTES
