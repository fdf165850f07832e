"""A stretch of a forward that keeps only what enters it, and runs again when backward asks for what it did not keep.

    region = Region()
    x = region.run(RegionCall("layer.0", first), (x,), {}, {})
    x = region.run(RegionCall("layer.1", second), (x,), {}, {id(x): 0})

Calls of one region may lie anywhere in the model's own code. A tensor that a call hands over to the next one is made
again; every other tensor that enters is kept. So code between the calls may do what it likes: it is not run again, and
its results are inputs. This is how torch.utils.checkpoint works inside (its non-reentrant form), for calls that stand
apart. Autograd's graph is that of the first run; only what it saved is recomputed.

1. What enters is saved as autograd saves tensors: hooks that move saved tensors see it, and changing it in place
   before backward is an error.
2. It is saved without its graph: what was computed from a region's own outputs would keep the region alive for ever.
3. The second run ends as soon as it made what is still asked for: the last product of a block is not computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from samegrad import trees
from samegrad.errors import CannotSplit
from samegrad.exact.phases import listener_now

_LEAVE_OUT = "leave that part out of the blocks to recompute"
# What torch says where a transform of torch.func meets hooks on saved tensors, or a node of ours.
_TRANSFORMED = ("saved tensor hooks", "functorch")


class Saved:
    """What autograd holds in place of a tensor: ``value`` is there between the second run and its use."""

    __slots__ = ("__weakref__", "region", "value", "version")

    def __init__(self, region: Region) -> None:
        self.region = region
        self.value: Tensor | None = None
        self.version = 0

    def filled(self, value: Tensor) -> None:
        self.value, self.version = value.detach(), value._version

    def taken(self) -> Tensor:
        """The tensor, given up: a graph that is kept and used again makes it again."""
        if self.value is None:
            self.region.run_again()
        value, self.value = self.value, None
        assert value is not None
        if value._version != self.version:
            raise CannotSplit(
                asked=f"run {self.region.names} again in backward",
                found="a tensor that its gradient needs is changed in place later on",
                do=f"use an operation that is not in place, or {_LEAVE_OUT}",
            )
        return value


class _Kept(torch.autograd.Function):
    """A node that only saves tensors, as any node of the model would (rule 1)."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise AssertionError("nothing depends on this node")


@dataclasses.dataclass(frozen=True)
class _Handed:
    """An input that is output ``leaf`` of the call before."""

    leaf: int


@dataclasses.dataclass(frozen=True)
class _FromOutside:
    """An input that is saved, as number ``place`` of its call."""

    place: int
    requires_grad: bool


@dataclasses.dataclass(frozen=True)
class RegionCall:
    """One call of ``function`` in a region.

    ``as_it_was``: a block in which all that the function reads is as it was when it first ran. ``drawing``: one in
    which it makes the draws that it made then.
    """

    name: str
    function: Callable[..., Any]
    as_it_was: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    drawing: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


class _Bound:
    """A call and the arguments it had."""

    def __init__(
        self, call: RegionCall, args: Sequence[Any], kwargs: Mapping[str, Any], handed: Mapping[int, int]
    ) -> None:
        self.call = call
        leaves, self._spec = trees.flatten((tuple(args), dict(kwargs)))
        self._leaves: list[Any] = []
        # The node's output: by itself what Python sees of a node does not keep it alive in torch 2.11.
        self._keeper: Tensor | None = None
        outside: list[Tensor] = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                self._leaves.append(leaf)
            elif id(leaf) in handed:
                self._leaves.append(_Handed(handed[id(leaf)]))
            else:
                self._leaves.append(_FromOutside(len(outside), leaf.requires_grad))
                outside.append(leaf.detach())  # rule 2
        if outside:
            anchor = torch.empty(0, device=outside[0].device, requires_grad=True)
            self._keeper = _Kept.apply(anchor, *outside)  # type: ignore[no-untyped-call]  # torch has no types here

    def run_again(self, handed: Sequence[Any]) -> list[Any]:
        """The leaves that the call returns; ``handed``: those of the call before."""
        outside = self._outside()
        leaves = [
            handed[leaf.leaf] if isinstance(leaf, _Handed)
            else outside[leaf.place] if isinstance(leaf, _FromOutside)
            else leaf
            for leaf in self._leaves
        ]  # fmt: skip
        args, kwargs = trees.unflatten(leaves, self._spec)
        # Draws know this frame as the one that runs all of the block again.
        with self.call.as_it_was(), self.call.drawing():
            return trees.leaves_of(self.call.function(*args, **kwargs))

    def _outside(self) -> list[Tensor]:
        if self._keeper is None:
            return []
        try:
            kept = cast(Any, self._keeper.grad_fn).saved_tensors
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise CannotSplit(
                asked=f"run {self.call.name} again in backward",
                found="what entered it was changed in place, by it or after it",
                do="use an operation that is not in place (inplace=False), recompute it as one run with the block "
                f"before it, or {_LEAVE_OUT}",
            ) from error
        wanted = [leaf.requires_grad for leaf in self._leaves if isinstance(leaf, _FromOutside)]
        # Autocast would keep the casts of leaves of a graph.
        return [t.detach().requires_grad_().view_as(t) if grad else t for t, grad in zip(kept, wanted, strict=True)]


