"""The words that records use, each from a short list: how exact, from where, counting what, in which phase."""

from __future__ import annotations

import enum


class Exactness(enum.IntEnum):
    """How a lever's or a plan's step relates to the plain step under the same draws; larger is weaker."""

    SAME_BITS = 0
    SAME_SUM = 1
    ROUNDED = 2
    SAME_DISTRIBUTION = 3
    DIFFERENT_FUNCTION = 4

    def explained(self) -> str:
        return {
            Exactness.SAME_BITS: "bit for bit the plain step",
            Exactness.SAME_SUM: "the same sum in another order: equal up to rounding",
            Exactness.ROUNDED: "a narrower dtype than declared",
            Exactness.SAME_DISTRIBUTION: "another random draw",
            Exactness.DIFFERENT_FUNCTION: "another function",
        }[self]


class Origin(enum.Enum):
    """Where a number comes from."""

    PREDICTED = "predicted"
    MEASURED = "measured"


class Counting(enum.Enum):
    """What a byte count counts. Counted tensor bytes are never printed as GPU memory."""

    TENSOR_BYTES = "counted tensor bytes"
    CUDA_ALLOCATOR = "CUDA allocator"


class Category(enum.Enum):
    """What live bytes are for: tensors, and what libraries take for themselves (cuBLAS, cuDNN, sums of many rows)."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    OPTIMIZER_STATE = "optimizer_state"
    BUFFERS = "buffers"
    WORKSPACES = "workspaces"
    INPUTS = "inputs"
    ACTIVATIONS = "activations"
    TEMPORARY = "temporary"


class Phase(enum.Enum):
    """Where in the step a moment lies."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    HANDOFF = "handoff"
    OPTIMIZER = "optimizer"


class KnobOrigin(enum.Enum):
    """Who set a knob of the plan."""

    PINNED = "pinned"
    DEFAULT = "default"
    CHOSEN = "chosen"


class Same(enum.Enum):
    """The answer of a verification."""

    SAME = "same"
    DIFFERS = "differs"
    UNPROVEN = "unproven"
