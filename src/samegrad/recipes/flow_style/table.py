"""``plan --table``: the document's memory, speed and quality tables, with measured figures beside its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(options: Any) -> list[Mapping[str, int | float | str | None]]:
    return []
