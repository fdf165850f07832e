"""Arrays of finite real numbers from ``.npy`` and ``.npz`` files; or BadInput with the path. Nothing is unpickled."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samegrad.recipes._recipe.refused_files import open_file, refused_file

# A header is a Python literal, an archive a zip file: every stage of reading them has a complaint of its own.
_READING_ERRORS = (
    OSError, ValueError, TypeError, SyntaxError, EOFError, LookupError, MemoryError, OverflowError, RuntimeError,
    NotImplementedError, tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_DO = "write or fetch the file anew, or take it out of the data"


def read_array(path: Path, *, what: str, dtype: type[np.floating[Any]] = np.float64) -> npt.NDArray[Any]:
    """The array of a ``.npy`` file in ``dtype``, of any shape. ``what`` names it as the user knows it: "a log-mel".

    Raises BadInput for a file that is cut off, goes on after its array, or holds other than finite real numbers.
    """
    try:
        with open_file(path) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):
                raise ValueError(f"bytes beyond the {array.nbytes} that the header speaks of")
        return _finite(array, dtype)
    except _READING_ERRORS as error:
        raise refused_file(path, what=what, found=error, do=_DO) from None


def read_archive(path: Path, names: Sequence[str], *, what: str) -> list[npt.NDArray[np.float64]]:
    """The arrays called ``names`` of a ``.npz`` file, in that order. Raises BadInput as ``read_array`` does."""
    try:
        with open_file(path) as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("no .npz archive, or the end of one is missing")
            file.seek(0)
            with np.load(file, allow_pickle=False) as kept:
                missing = [name for name in names if name not in kept]
                if missing:
                    raise ValueError(f"no {' and no '.join(missing)} in it")
                return [_named(name, kept) for name in names]
    except _READING_ERRORS as error:
        raise refused_file(path, what=what, found=error, do=_DO) from None


def _named(name: str, kept: Any) -> npt.NDArray[np.float64]:
    try:
        return _finite(kept[name], np.float64)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _finite(array: npt.NDArray[Any], dtype: type[np.floating[Any]]) -> npt.NDArray[Any]:
    """``array`` in ``dtype``. Raises ValueError for what is no real number, or not finite there."""
    if array.dtype.kind not in "iuf":
        raise ValueError(f"an array of {array.dtype}, which are no real numbers")
    # What is too large for dtype is told below, not warned of.
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    wrong = np.argwhere(~np.isfinite(converted))
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise ValueError(f"{array[place]} at {place}" + (f", which {np.dtype(dtype)} has no room for"
                         if np.isfinite(array[place]) else ", which is not finite"))  # fmt: skip
    return converted
