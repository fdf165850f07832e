"""Every error samegrad raises on purpose, and the exit code each one means.

    SamegradError
    ├── UsageError              2   an argument, option or config value is wrong; nothing was started
    ├── CannotSplit             1   the step cannot be split without changing its gradients
    │   ├── FalseNormalise      1   the declared normalise= is not what the loss does
    │   └── Untraceable         1   the model's Python code cannot be recorded as a graph of operations
    ├── CannotTrace             1   the step cannot be followed without running it: it needs values
    ├── BudgetTooSmall          1   no exact plan fits the budget
    ├── GradientsDiffer         1   a check found other gradients than the plain step's
    ├── BadInput                3   data, a checkpoint, a plan or a report file is wrong
    │   ├── WrongPlan           3   a plan was made for another step, or by another version
    │   └── NotMeasured         3   a prediction was asked for of something that was not measured for this step
    ├── EnvironmentProblem      4   no such device, missing extra, disk full, folder in use
    ├── OverBudget              5   out of memory, or over the budget, while running
    └── NonFinite               6   the loss or a gradient is not finite

Each error has three parts by construction, so that none is forgotten: what was *asked*, what was *found*
(with the place: module path, option, file:line, sample), and what to *do*.
"""

from __future__ import annotations

from traceback import clear_frames
from types import FrameType
from typing import Any

# The topic of advice that only whoever declares the step can follow; in ``do`` it is the end.
IN_THE_DECLARATION = "in the step's declaration"


class SamegradError(Exception):
    """An error with what was asked, what was found and what to do.

    ``file`` and ``option`` name the place when it is a file or a command-line option.
    """

    exit_code = 70
    code = "internal"

    def __init__(
        self, *, asked: str, found: str, do: str, file: str | None = None, option: str | None = None
    ) -> None:
        self.asked, self.found, self.do = asked, found, do
        self.file, self.option = file, option
        super().__init__(f"{asked}\n  found: {found}\n  do:    {do}")

    @property
    def hint(self) -> str:
        return self.do

    def forget_frames(self) -> None:
        """Lets go of what was live where this was raised, and where the errors were that it came from; lines stay.

        An error that somebody is still handling, a user's own around all this, is left as it is.
        """
        place = self.__traceback__
        while place is not None and _is_running(place.tb_frame):
            place = place.tb_next
        self.__traceback__ = place
        clear_frames(place)
        error = self.__cause__ or self.__context__
        while error is not None and not (error.__traceback__ and _is_running(error.__traceback__.tb_frame)):
            clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__

    def without_declaration(self) -> SamegradError:
        """The same for whoever cannot declare the step otherwise: a recipe's user."""
        do, declaring, _ = self.do.partition(f"; {IN_THE_DECLARATION}: ")
        if not declaring:
            return self
        told = _rebuild(type(self), self.asked, self.found, do, self.file, self.option)
        for note in getattr(self, "__notes__", ()):
            told.add_note(note)
        return told

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes send exceptions by pickle; keyword-only arguments need a rebuilder.
        return _rebuild, (type(self), self.asked, self.found, self.do, self.file, self.option)

    def to_json(self) -> dict[str, Any]:
        """The error document of the command line's ``--json``."""
        return {
            "error": {
                "code": self.code,
                "message": f"{self.asked}: {self.found}",
                "hint": self.do,
                "file": self.file,
                "option": self.option,
            }
        }


def _is_running(frame: FrameType) -> bool:
    """Whether ``frame`` has not ended; else what it holds is gone."""
    try:
        frame.clear()
    except RuntimeError:
        return True
    return False


def _rebuild(
    kind: type[SamegradError], asked: str, found: str, do: str, file: str | None, option: str | None
) -> SamegradError:
    return kind(asked=asked, found=found, do=do, file=file, option=option)


class UsageError(SamegradError):
    exit_code, code = 2, "usage"


class CannotSplit(SamegradError):
    exit_code, code = 1, "cannot-split"


class FalseNormalise(CannotSplit):
    code = "false-normalise"


class Untraceable(CannotSplit):
    code = "untraceable"


class CannotTrace(SamegradError):
    exit_code, code = 1, "cannot-trace"


class BudgetTooSmall(SamegradError):
    exit_code, code = 1, "budget-too-small"


class GradientsDiffer(SamegradError):
    exit_code, code = 1, "gradients-differ"


class BadInput(SamegradError):
    exit_code, code = 3, "bad-input"


class WrongPlan(BadInput):
    code = "wrong-plan"


class NotMeasured(BadInput):
    code = "not-measured"


class EnvironmentProblem(SamegradError):
    exit_code, code = 4, "environment"


class OverBudget(SamegradError):
    exit_code, code = 5, "over-budget"


class NonFinite(SamegradError):
    exit_code, code = 6, "non-finite"


def too_large_a_file() -> tuple[str, str]:
    """What an error of the system says with EFBIG, and what to do; room on the disk has no part in it."""
    import resource

    most_bytes = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if most_bytes == resource.RLIM_INFINITY:
        return "the file system takes no file as large", "write to another file system"
    return f"the limit on the size of a file was hit: {most_bytes} bytes (ulimit -f)", "raise the limit with ulimit -f"


def missing_extra(*, package: str, extra: str, wanted_for: str) -> EnvironmentProblem:
    """The error for a package that an extra brings, with the line that installs it."""
    return EnvironmentProblem(
        asked=wanted_for,
        found=f"the package {package!r} is not installed",
        do=f"pip install 'samegrad[{extra}]'",
    )
