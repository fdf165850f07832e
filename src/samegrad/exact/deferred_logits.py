"""Logits that do not exist yet, as a tensor: it looks like the head's output and remembers what is done to it.

A cross-entropy or a likelihood of it runs in chunks (``chunked_head.py``), and so does an argmax. An operation without
a rule (``logit_rules.py``) gets the whole logits, as the plain step makes them, and its name is noted.

What torch's own code sees has a ``grad_fn`` that refuses: a gradient that arrived there would otherwise be lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from samegrad.errors import CannotSplit, EnvironmentProblem
from samegrad.exact.chunk_map import Autocast
from samegrad.exact.logit_rows import LogitRows
from samegrad.exact.logit_rules import LOOKS, RULES
from samegrad.exact.pending_logits import PendingLogits, Uses
from samegrad.exact.replaced_forward import forward_replaced


@contextlib.contextmanager
def deferred_head(head: nn.Linear, *, rows: int, uses: Uses) -> Iterator[None]:
    """Calls of ``head`` give deferred logits, to be made ``rows`` positions at a time; without a graph, its logits."""

    def forward(hidden: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return nn.Linear.forward(head, hidden)
        uses.calls += 1
        autocast = Autocast.now([hidden.device.type])
        dtype = autocast.cast(hidden.detach()[..., :0]).dtype
        logits = LogitRows(head.weight, head.bias, autocast)
        return deferred(PendingLogits(hidden, logits, hidden.dim() - 1, dtype, rows, uses))

    with forward_replaced(head, forward):
        yield


def deferred(logits: PendingLogits) -> DeferredLogits:
    """``logits`` as a tensor; without a graph where gradients are switched off."""
    known = logits if torch.is_grad_enabled() else logits.detached()
    # autograd.Function.apply carries no types.
    tensor = cast(Any, _Stand).apply(known, known.hidden, known.logits.weight, known.logits.bias)
    if not isinstance(tensor, DeferredLogits):
        raise EnvironmentProblem(
            asked="logits that are made chunk by chunk",
            found=f"torch {torch.__version__} does not keep the class of a tensor that an autograd function returns",
            do="leave the lever chunk_loss out of the plan, or take a torch from 2.11 to 2.15",
        )
    tensor.pending = known
    return tensor


class DeferredLogits(Tensor):
    """Shape, dtype and device of logits without their memory."""

    pending: PendingLogits

    def check(self) -> None:
        """Raises CannotSplit where these logits are no longer what is known of them."""
        self.pending.uses.check_unchanged()
        with torch._C.DisableTorchFunctionSubclass():
            origin = self.grad_fn
        if origin is not None and origin.name() != _Stand.__name__ + "Backward":
            raise _refused(f"an autograd function ({origin.name()})")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        if name in LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        subject = args[0] if args else kwargs.get("input")
        if name in RULES and isinstance(subject, DeferredLogits):
            subject.check()
            rest = {key: value for key, value in kwargs.items() if args or key != "input"}
            found = RULES[name](subject.pending, func, *args[1:], **rest)
            if found is not NotImplemented:
                return deferred(found) if isinstance(found, PendingLogits) else found
        return func(*_whole(args, name), **_whole(kwargs, name))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as the function that switches it off
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise _refused(str(func))


class _Stand(torch.autograd.Function):
    """A tensor without memory in the place of logits."""

    @staticmethod
    def forward(ctx: Any, known: PendingLogits, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # torch has no types here.
        make = cast(Any, Tensor)._make_wrapper_subclass
        # A trace names the device that it stands for, which need not be there.
        device = hidden.untyped_storage().device
        return cast(Tensor, make(DeferredLogits, known.shape, dtype=known.dtype, device=device))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _refused("an autograd function")


def _refused(operation: str) -> CannotSplit:
    return CannotSplit(
        asked="logits that are made chunk by chunk",
        found=f"{operation} takes them past where samegrad could give it the whole logits",
        do="leave the lever chunk_loss out of the plan",
    )


def _name_of(function: Any) -> str:
    """``view`` for a method, ``shape`` for the getter of a property."""
    name: str = getattr(function, "__name__", str(function))
    return function.__self__.__name__ if name == "__get__" else name


def _whole(argument: Any, operation: str) -> Any:
    """``argument`` with the whole logits where deferred ones stand in it."""
    if isinstance(argument, DeferredLogits):
        argument.check()
        return argument.pending.whole(operation)
    if type(argument) in (list, tuple):
        return type(argument)(_whole(part, operation) for part in argument)
    if type(argument) is dict:
        return {key: _whole(part, operation) for key, part in argument.items()}
    return argument
