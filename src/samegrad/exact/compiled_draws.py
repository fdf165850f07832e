"""Draws in compiled code, handed to a mode as they are in code that is not compiled.

torch's compiler hands functions to modes by a list of its own, from which factories such as ``randn_like`` are missing
(which of them depends on torch's version). What is missing there would draw from torch's generator, without a word.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from samegrad.errors import EnvironmentProblem


def handed_over(draws: Iterable[Callable[..., Any]]) -> Callable[[], None]:
    """A function that puts ``draws`` on the compiler's list, where a compiler is there; it may be compiled itself."""
    functions = frozenset(draws)
    completed: object = None

    def show() -> None:
        nonlocal completed
        compiler = sys.modules.get("torch._dynamo.variables.torch")
        listing = getattr(compiler, "get_overridable_functions", None)
        if listing is not None:
            listed = listing()
            if listed is not completed:
                listed.update(functions)
                completed = listed
        elif torch.compiler.is_compiling():
            raise EnvironmentProblem(
                asked="compile draws that are keyed by rows",
                found=f"the compiler of torch {torch.__version__} does not say which functions it hands to modes",
                do="compile no part that draws, or take a torch from 2.11 to 2.15",
            )

    # Called while code is compiled, as torch.compiler.assume_constant_result has it, which imports the compiler.
    show._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return show
