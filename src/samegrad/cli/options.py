"""The options of one command: flags over environment over config files over the recipe over the defaults.

A command's options are frozen dataclasses shown as one flat set of flags; tyro reads the line. What lies below the
flags (files left to right, then ``SAMEGRAD_*``) becomes tyro's defaults, so flags win wherever they stand on the line.
Every value remembers where it came from, and all that is wrong, in all sources, is reported together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from samegrad.cli.config_files import read_config
from samegrad.cli.mistakes import (
    ENVIRONMENT_PREFIX,
    Mistake,
    file_of,
    outside_ranges,
    placed,
    placing,
    refuse,
    with_ranges,
)
from samegrad.cli.values import Kind, NotFinite, Written, convert, nearest
from samegrad.errors import UsageError

Part = TypeVar("Part")
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
# In config.json beside the options: for people, and to tell a config from another recipe's.
CONFIG_NOTES = ("schema_version", "samegrad_version", "target")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """Where other options come from."""

    config: tuple[Path, ...] = ()
    """YAML or JSON files with options, read left to right; flags win over them wherever they stand."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """What is printed, and how."""

    json: Switch = False
    """Print one JSON document on stdout and nothing else there, also on failure."""
    quiet: Annotated[Switch, tyro.conf.arg(aliases=["-q"])] = False
    """Only results and errors."""
    verbose: Annotated[Switch, tyro.conf.arg(aliases=["-v"])] = False
    """Also say what is done on the way."""
    no_color: Switch = False
    """No colours; the environment variable NO_COLOR does the same."""
    debug: Switch = False
    """Show Python tracebacks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What a command was asked: its option dataclasses filled in, and for each option where its value came from."""

    parts: tuple[Any, ...]
    origins: Mapping[str, str]

    def part(self, kind: type[Part]) -> Part:
        """The filled-in dataclass of type ``kind``."""
        return next(part for part in self.parts if type(part) is kind)

    def given(self, name: str) -> bool:
        """Whether somebody set the option: by flag, in the environment or in a file."""
        return self.origins[name] not in ("default", "recipe")


def parse_call(
    prog: str, kinds: Sequence[type], argv: Sequence[str], *, target: str | None = None, below: Sequence[Path] = ()
) -> Call:
    """The options in ``argv``, over those of the environment and of the ``--config`` files named in it.

    ``kinds`` are frozen dataclasses without required fields; ConfigOptions and StreamOptions are added to them.
    ``target`` is the name that a config file may carry; files ``below`` are read before those named. Raises
    UsageError with everything that is wrong; SystemExit(0) after ``--help``.
    """
    kinds = (*kinds, ConfigOptions, StreamOptions)
    hints = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
    if "-h" in argv or "--help" in argv:
        _read_line(prog, {kind: kind() for kind in kinds}, ["--help"])
    argv = _spelt_out(argv, hints)
    words, problems = _words_on_line(argv, hints)
    problems += _misspelt_variables(hints)
    values: dict[str, Any] = {}
    origins = {f.name: _first_origin(kind, f.name) for kind in kinds for f in dataclasses.fields(kind)}
    switches = {name for kind in kinds for name in _switches(kind)}
    settable = {name: hint for name, hint in hints.items() if name not in switches and name != "config"}
    files = [*below, *(Path(word.text) for word in words.get("config", []))]
    sections = [name for kind in kinds for name in getattr(kind, "config_sections", ())]
    for layer in (*(_file_layer(path, target, sections) for path in files), _environment_layer(settable)):
        problems += _lay_over(layer, settable, values, origins)
    for name, found in words.items():
        # What lies below a flag must be whole with it, or `--tied` could not rescue a file's `weight_penalty`; but
        # a switch that is on already would leave tyro nothing but to turn it off.
        under = {} if name in switches else values
        problems += _lay_over({name: _as_one(found, hints[name])}, hints, under, origins)
    outside = outside_ranges(kinds, values)
    if problems or len(outside) > 1:
        refuse(prog, with_ranges(problems, outside, values, origins))
    if outside:
        raise placed(outside[0], origins)
    lower = {kind: _filled(kind, values, origins) for kind in kinds}
    with placing(origins):
        return Call(parts=_read_line(prog, lower, argv), origins=origins)


def _switches(kind: type) -> list[str]:
    """The fields that only a line can turn on: never read from files or the environment."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return [name for name, hint in hints.items() if tyro.conf.FlagCreatePairsOff in getattr(hint, "__metadata__", ())]


