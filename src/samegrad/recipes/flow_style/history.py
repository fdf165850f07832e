"""What a run wrote down step by step, read back for curves, checks and advice. No torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class History:
    """Optimizer steps and validations in order; each entry is a line of metrics.jsonl."""

    steps: tuple[dict[str, Any], ...]
    validations: tuple[dict[str, Any], ...]

    def of_steps(self, name: str) -> list[float]:
        """The figures ``name`` of the steps that have it."""
        return [float(step[name]) for step in self.steps if step.get(name) is not None]

    def timed(self) -> History:
        """Without the steps whose bytes were counted one by one meanwhile: their seconds are not the step's own."""
        return dataclasses.replace(self, steps=tuple(step for step in self.steps if not step.get("counted")))

    def part(self, name: str) -> list[float]:
        """The part ``name`` of every validation."""
        return [float(line["parts"][name]) for line in self.validations if name in line.get("parts", {})]

    def first_epochs(self, epochs: int) -> History:
        """The first so many epochs; each ends with a validation."""
        ends = [int(line["step"]) for line in self.validations[:epochs]]
        return History(tuple(s for s in self.steps if ends and s["step"] <= ends[-1]), self.validations[:epochs])


def read_history(folder: Path) -> History:
    """The history of the run in ``folder``, empty where it has none; a line cut short by a crash is left out."""
    path = folder / "metrics.jsonl"
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
            # A resumed run writes steps again.
            lines[line["kind"], int(line["step"])] = line
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            continue

    def of(kind: str) -> tuple[dict[str, Any], ...]:
        return tuple(line for (found, _), line in sorted(lines.items()) if found == kind)

    return History(of("step"), of("validation"))


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
