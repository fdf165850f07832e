"""What is written at the end of a run: weights, the codec, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_results(model: Any, folder: Path, *, restyle: Any, splits: Any, options: Any) -> list[Path]:
    return []
