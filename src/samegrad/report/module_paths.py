"""Paths of modules for people: a number by itself is said with its parent's name or its module's class."""

from __future__ import annotations

from collections.abc import Mapping

from samegrad.report.words import clean_line


def module_name(path: str, classes: Mapping[str, str], *, shown: str | None = None) -> str:
    """``path`` as it is, or with the class of a module that is only numbered in its parent: "0 (Linear)".

    ``shown``: the end of ``path`` that is to be read, by default all of it.
    """
    shown = path if shown is None else shown
    if not is_numbered(path):
        return clean_line(shown)
    if path in classes:
        return clean_line(f"{shown} ({classes[path]})")
    return clean_line(shown) if "." in shown else f"module {shown}"


def module_names(path: str, classes: Mapping[str, str], *, shown: str) -> list[str]:
    """Names of the module, the fullest first and the shortest last, none of which is only a number."""
    fullest = module_name(path, classes, shown=shown)
    if not is_numbered(path):
        return [fullest, clean_line(shown.rpartition(".")[2])]
    shorter = [shown] if "." in shown else []
    return [fullest, *map(clean_line, [*shorter, *([classes[path]] if path in classes else [])])]


def is_numbered(path: str) -> bool:
    """Whether its own name is only a number, as that of an ``nn.Sequential``'s part."""
    return path.rpartition(".")[2].isdecimal()
