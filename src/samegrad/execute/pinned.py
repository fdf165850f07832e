"""A plan whose rows at a time the user pinned: nothing is measured, and nothing is left to choose but the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

from samegrad.declared import DeclaredStep
from samegrad.errors import UsageError
from samegrad.exact.batchnorm import shared_over_ranks
from samegrad.execute.ways import Ways
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.records import Exactness, KnobOrigin, Plan
from samegrad.trees import RowLayout


def pinned_plan(
    pinned: int | tuple[int, ...], declared: DeclaredStep, layout: RowLayout, find: Callable[[], Ways | None]
) -> Plan:
    """The plan of ``pinned`` rows at a time; ``find`` finds the ways there are, or None where that must wait.

    Raises CannotSplit where there is no way.
    """
    rows = pinned if isinstance(pinned, int) else list(pinned)
    head = {lever.name: lever.knobs() for lever in ChunkLoss.asked_for(declared)}
    waits = bool(shared_over_ranks(declared.network))
    if isinstance(rows, int) and rows >= layout.rows and not waits:
        exactness = ChunkLoss.exactness if head else Exactness.SAME_BITS
        return Plan(levers=head, exactness=exactness, batch_rows=layout.rows)
    levers: dict[str, dict[str, Any]] = {"host_rows": {}, "split_rows": {"rows": rows}}
    ways = find()
    if ways is not None and ways.by_rows is None:
        if not ways.mapped:
            assert ways.refusal is not None
            raise ways.refusal
        first = next((lever for lever in ways.mapped if "rows" in lever.knobs()), None)
        if first is None:
            raise ways.refusal or AssertionError("ways that are mapped say why rows cannot be split")
        levers = {first.name: first.knobs() | {"rows": rows}}
    return Plan(
        levers=levers | head,
        exactness=Exactness.SAME_SUM,
        batch_rows=layout.rows,
        knob_origins={f"{list(levers)[-1]}.rows": KnobOrigin.PINNED},
    )


def checked_rows(rows: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    """``rows`` as they were given, whole numbers. Raises UsageError for what cannot be rows at a time."""
    if rows is None:
        return None
    listed = tuple(rows) if isinstance(rows, Iterable) else (rows,)
    if not listed or any(not isinstance(n, Integral) or isinstance(n, bool) or n < 1 for n in listed):
        raise UsageError(
            asked=f"rows={rows!r}",
            found="rows at a time must be positive whole numbers",
            do="rows=32, or a list that adds up to the batch such as rows=[32, 32, 5]",
        )
    whole = tuple(int(n) for n in listed)
    return whole if isinstance(rows, Iterable) else whole[0]
