"""A file of one JSON object a line that a killed run can continue, so that every step stands in it exactly once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samegrad.errors import UsageError
from samegrad.store import faults
from samegrad.store.durable import write_atomically

PARTIAL = ".partial"


def json_line(record: Mapping[str, Any], *, place: str) -> str:
    """``record`` as one line of strict JSON; floats that are not finite become null. Raises UsageError."""
    try:
        return json.dumps(_nulled(record), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            asked=f"write to {place}",
            found=f"a record that JSON cannot hold ({error})",
            do="give numbers, strings, lists and dicts; turn tensors into numbers with .item()",
        ) from None


def _nulled(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _nulled(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nulled(part) for part in value]
    return value


def append_line(descriptor: int, line: str) -> None:
    """``line`` at the end of the file, whole or, when the disk refuses, not at all. Raises OSError."""
    data = (line + "\n").encode()
    size_bytes = os.fstat(descriptor).st_size
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        os.ftruncate(descriptor, size_bytes)
        raise


def rewind(path: Path, *, step: int | None) -> int:
    """How many whole lines were dropped: those of steps after ``step`` (none when it is None).

    What is not a whole record, as a kill leaves at the end, is moved to ``<name>.partial``. The file is replaced
    in one move, and only if something changes. Raises OSError.
    """
    if not path.exists():
        return 0
    text = path.read_bytes()
    kept, broken, dropped = [], [], 0
    for line in text.splitlines():
        at = _step_of(line)
        if at is None:
            broken.append(line)
        elif step is not None and at > step:
            dropped += 1
        else:
            kept.append(line)
    if broken:
        # Set aside first: a kill between the two writes repeats a line there and loses none here.
        with open(path.with_name(path.name + PARTIAL), "ab") as aside:
            aside.write(b"".join(line + b"\n" for line in broken))
    faults.reach("metrics.aside")
    whole = b"".join(line + b"\n" for line in kept)
    if whole != text:
        write_atomically(path, whole)
    return dropped


def _step_of(line: bytes) -> int | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None
