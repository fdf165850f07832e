"""What a traced step did: its operations in order, and the memory each took and gave back.

A trace is data: the allocator's model replays its events, the roofline adds up its operations, and both can do so
from a file and without torch.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from samegrad.records import Category, Phase

# In place of an operation's index.
BEFORE_THE_STEPS = -1


class Convolution(NamedTuple):
    """The shape of a convolution, forward or backward, which decides what the library takes for itself.

    ``inputs``, ``outputs``: channels of what its forward reads and writes, ``input_pixels`` and ``output_pixels`` the
    places of one row in them, ``kernel_pixels`` those under the kernel. ``pointwise``: one place, stride 1, no padding.
    ``channels_last``: its tensors lie with channels innermost.
    """

    rows: int
    inputs: int
    outputs: int
    input_pixels: int
    output_pixels: int
    kernel_pixels: int
    groups: int = 1
    pointwise: bool = False
    channels_last: bool = False


class Recurrence(NamedTuple):
    """The shape of a recurrent layer stack, forward or backward.

    ``steps`` of ``rows`` with ``inputs`` features through ``layers`` of ``hidden`` cells with ``gates`` each (LSTM 4,
    GRU 3, plain 1), in ``directions``. ``drops``: whether it drops between layers. ``batch_first``: rows come before
    steps in what it reads and writes, which the library has the other way round.
    """

    steps: int
    rows: int
    inputs: int
    hidden: int
    layers: int
    gates: int
    directions: int = 1
    drops: bool = False
    batch_first: bool = False


class Operation(NamedTuple):
    """One operation of a step, as torch dispatched it.

    ``name``: as ``aten.addmm.default``. ``module``: path of the innermost submodule it ran for, "" for the step's own
    code; in backward the module whose forward it differentiates. ``step``: 0 for the first step, 1 for the second,
    which has the optimizer's state. ``moved_bytes``: read and written, each tensor once. ``dtype``: the one its
    arithmetic runs in, as "bfloat16". ``kernels``: how many launches it takes, 0 for views. ``shape``: of
    convolutions, recurrent layers and their backwards, where it is known. ``bus_bytes``: copied in place from the host
    to the device, or to the host (below 0).
    """

    name: str
    module: str
    phase: Phase
    step: int
    flops: int
    moved_bytes: int
    dtype: str
    kernels: int
    shape: Convolution | Recurrence | None = None
    bus_bytes: int = 0


class MemoryEvent(NamedTuple):
    """A storage taken (``change_bytes`` > 0) or given back (< 0), in bytes as asked for, not rounded.

    ``storage``: a number of its own for each storage of the trace. ``operation``: index of the operation during or
    after which it happened, ``BEFORE_THE_STEPS`` for what stands before the first. ``category``: what the storage was
    for in the end. ``stream``: 0 for the one that computes, others for copies beside it; ``pool``: 0 for the memory
    that all share, others for a captured graph's own.
    """

    storage: int
    change_bytes: int
    operation: int
    category: Category
    stream: int = 0
    pool: int = 0


@dataclasses.dataclass(frozen=True)
class Trace:
    """Two steps of a training step on ``batch_rows`` rows in chunks of ``sizes``, followed without running them.

    ``events`` begin with what lives between steps and the batch. ``device`` is the kind whose dispatch was followed,
    "cuda" or "cpu". ``notes``: what could not be followed, by module or operation, in words. ``pieces``: of storages
    that live between steps, those that came to the device in pieces and were then laid out as one: bytes of each.
    ``module_classes``: of modules that have only a number for a name, by path.
    """

    operations: tuple[Operation, ...]
    events: tuple[MemoryEvent, ...]
    device: str
    batch_rows: int
    sizes: tuple[int, ...]
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    pieces: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    module_classes: dict[str, str] = dataclasses.field(default_factory=dict)
