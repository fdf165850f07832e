"""Where a benchmark leaves its figures: one small JSON a question, with the machine and the command that made it."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


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


def write(name: str, figures: dict[str, Any], *, quiet: bool = False) -> None:
    """Writes ``results/<name>.json`` (or below $OUT) and prints it, unless ``quiet``."""
    folder = Path(os.environ.get("OUT", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    document = {"command": command, "machine": machine(), **figures}
    text = json.dumps(document, indent=2) + "\n"
    (folder / f"{name}.json").write_text(text)
    if not quiet:
        print(text)
