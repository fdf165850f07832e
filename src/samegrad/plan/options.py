"""What the planner may do: knobs the user pinned, and how exact the plan must be."""

from __future__ import annotations

import dataclasses

from samegrad.records import Exactness, KnobOrigin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """``rows``: pinned rows at a time (a number or the size of every chunk), with who set them.

    ``allow``: the weakest exactness a plan may have. ``expected_steps``: how many will run under the plan, which what
    it costs once must pay for; None where nobody said. ``one_shape``: whether all batches are of the shape that is
    planned for, so that chunks may be compiled or captured for it.
    """

    rows: int | tuple[int, ...] | None = None
    rows_origin: KnobOrigin = KnobOrigin.PINNED
    allow: Exactness = Exactness.SAME_SUM
    expected_steps: int | None = None
    one_shape: bool = True
