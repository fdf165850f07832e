"""A training program, live, and its epochs one after another."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import samegrad as sg
from samegrad.recipes._recipe.asked import EmptyCache

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochResult:
    """One epoch: its optimizer steps, the validation value after them, and whether training ends here.

    Where ``run_epochs`` pauses within epochs, ``steps`` are those since the last pause, and ``is_over`` says whether
    the epoch is.
    ``improved``: the validation value is the best so far. ``validation_parts``: what that value is made of, by name,
    where the program says it. ``empty_cache_seconds`` and ``given_back_bytes`` are what
    ``--empty_cache`` cost and gave back to the driver.
    """

    epoch: int
    steps: tuple[sg.StepResult, ...]
    validation: float | None
    improved: bool
    stopped: bool
    seconds: float
    validation_parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    empty_cache_seconds: float = 0.0
    given_back_bytes: int = 0
    is_over: bool = True

    @property
    def loss(self) -> float:
        """The mean loss of the epoch's steps, each weighted by its rows."""
        rows = sum(step.batch_rows for step in self.steps)
        return float(sum(step.loss * step.batch_rows for step in self.steps) / rows)


@dataclasses.dataclass(kw_only=True)
class Program(abc.ABC):
    """A training program, live: the step, what feeds it, and what is judged and written at the end.

    ``batches_per_step``: batches whose mean loss makes one optimizer step. ``next_epoch``, ``steps_in_epoch`` (of it,
    done already), ``steps_done`` and ``stopped`` are where it stands; ``state`` and ``load_state`` carry them over a
    restart, tensors apart. ``unit`` is what the program's options count in, ``units_in`` how many of it some epochs
    are.
    """

    unit: ClassVar[str] = "epoch"

    step: sg.Step
    model: nn.Module
    optimizer: Optimizer
    best: sg.BestWeights
    epochs: int
    scaler: Any = None
    batches_per_step: int = 1
    empty_cache: EmptyCache = "never"
    next_epoch: int = 0
    steps_in_epoch: int = 0
    steps_done: int = 0
    stopped: bool = False

    @abc.abstractmethod
    def batches(self, epoch: int) -> Iterable[Any]:
        """The epoch's batches, ``batches_per_step`` for an optimizer step: a pure function of (options, epoch)."""

    def units_in(self, epochs: int) -> int:
        """How many of ``unit`` the first ``epochs`` epochs are."""
        return epochs

    def start(self) -> None:  # noqa: B027 - most programs have nothing to do
        """What happens once before the first epoch, and not when a run is resumed."""

    def begin_epoch(self, epoch: int) -> None:  # noqa: B027 - most programs have nothing to do
        """What changes with ``epoch``, before its first batch: stages, rates. A pure function of (options, epoch)."""

    def validate(self) -> float | None:
        """The value that early stopping watches (smaller is better), or None."""
        return None

    def validation_parts(self) -> Mapping[str, float]:
        """What the latest validation value is made of, by name; empty where it is one thing."""
        return {}

    @abc.abstractmethod
    def evaluate(self) -> dict[str, float]:
        """The field's metrics on the test rows, with the weights the model has now."""

    @abc.abstractmethod
    def write(self, folder: Path) -> list[Path]:
        """Writes weights and pictures into ``folder``, which exists; returns the files."""

    @abc.abstractmethod
    def describe(self) -> list[str]:
        """The program in a few lines for people: data, model, objective, optimizer."""

    def told_of(self, plan: sg.Plan, footprint: sg.Footprint) -> list[str]:
        """What the program's document would say of the plan, in lines for people; asked once it is in force."""
        return []

    def told_of_pins(self) -> list[str]:
        """What the options make part of the step itself, so that no plan shows it, in lines for people."""
        return []

    def state(self) -> dict[str, Any]:
        """All that resuming needs beside the tensors of model, optimizer and ``best.weights()``; goes to JSON."""
        return {
            "next_epoch": self.next_epoch,
            "steps_in_epoch": self.steps_in_epoch,
            "steps_done": self.steps_done,
            "stopped": self.stopped,
            "best": self.best.state(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any], best_weights: dict[str, Tensor]) -> None:
        """Continues where ``state`` was taken; model and optimizer are loaded by the caller."""
        self.next_epoch, self.steps_done = state["next_epoch"], state["steps_done"]
        # Of a checkpoint from before runs could stop within an epoch it is not there.
        self.steps_in_epoch = state.get("steps_in_epoch", 0)
        self.stopped = state["stopped"]
        self.best.load_state(state["best"], best_weights)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


