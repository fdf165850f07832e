"""What recurrent layers take on CUDA and give back, and the reserve that cuDNN keeps for backward.

The workspace holds one layer's gates, what passes between layers, the inputs, some states and the weights; the reserve
holds every layer's gates and cells and what passes between them. Both were read off recorded histories of two-layer
LSTMs in training (one H200, cuDNN 9.19) and meet them to within a kibibyte; for other kinds, depths and directions they
are the same rule, uncalibrated. torch copies inputs whose rows come first, and their gradients, to steps first; the
backward makes zeros in place of gradients of the last states, which losses rarely have. Source: torch's
``aten/src/ATen/native/cudnn/RNN.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from samegrad.measure.events import Recurrence

_FIXED_BYTES = 16 * 2**20
_RESERVE_FIXED_BYTES = 256
_STATES_PER_LAYER = 10
_LSTM_GATES = 4


class Passing(NamedTuple):
    """Memory taken after so many of the operation's storages, and given back after so many."""

    after_takes: int
    until_takes: int
    size_bytes: int


def forward_passing(shape: Recurrence, element_bytes: int, taken: Sequence[int]) -> list[Passing]:
    """What passes through the forward, whose storages are of the sizes ``taken``: outputs, states, the reserve last."""
    # In training the reserve is taken beside the workspace; without it there is none.
    trains = bool(taken) and taken[-1] == reserve_bytes(shape, element_bytes)
    before_reserve = len(taken) - 1 if trains else len(taken)
    workspace = Passing(before_reserve, len(taken), recurrence_bytes(shape, element_bytes))
    inputs_bytes = shape.steps * shape.rows * shape.inputs * element_bytes
    return [Passing(0, len(taken), inputs_bytes), workspace] if shape.batch_first else [workspace]


def backward_passing(shape: Recurrence, element_bytes: int, taken: Sequence[int]) -> list[Passing]:
    """What passes through the backward, whose last storage is the gradient of all weights."""
    last, states = len(taken), shape.layers * shape.directions * shape.rows * shape.hidden * element_bytes
    before_weights = max(last - 1, 0)
    zeros = [Passing(0, last, states)] * (2 if shape.gates == _LSTM_GATES else 1)
    workspace_bytes = recurrence_bytes(shape, element_bytes)
    workspaces = [Passing(place, place, workspace_bytes) for place in (before_weights, last)]
    if not shape.batch_first:
        return [*zeros, *workspaces]
    inputs_bytes, outputs_bytes = (
        shape.steps * shape.rows * features * element_bytes
        for features in (shape.inputs, shape.hidden * shape.directions)
    )
    copies = [Passing(0, before_weights, inputs_bytes), Passing(0, before_weights, outputs_bytes)]
    return [*zeros, *copies, workspaces[0], Passing(before_weights, last, inputs_bytes), workspaces[1]]


def recurrence_bytes(shape: Recurrence, element_bytes: int) -> int:
    """The workspace of the forward, and of each of the two kernels of the backward."""
    states = shape.rows * shape.hidden * shape.directions
    sequence = shape.steps * states
    between = (shape.layers - 1) * (2 if shape.drops else 1)
    elements = (
        (shape.gates + between) * sequence
        + shape.steps * shape.rows * shape.inputs
        + _STATES_PER_LAYER * shape.layers * states
        + _weight_elements(shape)
    )
    return elements * element_bytes + _FIXED_BYTES


def reserve_bytes(shape: Recurrence, element_bytes: int) -> int:
    """What the forward keeps for the backward."""
    sequence = shape.steps * shape.rows * shape.hidden * shape.directions
    cell = 1 if shape.gates == _LSTM_GATES else 0
    kept = shape.layers * (shape.gates + cell) + shape.layers - 1
    # What was dropped between layers is a bit an element.
    masks_bytes = (shape.layers - 1) * sequence // 8 if shape.drops else 0
    return kept * sequence * element_bytes + masks_bytes + _RESERVE_FIXED_BYTES


def _weight_elements(shape: Recurrence) -> int:
    """Elements of the weights without the biases."""
    later = (shape.layers - 1) * (shape.directions + 1) * shape.hidden
    return shape.directions * shape.gates * shape.hidden * (shape.inputs + shape.hidden + later)
