"""One draw after the other, each keyed by (step key, stream, call, sample id, element).

``Draws`` counts the calls of one run and knows whose rows are drawn for; ``Draw`` is one of them and gives its words
as masks, whole numbers or numbers of a distribution.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import torch
import torch.utils.checkpoint
from torch import Tensor

from samegrad.exact import keyed_direct, philox
from samegrad.exact.draw_sites import Sites, refused

# How many random bits a uniform number of a dtype has: all of them are numbers below one.
_UNIFORM_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
# What the frames of torch's checkpoint are known by.
_CHECKPOINT = torch.utils.checkpoint.CheckpointFunction.forward.__code__.co_filename


class StepKey:
    """One int64 of torch's default CPU generator, taken when a draw first needs it and the same from then on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._on: dict[torch.device, Tensor] = {}

    @classmethod
    def fixed(cls, value: int) -> StepKey:
        """A key that is taken from no generator, for trials."""
        key = cls()
        key._on[torch.device("cpu")] = torch.tensor(value, dtype=torch.int64)
        return key

    def take(self) -> None:
        """Takes it now, so that whatever advances a generator afterwards is something else."""
        self.tensor(torch.device("cpu"))

    @property
    def taken(self) -> bool:
        return bool(self._on)

    def tensor(self, device: torch.device) -> Tensor:
        """() int64 on ``device``."""
        with self._lock, torch._C.DisableTorchFunction():
            host = torch.device("cpu")
            if host not in self._on:
                self._on[host] = torch.empty((), dtype=torch.int64, device=host).random_()
            if device not in self._on:
                self._on[device] = self._on[host].to(device)
            return self._on[device]


def caller_id(levels: int) -> int:
    """Identity of the frame ``levels`` above the caller's, for as long as that frame runs. Compilers see no frames."""
    return 0 if torch.compiler.is_compiling() else id(sys._getframe(levels + 1))


class Draws:
    """The draws of one run on rows ``ids`` (n,) int64, counted from 0. ``stream``: 0 to 255.

    ``entered_from`` is the ``caller_id`` of whoever runs the block, and runs all of it when it runs it again.
    """

    def __init__(self, key: StepKey | Tensor, ids: Tensor, sites: Sites, stream: int, entered_from: int) -> None:
        if not 0 <= stream <= philox.LARGEST_STREAM:
            raise ValueError(f"stream is 0 to {philox.LARGEST_STREAM}, not {stream}")
        self._key, self.ids, self.sites, self._stream = key, ids, sites, stream
        self._rows = ids.shape[0]
        self._entered_from = entered_from
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.calls = 0

    def next(self, function: str, shape: Sequence[int], device: torch.device) -> Draw:
        """The next draw: of ``shape``, made by ``function``. Raises CannotSplit where its rows cannot be told."""
        sizes = tuple(shape)
        compiling = torch.compiler.is_compiling()
        if not compiling and _runs_again_alone(self._entered_from):
            raise refused(
                f"{function} (in torch.utils.checkpoint)",
                f"draws {sizes}: when that part runs again in backward it would draw something else",
                "take the checkpoint out of the model: chunks save memory in its place",
            )
        place = self.sites.place(self.calls, function, sizes, self._rows)
        key, ids = self._brought(device) if compiling else self._there(device)
        if place is None:
            ids = torch.full((1,), philox.WHOLE_BATCH, dtype=torch.int64, device=device)
            before, inner = 1, math.prod(sizes)
        else:
            before, inner = math.prod(sizes[: place.axis]), place.multiple * math.prod(sizes[place.axis + 1 :])
        call = self.calls
        self.calls = call + 1
        return Draw(sizes, (key, ids, self._stream, call, before, inner))

    def _there(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Key and ids on ``device``, brought there once."""
        found = self._on.get(device)
        if found is None:
            found = self._on[device] = self._brought(device)
        return found

    def _brought(self, device: torch.device) -> tuple[Tensor, Tensor]:
        key = self._key.tensor(device) if isinstance(self._key, StepKey) else self._key.to(device)
        return key, self.ids.to(device)


class Draw:
    """One draw. Tensors it gives are contiguous, of ``shape``, on the device it was asked for."""

    def __init__(self, shape: tuple[int, ...], where: keyed_direct.Where) -> None:
        self._shape = shape
        self._where = where

    def words(self, plane: int = 0) -> Tensor:
        """int64 in [0, 2**32)."""
        return keyed_direct.operation("words", self._where[1])(*self._where, plane).view(self._shape)

    def keep(self, drop: float) -> Tensor:
        """bool, False with probability ``drop``."""
        return keyed_direct.operation("keep", self._where[1])(*self._where, drop).view(self._shape)

    def dropout(self, values: Tensor, drop: float) -> tuple[Tensor, Tensor]:
        """``values`` (of this draw's shape) kept and divided by ``1 - drop``, or zero; and the mask."""
        return keyed_direct.dropout(values, self._where, drop)

    def uniform(self, dtype: torch.dtype) -> Tensor:
        """Numbers in [0, 1), as many bits as the dtype holds."""
        bits = _UNIFORM_BITS[dtype]
        if bits > philox.WORD_BITS:
            return self.numbers("uniform", dtype)
        return (self.words() >> (philox.WORD_BITS - bits)).to(dtype) * 2.0**-bits

    def numbers(self, distribution: str, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """Numbers of a distribution of ``keyed_ops``, computed in float64 and rounded once."""
        make = keyed_direct.operation("numbers", self._where[1])
        return make(*self._where, distribution, float(scale), float(shift), dtype).view(self._shape)

    def integers(self, low: int, high: int) -> Tensor:
        """int64 in [low, high)."""
        span = high - low
        if span <= 2**31:
            return ((self.words() * span) >> philox.WORD_BITS) + low
        if span > 2**63:
            raise refused("torch.Tensor.random_", f"draws from {span} whole numbers, more than 63 bits name")
        wide = (self.words() << 31) | (self.words(plane=1) >> 1)
        return (wide % span if span < 2**63 else wide) + low


def _runs_again_alone(entered_from: int) -> bool:
    """Whether a checkpoint lies between here and who entered the block: it would run this again without the block."""
    frame = sys._getframe(2)
    while frame is not None and id(frame) != entered_from:
        if frame.f_code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
