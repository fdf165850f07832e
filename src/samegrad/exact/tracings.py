"""Stages made so far, for calls that look the same on a network that looks the same."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.exact.replaced_forward import has_own_forward
from samegrad.exact.stage_tracing import has_hooks, trace_stages
from samegrad.exact.stages import Stages, is_rows

_PLAIN = (int, float, str, bool, type(None))


class Tracings:
    """A network is recorded once for each kind of call. Whoever keeps this keeps the stages over many steps.

    What the recorded code may branch on is compared at every call: modes, modules, their plain attributes, and the
    arguments that are no tensors; and whether a module has hooks or another forward, which a recording cannot show.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Stages] = {}

    @staticmethod
    def kept_for(network: nn.Module) -> Tracings:
        """Those of ``network``, as long as it lives: a plan's levers are made anew in every step."""
        return _kept.setdefault(network, Tracings())

    def stages_of(
        self, network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, rows: int, together: int = 1
    ) -> Stages:
        """Raises Untraceable, as ``trace_stages`` does."""
        leaves, spec = trees.flatten((tuple(args), dict(kwargs)))
        key = (together, repr(spec), tuple(_kind(leaf, rows) for leaf in leaves), _looks(network))
        if key not in self._made:
            with _no_function_modes():
                self._made[key] = trace_stages(network, args, kwargs, rows=rows, together=together)
        return self._made[key]


_kept: weakref.WeakKeyDictionary[nn.Module, Tracings] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _no_function_modes() -> Iterator[None]:
    """What watches torch's functions for the caller, keyed draws say, sees no recording. torch has no public way."""
    with contextlib.ExitStack() as stack:
        while torch._C._len_torch_function_stack():
            stack.enter_context(torch.overrides._pop_mode_temporarily())
        yield


def _kind(leaf: Any, rows: int) -> Hashable:
    if isinstance(leaf, Tensor):
        return is_rows(leaf, rows), leaf.dim(), leaf.dtype
    # An object is taken for itself only: what is in it may have changed.
    return (type(leaf), repr(leaf)) if isinstance(leaf, _PLAIN) else object()


def _looks(network: nn.Module) -> Hashable:
    return tuple(
        (name, id(part), type(part), has_hooks(part), has_own_forward(part), _plain_attributes(part))
        for name, part in network.named_modules()
    )


def _plain_attributes(part: nn.Module) -> Hashable:
    return tuple((key, repr(value)) for key, value in vars(part).items() if _is_plain(value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) for part in value)
    if isinstance(value, dict):
        return all(_is_plain(part) for part in value.values())
    return isinstance(value, _PLAIN)
