"""A hint for errors on a few rows: leaves of the batch that look like rows of another number than the batch has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep


@contextlib.contextmanager
def other_lengths_told(declared: DeclaredStep, batch: Any) -> Iterator[None]:
    """What is raised inside goes on as it is, with a note on such leaves: all rows share them, so few rows get them
    whole, and an error speaks of numbers that nobody gave."""
    try:
        yield
    except Exception as error:  # of any type; it goes on with a note
        for note in _notes(declared, batch):
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        raise


def _notes(declared: DeclaredStep, batch: Any) -> list[str]:
    if declared.batch_axes is not None:
        # What is shared was said.
        return []
    layout = declared.layout(batch)
    lengths = {
        path: leaf.shape[0]
        for path, leaf, axis in zip(layout.paths, trees.leaves_of(batch), layout.axes)
        if axis is None and isinstance(leaf, Tensor) and leaf.dim() > 0
    }
    return [
        f"{path} has {length} entries where the batch has {layout.rows} rows: it is taken for something that all rows "
        "share, and a few rows get it whole"
        for path, length in lengths.items()
        if layout.rows < 2 * length < 4 * layout.rows
    ]
