"""What cuDNN takes for recurrent layers and gives back, and the reserve that it keeps for backward.

The workspace holds one layer's gates, what passes between layers, the inputs, some states and the weights; the reserve
holds every layer's gates and cells and what passes between them. Both were read off recorded histories of two-layer
LSTMs in training (one H200, cuDNN 9.19) and meet them to within a kibibyte; for other kinds, depths and directions they
are the same rule, uncalibrated.
"""

from __future__ import annotations

from samegrad.measure.events import Recurrence

_FIXED_BYTES = 16 * 2**20
_STATES_PER_LAYER = 10
_LSTM_GATES = 4


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
    return kept * sequence * element_bytes + masks_bytes


def _weight_elements(shape: Recurrence) -> int:
    """Elements of the weights without the biases."""
    later = (shape.layers - 1) * (shape.directions + 1) * shape.hidden
    return shape.directions * shape.gates * shape.hidden * (shape.inputs + shape.hidden + later)
