"""What a plan that narrows the dtype is compared with: the plain step under the same autocast.

A narrower dtype is the same function rounded otherwise, so such a plan is never the declared step. What it must be is
the plain step under that autocast, written here with torch alone: the lever's own code is on one side only.
In float64 autocast narrows nothing, so there both are the declared step, and the logic is proven as ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep, Within
from samegrad.exact.replaced_forward import forward_replaced
from samegrad.levers import levers_of
from samegrad.levers.autocast import Autocast
from samegrad.records import Plan


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What a plan narrows: ``dtype`` None for nothing. Submodules ``full_precision`` stay in float32."""

    dtype: torch.dtype | None = None
    full_precision: tuple[str, ...] = ()

    @classmethod
    def of(cls, plan: Plan) -> Rounding:
        for lever in levers_of(plan):
            if isinstance(lever, Autocast):
                return cls(getattr(torch, lever.dtype), tuple(lever.full_precision))
        return cls()

    @property
    def plain_step(self) -> str:
        """The plain step that is compared with, in words."""
        if self.dtype is None:
            return "the plain step"
        kept = f" but for {', '.join(self.full_precision)}" if self.full_precision else ""
        return f"the plain step under autocast in {str(self.dtype).removeprefix('torch.')}{kept}"

    @contextlib.contextmanager
    def block(self, device_type: str, *_: Any) -> Iterator[None]:
        """A block in which torch rounds as the plan does."""
        if self.dtype is None:
            yield
            return
        with torch.autocast(device_type, dtype=self.dtype):
            yield

    @contextlib.contextmanager
    def applied(self, declared: DeclaredStep) -> Iterator[DeclaredStep]:
        """The declared step, whose plain call is the reference."""
        if self.dtype is None:
            yield declared
            return
        narrow = functools.partial(self.block, declared.device.type)
        with contextlib.ExitStack() as stack:
            for path in self.full_precision:
                part = declared.network.get_submodule(path)
                wide = functools.partial(_in_float32, declared.device.type, self.dtype, part.forward)
                stack.enter_context(forward_replaced(part, wide))
            yield dataclasses.replace(
                declared, forward=Within(declared.forward, narrow), loss_fn=Within(declared.loss_fn, narrow)
            )


def _in_float32(
    device_type: str, narrow: torch.dtype, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    def widened(leaf: Tensor) -> Tensor:
        return leaf.float() if leaf.dtype is narrow else leaf

    with torch.autocast(device_type, enabled=False):
        return forward(*trees.map_tensors(args, widened), **trees.map_tensors(kwargs, widened))
