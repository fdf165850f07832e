"""Where a benchmark leaves its figures: one small JSON a question, with the machine and the command that made it."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def read(name: str) -> dict[str, Any]:
    """What ``write`` left under ``name``, below $OUT or else in ``results``; nothing where there is nothing."""
    for folder in (Path(os.environ.get("OUT", RESULTS)), RESULTS):
        path = folder / f"{name}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
    return {}


class Cells:
    """The cells of one result, written each as it is measured, so that parts in processes of their own add up.

    A cell that the file holds from the same device and torch is not measured again, unless ``again``.
    """

    def __init__(self, name: str, facts: dict[str, Any], *, again: bool = False) -> None:
        self._name, self._facts, self._again = name, facts, again
        held = read(name)
        self.cells: dict[str, dict[str, Any]] = held.get("cells", {})
        self._commands: list[str] = held.get("commands", [])
        here = machine()
        self.place = f"{here.get('device', here['processor'])}, torch {here['torch']}"

    def __contains__(self, key: str) -> bool:
        there = key in self.cells and self.cells[key]["measured_on"] == self.place and not self._again
        if there:
            print(f"{key}: there already", flush=True)
        return there

    def add(self, key: str, figures: dict[str, Any]) -> None:
        """Writes the cell, and prints it in a line."""
        self.cells[key] = {**figures, "measured_on": self.place}
        self._commands = list(dict.fromkeys([*self._commands, command()]))
        write(self._name, {**self._facts, "commands": self._commands, "cells": self.cells}, quiet=True)
        print(f"{key}: {json.dumps(figures)}", flush=True)


def command() -> str:
    return f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()


def write(name: str, figures: dict[str, Any], *, quiet: bool = False) -> None:
    """Writes ``results/<name>.json`` (or below $OUT) and prints it, unless ``quiet``."""
    folder = Path(os.environ.get("OUT", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    document = {"command": command(), "machine": machine(), **figures}
    # Reasons and errors name lines of files; where the clone lies is nobody's business.
    text = json.dumps(document, indent=2).replace(f"{ROOT}{os.sep}", "") + "\n"
    (folder / f"{name}.json").write_text(text)
    if not quiet:
        print(text)
