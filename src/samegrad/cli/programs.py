"""A target, loaded: the program behind it that ``run`` and the other commands work on."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Its import draws from Python's generator: here that comes before the seeds, and is none of the program's draws.
import rich.console  # noqa: F401 - for what its import does
import torch

import samegrad as sg
from samegrad.cli.boundary import known_error
from samegrad.cli.devices import find_card_asked
from samegrad.cli.mistakes import file_of
from samegrad.cli.options import Call
from samegrad.cli.ranks import rank_count
from samegrad.cli.run_story import PictureFile
from samegrad.cli.target import FunctionTarget, Target
from samegrad.cli.training import FunctionTraining, Outcome, Tick, Training, counting_of
from samegrad.errors import BudgetTooSmall, CannotSplit, OverBudget, SamegradError, UsageError
from samegrad.measure import counters
from samegrad.measure.counting import sample_bytes
from samegrad.recipes import Program, Recipe, find_health, find_recipe, run_epochs
from samegrad.recipes._recipe import CacheEmptying
from samegrad.records import Counting, Footprint, Plan
from samegrad.store import (
    Checkpoint,
    model_into,
    optimizer_to_tensors,
    rng_from_tensors,
    rng_to_tensors,
    tensors_into_optimizer,
)
from samegrad.units import format_bytes, format_seconds, parse_bytes, parse_share

# After so long within an epoch what was done is written down, and a run that is asked to stop does.
_PAUSE_SECONDS = 2.0


@contextlib.contextmanager
def advised(target: Target) -> Iterator[None]:
    """A block that ends in a refusal or out of memory with the recipe's own advice beside the error."""
    try:
        yield
    except (SamegradError, MemoryError, RuntimeError) as error:
        known = known_error(error)
        if isinstance(target, FunctionTarget) or not isinstance(known, (BudgetTooSmall, CannotSplit, OverBudget)):
            raise
        told = error.without_declaration() if isinstance(error, SamegradError) else error
        for line in find_recipe(target.name).troubleshooting:
            told.add_note(line)
        if told is error:
            raise
        raise told.with_traceback(error.__traceback__) from error.__cause__


def load_training(target: Target, call: Call) -> Training:
    """The program of ``target``, its model made and its data opened, nothing trained yet."""
    options: Any = call.part(target.options_class)
    _seed(options.random_seed)
    pins = {} if isinstance(target, FunctionTarget) else find_recipe(target.name).pins
    _check_one_way(target, call, ("budget", *pins))
    if isinstance(target, FunctionTarget):
        loaded = target.load(options)
        if loaded.step.declared.device.type == "meta" and find_card_asked(options.device) is None:
            raise UsageError(
                asked=target.name, found="the model is on meta, so there is no device to run or measure it on",
                do="make it on a device, or plan for a card by name: samegrad plan --device 'RTX 4070'",
                option="device",
            )  # fmt: skip
        _check_budget(target, call, lambda: loaded.step.declared.device)
        return FunctionTraining(target.name, loaded.step, loaded.batches, budget=loaded.budget)
    recipe = find_recipe(target.name)
    _check_budget(target, call, lambda: sg.find_device(options.device))
    if find_card_asked(options.device) is not None:
        # A card may be elsewhere; the model is made here, and the budget is the card's: nothing is measured for
        # it here.
        return RecipeTraining(recipe, recipe.build(options.for_card_elsewhere()), budget=options.budget)
    return RecipeTraining(recipe, recipe.build(options))


def _check_budget(target: Target, call: Call, device: Callable[[], torch.device]) -> None:
    """Raises UsageError where ``--budget`` is more than there is: on the card that is planned for, or on ``device``."""
    options: Any = call.part(target.options_class)
    if options.budget is None or parse_share(options.budget) is not None:
        return
    card = find_card_asked(options.device)
    if card is not None:
        whole_bytes, how, name = card.memory_bytes, card.memory_basis, card.name
    else:
        here = device()
        (whole_bytes, how), name = counters.total_bytes(here), counters.device_name(here)
    if parse_bytes(options.budget) > whole_bytes:
        place = call.origins["budget"]
        raise UsageError(
            asked=f"--budget {options.budget}",
            found=f"{place}: {name} has {format_bytes(whole_bytes)} in all ({how})",
            do="give less than that, a share of it such as 80%, or plan for a larger card by name with --device",
            file=file_of(place),
            option="budget",
        )


