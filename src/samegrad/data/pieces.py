"""Pieces of rows: host tensors over arrays and mapped files, each with the name it came by."""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samegrad.errors import BadInput


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileStamp:
    """A mapped file as it was when it was opened."""

    path: str
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: str) -> FileStamp:
        status = os.stat(path)
        return cls(path=path, size_bytes=status.st_size, modified_ns=status.st_mtime_ns)

    def check(self) -> None:
        """Raise BadInput when the file is gone or another; reading past a shortened file would kill the process."""
        try:
            now = FileStamp.of(self.path)
        except FileNotFoundError:
            found = "the file is no longer there"
        else:
            if now == self:
                return
            found = f"the file changed while it was open ({self.size_bytes} bytes then, {now.size_bytes} now)"
        raise BadInput(
            asked=f"read rows of {self.path}",
            found=found,
            do="leave data files as they are while a run reads them, then start again",
            file=self.path,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive rows in one host tensor, axis 0 the rows.

    ``origins`` names where they came from, (name, rows) in order. ``mapped`` rows live in a file and are paged in
    as they are read; ``stamp`` is that file when samegrad mapped it itself.
    """

    values: Tensor
    origins: tuple[tuple[str, int], ...]
    mapped: bool
    stamp: FileStamp | None = None


Source = Tensor | NDArray[Any] | Piece


def as_piece(source: Source, name: str | None) -> Piece:
    """``source`` as a piece called ``name``, by default the file it is mapped from. Raises BadInput."""
    if isinstance(source, Piece):
        return source
    if not isinstance(source, (Tensor, np.ndarray)):
        raise BadInput(
            asked="rows of tensors or numpy arrays",
            found=f"a {type(source).__name__}",
            do="give torch tensors, numpy arrays, or a path to sg.open_rows",
        )
    array = source if isinstance(source, np.ndarray) else None
    label = name or (_file_of(array) if array is not None else None) or type(source).__name__.lower()
    values = source.detach() if isinstance(source, Tensor) else tensor_of(source, name=label)
    problem = None
    if values.device.type != "cpu" or values.layout != torch.strided:
        problem = f"it is on {values.device} with layout {values.layout}"
    elif values.dim() == 0:
        problem = "it is a single number"
    if problem is not None:
        raise BadInput(
            asked=f"rows of {label}",
            found=problem,
            do="give a dense host tensor with at least one axis; a device tensor is a batch leaf as it is",
        )
    mapped = array is not None and _file_of(array) is not None
    return Piece(values=values, origins=((label, values.shape[0]),), mapped=mapped)


def _file_of(array: NDArray[Any]) -> str | None:
    """The file that ``array`` is a view of, "a mapped file" if it has no name, None for memory."""
    for owner in _owners(array):
        if isinstance(owner, np.memmap):
            return str(owner.filename) if owner.filename is not None else "a mapped file"
        if isinstance(owner, mmap.mmap):
            return "a mapped file"
    return None


def _owners(array: NDArray[Any]) -> Iterable[Any]:
    owner: Any = array
    while owner is not None:
        yield owner
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)


class _Readable:
    """An array's memory without the read-only mark, which torch cannot carry and warns of. Rows never writes."""

    def __init__(self, array: NDArray[Any]) -> None:
        address, _ = array.__array_interface__["data"]
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def tensor_of(array: NDArray[Any], *, name: str) -> Tensor:
    """A tensor over ``array``'s memory, also when that is read-only: only to be read from. Raises BadInput."""
    try:
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError("a masked array, whose mask would be lost")
        return torch.from_numpy(array if array.flags.writeable else np.asarray(_Readable(array)))
    except (TypeError, ValueError) as error:
        raise BadInput(
            asked=f"rows of {name}",
            found=f"an array of dtype {array.dtype} and strides {array.strides}: {error}",
            do="give numbers in the machine's byte order: np.ascontiguousarray(array, dtype=np.float32)",
        ) from None
