"""Forward and loss under torch.autocast: products and convolutions in bfloat16 or float16, weights stay as they are.

Saves: half of what those operations keep for backward; they are also faster where the device has units for them.
Costs: a narrow copy of each weight while a chunk runs, and rounding.
Why the gradient is the same: it is not, bit for bit; it is that of the same function, rounded to the narrower dtype.
So the lever is ROUNDED and taken only where the step allows it. Backward runs outside autocast, every operation in
the dtype of its forward; weights' gradients are added up in the weights' own dtype.
Refuses: steps that are under autocast already (it is part of the plain step then), models without float32 parameters,
and float16 without a scaler.
Source: Micikevicius et al. 2017, "Mixed Precision Training", arXiv:1710.03740; torch.amp.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep, Within
from samegrad.errors import BadInput, UsageError
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._parts import parts_called
from samegrad.records import Exactness, Footprint

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Autocast:
    """``dtype``: "bfloat16", or "float16" with a scaler. ``full_precision``: submodules that stay in float32."""

    dtype: str = "bfloat16"
    full_precision: list[str] = dataclasses.field(default_factory=list)

    name: ClassVar[str] = "autocast"
    slot: ClassVar[Slot] = Slot.PRECISION
    exactness: ClassVar[Exactness] = Exactness.ROUNDED

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise BadInput(
                asked=f"{self.name} with dtype={self.dtype!r}", found="no such dtype", do=f"use {' or '.join(_DTYPES)}"
            )

    @classmethod
    def unsuited(cls, declared: DeclaredStep) -> str | None:
        if torch.is_autocast_enabled(declared.device.type):
            return "the step runs under autocast already"
        if not any(p.dtype is torch.float32 for module in declared.modules for p in module.parameters()):
            return "no parameter is float32, and autocast narrows nothing else"
        return None

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        declared = execution.declared
        device_type = declared.device.type
        narrow = functools.partial(_narrowed, device_type, _DTYPES[self.dtype])
        wide = functools.partial(_in_full_precision, device_type)
        with parts_called(self.name, declared.network, self.full_precision, wide):
            changed = dataclasses.replace(
                declared, forward=Within(declared.forward, narrow), loss_fn=Within(declared.loss_fn, narrow)
            )
            yield dataclasses.replace(execution, declared=changed, needs_scaler=self.dtype == "float16")

    def knobs(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "full_precision": self.full_precision}


@contextlib.contextmanager
def _narrowed(device_type: str, dtype: torch.dtype, *_: Any) -> Iterator[None]:
    if torch.is_autocast_enabled(device_type):
        raise UsageError(
            asked="run the step under autocast, as its plan says",
            found=f"it is called inside a torch.autocast block of its own ({torch.get_autocast_dtype(device_type)})",
            do="call step.backward outside that block, or plan again inside it: it is part of the step then",
        )
    with torch.autocast(device_type, dtype=dtype):
        yield


def _in_full_precision(
    device_type: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``forward`` without autocast, on float32 of what autocast made narrow on the way here."""
    if not torch.is_autocast_enabled(device_type):
        return forward(*args, **kwargs)
    narrow = torch.get_autocast_dtype(device_type)

    def widened(leaf: Tensor) -> Tensor:
        return leaf.float() if leaf.dtype is narrow else leaf

    with torch.autocast(device_type, enabled=False):
        return forward(*trees.map_tensors(args, widened), **trees.map_tensors(kwargs, widened))
