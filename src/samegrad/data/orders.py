"""Row orders: permutations that depend on a seed alone, and the indices a user may give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samegrad.errors import UsageError


def permutation(rows: int, *, seed: int, draw: int) -> Tensor:
    """A permutation of ``rows``, (rows,) int64 on the host: a function of (rows, seed, draw).

    The global generators are neither read nor moved. Raises UsageError for a negative seed.
    """
    if seed < 0:
        raise UsageError(asked=f"a row order from seed {seed}", found="a negative seed", do="give a seed of 0 or more")
    # Hashed, because neighbouring seeds of one generator and (seed + 1, draw) must not give related orders.
    state = np.random.SeedSequence(seed, spawn_key=(draw,)).generate_state(1, np.uint32)
    generator = torch.Generator(device="cpu").manual_seed(int(state[0]))
    return torch.randperm(rows, generator=generator, device="cpu")


def row_indices(indices: Sequence[int] | NDArray[Any] | Tensor, *, rows: int) -> Tensor:
    """``indices`` as a new (n,) int64 host tensor inside [0, rows), negative ones counted from the end.

    Raises UsageError naming the first index that is not a row.
    """
    given = indices.detach().cpu() if isinstance(indices, Tensor) else torch.from_numpy(_array(indices))
    if given.dim() != 1 or given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
        raise UsageError(
            asked="a subset of rows by index",
            found=f"indices of shape {tuple(given.shape)} and dtype {given.dtype}",
            do="give a slice or whole numbers in one dimension; a mask becomes those by mask.nonzero().flatten()",
        )
    index = given.to(torch.int64, copy=True)
    outside = (index < -rows) | (index >= rows)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise UsageError(
            asked=f"row {int(index[at])} (indices[{at}])",
            found=f"there are {rows} rows",
            do=f"give indices from {-rows} to {rows - 1}" if rows else "these rows are empty",
        )
    return index.add_(rows * (index < 0))


def _array(indices: Sequence[int] | NDArray[Any]) -> NDArray[Any]:
    array = np.array(indices)
    if array.dtype.kind not in "iubf":
        raise UsageError(
            asked="a subset of rows by index", found=f"indices of type {array.dtype}", do="give whole numbers"
        )
    return array if array.size else array.astype(np.int64)
