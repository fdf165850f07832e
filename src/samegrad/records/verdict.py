"""Whether a planned step is the plain one, and the comparisons behind that."""

from __future__ import annotations

import dataclasses

from samegrad.json_record import Record
from samegrad.kinds import Exactness, Same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(Record):
    """One comparison of a verification: the largest error found, the error the contract allows, and where.

    Errors are relative to the scale the contract names; ``passed`` is ``error <= allowed``. ``tier`` of the contract:
    0 bit for bit, 1 the same function (float64 or float32), 2 directly in the dtype that runs, 3 no further from
    float64 than the plain step is.
    """

    name: str
    passed: bool
    error: float
    allowed: float
    worst: str = ""
    detail: str = ""
    tier: int | None = None



@dataclasses.dataclass(frozen=True, kw_only=True)
class Departure(Record):
    """How far a planned step is from the declared one where it rounds otherwise: what that costs, not an error.

    ``gradient_norm_fraction``: the norm of the difference of all gradients, as a fraction of the declared step's.
    ``loss_fraction``: the same of the loss. ``levers`` are those that round.
    """

    levers: tuple[str, ...]
    gradient_norm_fraction: float
    loss_fraction: float



@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict(Record):
    """Whether the planned step's gradients, loss and buffers are those of the plain step.

    ``reference`` names what the planned step was compared with, on ``rows_checked`` of ``batch_rows`` rows.
    ``dtype`` is the narrowest that the step's gradients pass through, ``compared_dtype`` the one in which
    ``max_relative_error`` was found. UNPROVEN means that only a low precision could be compared, which proves nothing
    by itself; ``narrowed_by`` is what keeps the step from being compared in float64, where something does. ``fault``:
    where the step differs, which lever and which module, as far as that could be found.

    ``asked`` is how exact the plan is, its weakest lever's; ``found`` how exact it proved on the rows compared, None
    where it is not proven. ``departure``, where the plan rounds otherwise than declared: the answer is then about
    ``reference``, which rounds so too, and this is how far the declared step is.
    """

    answer: Same
    reference: str
    rows_checked: int
    batch_rows: int
    dtype: str
    compared_dtype: str
    max_relative_error: float
    worst_parameter: str
    parameters_checked: int
    buffers_checked: int
    checks: tuple[Check, ...] = ()
    seconds: float | None = None
    fault: str = ""
    narrowed_by: str = ""
    asked: Exactness | None = None
    found: Exactness | None = None
    departure: Departure | None = None

    @property
    def same(self) -> bool:
        return self.answer is Same.SAME

    @property
    def tiers(self) -> tuple[int, ...]:
        """The tiers of the contract that were compared, in order."""
        return tuple(sorted({check.tier for check in self.checks if check.tier is not None}))
