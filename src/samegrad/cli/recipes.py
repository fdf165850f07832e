"""``samegrad recipes``: list the training programs that come along, print one, or copy one out to change it."""

from __future__ import annotations

import ast
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from samegrad.cli.console import Console
from samegrad.cli.options import parse_line
from samegrad.cli.output_folder import check_output
from samegrad.cli.values import nearest
from samegrad.errors import UsageError
from samegrad.recipes import recipe_names

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipesOptions:
    """`ls` lists all, `cat NAME` prints a recipe's files, `cp NAME DIR` copies them into a new folder DIR/NAME."""

    what: tyro.conf.Positional[Literal["ls", "cat", "cp"]] = "ls"
    name: tyro.conf.Positional[str | None] = None
    folder: tyro.conf.Positional[Path | None] = None


def main(argv: Sequence[str], console: Console) -> int:
    options = parse_line("samegrad recipes", RecipesOptions, argv)
    if options.what == "ls":
        _list(console)
        return 0
    source = _source(options.name, options.what)
    if options.what == "cat":
        _print(source, console)
    else:
        _copy(source, options.folder, console)
    return 0


def _list(console: Console) -> None:
    told = {name: summary_of(name) for name in recipe_names()}
    width = max(map(len, told), default=0)
    for name, summary in told.items():
        console.result(f"{name:<{width}}  {summary}")
    console.document({"recipes": [{"name": name, "summary": summary} for name, summary in told.items()]})


def summary_of(name: str) -> str:
    """The first line of the recipe's docstring, read without importing it."""
    for file in ("recipe.py", "options.py", "model.py"):
        path = RECIPES / name / file
        if path.is_file() and (text := ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))):
            return text.splitlines()[0]
    return ""


def _source(name: str | None, what: str) -> Path:
    if name not in recipe_names():
        raise UsageError(
            asked=f"samegrad recipes {what} {name or ''}".rstrip(),
            found="no name" if name is None else f"no recipe {name!r}{nearest(name, recipe_names())}",
            do=f"name one of {', '.join(recipe_names())}",
        )
    return RECIPES / name


def _files(source: Path) -> list[Path]:
    return sorted(p for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def _print(source: Path, console: Console) -> None:
    texts = {str(p.relative_to(source)): p.read_text(encoding="utf-8") for p in _files(source)}
    for name, text in texts.items():
        if text:
            console.result(f"# ---- {source.name}/{name}\n{text}")
    console.document({"name": source.name, "files": texts})


def _copy(source: Path, folder: Path | None, console: Console) -> None:
    if folder is None:
        raise UsageError(
            asked=f"samegrad recipes cp {source.name}",
            found="no folder to copy into",
            do=f"samegrad recipes cp {source.name} .",
        )
    check_output(folder, option=None)
    target = folder / source.name
    if target.exists():
        raise UsageError(
            asked=f"samegrad recipes cp {source.name} {folder}",
            found=f"{target} exists already",
            do="name another folder, or move that one away",
        )
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    console.result(str(target))
    console.document({"name": source.name, "folder": str(target)})
