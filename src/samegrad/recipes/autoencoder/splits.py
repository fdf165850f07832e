"""Where the rows come from: real ones under ``--data_root``, or patches of bundled pictures."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe import INSTALL
from samegrad.recipes._recipe.precision import weight_dtype

from . import data
from .options import AutoencoderOptions


class EpochRows(data.ReadRows, Protocol):
    """Rows in an order of their own each epoch: ``sg.Rows`` and ``data.Patches``."""

    @property
    def dtype(self) -> torch.dtype: ...

    def shuffled(self, *, seed: int, epoch: int) -> EpochRows: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """Disjoint rows to train on, to stop by and to judge by, and what they are, in words."""

    train: EpochRows
    validation: EpochRows
    test: EpochRows
    described: str


def open_splits(options: AutoencoderOptions) -> Splits:
    """The rows of ``--data_root``, each read once to see that it is finite, or patches of the bundled pictures.

    Raises BadInput for rows that cannot be read or trained on, UsageError for more patches than there are,
    EnvironmentProblem when scikit-image is not installed.
    """
    dtype = weight_dtype(options.dtype)
    if options.data_root is not None:
        return _split(_opened(options.data_root, options.layer_for_activation), options, dtype=dtype)
    try:
        train, validation, test = data.patch_splits(
            options.patch_rows, options.fractions, seed=options.random_seed, dtype=dtype
        )
    except ValueError as error:
        raise sg.UsageError(
            asked=f"--patch_rows {options.patch_rows}", found=str(error), do="ask for another number of rows",
            option="patch_rows",
        ) from None  # fmt: skip
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise sg.EnvironmentProblem(asked="patches of scikit-image's pictures", found=str(error), do=INSTALL) from None
    described = f"{options.patch_rows} patches of {data.PATCH_SIDE} x {data.PATCH_SIDE} grey pixels, scikit-image"
    return Splits(train=train, validation=validation, test=test, described=described)


def _opened(root: Path, layer: int) -> sg.Rows:
    """The rows under ``root``: of parquet files the column of ``layer``; other formats hold one array."""
    parquet = any(root.glob("*.parquet")) if root.is_dir() else root.suffix in (".parquet", ".pq")
    return sg.open_rows(root, column=f"activation_layer_{layer}" if parquet else None)


def _split(stored: sg.Rows, options: AutoencoderOptions, *, dtype: torch.dtype) -> Splits:
    if len(stored.shape) != 2 or 0 in stored.shape or stored.dtype.is_complex:
        raise _unfit(stored, options)
    rows = as_rows(stored, dtype=dtype)
    parts = rows.split(options.fractions, seed=options.random_seed)
    if min(map(len, parts)) == 0:
        raise _unfit(stored, options)
    # One NaN in rows to validate or test on makes every figure NaN, and in those to train on the wrong thing is blamed.
    sg.check_rows(rows)
    return Splits(train=parts[0], validation=parts[1], test=parts[2], described=rows.described)


def _unfit(rows: sg.Rows, options: AutoencoderOptions) -> sg.BadInput:
    return sg.BadInput(
        asked=f"rows to train, validate and test on in {options.data_root}",
        found=f"an array of shape {rows.shape}, {rows.dtype}",
        do="give (rows, numbers), real ones, with enough rows that each of the three parts gets one",
        file=str(options.data_root),
    )


def as_rows(rows: Any, *, dtype: torch.dtype | None = None) -> Any:
    """``rows`` as rows that are read in parts: a path is opened, an array or host tensor wrapped; never copied.

    ``dtype``: what reading them returns. Raises BadInput for what cannot be rows.
    """
    if isinstance(rows, (str, os.PathLike)):
        rows = sg.open_rows(rows)
    elif isinstance(rows, (Tensor, np.ndarray)):
        rows = sg.Rows(rows)
    return rows if dtype in (None, rows.dtype) else rows.converted(dtype)
