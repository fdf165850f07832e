"""What the user's code calls, in order: every torch function that makes or writes a tensor, with its numbers and place.

A function mode sees the calls of Python code and not what torch does inside them, so that two runs on other numbers of
rows have the same calls unless the code itself asked how many rows there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Frames of torch and of samegrad are not the user's.
_TORCH, _SAMEGRAD = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
# What changes how later calls compute, without returning a tensor.
_SWITCHES = ("__setitem__", "_set_grad_enabled")
_OUTSIDE = "code outside its modules"


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call. ``place``: the module it was made in. ``line``: "net.py:7" or "". ``leaves``: its arguments, flat.

    ``shapes``: how many tensors it made, and the lengths of the first and the last. Numbers are in the leaves as they
    are, tensors as their dtype and number of axes, lists with their length before their entries.
    """

    function: str
    place: str
    line: str
    leaves: tuple[Any, ...]
    shapes: tuple[int, ...]


@dataclasses.dataclass
class Calls:
    """The calls of one run on ``rows`` rows, and what ended it early, in words."""

    rows: int
    calls: list[Call] = dataclasses.field(default_factory=list)
    failure: str = ""


class CallsSeen(TorchFunctionMode):
    """Writes down the calls inside the block. ``running``: the modules that run, outermost first.

    ``call(function, args, kwargs)`` makes each.
    """

    def __init__(self, found: list[Call], call: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self._found, self._call = found, call
        self._running: list[str] = []
        self._outside = _OUTSIDE

    @contextlib.contextmanager
    def within(self, running: list[str], outside: str = _OUTSIDE) -> Iterator[None]:
        """A block whose calls are made in the modules ``running``, or ``outside`` of them."""
        before = self._running, self._outside
        self._running, self._outside = running, outside
        try:
            yield
        finally:
            self._running, self._outside = before

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._call(func, args, kwargs or {})
        name = function_name(func)
        made = list(tensors_in((result,)))
        if made or name in _SWITCHES:
            leaves: list[Any] = []
            for part in (*args, *sorted((kwargs or {}).items())):
                _flatten(part, leaves)
            place = self._running[-1] if self._running else self._outside
            # The frame of this method, then that of whoever called.
            line = line_from(sys._getframe(1))
            self._found.append(Call(name, place, line, tuple(leaves), _shapes_of(made)))
        return result


def function_name(func: Any) -> str:
    """What is called, or read: properties are descriptors, whose own name says what."""
    name = getattr(func, "__name__", type(func).__name__)
    return str(getattr(getattr(func, "__self__", None), "__name__", name)) if name == "__get__" else str(name)


def _shapes_of(made: Sequence[Tensor]) -> tuple[int, ...]:
    return (len(made), *made[0].shape, *made[-1].shape) if made else ()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """A block in which compiled functions run as they were written."""
    if "torch._dynamo" not in sys.modules:
        # Nothing is compiled, and setting the stance would load the compiler.
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def tensors_in(values: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among ``values``, and in tuples and lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)


def _flatten(value: Any, leaves: list[Any]) -> None:
    if isinstance(value, Tensor):
        leaves.append(OfTensor(f"{value.dtype} {value.dim()}"))
    elif value is None or isinstance(value, (bool, int, float, complex, str)):
        leaves.append(value)
    elif isinstance(value, (tuple, list)):
        leaves.append(Length(len(value)))
        for part in value:
            _flatten(part, leaves)
    elif isinstance(value, slice):
        _flatten((value.start, value.stop, value.step), leaves)
    elif isinstance(value, dict):
        _flatten(tuple(value.items()), leaves)
    else:
        leaves.append(str(value) if isinstance(value, (torch.dtype, torch.device)) else type(value).__name__)


class Length(int):
    """How many entries of a list follow."""


class OfTensor(str):
    """What stands for a tensor: its dtype and number of axes."""


def line_from(frame: FrameType | None) -> str:
    """The user's line that ``frame`` runs for, as "net.py:7"; "" where there is none."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_SAMEGRAD):
            return ""
        if not name.startswith((_TORCH, "<")):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