def _first_origin(kind: type, name: str) -> str:
    """"recipe" for what a recipe's own options class declares, "default" for what it inherits and for ours."""
    of_recipe = kind.__module__.startswith("samegrad.recipes.") and name in kind.__annotations__
    return "recipe" if of_recipe else "default"


def _spelt_out(argv: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """``argv`` with a value after every truth that may be unset: tyro knows no bare and no ``no_`` form of those."""
    told = []
    for token, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        name = token[2:].replace("-", "_") if token.startswith("--") else ""
        if hints.get(name) == bool | None:
            told += [token] if not following.startswith("-") else [token, "True"]
        elif name.startswith("no_") and name not in hints and hints.get(name[3:]) == bool | None:
            told += [f"--{name[3:]}", "False"]
        else:
            told.append(token)
    return told


def _words_on_line(argv: Sequence[str], hints: Mapping[str, Any]) -> tuple[dict[str, list[Written]], list[Mistake]]:
    """The words after each option of ``argv``, and the options that do not exist. Short flags are left to tyro."""
    words: dict[str, list[Written]] = {}
    problems = []
    current: list[Written] = []
    for token in argv:
        if re.match("-[A-Za-z]", token):
            current = []
            continue
        if not token.startswith("--"):
            current.append(Written(text=token, kind=Kind.WORD, where=""))
            continue
        head, equals, tail = token.partition("=")
        name = head[2:].replace("-", "_")
        negated = name.startswith("no_") and name not in hints and hints.get(name[3:]) is bool
        name = name[3:] if negated else name
        where = f"--{name}"
        if name not in hints:
            near = nearest(where, [f"--{n}" for n in hints])
            problems.append(Mistake(text=f"unknown option '--{name}'{near}", option=name))
            current = []
        elif hints[name] is bool:
            words[name] = [Written(text=str(not negated), kind=Kind.WORD, where=where)]
            current = []
        else:
            current = words[name] = words.get(name, []) if name == "config" else []
            if equals:
                current.append(Written(text=tail, kind=Kind.WORD, where=where))
    located = {
        name: [dataclasses.replace(word, where=f"--{name}") for word in found] for name, found in words.items()
    }
    if words.get("config") == []:
        problems.append(Mistake(text="--config: no file is named", option="config"))
    return {name: found for name, found in located.items() if found}, problems


def _as_one(found: list[Written], hint: Any) -> Written:
    """The words of one option as one value; what follows a scalar's first word is tyro's to refuse."""
    if not _wants_list(hint):
        return found[0]
    return Written(text="", kind=Kind.LIST, where=found[0].where, items=tuple(found))


def _wants_list(hint: Any) -> bool:
    return any(typing.get_origin(h) in (tuple, list) for h in (hint, *typing.get_args(hint)))


def _file_layer(path: Path, target: str | None, sections: Sequence[str] = ()) -> dict[str, Written]:
    """The options in ``path``; ``sections``: mappings in it whose keys are options like those beside them."""
    layer: dict[str, Written] = {}
    for dotted, written in read_config(path).items():
        section, _, inner = dotted.partition(".")
        name = inner if inner and section in sections else dotted
        if name in layer:
            raise UsageError(
                asked=f"--config {path}",
                found=f"{written.where}: {name!r} stands here and at {layer[name].where}",
                do="write an option once",
                file=str(path),
                option="config",
            )
        layer[name] = written
    named = layer.get("target")
    if named is not None and target is not None and named.text != target:
        raise UsageError(
            asked=f"--config {path} for {target}",
            found=f"{named.where}: this config is for {named.text!r}",
            do=f"run {named.text!r} with it, or remove that line",
            file=str(path),
            option="config",
        )
    return {name: written for name, written in layer.items() if name not in CONFIG_NOTES}


def _environment_layer(hints: Mapping[str, Any]) -> dict[str, Written]:
    variables = {name: ENVIRONMENT_PREFIX + name.upper() for name in hints}
    return {
        name: Written(text=os.environ[variable], kind=Kind.WORD, where=variable)
        for name, variable in variables.items()
        if variable in os.environ
    }


def _misspelt_variables(hints: Mapping[str, Any]) -> list[Mistake]:
    """Variables of ours that no option reads but nearly does; others belong to other commands and recipes."""
    known = [ENVIRONMENT_PREFIX + name.upper() for name in hints]
    ours = [name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX) and name not in known]
    near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.9) for name in ours}
    return [
        Mistake(
            text=f"{name}: no such option; did you mean {found[0]!r}?",
            option=name.removeprefix(ENVIRONMENT_PREFIX).lower(),
        )
        for name, found in near.items()
        if found
    ]


