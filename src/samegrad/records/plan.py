"""What a step may hold, how it is run, and the plans that no other one beats."""

from __future__ import annotations

import dataclasses
from typing import Any

from samegrad.json_record import Record
from samegrad.kinds import Counting, Exactness, KnobOrigin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget(Record):
    """Bytes a step may hold on one device, and where that number was taken from.

    ``counting``: on CUDA what this process's allocator reserves, on the CPU counted tensor bytes.
    ``source``: "--budget 6GiB", or what was free and how that was read.
    """

    total_bytes: int
    device: str
    counting: Counting
    source: str
    host_bytes: int | None = None



@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """How a step is run: ``levers`` maps a lever's name to its knobs. A saved plan is a plan re-applied.

    ``knob_origins`` maps ``"lever.knob"`` to who set it; ``reasons`` says in plain words why each lever was taken,
    refused or not needed. ``signature`` is the shape of the batch and the model the plan was made for, ``parameters``
    the dtype and shape of each of the model's parameters, by name: what says which of them is another.
    """

    levers: dict[str, dict[str, Any]]
    exactness: Exactness
    batch_rows: int
    budget: Budget | None = None
    predicted_peak_bytes: int | None = None
    predicted_seconds: float | None = None
    knob_origins: dict[str, KnobOrigin] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    signature: str = ""
    parameters: dict[str, str] = dataclasses.field(default_factory=dict)



@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontPoint(Record):
    """The fastest plan within ``budget_bytes``, which is the least that this plan needs, and its seconds a step."""

    budget_bytes: int
    seconds: float
    plan: Plan



@dataclasses.dataclass(frozen=True, kw_only=True)
class Front(Record):
    """Budgets against step times: the plans that no other one beats in both, fastest first, and what they rest on.

    ``left_out``: plans that could not be judged, each with the reason.
    """

    device: str
    counting: Counting
    basis: str
    batch_rows: int
    points: tuple[FrontPoint, ...]
    left_out: tuple[str, ...] = ()
