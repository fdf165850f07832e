"""Totals delivered in one backward: each parameter's hooks fire once, and DDP's reducer is armed once.

``torch.autograd.backward(parameters, totals)`` fires tensor hooks once but skips DDP's reducer, which is armed in
``ddp.forward``. So one node stands for the whole step; under DDP it goes through ``ddp.forward`` in place of the
module and holds only parameters that received a gradient, as the plain step's graph would.

1. The node gives up its totals while it runs; otherwise ``AccumulateGrad`` would clone them, a parameter size more.
2. ``.grad`` is untouched until here, and what stood there is added to, as ``backward()`` does.
3. What else ``ddp.forward`` does first, it does before the chunks: they are to see the first rank's buffers, and a rank
   that runs whole beside one that is split is to find the same collectives in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from samegrad.exact.phases import announce
from samegrad.exact.ranks import Agreement
from samegrad.records import Phase


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, totals: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.totals = totals
        # A plain tensor, also of sharded parameters; backward begins at real numbers only.
        return torch.zeros((), dtype=parameters[0].dtype.to_real(), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        # rule 1
        totals = tuple(ctx.totals)
        ctx.totals.clear()
        return (None, *totals)


class _Stub(nn.Module):
    """Stands where the network stood while ``ddp.forward`` runs; holds no parameters of its own."""

    def __init__(self, totals: list[Tensor], parameters: Sequence[Tensor]) -> None:
        super().__init__()
        # autograd.Function.apply carries no types.
        apply: Callable[..., Tensor] = cast(Any, _Deliver).apply
        self._call: Callable[[], Tensor] = lambda: apply(totals, *parameters)

    def forward(self, _: None = None) -> Tensor:
        return self._call()


def begin_step(model: nn.Module) -> None:
    """What ``ddp.forward`` does before the network runs: the first rank's buffers on every rank, if it sends them."""
    if isinstance(model, DistributedDataParallel):
        # torch has no types here.
        ddp: Any = model
        # rule 3: after the first backward, ranks agree on buckets before they send buffers.
        ddp.reducer._rebuild_buckets()
        if ddp._check_sync_bufs_pre_fwd():
            ddp._sync_buffers()


def hand_over(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    totals: list[Tensor | None],
    agreement: Agreement | None = None,
) -> None:
    """Adds ``totals[i]`` to ``parameters[i].grad`` through one backward. ``totals`` is emptied.

    ``agreement``: the other ranks, all of which are to be ready first; raises where one of them failed.

    Parameters whose total is None keep ``.grad`` as it is. ``model`` may be a DistributedDataParallel: then the
    gradients are reduced over the ranks exactly once. Should it raise, it is taken back where nothing but new ``.grad``
    can have come of it (``can_be_taken_back``).
    """
    if agreement is not None:
        agreement.ready()
    announce(Phase.HANDOFF)
    reached = [p for p, total in zip(parameters, totals) if total is not None]
    given = [total for total in totals if total is not None]
    totals.clear()
    if not reached:
        return
    stub = _Stub(given, reached)
    del given
    with torch.enable_grad():
        root = _through_reducer(model, stub) if isinstance(model, DistributedDataParallel) else stub()
    del stub
    undoes = can_be_taken_back(model, reached)
    try:
        # What a shared leaf came from is behind it, and runs as after the user's autocast block.
        with torch.autocast(root.device.type, enabled=False):
            root.backward()
    except BaseException:
        if undoes:
            for parameter in reached:
                parameter.grad = None
        raise


def can_be_taken_back(model: nn.Module, parameters: Sequence[Tensor]) -> bool:
    """Whether handing gradients to ``parameters`` only makes new ``.grad``: nothing is added to, hooked or reduced."""
    return not isinstance(model, DistributedDataParallel) and all(
        p.is_leaf and p.grad is None and not has_hooks(p) for p in parameters
    )


def has_hooks(leaf: Tensor) -> bool:
    return bool(leaf._backward_hooks or post_accumulate_hooks(leaf))


def post_accumulate_hooks(leaf: Tensor) -> Any:
    # Absent until the first one is registered.
    return getattr(leaf, "_post_accumulate_grad_hooks", None)


def _through_reducer(ddp: DistributedDataParallel, stub: _Stub) -> Tensor:
    if cast(Any, ddp)._check_sync_bufs_pre_fwd():
        # They came before the chunks; what is in them since is this rank's own. ddp.forward sets the flag again.
        ddp.require_forward_param_sync = False
    network = ddp._modules["module"]
    ddp._modules["module"] = stub
    try:
        # With device_ids, ddp.forward moves its first input and fails when there is none.
        return cast(Tensor, ddp(None))
    finally:
        ddp._modules["module"] = network


@contextlib.contextmanager
def gradients_apart(leaves: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
    """A block whose backward leaves the gradients of ``leaves`` in the list, and ``.grad`` and hooks unaware of it."""
    before = [leaf.grad for leaf in leaves]
    post = [(leaf, hooks) for leaf in leaves if (hooks := post_accumulate_hooks(leaf))]
    found: list[Tensor | None] = []
    try:
        for leaf in leaves:
            leaf.grad = None
        for leaf, _ in post:
            # None would leave them in force.
            cast(Any, leaf)._post_accumulate_grad_hooks = {}
        with hooks_silenced([leaf for leaf in leaves if leaf._backward_hooks]):
            yield found
        found += [leaf.grad for leaf in leaves]
    finally:
        for leaf, hooks in post:
            cast(Any, leaf)._post_accumulate_grad_hooks = hooks
        for leaf, gradient in zip(leaves, before):
            leaf.grad = gradient


@contextlib.contextmanager
def hooks_silenced(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Tensor hooks of ``leaves`` set aside: a partial gradient is being taken, the total will fire them."""
    hooks = [leaf._backward_hooks for leaf in leaves]
    try:
        for leaf in leaves:
            leaf._backward_hooks = None
        yield
    finally:
        for leaf, hook in zip(leaves, hooks):
            leaf._backward_hooks = hook
