"""A target, loaded: the program behind it that ``run`` and the other commands work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import samegrad as sg
from samegrad.cli.options import Call
from samegrad.cli.run_story import PictureFile
from samegrad.cli.target import FunctionOptions, FunctionTarget, Target
from samegrad.cli.training import FunctionTraining, Outcome, Tick, Training, counting_of
from samegrad.recipes import Program, Recipe, find_recipe, run_epochs
from samegrad.records import Counting, Plan
from samegrad.store import (
    Checkpoint,
    model_into,
    optimizer_to_tensors,
    rng_from_tensors,
    rng_to_tensors,
    tensors_into_optimizer,
)


def load_training(target: Target, call: Call, plan: Plan | None = None) -> Training:
    """The program of ``target``, its model made and its data opened, nothing trained yet.

    ``plan``: the plan it will be given; a recipe then leaves its own default number of rows out.
    """
    if isinstance(target, FunctionTarget):
        loaded = target.load(call.part(FunctionOptions))
        return FunctionTraining(target.name, loaded.step, loaded.batches, budget=loaded.budget)
    recipe = find_recipe(target.name)
    options: Any = call.part(target.options_class)
    if plan is not None and options.budget is None:
        total_bytes = plan.budget.total_bytes if plan.budget is not None else 2**59
        options = dataclasses.replace(options, budget=f"{total_bytes}B")
    return RecipeTraining(recipe, recipe.build(options))


class RecipeTraining:
    """A recipe's program, one epoch a tick."""

    unit = "epoch"
    budget: str | None = None

    def __init__(self, recipe: Recipe, program: Program) -> None:
        self.title, self.recipe, self.program = recipe.name, recipe, program
        self._batch = next(iter(program.batches(0)))

    @property
    def step(self) -> sg.Step:
        return self.program.step

    @property
    def batch(self) -> Any:
        return self._batch

    @property
    def total(self) -> int | None:
        return self.program.epochs

    @property
    def done(self) -> int:
        return self.program.next_epoch

    @property
    def steps_done(self) -> int:
        return self.program.steps_done

    def limit(self, ticks: int) -> None:
        self.program.epochs = min(self.program.epochs, ticks)

    def ticks(self) -> Iterator[Tick]:
        counter = sg.count_bytes(self.step) if counting_of(self.step) is Counting.TENSOR_BYTES else None
        for epoch in run_epochs(self.program, counter=counter):
            last = epoch.stopped or self.done >= self.program.epochs
            yield Tick(results=epoch.steps, validation_loss=epoch.validation, last=last)

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
        return Outcome(
            metrics=self.program.evaluate(),
            pictures=tuple(
                PictureFile(file=path.name, caption=path.stem.replace("_", " "))
                for path in written
                if path.suffix in (".png", ".svg")
            ),
            notes=tuple(self.program.describe()),
            troubleshooting=self.recipe.troubleshooting,
        )
