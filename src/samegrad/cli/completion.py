"""``samegrad completion bash|zsh|fish``: the script that completes commands, recipes and options in a shell."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import tyro

from samegrad.cli.console import Console
from samegrad.cli.options import ConfigOptions, StreamOptions, parse_line, without_prefix
from samegrad.cli.target import FunctionOptions
from samegrad.recipes import find_options, recipe_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """Print the script; for bash: `source <(samegrad completion bash)`."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]


def main(argv: Sequence[str], console: Console) -> int:
    options = parse_line("samegrad completion", CompletionOptions, argv)
    script = completion_script(options.shell)
    console.result(script)
    console.document({"shell": options.shell, "script": script})
    return 0


def completion_script(shell: str) -> str:
    """The completion script of the whole command tree."""
    said = io.StringIO()
    marker: Any = tyro.conf.OmitSubcommandPrefixes
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        tyro.cli(
            marker[_tree()],
            prog="samegrad",
            args=["--tyro-print-completion", shell],
            use_underscores=True,
        )
    return said.getvalue().rstrip()


def _tree() -> Any:
    from samegrad.cli.main import COMMANDS

    return _one_of({name: _command(name) for name in COMMANDS})


def _one_of(kinds: Mapping[str, type]) -> Any:
    """Subcommands for tyro; built at run time, so out of a type checker's sight."""
    union: Any = Union
    return union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())]


def _command(name: str) -> type:
    """A class whose fields are the command's options, or its recipes with their options."""
    own = getattr(importlib.import_module(f"samegrad.cli.{name}"), f"{name.capitalize()}Options", None)
    if name not in ("run", "measure", "plan", "verify"):
        return _flat(name, own)
    marker: Any = tyro.conf.OmitSubcommandPrefixes
    targets = {recipe: _flat(recipe, own, find_options(recipe)) for recipe in recipe_names()}
    targets["FILE.py:FUNCTION"] = _flat(name, own, FunctionOptions)
    return dataclasses.make_dataclass(name, [("target", marker[_one_of(targets)])])


def _flat(name: str, *kinds: type | None) -> type:
    wanted = [kind for kind in (*kinds, ConfigOptions, StreamOptions) if kind is not None]
    return dataclasses.make_dataclass(name, [(kind.__name__, without_prefix(kind)) for kind in wanted])
