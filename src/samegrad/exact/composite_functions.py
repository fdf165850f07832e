"""Functions of torch.nn.functional that are written in Python, run so that a mode sees what they draw.

They ask first whether a mode is on and hand themselves over if so. Run from a mode they would do so for ever, and run
without it they would hide what they draw.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any, TypeGuard

import torch.nn.functional as F


def _is_composite(func: Any) -> TypeGuard[FunctionType]:
    return type(func) is FunctionType and func.__module__ == F.__name__


def twins_of_drawing(draws: Iterable[Any]) -> dict[FunctionType, FunctionType]:
    """The composites that may call one of ``draws``, by its name, or a function they are given; and what to run.

    The twin of a composite is the same code, told that no mode is on.
    """
    names = {draw.__name__ for draw in draws}
    composites = [func for func in vars(F).values() if _is_composite(func)]
    # A compiler would look names up in the module of that name, and find the question there.
    twin_globals = {name: value for name, value in vars(F).items() if name != "__name__"}
    for question in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
        twin_globals[question] = _not_overridden
    return {func: _twin(func, twin_globals) for func in composites if _reaches(func, names, set())}


def _reaches(func: FunctionType, draws: set[str], seen: set[FunctionType]) -> bool:
    if func in seen:
        return False
    seen.add(func)
    names = set(_names(func.__code__))
    if names & draws or any("Callable" in str(p.annotation) for p in inspect.signature(func).parameters.values()):
        return True
    called = [func.__globals__.get(name) for name in names] + [cell.cell_contents for cell in func.__closure__ or ()]
    return any(_reaches(part, draws, seen) for part in called if isinstance(part, FunctionType) and _is_composite(part))


def _names(code: CodeType) -> Iterator[str]:
    """Names of everything that ``code`` calls, those of methods as well."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _twin(func: FunctionType, twin_globals: dict[str, Any]) -> FunctionType:
    # Some only choose between two others, which they hold in their closure.
    cells = func.__closure__ and tuple(
        CellType(_twin(cell.cell_contents, twin_globals)) if _is_composite(cell.cell_contents) else cell
        for cell in func.__closure__
    )
    names = twin_globals if func.__globals__ is vars(F) else func.__globals__
    twin = FunctionType(func.__code__, names, func.__name__, func.__defaults__, cells)
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin


def _not_overridden(*_: Any) -> bool:
    return False
