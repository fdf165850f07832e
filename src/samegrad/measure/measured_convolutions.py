"""Convolutions measured one by one on a card: what cuDNN took for each, and for the same layer with other rows.

Which kernel cuDNN chooses, and with it whether a tensor is copied and whether a sum is split, depends on the channels
and on how many places are written, by no rule that was found for all; ``convolution_workspaces`` holds those there are.

A layer that was measured takes what it took. For another number of rows the one is read that wrote the number of places
nearest to its own: what that took is so many copies of what it reads, of what it writes and of its weight, and a rest;
the layer takes as many copies of its own, and the same rest. Where rows were left out to see, that was right more often
than the rules for some passes, and no more often for the others (``benchmarks/convolutions_gpu.py``).
"""

from __future__ import annotations

import csv
import enum
import functools
import itertools
import math
from collections.abc import Container, Iterable
from pathlib import Path
from typing import NamedTuple

from samegrad.measure.events import Convolution

FOLDER = Path(__file__).parent / "calibration"
_FILES = {(9, 0): "convolutions_h100.csv"}
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
# Channels that do not fill so many bytes are padded in copies, which are then no multiple of what is copied.
_FILLED_BYTES = 16
# Whether there is a copy of what is read, of what is written, of the weight.
_COPIES = tuple(itertools.product((0, 1), repeat=3))


class Pass(enum.IntEnum):
    """One kernel of a convolution, in the order of a layer's columns."""

    FORWARD = 0
    INPUT_GRADIENT = 1
    WEIGHT_GRADIENT = 2


# By the bytes of an element, those that are read across to other rows.
_READ_ACROSS = frozenset(((4, Pass.FORWARD), (4, Pass.INPUT_GRADIENT)))


class Layer(NamedTuple):
    """A convolution of ``rows`` squares of ``side`` places, padded to keep their size, and what each pass took.

    The columns of the files in ``calibration``. ``dtype``: "float32" (TF32 allowed) or "bfloat16", float16's as well.
    """

    dtype: str
    kernel: int
    stride: int
    inputs: int
    outputs: int
    side: int
    rows: int
    forward_bytes: int
    input_gradient_bytes: int
    weight_gradient_bytes: int

    @property
    def element_bytes(self) -> int:
        return _ELEMENT_BYTES[self.dtype]

    @property
    def output_side(self) -> int:
        return (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def shape(self) -> Convolution:
        pixels = self.side**2, self.output_side**2, self.kernel**2
        return Convolution(self.rows, self.inputs, self.outputs, *pixels, pointwise=self.kernel == self.stride == 1)

    def taken_bytes(self, which: Pass) -> int:
        return (self.forward_bytes, self.input_gradient_bytes, self.weight_gradient_bytes)[which]


class MeasuredConvolutions:
    """``layers``, looked up by element bytes, channels, kernel and stride.

    ``read_across``: element bytes and passes for which layers tell of others with another number of rows.
    """

    def __init__(
        self, layers: Iterable[Layer], *, read_across: Container[tuple[int, Pass]] = _READ_ACROSS
    ) -> None:
        self._read_across = read_across
        self._alike: dict[tuple[int, ...], list[Layer]] = {}
        for layer in layers:
            self._alike.setdefault(_kind_of(layer.shape, layer.element_bytes), []).append(layer)

    def bytes_of(self, which: Pass, shape: Convolution, element_bytes: int) -> int | None:
        """The workspace of a pass of ``shape``; None where no layer tells it."""
        if shape.groups > 1 or shape.channels_last:
            return None
        alike = self._alike.get(_kind_of(shape, element_bytes))
        if not alike:
            return None
        nearest = min(alike, key=lambda layer: _apart(layer.shape, shape))
        taken = nearest.taken_bytes(which)
        if nearest.shape == shape:
            return taken
        padded = any(channels * element_bytes % _FILLED_BYTES for channels in (shape.inputs, shape.outputs))
        if padded or (element_bytes, which) not in self._read_across:
            return None
        copies, rest = _copies_in(taken, _tensors_bytes(nearest.shape, element_bytes))
        return rest + _sum_of(copies, _tensors_bytes(shape, element_bytes))


@functools.cache
def measured_convolutions(capability: tuple[int, int]) -> MeasuredConvolutions | None:
    """What was measured on a card of ``capability``, None where nothing was."""
    name = _FILES.get(capability)
    return None if name is None else MeasuredConvolutions(read_layers(FOLDER / name))


def read_layers(path: Path) -> list[Layer]:
    with path.open(newline="") as file:
        return [Layer(line[0], *map(int, line[1:])) for line in itertools.islice(csv.reader(file), 1, None)]


def _kind_of(shape: Convolution, element_bytes: int) -> tuple[int, ...]:
    stride = round(math.sqrt(shape.input_pixels / shape.output_pixels))
    return element_bytes, shape.inputs, shape.outputs, shape.kernel_pixels, stride, shape.pointwise


def _apart(one: Convolution, other: Convolution) -> tuple[float, ...]:
    """By the places that are written, then by those of one picture, written and read."""
    numbers = [(shape.rows * shape.output_pixels, shape.output_pixels, shape.input_pixels) for shape in (one, other)]
    return tuple(abs(math.log(a / b)) for a, b in zip(*numbers, strict=True))


def _tensors_bytes(shape: Convolution, element_bytes: int) -> tuple[int, int, int]:
    """What is read, what is written, the weight."""
    read, written = shape.inputs * shape.input_pixels, shape.outputs * shape.output_pixels
    weight = shape.inputs * shape.outputs * shape.kernel_pixels
    return shape.rows * read * element_bytes, shape.rows * written * element_bytes, weight * element_bytes


def _copies_in(taken_bytes: int, tensors_bytes: tuple[int, int, int]) -> tuple[tuple[int, ...], int]:
    """The copies that leave the least of ``taken_bytes``, and that rest."""
    rests = ((copies, taken_bytes - _sum_of(copies, tensors_bytes)) for copies in _COPIES)
    return min(((copies, rest) for copies, rest in rests if rest >= 0), key=lambda found: found[1])


def _sum_of(copies: tuple[int, ...], tensors_bytes: tuple[int, int, int]) -> int:
    return sum(n * size for n, size in zip(copies, tensors_bytes, strict=True))
