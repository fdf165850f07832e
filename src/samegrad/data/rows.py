"""Rows that stay on the host or on disk: read a few at a time, in any order, never copied whole.

1. A ``Rows`` is pieces of memory plus an order. Subsets, splits and epochs change the order alone: eight bytes a
   row, and nothing at all for slices.
2. ``read`` hands out memory of its own, so that nothing done to a chunk can reach the user's data.
3. Rows move as integers of their width: bytes in, the same bytes out, whatever the dtype is able to compute.
"""

from __future__ import annotations

import copy
import itertools
import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from samegrad import trees
from samegrad.data.orders import permutation, row_indices
from samegrad.data.pieces import Piece, Source, as_piece
from samegrad.errors import BadInput, UsageError
from samegrad.units import format_bytes

# Rows whose reading order differs from their order in memory pass through this much scratch at a time.
_SCRATCH_BYTES = 1 * 2**20
_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Rows:
    """Rows of one shape and dtype in host memory or on disk, read by position; a ``trees.RowSource``.

    ``source`` is a host tensor, a numpy array (``np.memmap`` included), or several of them one after another; axis
    0 is the rows. Nothing is copied. ``name`` is used in messages. Raises BadInput for what cannot be held so.
    """

    _pieces: tuple[Piece, ...]
    _starts: Tensor
    _order: range | Tensor
    _dtype: torch.dtype
    _scale: float | None

    def __init__(self, source: Source | Sequence[Source], *, name: str | None = None) -> None:
        sources = list(source) if isinstance(source, Sequence) else [source]
        names = [name] if len(sources) == 1 or name is None else [f"{name}[{i}]" for i in range(len(sources))]
        self._pieces = tuple(as_piece(s, n) for s, n in zip(sources, itertools.cycle(names)))
        if not self._pieces:
            raise BadInput(
                asked="rows of a sequence of tensors or arrays",
                found="the sequence is empty",
                do="give at least one tensor or array",
            )
        first = self._pieces[0]
        for piece in self._pieces[1:]:
            if _kind(piece) != _kind(first):
                raise BadInput(
                    asked="pieces of one row shape and dtype",
                    found=f"{piece.origins[0][0]} has {_kind(piece)}, {first.origins[0][0]} has {_kind(first)}",
                    do="convert the pieces to one dtype and width first",
                )
        lengths = [piece.values.shape[0] for piece in self._pieces]
        self._starts = torch.tensor([0, *itertools.accumulate(lengths)], device="cpu")
        self._order = range(sum(lengths))
        self._dtype = first.values.dtype
        self._scale = None

    def __len__(self) -> int:
        return len(self._order)

    def __repr__(self) -> str:
        return f"Rows({self.described})"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self._pieces[0].values.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that ``read`` returns."""
        return self._dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as ``read`` returns it."""
        return math.prod(self.shape[1:]) * self._dtype.itemsize

    @property
    def mapped(self) -> bool:
        """Whether every row lies in a file and is paged in when it is read."""
        return all(piece.mapped for piece in self._pieces)

    @property
    def resident_bytes(self) -> int:
        """Host bytes held: the unmapped rows, and eight bytes a row where there is an index order."""
        held = [piece.values for piece in self._pieces if not piece.mapped]
        return trees.storage_bytes(held if isinstance(self._order, range) else [*held, self._order])

    @property
    def described(self) -> str:
        """Name, shape, dtype, bytes and place in one line, for people."""
        names = [name for piece in self._pieces for name, _ in piece.origins]
        name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        size = " x ".join(map(str, self.shape)) + " " + str(self._dtype).removeprefix("torch.")
        some = any(piece.mapped for piece in self._pieces)
        where = "mapped from disk" if self.mapped else "partly mapped from disk" if some else "in host memory"
        whole = int(self._starts[-1])
        in_full = isinstance(self._order, range) and self._order == range(whole)
        order = "" if in_full else f", selected from {whole} rows"
        return f"{name}: {size} ({format_bytes(len(self) * self.row_bytes)}), {where}{order}"

    def place(self, row: int) -> str:
        """Where row ``row`` comes from, as ``"acts/part_02.parquet row 17"``."""
        position = int(self._order[row])
        for name, rows in (origin for piece in self._pieces for origin in piece.origins):
            if position < rows:
                return f"{name} row {position}"
            position -= rows
        raise IndexError(row)

    def subset(self, indices: slice | Sequence[int] | NDArray[Any] | Tensor) -> Rows:
        """These rows in this order: a slice, or integers as numpy takes them (negative ones count from the end).

        Raises UsageError for indices that are not whole numbers inside the rows.
        """
        if isinstance(indices, slice):
            if isinstance(self._order, range):
                return self._ordered(self._order[indices])
            chosen = _stepless(range(len(self))[indices])
            if chosen.step == 1:
                return self._ordered(self._order[chosen.start : chosen.stop])
            return self._ordered(self._at(_counted(chosen)))
        return self._ordered(self._at(row_indices(indices, rows=len(self))))

    def shuffled(self, *, seed: int, epoch: int) -> Rows:
        """The same rows in the order of ``epoch``, a function of (seed, epoch, number of rows) alone.

        Call it on the rows themselves each epoch, not on the last epoch's result.
        """
        if epoch < 0:
            raise UsageError(asked=f"the row order of epoch {epoch}", found="a negative epoch", do="count from 0")
        return self._ordered(self._at(permutation(len(self), seed=seed, draw=epoch + 1)))

    def split(self, fractions: Sequence[float], *, seed: int) -> tuple[Rows, ...]:
        """Disjoint subsets, one a fraction, that together are all rows; who goes where is a function of the seed.

        Each part keeps the order of these rows, so that a pass over it walks forward through a file. Raises
        UsageError unless the fractions are positive and add up to 1.
        """
        if not fractions or min(fractions) <= 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-9):
            raise UsageError(
                asked=f"split rows by {list(fractions)}",
                found=f"the fractions add up to {sum(fractions):.6g}" if fractions else "no fractions",
                do="give positive fractions that add up to 1, for example (0.5, 0.2, 0.3)",
            )
        drawn = permutation(len(self), seed=seed, draw=0)
        cuts = [round(len(self) * share) for share in itertools.accumulate(fractions)]
        spans = itertools.pairwise([0, *cuts[:-1], len(self)])
        return tuple(self._ordered(self._at(drawn[a:b].sort().values)) for a, b in spans)

    def converted(self, dtype: torch.dtype, *, scale: float | None = None) -> Rows:
        """Rows that ``read`` returns as ``row.to(dtype) * scale``; what is stored stays as it is.

        Raises UsageError where that would drop fractions or imaginary parts, or when these rows are converted already.
        """
        found, do = None, "convert to a floating-point dtype"
        if self._scale is not None or self._dtype != self._pieces[0].values.dtype:
            found, do = "the rows are converted already", "convert the original rows once"
        elif self._dtype.is_complex and not dtype.is_complex:
            found, do = "the imaginary parts would be lost", "convert to a complex dtype, or give their real parts"
        elif (self._dtype.is_floating_point or scale is not None) and not dtype.is_floating_point:
            found = "the fractions would be lost"
        if found is not None:
            raise UsageError(
                asked=f"convert {self._dtype} rows to {dtype}" + ("" if scale is None else f" times {scale:g}"),
                found=found,
                do=do,
            )
        new = copy.copy(self)
        new._dtype, new._scale = dtype, scale
        return new

    @torch.no_grad()
    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows ``start`` to ``stop``, (stop - start, ...) on the host, in new memory or written into ``out``.

        ``out`` may be pinned. Beside the result at most a few MiB are allocated. Raises UsageError for a span or an
        ``out`` that does not fit, and BadInput when a mapped file was changed since it was opened.
        """
        self._check_read(start, stop, out)
        shape = (stop - start, *self.shape[1:])
        target = torch.empty(shape, dtype=self._dtype, device="cpu") if out is None else out
        for piece in self._pieces:
            if piece.stamp is not None:
                piece.stamp.check()
        order = self._order[start:stop]
        if isinstance(order, range) and order.step == 1:
            self._copy_span(order.start, order.stop, target)
        else:
            self._gather(_counted(order) if isinstance(order, range) else order, target)
        return target if self._scale is None else target.mul_(self._scale)

    def _ordered(self, order: range | Tensor) -> Rows:
        new = copy.copy(self)
        new._order = _stepless(order) if isinstance(order, range) else order
        return new

    def _at(self, index: Tensor) -> Tensor:
        """The order's entries at ``index``, which is overwritten where the order is a range."""
        if isinstance(self._order, range):
            return index.mul_(self._order.step).add_(self._order.start)
        return self._order[index]

    def _check_read(self, start: int, stop: int, out: Tensor | None) -> None:
        if not 0 <= start <= stop <= len(self):
            raise UsageError(
                asked=f"rows {start} to {stop}",
                found=f"there are {len(self)} rows: {self.described}",
                do="read spans with 0 <= start <= stop <= len(rows)",
            )
        want = (stop - start, *self.shape[1:])
        if out is not None and (out.shape != want or out.dtype != self._dtype or out.device.type != "cpu"):
            raise UsageError(
                asked=f"rows {start} to {stop} written into out=",
                found=f"out is {tuple(out.shape)} {out.dtype} on {out.device}",
                do=f"give a host tensor of shape {want} and dtype {self._dtype}",
            )

    def _copy_span(self, first: int, last: int, target: Tensor) -> None:
        for piece, start in zip(self._pieces, self._starts.tolist()):
            a, b = max(first, start), min(last, start + piece.values.shape[0])
            if a < b:
                target[a - first : b - first].copy_(piece.values[a - start : b - start])

    def _gather(self, positions: Tensor, target: Tensor) -> None:
        first = self._pieces[0]
        alone = len(self._pieces) == 1 and self._dtype == first.values.dtype
        if alone:
            if first.mapped:
                _page_in(_raw(first.values), positions)
            torch.index_select(_raw(first.values), 0, positions, out=_raw(target))
            return
        # Forward through memory and files, whatever the order asked for.
        ascending, places = positions.sort()
        cuts = torch.searchsorted(ascending, self._starts).tolist()
        block = max(1, _SCRATCH_BYTES // max(1, self.row_bytes))
        scratch = torch.empty((min(block, len(places)), *self.shape[1:]), dtype=first.values.dtype, device="cpu")
        for piece, start, (low, high) in zip(self._pieces, self._starts.tolist(), itertools.pairwise(cuts)):
            for a, b in _blocks(low, high, block):
                rows = scratch[: b - a]
                torch.index_select(_raw(piece.values), 0, ascending[a:b] - start, out=_raw(rows))
                _raw(target).index_copy_(0, places[a:b], _raw(rows.to(self._dtype)))


def _blocks(low: int, high: int, block: int) -> Iterator[tuple[int, int]]:
    return ((a, min(a + block, high)) for a in range(low, high, block))


def _stepless(order: range) -> range:
    """``order``, its step 1 where there is nothing to step over: steps multiply with every slice, past any int64."""
    return order if len(order) > 1 else range(order.start, order.start + len(order))


def _counted(steps: range) -> Tensor:
    return torch.arange(len(steps), device="cpu").mul_(steps.step).add_(steps.start)


def _page_in(values: Tensor, positions: Tensor) -> None:
    """Touch every page of these rows, forward through the file; gathered in any order then, they are in memory."""
    if values.numel() and values.is_contiguous() and bool((positions[1:] < positions[:-1]).any()):
        forward, rows = positions.sort().values, values.view(len(values), -1)
        for part in (rows[:, :: max(1, mmap.PAGESIZE // values.dtype.itemsize)], rows[:, -1:]):
            part.index_select(0, forward)


def _raw(values: Tensor) -> Tensor:
    # rule 3: torch gathers integers for every dtype, but not each dtype itself (uint16, float8)
    return values.view(_RAW[values.dtype.itemsize]) if values.dtype.itemsize in _RAW else values


def _kind(piece: Piece) -> str:
    shape = " x ".join(map(str, piece.values.shape[1:])) or "one number"
    return f"{shape} {str(piece.values.dtype).removeprefix('torch.')} a row"
