"""Real points: the digits that scikit-learn ships, and CIFAR-10 from its files in either layout.

A pickled batch is read without running what a pickle may ask for.
"""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

DIGIT_SIDE = 8
CIFAR_SHAPE = (3, 32, 32)
CIFAR_NUMBERS = 3072
CIFAR_LAYOUT = (
    "cifar-10-batches-py/data_batch_1 ... data_batch_5 and test_batch, or "
    "cifar-10-batches-bin/data_batch_1.bin ... data_batch_5.bin and test_batch.bin"
)
Points = npt.NDArray[np.float64]


def read_digits() -> Points:
    """scikit-learn's 1797 handwritten digits, (1797, 64), pixels from [0, 16] to [-1, 1]."""
    from sklearn.datasets import load_digits

    return np.asarray(load_digits().data, dtype=np.float64) / 8 - 1


def read_cifar10(root: Path) -> Points:
    """All 60 000 pictures below ``root`` in either layout, or those of the batches that are there: (N, 3072).

    Standardised per channel. Raises FileNotFoundError without any batch, ValueError for a file that is none.
    """
    python = [p for p in sorted(root.rglob("*_batch*")) if p.is_file() and p.suffix == ""]
    binary = sorted(root.rglob("*_batch*.bin"))
    if not python and not binary:
        raise FileNotFoundError(f"no batch below {root}; expected {CIFAR_LAYOUT}")
    read = [_read_python(p) for p in python] if python else [_read_binary(p) for p in binary]
    pictures = np.concatenate(read).reshape(-1, *CIFAR_SHAPE).astype(np.float64) / 255
    mean = pictures.mean(axis=(0, 2, 3), keepdims=True)
    deviation = pictures.std(axis=(0, 2, 3), keepdims=True)
    return np.asarray((pictures - mean) / np.where(deviation == 0, 1, deviation)).reshape(len(pictures), CIFAR_NUMBERS)


def _read_binary(path: Path) -> Any:
    """One label byte and 3072 pixel bytes a picture."""
    if not path.is_file():
        raise ValueError(f"{path}: a folder, not a file")
    raw = np.fromfile(path, dtype=np.uint8)
    if len(raw) == 0 or len(raw) % (1 + CIFAR_NUMBERS):
        raise ValueError(f"{path}: {len(raw)} bytes are no whole number of pictures of {1 + CIFAR_NUMBERS}")
    return raw.reshape(-1, 1 + CIFAR_NUMBERS)[:, 1:]


class _Kept:
    """An array or dtype that a pickle asks for, as it is written there; numpy makes nothing of it.

    Numpy trusts such a description: what says it holds objects has its bytes taken for addresses.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """What old protocols write bytes as."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes bytes as {encoding}")
    return text.encode("latin1")


class _Descriptions(pickle._Unpickler):
    """Reads a batch with its arrays as descriptions; nothing that a file names is looked up.

    The one in Python: that in C makes its memo as long as a number in the file says, tens of GiB for one byte changed.
    """

    _KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _Kept, ("numpy._core.multiarray", "_reconstruct"): _Kept,
        ("numpy", "ndarray"): _Kept, ("numpy", "dtype"): _Kept, ("_codecs", "encode"): _encoded,
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch of CIFAR-10 needs")
        return self._KNOWN[module, name]


# A file of changed bytes ends in any of these.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError, OverflowError, MemoryError,
    AssertionError, struct.error,
)  # fmt: skip


def _read_python(path: Path) -> Any:
    """The ``data`` (N, 3072) of a pickled batch, without running anything that the file asks for."""
    try:
        batch = _Descriptions(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        if not isinstance(batch, dict):
            raise ValueError(f"a {type(batch).__name__}, not a dictionary")
        if b"data" not in batch:
            raise ValueError("no 'data' in it")
        pixels = _bytes_of(batch[b"data"])
    except (*_UNPICKLING_ERRORS, OSError) as error:
        raise ValueError(f"{path}: not a batch of CIFAR-10 ({str(error) or 'it ends too early'})") from None
    if pixels.ndim != 2 or pixels.shape[1] != CIFAR_NUMBERS or len(pixels) == 0:
        raise ValueError(f"{path}: data of shape {pixels.shape}, not (N, {CIFAR_NUMBERS}) with a picture in it")
    return pixels


def _bytes_of(described: Any) -> npt.NDArray[np.uint8]:
    """The array of bytes that ``described`` is a description of. Raises ValueError for anything else."""
    state = described.state if isinstance(described, _Kept) else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("its data is no array of bytes")
    _, shape, dtype, by_columns, raw = state
    if not isinstance(dtype, _Kept) or dtype.arguments[:1] not in (("u1",), (b"u1",)) or not isinstance(raw, bytes):
        raise ValueError("its data is no array of bytes")
    return np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(shape, order="F" if by_columns else "C"))
