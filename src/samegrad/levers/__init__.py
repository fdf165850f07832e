"""The levers found in this folder: every file that does not start with an underscore holds exactly one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
import pkgutil
from typing import Any, cast

from samegrad.declared import DeclaredStep
from samegrad.errors import BadInput, WrongPlan
from samegrad.levers._lever import ChoosyLever, Execution, Lever, PredictedLever, Slot, StandingLever
from samegrad.records import Exactness, Plan

__all__ = [
    "Execution", "Lever", "PredictedLever", "Slot", "StandingLever", "find_levers", "find_whole_levers", "levers_of",
    "unsuited_levers", "weakest_exactness",
]  # fmt: skip


def find_levers() -> dict[str, type[Lever]]:
    """Every lever by name, in slot order."""
    return dict(_scanned(tuple(__path__)))


def find_whole_levers() -> dict[str, type[Lever]]:
    """Those of the levers that leave the chunks of a step as they are, by name, in slot order."""
    return {name: lever for name, lever in find_levers().items() if not hasattr(lever, "predict")}


@functools.cache
def _scanned(folders: tuple[str, ...]) -> dict[str, type[Lever]]:
    # Once a process: a plan is looked at in every step, and the folder may lie on a slow disk.
    found: list[type[Lever]] = []
    for module in pkgutil.iter_modules(folders):
        if module.name.startswith("_"):
            continue
        content = importlib.import_module(f"{__name__}.{module.name}")
        classes = [c for c in vars(content).values() if inspect.isclass(c) and c.__module__ == content.__name__]
        mine = [cast(type[Lever], c) for c in classes if hasattr(c, "slot")]
        if len(mine) != 1:
            raise TypeError(f"{content.__name__} must define exactly one lever, found {[m.__name__ for m in mine]}")
        found += mine
    return {lever.name: lever for lever in sorted(found, key=lambda lever: (lever.slot, lever.name))}


def levers_of(plan: Plan) -> list[Lever]:
    """The levers of ``plan`` with their knobs set, in slot order. Raises WrongPlan for what is not known."""
    known = find_levers()
    chosen = []
    for name, knobs in plan.levers.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            raise WrongPlan(
                asked="apply a plan",
                found=f"it takes a lever {name!r}{meant}; this samegrad has {', '.join(known)}",
                do="plan again with this version",
            )
        try:
            chosen.append(known[name](**knobs))
        except TypeError as error:
            has = [field.name for field in dataclasses.fields(cast(Any, known[name]))]
            unknown = next((f"it has no {knob!r}" for knob in knobs if knob not in has), str(error))
            raise WrongPlan(
                asked=f"apply a plan with {name} {knobs}",
                found=f"{unknown}; knobs of {name} are {', '.join(has) or 'none'}",
                do="plan again with this version",
            ) from None
        except BadInput as error:
            # A value that the lever cannot take: the file is wrong, whatever the lever calls it.
            raise WrongPlan(
                asked=f"apply a plan: {error.asked}", found=error.found, do="plan again, or correct the plan"
            ) from None
    chosen.sort(key=lambda lever: lever.slot)
    for one, other in itertools.pairwise(chosen):
        if one.slot is other.slot:
            raise WrongPlan(
                asked="apply a plan",
                found=f"it takes both {one.name} and {other.name}, which stand in one place ({one.slot.name.lower()})",
                do="keep one of them, or plan again",
            )
    return chosen


def weakest_exactness(plan: Plan) -> Exactness:
    """How exact ``plan`` is: as its weakest lever, or weaker where it says so itself."""
    return max([plan.exactness, *(lever.exactness for lever in levers_of(plan))])


def unsuited_levers(declared: DeclaredStep) -> dict[str, str]:
    """The levers that a declared step cannot take, or gains nothing by, each with the reason."""
    levers: dict[str, object] = {**find_levers()}
    asked = {name: lever.unsuited(declared) for name, lever in levers.items() if isinstance(lever, ChoosyLever)}
    return {name: reason for name, reason in asked.items() if reason is not None}