def _check_one_way(target: Target, call: Call, others: Sequence[str]) -> None:
    """A given plan says all about how the step runs; raises UsageError where another option says it too."""
    given = [name for name in others if call.given(name)]
    if given and any(getattr(part, "plan", None) is not None for part in call.parts):
        raise UsageError(
            asked=f"--plan for {target.name}, and {given[0]} ({call.origins[given[0]]})",
            found="both decide how many rows run at a time",
            do="give one of them; a plan brings its own budget",
            option=given[0],
        )


def _seed(seed: int) -> None:
    """The default generators of this process, which is the command's own: the same command, the same draws."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RecipeTraining:
    """A recipe's program, one epoch a tick or a few seconds of it, counted in the program's own unit."""

    declared_here = False

    def __init__(self, recipe: Recipe, program: Program, *, budget: str | None = None) -> None:
        self.title, self.recipe, self.program, self.budget = recipe.name, recipe, program, budget
        self.unit = program.unit
        self._batch = next(iter(program.batches(0)))
        self._emptied = CacheEmptying()

    @property
    def step(self) -> sg.Step:
        return self.program.step

    @step.setter
    def step(self, step: sg.Step) -> None:
        self.program.step = step

    @property
    def batch(self) -> Any:
        return self._batch

    @property
    def total(self) -> int | None:
        return self.program.units_in(self.program.epochs)

    @property
    def done(self) -> int:
        return self.program.units_in(self.program.next_epoch)

    @property
    def steps_done(self) -> int:
        return self.program.steps_done

    def told_of(self, plan: Plan, footprint: Footprint) -> Sequence[str]:
        return self.program.told_of(plan, footprint)

    def told_of_pins(self) -> Sequence[str]:
        return self.program.told_of_pins()

    def limit(self, units: int) -> None:
        # Training stops between two epochs, so an epoch that holds the last one is done to its end.
        epochs = range(1, self.program.epochs)
        self.program.epochs = next((n for n in epochs if self.program.units_in(n) >= units), self.program.epochs)

    def ticks(self) -> Iterator[Tick]:
        counter = sample_bytes(self.step) if counting_of(self.step) is Counting.TENSOR_BYTES else None
        # Ranks pause together, or one would wait for another that has stopped: by the clock they would not.
        pause_seconds = _PAUSE_SECONDS if rank_count() == 1 else math.inf
        for epoch in run_epochs(self.program, counter=counter, pause_seconds=pause_seconds):
            self._emptied.seconds += epoch.empty_cache_seconds
            self._emptied.given_back_bytes += epoch.given_back_bytes
            last = epoch.is_over and (epoch.stopped or self.program.next_epoch >= self.program.epochs)
            yield Tick(
                results=epoch.steps,
                validation_loss=epoch.validation,
                last=last,
                validation_parts=epoch.validation_parts,
            )

    def tensors(self) -> Mapping[str, Mapping[str, Any]]:
        optimizer, _ = optimizer_to_tensors(self.program.optimizer)
        model, best = self.program.model.state_dict(), self.program.best.weights()
        return {"model": model, "optimizer": optimizer, "best": best, "rng": rng_to_tensors()}

    def state(self) -> Mapping[str, Any]:
        return {"program": self.program.state(), "optimizer": optimizer_to_tensors(self.program.optimizer)[1]}

    def restore(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        model_into(self.program.model, checkpoint.tensors["model"])
        optimizer_state = checkpoint.state["optimizer"]
        tensors_into_optimizer(self.program.optimizer, checkpoint.tensors["optimizer"], optimizer_state)
        self.program.load_state(checkpoint.state["program"], dict(checkpoint.tensors["best"]))
        return rng_from_tensors(checkpoint.tensors["rng"])

    def finish(self, folder: Path) -> Outcome:
        written = self.program.write(folder)
        health = find_health(self.recipe.name)
        # Where a recipe knows what its figures speak for, that is told, and not all there is to say.
        advice = self.recipe.troubleshooting if health is None else health.advise(folder)
        return Outcome(
            metrics=self.program.evaluate(),
            pictures=tuple(
                PictureFile(file=path.name, caption=path.stem.replace("_", " "))
                for path in written
                if path.suffix in (".png", ".svg")
            ),
            notes=(*self.program.describe(), *self._told_of_emptying()),
            troubleshooting=advice,
        )

    def _told_of_emptying(self) -> list[str]:
        """What ``--empty_cache`` cost and gave back; it lowers no peak of the step."""
        asked = self.program.empty_cache
        if asked == "never":
            return []
        cost = format_seconds(self._emptied.seconds)
        back = format_bytes(self._emptied.given_back_bytes)
        return [f"empty_cache after every {asked}: {cost} in all, {back} handed back to the driver"]
