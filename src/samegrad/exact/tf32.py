"""Where products of float32 numbers are rounded to TF32 on CUDA, as torch is told now.

Told by ``fp32_precision``: reading the older ``allow_tf32`` raises where a user sets the newer one.
Source: PyTorch documentation, "CUDA semantics", TensorFloat-32.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Self, cast

import torch


@dataclasses.dataclass(frozen=True)
class Tf32Products:
    """Which products are: of matrices, in convolutions, in recurrent layers."""

    matrices: bool
    convolutions: bool
    recurrences: bool

    @classmethod
    def now(cls) -> Self:
        return cls(*(_in_use(place) == "tf32" for place in _places()))

    @property
    def any(self) -> bool:
        return self.matrices or self.convolutions or self.recurrences


@contextlib.contextmanager
def products_in_float32() -> Iterator[None]:
    """A block in which none is; afterwards all settings are what they were. They are the process's."""
    if not Tf32Products.now().any:
        yield
        return
    before = [place.fp32_precision for place in _places()]
    with contextlib.ExitStack() as stack:
        # In this order on the way out too: the older setters write the newer settings.
        stack.callback(_set, before)
        _turn_off_older(stack)
        _set(["ieee"] * len(before))
        yield


def _turn_off_older(stack: contextlib.ExitStack) -> None:
    """The older settings are off as well, where they say the same as the newer: code inside may read either."""
    with contextlib.suppress(RuntimeError):
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, precision)
    with contextlib.suppress(RuntimeError):
        allowed = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        stack.callback(setattr, torch.backends.cudnn, "allow_tf32", allowed)


def _set(precisions: list[str]) -> None:
    for place, precision in zip(_places(), precisions):
        place.fp32_precision = precision


def _places() -> tuple[Any, Any, Any]:
    # These settings are properties of modules, which torch does not type.
    backends = cast(Any, torch.backends)
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn


def _in_use(place: Any) -> str:
    # "none" leaves the choice to the setting for all backends.
    return str(cast(Any, torch.backends).fp32_precision if place.fp32_precision == "none" else place.fp32_precision)
