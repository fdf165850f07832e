"""What a command works on: a recipe's name, or ``file.py:function`` returning ``(Step, iterable of batches)``.

Names are found and options are read without importing torch; only ``load`` does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from samegrad.cli.boundary import known_error
from samegrad.cli.devices import find_card_asked
from samegrad.cli.options import Call, parse_call
from samegrad.cli.values import nearest
from samegrad.errors import BadInput, EnvironmentProblem, OverBudget, SamegradError, UsageError
from samegrad.recipes import OutOfRange, find_options, recipe_names

if TYPE_CHECKING:
    from samegrad import Step

_FILE_TARGET = re.compile(r"(?P<path>.+\.py):(?P<function>[A-Za-z_]\w*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionOptions:
    """Passed to the function as keywords of the same names, where it has such parameters.

    ``changes_on_resume``: what may be another in a run that goes on.
    """

    # Without a type, so that it is no option itself.
    changes_on_resume = frozenset(("budget", "device"))

    budget: str | None = None
    """Bytes the step may hold: 6GiB, 512MiB, 80%."""
    device: str | None = None
    """Device to train on: cpu, cuda, cuda:1; for plan and measure also a card's name (samegrad doctor --cards)."""
    random_seed: int = 0
    """Seed of the default generators of torch, numpy and Python, set before the function is called."""

    def __post_init__(self) -> None:
        if not 0 <= self.random_seed < 2**63:
            raise OutOfRange(
                asked=f"--random_seed {self.random_seed}", found="it must be of 63 bits and not negative",
                do=f"give 0 to {2**63 - 1}", option="random_seed",
            )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a function returned; ``budget`` is the one given that the function has no parameter for."""

    step: Step
    batches: Iterable[Any]
    budget: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeTarget:
    name: str

    @property
    def options_class(self) -> type:
        """The recipe's options, from its own file; imports no torch."""
        return find_options(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionTarget:
    path: Path
    function: str
    options_class: type = FunctionOptions

    @property
    def name(self) -> str:
        return f"{self.path}:{self.function}"

    def load(self, options: FunctionOptions) -> Loaded:
        """What the function returns, called with those options that are set and that it takes.

        Raises UsageError for a device it does not take, BadInput for a file or function that is not there or fails.
        """
        from samegrad import Step
        from samegrad.declared import is_one_batch

        with UserCode(self):
            function = getattr(_load_module(self.path), self.function, None)
        if not callable(function):
            raise BadInput(
                asked=self.name, found=f"{self.path} has no function {self.function!r}",
                do="name a function that returns (samegrad.Step(...), batches)", file=str(self.path),
            )  # fmt: skip
        keywords = _keywords(self.name, function, options)
        with UserCode(self):
            returned = function(**keywords)
        match returned:
            case (Step(), batch) if is_one_batch(batch):
                raise BadInput(
                    asked=self.name,
                    found=f"beside the step the function returned a {type(batch).__name__} that looks like one batch",
                    do="return a list of batches: return step, [batch]", file=str(self.path),
                )  # fmt: skip
            case (Step() as step, batches) if hasattr(batches, "__iter__"):
                budget = None if "budget" in keywords else options.budget
                return Loaded(step=step, batches=batches, budget=budget)
        raise BadInput(
            asked=self.name,
            found=f"the function returned {_shape_of(returned)}",
            do="return (samegrad.Step(model, loss_fn, ...), batches), where batches can be iterated over",
            file=str(self.path),
        )


Target = RecipeTarget | FunctionTarget


# What a user's file may end in that no change of it is the way out of.
_NO_MISTAKE = (EnvironmentProblem, OverBudget)


class UserCode:
    """A ``with`` block that turns what a user's file raises into BadInput with the line in that file."""

    def __init__(self, target: FunctionTarget) -> None:
        self.target = target

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An exit is the program's own; with its code, 0 mostly, ours would say that all is done.
        if not isinstance(error, (Exception, SystemExit)) or isinstance(error, SamegradError):
            return
        if isinstance(known_error(error), _NO_MISTAKE):
            return
        path = str(self.target.path.resolve())
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == path]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else lines[-1] if lines else None
        raise BadInput(
            asked=self.target.name,
            found=f"{self.target.path}{f':{line}' if line else ''}: {type(error).__name__}: {error}".rstrip(": "),
            do="correct the file; --debug shows the traceback",
            file=str(self.target.path),
        ) from error


