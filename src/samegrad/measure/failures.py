"""Why a step could not be followed: which module, which operation, which line of the user's."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from samegrad.errors import CannotTrace, SamegradError
from samegrad.measure.recorder import Recorder

# Frames of torch, of samegrad and of Python itself are not the user's.
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_PYTHON = Path(contextlib.__file__).parent
# But a recipe's model and loss are a user's code in all that matters here.
_RECIPES = str(Path(__file__).parents[1] / "recipes")
# Where samegrad stands between an operation of the user's code and torch.
_BETWEEN = ("__torch_function__", "__torch_dispatch__")
# What torch says of tensors of several devices, before and since 2.13; it calls the one that is followed "meta".
_MIXED = ("two different devices", "found at least two devices")


@contextlib.contextmanager
def explained(recorder: Recorder) -> Iterator[None]:
    """What the step raises as CannotTrace, with the module and the operation that it happened in."""
    try:
        yield
    except SamegradError:
        raise
    except Exception as error:
        raise _cannot_trace(recorder, error) from error


def _cannot_trace(recorder: Recorder, error: Exception) -> CannotTrace:
    failure = recorder.failure
    place, operation = "the step's own code", ""
    if failure is not None and failure.error in map(id, (error, error.__cause__, error.__context__)):
        place, operation = failure.place, failure.operation
    place += line_of(error)
    do = "measure the step by probes on its device, or compute that value outside the step"
    if isinstance(error, DataDependentOutputException):
        found = f"{operation or error.func} in {place} needs the values of a tensor"
    elif isinstance(error, DynamicOutputShapeException):
        found = f"{operation or error.func} in {place} has a shape that depends on the values of a tensor"
    elif any(words in str(error) for words in _MIXED):
        found = f"{operation} in {place} takes a tensor of the host beside one of the device"
        do = "make it where the others are, as in torch.arange(n, device=x.device); on CUDA the step would raise"
    else:
        found = f"{operation + ' in ' if operation else ''}{place} raised {type(error).__name__}: {error}"
    return CannotTrace(
        asked="follow the step without running it",
        found=found,
        do=do,
    )


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def line_of(error: BaseException) -> str:
    """Where the user's own code was, as " (file.py:7)"."""
    own = _own_line(traceback.extract_tb(error.__traceback__))
    return f" ({own})" if own else ""


def line_now() -> str:
    """Where the user's own code is, as "file.py:7"; "" where none of it runs."""
    return _own_line(traceback.extract_stack())


def _own_line(frames: traceback.StackSummary) -> str:
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith((*_LIBRARIES, "<")) and Path(frame.filename).parent != _PYTHON
    ]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def is_of_the_users_code(error: BaseException) -> bool:
    """Whether it was raised by an operation that the user's code called last, and not by samegrad itself."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_LIBRARIES[0], "<"))
        and Path(frame.filename).parent != _PYTHON
        and frame.name not in _BETWEEN
    ]
    last = frames[-1].filename if frames else _LIBRARIES[1]
    return last.startswith(_RECIPES) or not last.startswith(_LIBRARIES[1])