def _lay_over(
    layer: Mapping[str, Written], hints: Mapping[str, Any], values: dict[str, Any], origins: dict[str, str]
) -> list[Mistake]:
    """Puts ``layer`` over ``values`` and ``origins``; returns what is wrong in it, one line each."""
    problems = []
    for name, written in layer.items():
        if name not in hints:
            text = f"{written.where}: unknown option {name!r}{nearest(name, hints)}"
            problems.append(Mistake(text=text, option=name, where=written.where))
            continue
        try:
            values[name] = convert(written, hints[name])
            origins[name] = written.where
        except ValueError as error:
            text = f"{written.where}: {f'{name}: ' if file_of(written.where) else ''}{error}"
            problems.append(Mistake(text=text, option=name, where=written.where))
            if isinstance(error, NotFinite) and not _wants_list(hints[name]):
                # It is refused already, and kept for its range to be told.
                values[name], origins[name] = error.value, written.where
    return problems


def _filled(kind: type, values: Mapping[str, Any], origins: Mapping[str, str]) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    with placing(origins):
        return kind(**{name: value for name, value in values.items() if name in names})


def parse_line(prog: str, kind: type[Part], argv: Sequence[str]) -> Part:
    """The options of a command that takes none from files or the environment; ``kind`` may have required fields.

    Raises UsageError; SystemExit(0) after ``--help``.
    """
    filled: Part = _read_line(prog, {kind: None, StreamOptions: StreamOptions()}, argv)[0]
    return filled


def _read_line(prog: str, lower: Mapping[type, Any], argv: Sequence[str]) -> tuple[Any, ...]:
    """``argv`` read by tyro into each class of ``lower``, over the values given there."""
    flat = [(_title(kind), without_prefix(kind)) for kind in lower]
    fields: list[Any] = [(*field, part) if part is not None else field for field, part in zip(flat, lower.values())]
    whole = dataclasses.make_dataclass("Options", fields, frozen=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: Any = tyro.cli(whole, prog=prog, args=list(argv), use_underscores=True, description="")
    except SystemExit as ending:
        if ending.code in (0, None):
            raise
        # Between the box's title and its first rule stands what is wrong; below, help that --help shows as well.
        # Where the terminal has no UTF-8 the box is drawn in ASCII.
        lines = [line.strip("│╭╮╰╯|+ ") for line in said.getvalue().splitlines()[1:]]
        lines = lines[1:] if lines and _is_rule(lines[0]) else lines
        told = lines[: next((i for i, line in enumerate(lines) if _is_rule(line)), len(lines))]
        text = " ".join(filter(None, told)) or "the options cannot be read"
        option = re.search(r"--([A-Za-z_]+)", text)
        refuse(prog, [Mistake(text=text, option=option[1] if option else None)])
    return tuple(getattr(parsed, field.name) for field in dataclasses.fields(whole))


def _is_rule(line: str) -> bool:
    return len(line) > 1 and set(line) <= set("─-")


def without_prefix(kind: type) -> Any:
    """``kind`` as a field's type for tyro, its options standing beside those of other fields."""
    marker: Any = tyro.conf.OmitArgPrefixes
    return marker[kind]


def _title(kind: type) -> str:
    """``RunOptions`` as the heading tyro derives from a field's name: ``run``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__.removesuffix("Options")).lower()