def take_target(command: str, argv: Sequence[str]) -> tuple[Target | None, list[str]]:
    """The target named in ``argv``, wherever it stands, and the rest; None where none is named.

    Raises UsageError for a first word that is neither a recipe nor ``file.py:function``.
    """
    places = [place for place, token in enumerate(argv) if parse_target(token)]
    # Right behind an option a name may be its value; behind a switch such as --json it is the target all the same.
    free = [p for p in places if p == 0 or not argv[p - 1].startswith("-") or "=" in argv[p - 1]]
    for place in (free or places)[:1]:
        return parse_target(argv[place]), [*argv[:place], *argv[place + 1 :]]
    if argv and not argv[0].startswith("-"):
        file, _, function = argv[0].partition(":")
        meant = f"{file.removesuffix('.py')}.py"
        near = nearest(argv[0], recipe_names())
        if Path(meant).is_file():
            asked = f"; did you mean '{meant}:{function}'?"
            near = asked if function else f"; name a function in it: {meant}:NAME"
        raise UsageError(
            asked=f"samegrad {command} {argv[0]}",
            found=f"{argv[0]!r} is neither a recipe nor file.py:function{near}",
            do=f"use one of {', '.join(recipe_names())}, or path/to/file.py:function",
        )
    return None, list(argv)


def target_call(
    command: str, kinds: Sequence[type], argv: Sequence[str], *, below: Sequence[Path] = ()
) -> tuple[Target, Call]:
    """The target named in ``argv``, and its options together with the command's own ``kinds``.

    ``below``: config files that lie under all that the line names. Raises UsageError when there is no target or an
    option is wrong; SystemExit(0) after ``--help``.
    """
    target, rest = take_target(command, argv)
    if target is None and ("-h" in rest or "--help" in rest):
        parse_call(f"samegrad {command} TARGET", (FunctionOptions, *kinds), ["--help"])
    if target is None:
        raise UsageError(
            asked=f"samegrad {command}",
            found="no target",
            do=f"name a recipe ({', '.join(recipe_names())}) or file.py:function",
        )
    prog = f"samegrad {command} {target.name}"
    return target, parse_call(prog, (target.options_class, *kinds), rest, target=target.name, below=below)


def asked_device(target: Target, call: Call) -> str | None:
    """What ``--device`` says, or what stands for it."""
    options: Any = call.part(target.options_class)
    device: str | None = options.device
    return device


def parse_target(token: str) -> Target | None:
    if token in recipe_names():
        return RecipeTarget(name=token)
    match = _FILE_TARGET.fullmatch(token)
    return FunctionTarget(path=Path(match["path"]), function=match["function"]) if match else None


def _load_module(path: Path) -> Any:
    if not path.is_file():
        raise BadInput(asked=str(path), found="no such file", do="give the path of a Python file", file=str(path))
    name = f"samegrad_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise BadInput(asked=str(path), found="not a Python file", do="name a .py file", file=str(path))
    module = importlib.util.module_from_spec(spec)
    # As for a script: what lies beside the file can be imported, and the module is found by pickle and dataclasses.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _keywords(name: str, function: Any, options: FunctionOptions) -> dict[str, Any]:
    taken = inspect.signature(function).parameters
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    if find_card_asked(options.device) is not None:
        values["device"] = _without_the_card(taken)
    elif options.device is not None and "device" not in taken:
        raise UsageError(
            asked=f"--device for {name}",
            found=f"{name.rpartition(':')[2]}() has no parameter 'device'",
            do="add the parameter device to the function and put the model there, or leave the option out",
            option="device",
        )
    return {option: value for option, value in values.items() if option in taken and value is not None}


def _without_the_card(taken: Mapping[str, inspect.Parameter]) -> str | None:
    """Where a function makes its model for a card that may be elsewhere: on the CPU, or on meta by its own default."""
    if "device" not in taken or str(taken["device"].default) == "meta":
        return None
    return "cpu"


def _shape_of(returned: Any) -> str:
    if isinstance(returned, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in returned) or 'nothing'}"
    return f"a {type(returned).__name__}"
