"""Nested batches: which leaves carry rows, and how to cut, join, move and count them.

A batch is any nesting of dicts, tuples, lists and NamedTuples (or a class registered with torch's pytree) whose
leaves are tensors, row sources (rows on disk or still to be gathered) or anything else. Leaves that carry rows are
cut along their row axis; all other leaves are shared by every chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

# The one private torch module used for nesting: users' own containers are registered there.
from torch.utils import _pytree as pytree

from samegrad.errors import BadInput, UsageError


@runtime_checkable
class RowSource(Protocol):
    """Rows that are not a tensor yet: on disk, or gathered from host memory in some order."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` as a host tensor of ``shape[1:]`` a row, written into ``out`` if given."""
        ...


RowLeaf = Tensor | RowSource


def is_row_source(leaf: Any) -> TypeGuard[RowSource]:
    # A tensor has shape, dtype and len but no read, so the protocol tells them apart; the test keeps it so.
    return not isinstance(leaf, Tensor) and isinstance(leaf, RowSource)


class LeafExtent(NamedTuple):
    """A leaf of a batch: what it is, and how long it is along every axis but that of the rows (1 there)."""

    what: str
    row_axis: int | None
    lengths: tuple[int, ...]


Extents = tuple[LeafExtent, ...]


def covers(large: Extents, small: Extents) -> bool:
    """Whether batches of ``small`` are like those of ``large`` and nowhere longer."""
    return len(large) == len(small) and all(
        a.what == b.what
        and a.row_axis == b.row_axis
        and len(a.lengths) == len(b.lengths)
        and all(theirs <= ours for ours, theirs in zip(a.lengths, b.lengths))
        for a, b in zip(large, small)
    )


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Where the rows of a batch are: ``axes[i]`` is leaf i's row axis, or None for a leaf all chunks share.

    ``rows`` is the batch's row count, ``paths`` the leaves' places as the user would write them.
    """

    rows: int
    axes: tuple[int | None, ...]
    paths: tuple[str, ...]
    spec: Any

    def signature(self, batch: Any) -> str:
        """What a batch looks like, row count left out: two batches with one signature share plans and checks."""
        parts = []
        for leaf, axis, path in zip(pytree.tree_leaves(batch), self.axes, self.paths):
            if isinstance(leaf, Tensor) or is_row_source(leaf):
                shape = [("rows" if i == axis else str(n)) for i, n in enumerate(leaf.shape)]
                grad = "+grad" * (isinstance(leaf, Tensor) and leaf.requires_grad)
                parts.append(f"{path}:{str(leaf.dtype).removeprefix('torch.')}[{','.join(shape)}]{grad}")
            else:
                parts.append(f"{path}:{type(leaf).__name__}")
        return " ".join(parts)


def extents_of(batch: Any, layout: RowLayout) -> Extents:
    """What ``batch`` is made of, leaf by leaf."""
    found = []
    for leaf, axis, path in zip(pytree.tree_leaves(batch), layout.axes, layout.paths):
        what, lengths = f"{path}:{type(leaf).__name__}", tuple[int, ...]()
        if isinstance(leaf, Tensor) or is_row_source(leaf):
            grad = "+grad" * (isinstance(leaf, Tensor) and leaf.requires_grad)
            what += f" {leaf.dtype}{grad}"
            lengths = tuple(1 if i == axis else int(n) for i, n in enumerate(leaf.shape))
        found.append(LeafExtent(what, axis, lengths))
    return tuple(found)


def find_rows(batch: Any, batch_axes: Any = None) -> RowLayout:
    """The row layout of ``batch``. Raises BadInput naming the leaf that does not fit.

    ``batch_axes`` is None, an int for every tensor leaf, or a nesting like the batch's (a prefix is enough) of ints
    and None, None meaning shared. Without it the row count is the leading length of the first tensor leaf with at
    least one axis; leaves of that leading length carry rows, others are shared.
    """
    with_paths, spec = pytree.tree_flatten_with_path(batch)
    paths = tuple("batch" + pytree.keystr(path) for path, _ in with_paths)
    leaves = [leaf for _, leaf in with_paths]
    axes: list[int | None]
    if batch_axes is None or isinstance(batch_axes, int):
        default = 0 if batch_axes is None else batch_axes
        sizes = [_length(leaf, default) for leaf in leaves]
        rows = next((size for size in sizes if size is not None), None)
        axes = [default if size is not None and size == rows else None for size in sizes]
    else:
        axes = _broadcast_axes(batch_axes, batch, paths)
        sizes = [None if a is None else _length(leaf, a) for leaf, a in zip(leaves, axes)]
        for leaf, axis, size, path in zip(leaves, axes, sizes, paths):
            if axis is not None and size is None:
                raise UsageError(
                    asked=f"batch_axes puts rows on axis {axis} of {path}",
                    found=f"that leaf is {_described(leaf)}",
                    do="give None for leaves that all rows share",
                )
        rows = next((size for size in sizes if size is not None), None)
        for size, path in zip(sizes, paths):
            if size is not None and size != rows:
                raise BadInput(
                    asked="a batch whose row leaves have one length",
                    found=f"{path} has {size} rows, an earlier leaf has {rows}",
                    do="make the lengths equal, or mark the leaf as shared with None in batch_axes",
                )
    if rows is None:
        raise BadInput(
            asked="a batch with rows",
            found="no tensor leaf with at least one axis: "
            + ", ".join(f"{p} is {_described(leaf)}" for p, leaf in zip(paths, leaves)),
            do="give tensors whose first axis is the rows, or say where they are with batch_axes=",
        )
    if rows == 0:
        raise BadInput(
            asked="a batch with at least one row",
            found=f"{next(p for p, a in zip(paths, axes) if a is not None)} has no rows",
            do="drop empty batches",
        )
    return RowLayout(rows=rows, axes=tuple(axes), paths=paths, spec=spec)


def _length(leaf: Any, axis: int) -> int | None:
    if isinstance(leaf, Tensor) and leaf.dim() > axis:
        return leaf.shape[axis]
    if axis == 0 and is_row_source(leaf):
        return len(leaf)
    return None


def _broadcast_axes(batch_axes: Any, batch: Any, paths: Sequence[str]) -> list[int | None]:
    def spread(axis: int | None, part: Any) -> Any:
        return pytree.tree_map(lambda _: _Axis(axis), part)

    try:
        marked = pytree.tree_map(
            spread, batch_axes, batch, is_leaf=lambda node: node is None or isinstance(node, int)
        )
        return [mark.axis for mark in pytree.tree_leaves(marked)]
    except ValueError as error:
        raise UsageError(
            asked=f"batch_axes={batch_axes!r}",
            found=f"its nesting is not the batch's ({', '.join(paths)}): {error}",
            do="nest ints and None as the batch is nested, for example (0, None)",
        ) from None


@dataclasses.dataclass(frozen=True)
class _Axis:
    axis: int | None


def _described(leaf: Any) -> str:
    if isinstance(leaf, Tensor) or is_row_source(leaf):
        return f"{type(leaf).__name__}{tuple(leaf.shape)}"
    return f"a {type(leaf).__name__}"


def slice_rows(batch: Any, layout: RowLayout, start: int, stop: int) -> Any:
    """Rows ``start`` to ``stop`` of ``batch``: views of tensors, reads of row sources, shared leaves as they are.

    Views are detached: a view taken under ``no_grad`` of a leaf that requires grad would claim to require grad and
    yet be outside any later graph.
    """
    return _rebuild(batch, layout, lambda leaf, axis: _sliced(leaf, axis, start, stop))


def _sliced(leaf: RowLeaf, axis: int, start: int, stop: int) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf.detach().narrow(axis, start, stop - start)
    return leaf.read(start, stop)


def first_rows(batch: Any, layout: RowLayout, rows: int) -> Any:
    """The first ``rows`` rows of ``batch``: views of tensors, and row sources that still read when they are asked."""

    def head(leaf: RowLeaf, axis: int) -> RowLeaf:
        return leaf.detach().narrow(axis, 0, rows) if isinstance(leaf, Tensor) else _FirstRows(leaf, rows)

    return _rebuild(batch, layout, head)


@dataclasses.dataclass(frozen=True)
class _FirstRows:
    source: RowSource
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def __len__(self) -> int:
        return self.rows

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return self.source.read(start, stop, out)


def take_rows(batch: Any, layout: RowLayout, indices: Sequence[int]) -> Any:
    """The rows ``indices`` of ``batch``, copied, in that order."""

    def taken(leaf: RowLeaf, axis: int) -> Tensor:
        if isinstance(leaf, Tensor):
            return leaf.detach().index_select(axis, torch.tensor(indices, device=leaf.device))
        return torch.cat([leaf.read(i, i + 1) for i in indices])

    return _rebuild(batch, layout, taken)


def _rebuild(batch: Any, layout: RowLayout, of_row_leaf: Callable[[RowLeaf, int], Any]) -> Any:
    leaves = [
        leaf if axis is None else of_row_leaf(leaf, axis)
        for leaf, axis in zip(pytree.tree_leaves(batch), layout.axes)
    ]
    return pytree.tree_unflatten(leaves, layout.spec)


def move(tree: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """``tree`` with every tensor leaf on ``device``; leaves already there are not copied."""
    return map_tensors(tree, lambda leaf: leaf.to(device, non_blocking=non_blocking))


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def leaves_of(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    return pytree.tree_flatten(tree)


def flatten_with_paths(tree: Any, root: str) -> list[tuple[str, Any]]:
    """Every leaf with its place as a user would write it, below ``root``."""
    return [(root + pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]


def unflatten(leaves: Sequence[Any], spec: Any) -> Any:
    return pytree.tree_unflatten(list(leaves), spec)


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages under ``tensors``: tied and overlapping tensors count once."""
    seen = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(seen.values())


def row_bytes(batch: Any, layout: RowLayout) -> int:
    """Bytes of one row of ``batch``, over all leaves that carry rows."""
    total = 0
    for leaf, axis in zip(pytree.tree_leaves(batch), layout.axes):
        if axis is not None:
            per_row = 1
            for i, size in enumerate(leaf.shape):
                per_row *= 1 if i == axis else size
            total += per_row * leaf.dtype.itemsize
    return total


def even_sizes(batch_rows: int, rows: int) -> list[int]:
    """``batch_rows`` cut into chunks of ``rows``, the last one shorter when it does not divide."""
    full, rest = divmod(batch_rows, rows)
    return [rows] * full + [rest] * bool(rest)


