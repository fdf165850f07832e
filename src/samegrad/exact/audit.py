"""Does the loss of a batch follow from the losses of its chunks as claimed? Tried on a few rows.

The gradient of the loss with respect to every output row is taken once on all rows and once on parts of several
sizes, each part weighted as the claim says; likewise the gradients of what the loss uses beside the rows, whose parts
add up. The audit may reject a claim; it never selects one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.exact import losses
from samegrad.exact.aliases import NARROW
from samegrad.exact.handoff import hooks_silenced
from samegrad.exact.losses import Form
from samegrad.exact.tf32 import products_in_float32
from samegrad.trees import RowLayout


@dataclasses.dataclass(frozen=True)
class Residual:
    """The largest difference the audit found, relative to the largest gradient, and what rounding explains.

    ``silent_parts``: some part had no gradient at all, so nothing could be learnt of how it is weighted. ``terms``:
    how many numbers the loss adds up.
    """

    gradient: float
    loss: float
    allowed: float
    silent_parts: bool = False
    terms: float = 1.0

    @property
    def passed(self) -> bool:
        # A long sum of equal terms is rounded the same way each time: by a fraction of a term's share.
        return self.gradient <= self.allowed and self.loss <= self.allowed * max(1.0, self.terms / 1024)


def splits_of(rows: int) -> list[list[int]]:
    """Uneven ways to part ``rows`` rows: a claim that holds for equal parts only must fail."""
    if rows < 2:
        return []
    if rows == 2:
        return [[1, 1]]
    middle = max(1, rows // 3)
    return [[middle, rows - middle], [1, 1, rows - 2]]


def audit(
    declared: DeclaredStep, outputs: Any, batch: Any, layout: RowLayout, form: Form | None
) -> Residual | None:
    """The residual of the claim on these rows, or None when they cannot tell (one row, or no gradient at all).

    ``form`` None means the claim is ``declared.normalise``. ``outputs`` are detached rows for ``batch``.
    """
    wide = not any(p.dtype in NARROW for p in _owned(declared))
    outputs, batch = (_widened(outputs), _widened(batch)) if wide else (outputs, batch)
    worst: Residual | None = None
    with products_in_float32() if declared.device.type == "cuda" else contextlib.nullcontext():
        # In TF32 a loss with products of its own (a perceptual one) rounds by more than a wrong weight is wrong by.
        for rows in (outputs, trees.map_tensors(outputs, lambda leaf: leaf.flip(0))):
            residual = _residual(declared, rows, batch, layout, form)
            if residual is not None and (worst is None or residual.gradient > worst.gradient):
                worst = residual
    return worst


def _owned(declared: DeclaredStep) -> list[Tensor]:
    return [] if declared.loss_module is None else list(declared.loss_module.parameters())


def _widened(tree: Any) -> Any:
    # A half-precision comparison cannot tell a wrong weight from rounding.
    return trees.map_tensors(tree, lambda leaf: leaf.float() if leaf.dtype in NARROW else leaf)


def _residual(
    declared: DeclaredStep, outputs: Any, batch: Any, layout: RowLayout, form: Form | None
) -> Residual | None:
    whole = _gradients(declared, outputs, batch, form)
    scale = max((g.abs().max().item() for g in whole.rows if g is not None and g.numel()), default=0.0)
    if scale == 0 or not layout.rows > 1:
        return None
    gradient = loss = 0.0
    silent = False
    for sizes in splits_of(layout.rows):
        start, total_loss = 0, 0.0
        beside = _Beside(whole.others)
        for size in sizes:
            part = slice(start, start + size)
            part_outputs = _rows_of(outputs, part)
            part_batch = trees.slice_rows(batch, layout, start, start + size)
            mine = _gradients(declared, part_outputs, part_batch, form)
            share = _share(form, declared, size / layout.rows, mine.count, whole.count)
            start += size
            for g, total in zip(mine.rows, whole.rows):
                reference = total[part] if total is not None else 0.0
                ours = g * share if g is not None and share != 0 else 0.0
                gradient = _worse(gradient, torch.as_tensor(ours - reference).abs().max().item() / scale)
            silent = silent or not any(g is not None and bool(g.any()) for g in mine.rows)
            total_loss += mine.loss * share if share != 0 else 0.0
            beside.add(mine.others, share)
        gradient = _worse(gradient, beside.error(scale))
        loss = _worse(loss, abs(total_loss - whole.loss) / max(abs(whole.loss), scale))
    unit = max(torch.finfo(leaf.dtype).eps for leaf in _float_leaves(outputs)) / 2
    if torch.is_autocast_enabled(declared.device.type):
        unit = max(unit, torch.finfo(torch.get_autocast_dtype(declared.device.type)).eps / 2)
    return Residual(gradient=gradient, loss=loss, allowed=128 * unit, silent_parts=silent, terms=whole.count)


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """Of one loss: gradients of each output leaf and, by id, of what else it depends on; its value and its count."""

    rows: Sequence[Tensor | None]
    others: dict[int, Tensor]
    loss: float
    count: float


class _Beside:
    """Gradients of what the loss uses beside the rows, parts added up against the whole."""

    def __init__(self, whole: dict[int, Tensor]) -> None:
        self._left = dict(whole)
        self._sizes = dict.fromkeys(whole, 0.0)

    def add(self, part: dict[int, Tensor], share: float) -> None:
        for key, g in part.items() if share != 0 else ():
            self._left[key] = self._left[key] - g * share if key in self._left else -g * share
            self._sizes[key] = self._sizes.get(key, 0.0) + (g * share).abs().max().item()

    def error(self, scale: float) -> float:
        """The largest rest, on the scale of the parts or of the rows' gradients: some are zero by structure."""
        worst = 0.0
        for key, rest in self._left.items():
            worst = _worse(worst, rest.abs().max().item() / max(self._sizes[key], scale))
        return worst


def _worse(worst: float, error: float) -> float:
    """The larger of the two; what is not a number is infinitely wrong."""
    return math.inf if math.isnan(error) else max(worst, error)


def _rows_of(outputs: Any, part: slice) -> Any:
    return trees.map_tensors(outputs, lambda leaf: leaf[part])


def _share(form: Form | None, declared: DeclaredStep, rows: float, count: float, whole_count: float) -> float:
    if form is Form.ROW_SUM or (form is None and declared.normalise == "sum"):
        return 1.0
    if form is Form.ROW_MEAN or (form is None and declared.normalise == "mean"):
        return rows
    return count / whole_count if whole_count else 0.0


def _float_leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in trees.leaves_of(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _gradients(declared: DeclaredStep, outputs: Any, batch: Any, form: Form | None) -> _Gradients:
    leaves, spec = trees.flatten(outputs)
    leaves = [
        leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    live = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    with torch.enable_grad():
        loss = declared.loss_fn(trees.unflatten(leaves, spec), batch)
    count = 0.0
    if form is Form.COUNTED:
        count = losses.count_of(loss).item()
    elif form is None and callable(declared.normalise):
        count = float(declared.normalise(batch))
    known = {id(leaf) for leaf in live}
    others = [leaf for leaf in losses.leaves_under(loss) if id(leaf) not in known and leaf.numel()]
    with hooks_silenced(others):
        gradients = torch.autograd.grad(loss.reshape(()), [*live, *others], allow_unused=True)
    beside = {id(leaf): g.to_dense() for leaf, g in zip(others, gradients[len(live) :]) if g is not None}
    return _Gradients(gradients[: len(live)], beside, float(loss.detach()), count)
