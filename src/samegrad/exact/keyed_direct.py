"""The operations of ``keyed_ops`` called by themselves, where nothing looks on.

torch's way to an operation that is written in Python takes the host longer than a large dropout takes the device.
Compilers, transforms (functorch), dispatch modes and forward-mode differentiation must see the operation, so they get
torch's; what is computed is the same function either way, hence the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from samegrad.exact import keyed_ops

# key, ids, stream, call, before, inner: the first six arguments of every operation.
Where = tuple[Tensor, Tensor, int, int, int, int]
_C = cast(Any, torch._C)


def looked_on(tensor: Tensor) -> bool:
    """Whether anything but plain autograd follows what happens to ``tensor``."""
    return (
        torch.compiler.is_compiling()
        or (type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter)
        or _C._len_torch_dispatch_stack() > 0
        or _C._dispatch_tls_is_dispatch_key_included(_C.DispatchKey.PreDispatch)
        or _C._get_tracing_state() is not None
        or _transformed()
    )


def _transformed() -> bool:
    return _C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def operation(name: str, ids: Tensor) -> Callable[..., Tensor]:
    """What makes ``samegrad::keyed_<name>``, not differentiable, on the device of ``ids``."""
    if looked_on(ids) or not (ids.is_cuda or ids.is_cpu):
        return cast(Callable[..., Tensor], getattr(torch.ops.samegrad, f"keyed_{name}"))
    return keyed_ops.KERNELS[name][ids.is_cuda]


def dropout(values: Tensor, where: Where, drop: float) -> tuple[Tensor, Tensor]:
    """``samegrad::keyed_dropout``: values kept and divided by ``1 - drop``, or zero; and the mask, bool."""
    if looked_on(values) or not (values.is_cuda or values.is_cpu):
        if not torch.compiler.is_compiling() and _transformed():
            # torch's own products: an operation that is written in Python has no forward mode.
            keep = operation("keep", where[1])(*where, drop).view(values.shape)
            return values * keep * (1 / (1 - drop)), keep
        dropped: tuple[Tensor, Tensor] = torch.ops.samegrad.keyed_dropout(values, *where, drop)
        return dropped
    if values.requires_grad and torch.is_grad_enabled():
        return cast(tuple[Tensor, Tensor], _Dropout.apply(values, where, drop))  # type: ignore[no-untyped-call]
    return keyed_ops.DROPOUTS[values.is_cuda](values, *where, drop)


class _Dropout(torch.autograd.Function):
    """Saves the mask, a byte for each element, as torch's own does."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, where: Where, drop: float) -> tuple[Tensor, Tensor]:
        dropped, keep = keyed_ops.DROPOUTS[values.is_cuda](values, *where, drop)
        ctx.save_for_backward(keep)
        ctx.drop = drop
        # A cotangent for the mask would be zeros, as many as there are elements.
        ctx.set_materialize_grads(False)
        return dropped, keep

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, None, None]:
        (keep,) = ctx.saved_tensors
        cotangent = cotangents[0]
        return None if cotangent is None else keyed_ops.scaled(cotangent, keep, ctx.drop), None, None
