"""``samegrad completion bash|zsh|fish``: the script that completes commands, recipes and options in a shell."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union

import tyro

from samegrad.cli.console import Console
from samegrad.cli.options import ConfigOptions, StreamOptions, parse_line
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
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        tyro.cli(
            tyro.conf.OmitSubcommandPrefixes[_tree()],
            prog="samegrad",
            args=["--tyro-print-completion", shell],
            use_underscores=True,
        )
    return said.getvalue().rstrip()


def _tree() -> Any:
    from samegrad.cli.main import COMMANDS

    leaves = {name: _command(name) for name in COMMANDS}
    return Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in leaves.items())]  # noqa: UP007


def _command(name: str) -> type:
    """A class whose fields are the command's options, or its recipes with their options."""
    own = getattr(importlib.import_module(f"samegrad.cli.{name}"), f"{name.capitalize()}Options", None)
    if name not in ("run", "measure", "plan", "verify"):
        return _flat(name, own)
    targets = tuple(
        Annotated[_flat(recipe, own, find_options(recipe)), tyro.conf.subcommand(recipe)]
        for recipe in recipe_names()
    )
    return dataclasses.make_dataclass(name, [("target", tyro.conf.OmitSubcommandPrefixes[Union[targets]])])  # noqa: UP007


def _flat(name: str, *kinds: type | None) -> type:
    wanted = [kind for kind in (*kinds, ConfigOptions, StreamOptions) if kind is not None]
    return dataclasses.make_dataclass(name, [(k.__name__, tyro.conf.OmitArgPrefixes[k]) for k in wanted])  # type: ignore[valid-type]
