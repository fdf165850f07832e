"""Real points: the digits that scikit-learn ships, and CIFAR-10 from its files in either layout.

A pickled batch is read without running what a pickle may ask for.
"""

from __future__ import annotations

import io
import pickle
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
    raw = np.fromfile(path, dtype=np.uint8)
    if len(raw) == 0 or len(raw) % (1 + CIFAR_NUMBERS):
        raise ValueError(f"{path}: {len(raw)} bytes are no whole number of pictures of {1 + CIFAR_NUMBERS}")
    return raw.reshape(-1, 1 + CIFAR_NUMBERS)[:, 1:]


class _ArraysOnly(pickle.Unpickler):
    """Reads the arrays of a batch and nothing that could run."""

    _ALLOWED: ClassVar[set[tuple[str, str]]] = {
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
        ("numpy", "dtype"), ("_codecs", "encode"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch of CIFAR-10 needs")
        return super().find_class(module, name)


def _read_python(path: Path) -> Any:
    """The ``data`` (N, 3072) of a pickled batch, without running anything that the file asks for."""
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels = np.asarray(batch[b"data"], dtype=np.uint8)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a batch of CIFAR-10 ({error})") from None
    if pixels.ndim != 2 or pixels.shape[1] != CIFAR_NUMBERS:
        raise ValueError(f"{path}: data of shape {pixels.shape}, not (N, {CIFAR_NUMBERS})")
    return pixels
