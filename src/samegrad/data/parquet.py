"""Parquet list columns as one array of rows.

Values come out of Arrow's flat buffers about 1 MiB at a time and go to their place in one array made beforehand.
Reading whole row groups would hold three to five times the array (a file's only row group is decoded at once), and
Python lists eight times.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samegrad.data.columns import chosen_column
from samegrad.data.pieces import Piece, tensor_of
from samegrad.errors import BadInput, EnvironmentProblem, missing_extra
from samegrad.units import format_bytes

_BATCH_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """What one file's footer says of the column."""

    path: str
    column: str
    rows: int
    dtype: np.dtype[Any]

    def wrong(self, found: str, do: str = "write the rows anew, all of one width and without gaps") -> BadInput:
        return BadInput(asked=f"column {self.column!r} of {self.path}", found=found, do=do, file=self.path)


def open_parquet(paths: Sequence[str], *, column: str | None) -> Piece:
    """The lists of ``column`` in all files, one after another, as one (rows, width) tensor in host memory.

    ``list``, ``large_list`` and ``fixed_size_list`` of one numeric type are read. Raises BadInput naming file, row
    group and row for ragged or empty lists and nulls, EnvironmentProblem when the array does not fit or pyarrow is
    missing.
    """
    first = _read_footer(paths[0], column)
    parts = [first, *(_read_footer(path, first.column) for path in paths[1:])]
    for part in parts:
        if part.dtype != first.dtype:
            raise part.wrong(f"lists of {part.dtype}, but {first.path} has lists of {first.dtype}",
                             "write all parts with one type")  # fmt: skip
    filled = [part for part in parts if part.rows]
    if not filled:
        raise first.wrong("no rows", "give files with at least one row")
    width = _first_width(filled[0])
    rows = sum(part.rows for part in parts)
    try:
        values = np.empty((rows, width), dtype=first.dtype)
    except (MemoryError, ValueError):
        need = format_bytes(rows * width * first.dtype.itemsize)
        raise EnvironmentProblem(
            asked=f"column {first.column!r} of {paths[0]}" + (f" and {len(paths) - 1} more" if paths[1:] else ""),
            found=f"{rows} rows of {width} {first.dtype} need {need} of host memory",
            do="save the rows as .npy files, which are mapped and need none",
            file=paths[0],
        ) from None
    done = 0
    for part in filled:
        _read_values(part, values[done : done + part.rows], first=filled[0])
        done += part.rows
    _release_arrow_memory()
    origins = tuple((part.path, part.rows) for part in filled)
    return Piece(values=tensor_of(values, name=paths[0]), origins=origins, mapped=False)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The open parquet file; what Arrow says of damaged content, also later in the block, becomes BadInput."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise missing_extra(package="pyarrow", extra="recipes", wanted_for=f"rows of {path}") from None
    try:
        # A buffered stream: without it each column chunk's bytes are held whole beside what is decoded from them.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BATCH_BYTES, pre_buffer=False) as file:
            yield file
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadInput(
            asked=f"rows of {path}",
            found=f"not a sound parquet file: {error}",
            do="write or fetch the file anew",
            file=path,
        ) from None


def _read_footer(path: str, column: str | None) -> _Part:
    with _opened(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
        twice = [name for name in schema.names if schema.names.count(name) > 1 and column in (None, name)]
        if twice:
            raise BadInput(
                asked=f"rows of {path}",
                found=f"{schema.names.count(twice[0])} columns are called {twice[0]!r}",
                do="write the file anew, each column with a name of its own",
                file=path,
            )
        lists = {field.name: dtype for field in schema if (dtype := _list_dtype(field.type)) is not None}
        if column in schema.names and column not in lists:
            raise BadInput(
                asked=f"column {column!r} of {path}",
                found=f"its type is {schema.field(column).type}",
                do="name a column of lists of numbers" + (f": {', '.join(lists)}" if lists else ""),
                file=path,
                option="column",
            )
    name = chosen_column(path, column=column, names=list(lists), kind="list column")
    return _Part(path=path, column=name, rows=rows, dtype=lists[name])


def _list_dtype(arrow_type: Any) -> np.dtype[Any] | None:
    """The dtype of the values of a list type; None for other types, and for values numpy cannot view in place."""
    from pyarrow import types

    if not (types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type)):
        return None
    value = arrow_type.value_type
    return np.dtype(value.to_pandas_dtype()) if types.is_integer(value) or types.is_floating(value) else None


def _first_width(part: _Part) -> int:
    group, row, lists = next(_batches(part, batch_rows=1), (0, 0, None))
    width = 0 if lists is None else len(lists.flatten())
    if width == 0:
        raise part.wrong(f"row group {group}, row {row} (row 0 of the file) is empty or null")
    return width


def _batches(part: _Part, *, batch_rows: int) -> Iterator[tuple[int, int, Any]]:
    """(row group, first row in it, lists) of a file, in order."""
    with _opened(part.path) as file:
        for group in range(file.num_row_groups):
            row = 0
            for batch in file.iter_batches(
                batch_size=batch_rows, row_groups=[group], columns=[part.column], use_threads=False
            ):
                lists = batch.column(part.column)
                yield group, row, lists
                row += len(lists)


def _read_values(part: _Part, target: NDArray[Any], *, first: _Part) -> None:
    """Write the lists of ``part`` into ``target``, (rows, width); ``first`` is the file that set the width."""
    width = target.shape[1]
    done = 0
    for group, row, lists in _batches(part, batch_rows=max(1, _BATCH_BYTES // (width * target.itemsize))):
        if done + len(lists) > part.rows:
            break
        at, found = _first_unfit(lists, width)
        if at is not None:
            set_by = "" if first is part else f" ({first.path} has {width})"
            raise part.wrong(f"row group {group}, row {row + at} (row {done + at} of the file) {found}{set_by}")
        target[done : done + len(lists)] = lists.flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
        done += len(lists)
    if done != part.rows:
        raise part.wrong(f"the footer says {part.rows} rows, the row groups hold another number", "write it anew")


def _first_unfit(lists: Any, width: int) -> tuple[int | None, str]:
    """The first list that is null, of another width or has a null in it, and what it is; None when all fit."""
    if lists.null_count:
        return int(np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False))[0]), "is null"
    from pyarrow import types

    if not types.is_fixed_size_list(lists.type):
        lengths = np.diff(lists.offsets.to_numpy())
        unfit = np.flatnonzero(lengths != width)
        if len(unfit):
            return int(unfit[0]), f"has {lengths[unfit[0]]} values where {width} are needed"
    elif lists.type.list_size != width:
        return 0, f"has {lists.type.list_size} values where {width} are needed"
    values = lists.flatten()
    if values.null_count:
        return int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // width, "has a null in it"
    return None, ""


def _release_arrow_memory() -> None:
    import pyarrow

    pyarrow.default_memory_pool().release_unused()
