"""The complete training programs that come along: a folder each, found by its ``options.py``.

Listing recipes and reading their options imports no torch; ``find_recipe`` does.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path

import samegrad as sg
from samegrad.recipes._recipe import (
    Answer,
    CommonOptions,
    EpochResult,
    Finding,
    Health,
    OutOfRange,
    Program,
    Recipe,
    run_epochs,
)

__all__ = [
    "Answer",
    "CommonOptions",
    "EpochResult",
    "Finding",
    "Health",
    "OutOfRange",
    "Program",
    "Recipe",
    "find_health",
    "find_options",
    "find_recipe",
    "recipe_names",
    "run_epochs",
]


def recipe_names() -> list[str]:
    """The recipes that come along, sorted."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/options.py"))


def find_options(name: str) -> type[CommonOptions]:
    """The options class of the recipe ``name``; imports no torch. Raises UsageError with the nearest name."""
    _check_name(name)
    options: type[CommonOptions] = importlib.import_module(f"{__name__}.{name}.options").Options
    return options


def find_recipe(name: str) -> Recipe:
    """The recipe ``name``, ready to build. Raises UsageError with the nearest name."""
    _check_name(name)
    recipe: Recipe = importlib.import_module(f"{__name__}.{name}.recipe").RECIPE
    return recipe


def find_health(name: str) -> Health | None:
    """The checks that the recipe ``name`` has on its own runs; None where it has none, or for another name."""
    if name not in recipe_names() or not (Path(__file__).parent / name / "health.py").is_file():
        return None
    health: Health = importlib.import_module(f"{__name__}.{name}.health")
    return health


def _check_name(name: str) -> None:
    known = recipe_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise sg.UsageError(
            asked=f"the recipe {name!r}",
            found="there is none of that name" + (f"; did you mean {near[0]!r}?" if near else ""),
            do=f"use one of {', '.join(known)}",
        )
