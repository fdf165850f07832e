"""Values that cross a cut between stages: tensors of rows, in any nesting, and plain values such as shapes.

A tensor may have several entries a row on its first axis (rows and time steps taken together before a layer); it
crosses with rows first, in the order its own chunk had. Plain values are those of a chunk's length.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.errors import CannotSplit

_PLAIN = (int, float, str, slice, type(None), enum.Enum, torch.Size, torch.dtype, torch.device, torch.memory_format)


class Crossing:
    """How one value crosses: learned from the first chunk, checked with the others."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._spec: Any = None
        self._entries: list[int | None] | None = None
        self._plain: dict[int, list[Any]] = {}

    @property
    def tensors(self) -> int:
        """How many tensors cross."""
        return sum(entries is not None for entries in self._entries or [])

    def packed(self, value: Any, rows: int) -> list[Tensor]:
        """The tensors of ``value``, (rows, entries a row, ...) each or (rows, ...) where there is one entry a row."""
        leaves, spec = trees.flatten(value)
        entries = [self._entries_of(leaf, rows) for leaf in leaves]
        plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if self._entries is None:
            self._spec, self._entries = spec, entries
        if entries != self._entries or plain != self._plain.setdefault(rows, plain):
            raise self._refused("is of another form for other rows")
        return [_with_rows(leaf, rows, n) for leaf, n in zip(leaves, entries) if n is not None]

    def unpacked(self, tensors: Sequence[Tensor], rows: int) -> Any:
        entries, remaining = self._entries or [], iter(tensors)
        leaves = list(self._plain.get(rows, [None] * len(entries)))
        for place, n in enumerate(entries):
            if n is not None:
                tensor = next(remaining)
                leaves[place] = tensor if n == 1 else tensor.reshape(rows * n, *tensor.shape[2:])
        return trees.unflatten(leaves, self._spec)

    def returned(self, tensors: Sequence[Tensor], rows: int) -> Any:
        """The value of all ``rows`` rows, as the network returns it. Raises CannotSplit for what is not rows."""
        entries = self._entries or []
        if any(n not in (1, None) for n in entries):
            raise self._refused("is returned and is not one entry a row")
        first = next(iter(self._plain.values()))
        for length, plain in self._plain.items():
            if plain != first or any(_tells(leaf, length) for leaf in plain):
                raise self._refused("is returned and tells how many rows ran together")
        self._plain[rows] = first
        return self.unpacked(tensors, rows)

    def _entries_of(self, leaf: Any, rows: int) -> int | None:
        if isinstance(leaf, Tensor):
            if leaf.dim() == 0 or leaf.shape[0] % rows or not leaf.shape[0]:
                raise self._refused(f"has shape {tuple(leaf.shape)} for {rows} rows, so it is not one entry a row")
            return leaf.shape[0] // rows
        if not isinstance(leaf, _PLAIN):
            raise self._refused(f"is a {type(leaf).__name__}, and tensors inside it cannot be seen")
        return None

    def _refused(self, found: str) -> CannotSplit:
        return CannotSplit(
            asked="run a model with BatchNorm a few rows at a time",
            found=f"{self._name} {found}",
            do="keep rows on the first axis between BatchNorm layers and in what is returned, or run the step whole",
        )


def _tells(leaf: Any, rows: int) -> bool:
    """Whether a plain value may be the length of a chunk, which the caller would take for the batch's."""
    return rows in leaf if isinstance(leaf, torch.Size) else isinstance(leaf, (int, float)) and leaf == rows


def _with_rows(leaf: Tensor, rows: int, entries: int) -> Tensor:
    return leaf if entries == 1 else leaf.reshape(rows, entries, *leaf.shape[1:])