def run_epochs(
    program: Program, *, first_epoch: int | None = None, counter: Any = None, pause_seconds: float = math.inf
) -> Iterator[EpochResult]:
    """Trains ``program`` and yields after each epoch; afterwards the best weights are in the model.

    They are restored whether training stopped early or the epochs ran out, but not when the caller leaves the loop:
    what is saved then is where training stands. ``first_epoch`` overrides where ``program`` stands. ``counter`` (from
    ``sg.count_bytes``) counts tensor bytes where there is no CUDA allocator. ``pause_seconds``: also yields between two
    steps of an epoch when so much time has passed. Raises NonFinite, weights unchanged.
    """
    if first_epoch is not None:
        program.next_epoch, program.steps_in_epoch = first_epoch, 0
    if program.next_epoch == 0 and program.steps_in_epoch == 0:
        program.start()
    while program.next_epoch < program.epochs and not program.stopped:
        yield from _run_epoch(program, counter, pause_seconds)
    program.best.restore()


def _run_epoch(program: Program, counter: Any, pause_seconds: float) -> Iterator[EpochResult]:
    start = time.perf_counter()
    emptying = CacheEmptying()
    steps: list[sg.StepResult] = []

    def so_far(*, validation: float | None = None, is_over: bool = False) -> EpochResult:
        return EpochResult(
            epoch=program.next_epoch,
            steps=tuple(steps),
            validation=validation,
            improved=validation is not None and program.best.waited == 0,
            stopped=program.stopped,
            seconds=time.perf_counter() - start,
            validation_parts=program.validation_parts() if is_over else {},
            empty_cache_seconds=emptying.seconds,
            given_back_bytes=emptying.given_back_bytes,
            is_over=is_over,
        )

    program.begin_epoch(program.next_epoch)
    batches = _Batches(program.batches(program.next_epoch), done=program.steps_in_epoch * program.batches_per_step)
    for result in sg.train(
        program.step,
        batches,
        scaler=program.scaler,
        first_index=program.steps_done,
        counter=counter,
        batches_per_step=program.batches_per_step,
    ):
        steps.append(result)
        program.steps_done += 1
        program.steps_in_epoch += 1
        if program.empty_cache == "step":
            emptying.empty()
        # The last steps of an epoch come with its validation.
        if time.perf_counter() - start >= pause_seconds and batches.are_left():
            yield so_far()
            start, emptying = time.perf_counter(), CacheEmptying()
            steps.clear()
    value = program.validate()
    if value is not None:
        program.stopped = program.best.update(value)
        if program.empty_cache == "validation":
            emptying.empty()
    over = so_far(validation=value, is_over=True)
    program.next_epoch, program.steps_in_epoch = program.next_epoch + 1, 0
    yield over


class _Batches:
    """The batches of an epoch but for those that are ``done``; ``are_left`` reads one ahead."""

    def __init__(self, batches: Iterable[Any], *, done: int) -> None:
        self._rest = itertools.islice(batches, done, None)
        self._next: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._next.pop() if self._next else next(self._rest)

    def are_left(self) -> bool:
        self._next = self._next or list(itertools.islice(self._rest, 1))
        return bool(self._next)


class CacheEmptying:
    """``torch.cuda.empty_cache()`` with what it costs (``seconds``) and returns (``given_back_bytes``)."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.given_back_bytes = 0

    def empty(self) -> None:
        """Hands cached memory back to the driver; does nothing without CUDA."""
        import torch

        if not torch.cuda.is_available():
            return
        start, reserved_bytes = time.perf_counter(), torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        self.given_back_bytes += reserved_bytes - torch.cuda.memory_reserved()
        self.seconds += time.perf_counter() - start