_Look = tuple[torch.Size, torch.dtype, torch.device]


def _look(tensor: Tensor) -> _Look:
    """What a saved tensor shows from outside."""
    return tensor.shape, tensor.dtype, tensor.device


class _Complete(BaseException):
    """Ends a second run that made all that was asked for. Models catch exceptions; this is none of theirs."""


class Region:
    """Calls of one forward, one after another, which keep only what enters them from outside."""

    def __init__(self) -> None:
        self._calls: list[_Bound] = []
        self._saved: list[tuple[weakref.ref[Saved], _Look]] = []
        self._running = False
        # Backward may run in another thread, where it is not set.
        self._listener = listener_now()

    @property
    def names(self) -> str:
        return " to ".join(dict.fromkeys([self._calls[0].call.name, self._calls[-1].call.name]))

    def run(
        self, call: RegionCall, args: Sequence[Any], kwargs: Mapping[str, Any], handed: Mapping[int, int]
    ) -> Any:
        """What ``call`` returns for these arguments; nothing inside it is kept.

        ``handed``: the place of a tensor among the leaves that the call before returned, by its id.
        """
        self._running = True
        try:
            self._calls.append(_Bound(call, args, kwargs, handed))
            with saved_tensors_hooks(self._pack, Saved.taken):
                return call.function(*args, **kwargs)
        except RuntimeError as error:
            if not any(words in str(error) for words in _TRANSFORMED):
                raise
            raise CannotSplit(
                asked=f"run {call.name} again in backward",
                found="it meets a transform of torch.func, which lets no tensor be saved in another way",
                do=_LEAVE_OUT,
            ) from error
        finally:
            self._running = False

    def _pack(self, tensor: Tensor) -> Saved:
        saved = Saved(self)
        self._saved.append((weakref.ref(saved), _look(tensor)))
        return saved

    def run_again(self) -> None:
        """Fills what is still held of the region."""
        if self._running:
            raise CannotSplit(
                asked=f"run {self.names} again in backward",
                found="it asks for gradients inside its own forward",
                do=_LEAVE_OUT,
            )
        again = _SecondRun(self.names, self._saved)
        heard = contextlib.nullcontext() if self._listener is None else self._listener.running_again()
        with heard, torch.enable_grad(), saved_tensors_hooks(again.pack, _itself):
            try:
                handed: list[Any] = []
                for bound in self._calls:
                    handed = bound.run_again(handed)
            except _Complete:
                return
        again.refuse("it saved fewer tensors")


class _SecondRun:
    """Hands the tensors that a second run saves to those who wait for them, in the order of the first run."""

    def __init__(self, names: str, saved: Sequence[tuple[weakref.ref[Saved], _Look]]) -> None:
        self._names, self._saved = names, saved
        self._last = max(index for index, (reference, _) in enumerate(saved) if reference() is not None)
        self._next = 0

    def pack(self, tensor: Tensor) -> Tensor:
        reference, look = self._saved[self._next]
        if look != _look(tensor):
            self.refuse(f"tensor {self._next} that it saved was {look} and is {_look(tensor)}")
        waiting = reference()
        if waiting is not None:
            waiting.filled(tensor)
        if self._next == self._last:
            raise _Complete  # rule 3
        self._next += 1
        return tensor.detach()

    def refuse(self, found: str) -> NoReturn:
        raise CannotSplit(
            asked=f"run {self._names} again in backward as it ran in forward",
            found=found,
            do=f"look for state, switches or caches that the part reads or writes, or {_LEAVE_OUT}",
        )


def _itself(tensor: Tensor) -> Tensor:
    return tensor
