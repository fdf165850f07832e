"""Files to Rows: mapped where the format allows it, read once into one array where it does not.

1. Nothing in a file is trusted before it is checked: a header's size against the file, no pickled objects, every
   list of a column one width.
2. A file that cannot be taken whole is refused with its path and row, never shortened or padded.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samegrad.data.columns import chosen_column
from samegrad.data.parquet import open_parquet
from samegrad.data.pieces import FileStamp, Piece, tensor_of
from samegrad.data.rows import Rows
from samegrad.errors import BadInput, UsageError, missing_extra
from samegrad.trees import RowSource

_PARQUET = (".parquet", ".pq")
_SAFETENSORS_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# A .npy header is a Python literal, and every stage of reading one has its own complaint.
_HEADER_ERRORS = (ValueError, TypeError, SyntaxError, EOFError, tokenize.TokenError, RecursionError, MemoryError)


def open_rows(path: str | os.PathLike[str], *, column: str | None = None, pattern: str | None = None) -> Rows:
    """The rows of a file, or of a directory's files one after another in the order of their names.

    ``.npy`` and ``.safetensors`` are mapped and hold no host memory; ``.parquet`` is decoded once into one array in
    host memory. ``column`` names the list column (parquet) or tensor (safetensors), and may be left out where there
    is only one. ``pattern`` picks a directory's files, by default ``*.parquet``, ``*.npy`` or ``*.safetensors``,
    whichever is there. Raises BadInput naming file and row, UsageError for a path that cannot be rows.
    """
    root = Path(path)
    found, files = _problem_of(root), [root]
    if found is None:
        files = _files_in(root, pattern) if root.is_dir() else [root]
    suffixes = sorted({file.suffix.lower() for file in files})
    if found is None and (len(suffixes) != 1 or suffixes[0] not in (*_PARQUET, *_MAPPED)):
        found = f"files of type {', '.join(map(repr, suffixes))}"
    if found is not None:
        raise BadInput(
            asked=f"rows of {root}",
            found=found,
            do="give a .npy, .safetensors or .parquet file, or a directory of one of these",
            file=str(root),
        )
    if pattern is not None and not root.is_dir():
        raise UsageError(
            asked=f"the files {pattern!r} in {root}",
            found="that path is a file",
            do="leave pattern= out, or give the directory",
            option="pattern",
        )
    names = [str(file) for file in files]
    try:
        if suffixes[0] in _PARQUET:
            return Rows(open_parquet(names, column=column))
        return Rows([_MAPPED[suffixes[0]](name, column) for name in names])
    except PermissionError as error:
        raise BadInput(
            asked=f"rows of {error.filename or root}",
            found="this user may not read the file",
            do="change its mode, or run as its owner",
            file=str(error.filename or root),
        ) from None


def check_rows(rows: RowSource, *, partition_rows: int = 4096) -> None:
    """Nothing, when every number of ``rows`` is finite; each row is read once, ``partition_rows`` at a time.

    Raises BadInput naming the first row that holds a NaN or an infinity, and the file it comes from.
    """
    if not (rows.dtype.is_floating_point or rows.dtype.is_complex):
        return
    for start in range(0, len(rows), partition_rows):
        chunk = rows.read(start, min(start + partition_rows, len(rows)))
        # float8 has no isfinite of its own; every one of its values is a float32
        finite = torch.isfinite(chunk.float() if chunk.dtype.itemsize == 1 else chunk)
        if bool(finite.all()):
            continue
        first, *inside = finite.logical_not().nonzero()[0].tolist()
        place = f" ({rows.place(start + first)})" if isinstance(rows, Rows) else ""
        position = f" at position {tuple(inside)}" if inside else ""
        raise BadInput(
            asked="rows of finite numbers",
            found=f"row {start + first}{place} holds {chunk[(first, *inside)].item()}{position}",
            do="leave that row out with rows.subset(...), or write the file anew without it",
        )


def _problem_of(path: Path) -> str | None:
    """Why nothing can be read at ``path``, of whatever type; None where that can be."""
    try:
        if not path.exists():
            return "no such file or directory"
        # Reading a pipe would wait for whoever writes into it.
        return None if path.is_dir() or path.is_file() else "no regular file"
    except (OSError, ValueError) as error:
        # A name that is too long, a folder that may not be entered, a zero byte.
        return getattr(error, "strerror", None) or str(error)


def _files_in(folder: Path, pattern: str | None) -> list[Path]:
    patterns = ("*.parquet", "*.npy", "*.safetensors") if pattern is None else (pattern,)
    try:
        files = sorted(file for each in patterns for file in folder.glob(each) if file.is_file())
    except (ValueError, NotImplementedError) as error:
        raise UsageError(
            asked=f"the files pattern={pattern!r} in {folder}", found=str(error), do="give a pattern such as *.npy",
            option="pattern",
        ) from None  # fmt: skip
    if not files:
        there = sorted(file.name for file in folder.iterdir())[:5]
        raise BadInput(
            asked=f"the files {' or '.join(patterns)} in {folder}",
            found=f"none; it holds {', '.join(there) or 'nothing'}",
            do="give the directory of the data files, or their pattern with pattern=",
            file=str(folder),
            option="pattern",
        )
    return files


def _mapped_piece(path: str, *, offset_bytes: int, shape: Sequence[int], dtype: torch.dtype) -> Piece:
    """The part of a file from ``offset_bytes`` on as a tensor whose pages are read when they are needed."""
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes == 0:
        values = torch.empty(*shape, dtype=dtype, device="cpu")
    else:
        # Read-only, not copy-on-write: a private writable mapping counts against the host's memory in full.
        memory = np.memmap(path, dtype=np.uint8, mode="r", offset=offset_bytes, shape=(size_bytes,))
        values = tensor_of(memory, name=path).view(dtype).view(*shape)
    return Piece(values=values, origins=((path, shape[0]),), mapped=True, stamp=FileStamp.of(path))


def _open_npy(path: str, column: str | None) -> Piece:
    def wrong(found: str, do: str = "write the file anew with np.save") -> BadInput:
        return BadInput(asked=f"rows of {path}", found=found, do=do, file=path)

    if column is not None:
        raise UsageError(
            asked=f"column {column!r} of {path}",
            found="a .npy file holds one array without a name",
            do="leave column= out",
            option="column",
        )
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"header version {version}")
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran_order, dtype = read_header(file)
        except _HEADER_ERRORS as error:
            raise wrong(f"no readable .npy header: {error}") from None
        offset_bytes = file.tell()
        there_bytes = os.fstat(file.fileno()).st_size - offset_bytes
    if dtype.hasobject:
        raise wrong("an array of Python objects, which only unpickling can read; unpickling runs code",
                    "save numbers: np.save(path, np.stack(rows).astype(np.float32))")  # fmt: skip
    if not shape or min(shape) < 0:
        raise wrong(f"an array of shape {shape}, which has no rows")
    if fortran_order and len(shape) > 1:
        raise wrong("columns stored one after another (Fortran order), so that each row touches the whole file",
                    "save np.ascontiguousarray(array)")  # fmt: skip
    claimed_bytes = math.prod(shape) * dtype.itemsize
    if claimed_bytes != there_bytes:
        raise wrong(f"the header says {shape[0]} rows ({claimed_bytes} bytes), the file holds {there_bytes} bytes")
    native = tensor_of(np.empty(0, dtype=dtype), name=path).dtype
    return _mapped_piece(path, offset_bytes=offset_bytes, shape=shape, dtype=native)


def _open_safetensors(path: str, column: str | None) -> Piece:
    try:
        import safetensors
    except ImportError:
        raise missing_extra(package="safetensors", extra="recipes", wanted_for=f"rows of {path}") from None
    try:
        # The library's own checks first: header size, overlapping tensors, the file's length.
        with safetensors.safe_open(path, framework="numpy") as file:
            names = sorted(file.keys())
    except safetensors.SafetensorError as error:
        raise BadInput(
            asked=f"rows of {path}", found=f"not a sound safetensors file: {error}", do="write it anew", file=path
        ) from None
    name = chosen_column(path, column=column, names=names, kind="tensor")
    with open(path, "rb") as raw:
        (header_bytes,) = struct.unpack("<Q", raw.read(8))
        entry: dict[str, Any] = json.loads(raw.read(header_bytes))[name]
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is None or not entry["shape"]:
        raise BadInput(
            asked=f"rows of tensor {name!r} in {path}",
            found=f"dtype {entry['dtype']} and shape {tuple(entry['shape'])}",
            do="give a tensor of numbers with at least one axis",
            file=path,
        )
    offset_bytes = 8 + header_bytes + entry["data_offsets"][0]
    return _mapped_piece(path, offset_bytes=offset_bytes, shape=entry["shape"], dtype=dtype)


_MAPPED: dict[str, Callable[[str, str | None], Piece]] = {".npy": _open_npy, ".safetensors": _open_safetensors}
