"""What may be done to logits that do not exist yet (``pending_logits.py``), operation by operation.

A rule takes the logits, the operation and its other arguments. It gives other pending logits, the operation's result,
or ``NotImplemented`` where that is not the operation it knows: then the logits are made whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samegrad.exact.chunk_map import Autocast
from samegrad.exact.chunked_head import HeadLoss, Likelihood
from samegrad.exact.logit_rows import Cast
from samegrad.exact.pending_logits import PendingLogits

Rule = Callable[..., Any]

_EVERYTHING = slice(None)


def reshaped(known: PendingLogits, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A view of another shape, if it leaves the classes an axis of their own."""
    new = function(torch.empty(known.shape, dtype=known.dtype, device="meta"), *args, **kwargs)
    if not isinstance(new, Tensor) or new.dtype is not known.dtype:
        return NotImplemented
    before = math.prod(known.positions[: known.class_axis])
    for axis, length in enumerate(new.shape):
        if length == known.classes and math.prod(new.shape[:axis]) == before:
            positions = (*new.shape[:axis], *new.shape[axis + 1 :])
            return known.moved(known.hidden.reshape(*positions, known.hidden.shape[-1]), axis)
    return NotImplemented


def reordered(known: PendingLogits, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Axes in another order."""
    axis = known.class_axis
    # Axes of different lengths, so that the result says where each of them went.
    marked = function(torch.empty(tuple(range(2, 2 + len(known.shape))), device="meta"), *args, **kwargs)
    order = [length - 2 for length in marked.shape]
    positions = [old - (old > axis) for old in order if old != axis]
    return known.moved(known.hidden.permute(*positions, known.hidden.dim() - 1), order.index(axis))


def indexed(known: PendingLogits, _: Any, key: Any) -> Any:
    """Some of the positions, all classes of each."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(k, (list, str)) or (isinstance(k, Tensor) and k.dtype is torch.uint8) for k in keys):
        return NotImplemented
    axes_taken = [k.dim() if isinstance(k, Tensor) and k.dtype is torch.bool else int(k is not None) for k in keys]
    missing = len(known.shape) - sum(t for k, t in zip(keys, axes_taken) if k is not Ellipsis)
    full: list[Any] = []
    for k in keys if any(k is Ellipsis for k in keys) else [*keys, Ellipsis]:
        full += [_EVERYTHING] * missing if k is Ellipsis else [k]
    place = _place_of_axis(full, known.class_axis)
    if place is None or not _takes_all(full[place], known.classes):
        return NotImplemented
    advanced = any(isinstance(k, (Tensor, bool)) for k in full)
    rest = full[:place] + full[place + 1 :]
    if advanced and known.class_axis != len(known.positions):
        return NotImplemented
    found = known.hidden[tuple(rest)]
    if advanced:
        return known.moved(found, found.dim() - 1)
    return known.moved(found, sum(1 for k in full[:place] if k is None or isinstance(k, slice)))


def _place_of_axis(keys: list[Any], axis: int) -> int | None:
    """Which of ``keys`` is that of ``axis``; None where a mask takes it with others."""
    at = 0
    for place, key in enumerate(keys):
        if key is None:
            continue
        if at == axis:
            return place
        at += key.dim() if isinstance(key, Tensor) and key.dtype is torch.bool else 1
    return None


def _takes_all(key: Any, length: int) -> bool:
    return isinstance(key, slice) and key.indices(length) == (0, length, 1)


def selected(known: PendingLogits, function: Any, dim: int, index: int) -> Any:
    return indexed(known, function, (*[_EVERYTHING] * _axis(known, dim), index))


def narrowed(known: PendingLogits, function: Any, dim: int, start: int, length: int) -> Any:
    if isinstance(start, Tensor) or start < 0:
        return NotImplemented
    return indexed(known, function, (*[_EVERYTHING] * _axis(known, dim), slice(start, start + length)))


def converted(known: PendingLogits, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Another dtype, or the same logits in memory of their own."""
    like = function(torch.empty((0,), dtype=known.dtype, device=known.hidden.device), *args, **kwargs)
    if not isinstance(like, Tensor) or like.device != known.hidden.device or not like.is_floating_point():
        return NotImplemented
    if like.dtype is known.dtype:
        return known
    return known.then(Cast(like.dtype), like.dtype)


def detached(known: PendingLogits, _: Any) -> Any:
    return known.detached()


def each_entry(known: PendingLogits, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A product with a number, a tanh: the same for every entry."""
    if kwargs or any(not isinstance(arg, (int, float)) for arg in args):
        return NotImplemented
    return known.then(lambda logits: function(logits, *args), known.dtype)


def log_softmax(
    known: PendingLogits, _: Any, dim: int | None = None, *stacklevel: Any, dtype: torch.dtype | None = None, **__: Any
) -> Any:
    if dim is None or _axis(known, dim) != known.class_axis or any(isinstance(s, torch.dtype) for s in stacklevel):
        return NotImplemented
    autocast = Autocast.now([known.hidden.device.type])

    def step(logits: Tensor) -> Tensor:
        with autocast.entered():
            return torch.log_softmax(logits, -1, dtype=dtype)

    return known.then(step, step(torch.empty((1, 1), dtype=known.dtype, device=known.hidden.device)).dtype)


def argmax(known: PendingLogits, _: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The likeliest classes, int64, a few positions at a time."""
    if dim is None or _axis(known, dim) != known.class_axis:
        return NotImplemented
    rows, logits = known.hidden.detach().reshape(-1, known.hidden.shape[-1]), known.logits.detached()
    with torch.no_grad():
        parts = torch.split(rows, known.rows)
        found = torch.cat([logits.of(part).argmax(-1) for part in parts]).view(known.positions)
    return found.unsqueeze(known.class_axis) if keepdim else found


def cross_entropy(
    known: PendingLogits,
    _: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    likelihood = functools.partial(
        F.cross_entropy, weight=weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if size_average is not None or reduce is not None:
        return NotImplemented
    smoothing = label_smoothing if weight is None else None
    return _loss(known, likelihood, target, weight, ignore_index, reduction, smoothing)


def nll_loss(
    known: PendingLogits,
    _: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    likelihood = functools.partial(F.nll_loss, weight=weight, ignore_index=ignore_index, reduction="none")
    if size_average is not None or reduce is not None:
        return NotImplemented
    return _loss(known, likelihood, target, weight, ignore_index, reduction)


def _loss(
    known: PendingLogits,
    likelihood: Likelihood,
    target: Any,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float | None = None,
) -> Any:
    classes_second = known.class_axis == min(1, len(known.positions))
    # Targets that are probabilities have a float for every logit: they are as large as the logits are.
    if not isinstance(target, Tensor) or target.is_floating_point() or not classes_second:
        return NotImplemented
    if target.shape != known.positions or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    if weight is not None and weight.requires_grad:
        return NotImplemented
    loss = HeadLoss(
        logits=known.logits,
        likelihood=likelihood,
        autocast=Autocast.now([known.hidden.device.type]),
        rows=known.rows,
        reduction=reduction,  # type: ignore[arg-type]  # checked above
        class_weight=weight,
        ignore_index=ignore_index,
        of_chunk=known.losses,
        smoothing=smoothing,
    )
    known.uses.note_loss(target.numel())
    found = loss(known.hidden.reshape(-1, known.hidden.shape[-1]), target.reshape(-1))
    return found.view(target.shape) if reduction == "none" else found


def _axis(known: PendingLogits, dim: int) -> int:
    return dim + len(known.shape) if dim < 0 else dim


# Questions about logits that need none of their numbers.
LOOKS = frozenset(
    "shape dtype device layout ndim requires_grad is_cuda is_cpu is_sparse is_quantized is_meta is_nested names size "
    "dim numel nelement ndimension is_floating_point is_complex element_size itemsize nbytes __len__ is_contiguous "
    "grad_fn is_leaf".split()
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"], reshaped),
    **dict.fromkeys(["transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "T", "mT"], reordered),
    "__getitem__": indexed,
    "select": selected,
    "narrow": narrowed,
    **dict.fromkeys(["to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone"], converted),
    "detach": detached,
    **dict.fromkeys(["mul", "div", "true_divide", "__mul__", "__rmul__", "__truediv__", "tanh"], each_entry),
    "log_softmax": log_softmax,
    "argmax": argmax,
    "cross_entropy": cross_entropy,
    "nll_loss": nll_loss,
}
