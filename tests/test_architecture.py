"""The floors of ARCHITECTURE.md, held by reading imports with ``ast``."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "samegrad"

# A part may import parts on lower floors, never its own floor's neighbours and never a higher one.
FLOORS = [
    {"errors"},
    {"units", "json_record", "kinds"},
    {"unit_tables"},
    {"records", "trees", "module_walk"},
    {"declared"},
    {"exact"},
    {"measure", "levers", "data", "store", "report"},
    {"plan", "execute"},
    {"verify"},
    {"settle"},
    {"step"},
    {"__init__"},
    {"recipes"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}
BANNED_STEMS = {"utils", "util", "helpers", "common", "core", "manager", "misc", "base"}
NO_TORCH = {"errors", "units", "json_record", "kinds", "unit_tables", "records", "report", "__init__"}


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path, text: str | None = None) -> list[tuple[str, int]]:
    """Every module that ``path`` imports, absolute, with its line; ``samegrad`` itself for root imports."""
    package = ("samegrad", *path.relative_to(SOURCE).parts[:-1])
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [origin, node.module or ""]))
            if module == "samegrad":
                # ``from samegrad import errors`` means the part, ``from samegrad import Step`` the root.
                found += [
                    (f"samegrad.{a.name}" if a.name in FLOOR_OF else "samegrad", node.lineno) for a in node.names
                ]
            else:
                found.append((module, node.lineno))
    return found


def violations(path: Path, text: str | None = None) -> list[str]:
    here = part_of(path)
    inside = path.relative_to(SOURCE)
    wrong = []
    for module, line in imports_of(path, text):
        parts = module.split(".")
        if here in NO_TORCH and parts[0] == "torch":
            wrong.append(f"{inside}:{line} imports torch")
        if parts[0] != "samegrad":
            continue
        there = parts[1] if len(parts) > 1 else "__init__"
        shared = parts[2:] == [] or parts[2].startswith("_")
        if there == here and here == "levers" and not shared and path.stem != "__init__":
            wrong.append(f"{inside}:{line} imports the lever {module}")
        if there == here and here == "recipes" and parts[2:3] not in ([], ["_recipe"], [inside.parts[1]]):
            wrong.append(f"{inside}:{line} imports the recipe {module}")
        if there != here and FLOOR_OF[there] >= FLOOR_OF[here]:
            wrong.append(f"{inside}:{line} imports {module}, which is not on a lower floor")
        if here == "recipes":
            if len(inside.parts) > 2 and path.stem in ("model", "data"):
                wrong.append(f"{inside}:{line} imports {module}; a recipe's {path.stem}.py imports nothing of ours")
            elif there not in ("recipes", "__init__"):
                wrong.append(f"{inside}:{line} imports {module}; recipes import only public names")
    return wrong


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    assert part_of(path) in FLOOR_OF, f"{path} stands on no floor"
    assert violations(path) == []


@pytest.mark.parametrize(
    ("path", "planted"),
    [
        ("units.py", "from samegrad.records import Plan"),
        ("records/plan.py", "import torch"),
        ("exact/losses.py", "from samegrad.measure import census"),
        ("plan/choose.py", "import samegrad.execute.run"),
        ("levers/split_rows.py", "from samegrad.levers.host_rows import HostRows"),
        ("recipes/autoencoder/model.py", "from samegrad import Step"),
        ("recipes/autoencoder/recipe.py", "from samegrad.exact import program"),
        ("step.py", "from samegrad import Step"),
    ],
)
def test_a_planted_upward_import_is_caught(path: str, planted: str) -> None:
    assert violations(SOURCE / path, planted) != []


def caught_by_type(text: str) -> list[int]:
    """Lines on which an ``except`` names torch's out-of-memory error, which is one sign of many."""
    handlers = [node.type for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ExceptHandler) and node.type]
    return [h.lineno for h in handlers if "OutOfMemoryError" in ast.unparse(h)]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_what_is_out_of_memory_is_told_in_one_place(path: Path) -> None:
    assert caught_by_type(path.read_text()) == [], "ask exact.out_of_memory.is_out_of_memory"


def test_a_planted_out_of_memory_clause_is_caught() -> None:
    assert caught_by_type("try:\n    pass\nexcept (ValueError, torch.OutOfMemoryError):\n    pass") == [3]


def test_no_grab_bag_files() -> None:
    assert [p for p in sources() if p.stem.strip("_") in BANNED_STEMS] == []


def test_files_stay_readable() -> None:
    long = {str(p.relative_to(SOURCE)): n for p in sources() if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}
