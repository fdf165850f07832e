"""Plans made of followed steps: rows at a time, units that run again, and what each is predicted to hold and take.

One function predicts a plan from its levers (``predict_traced``); the search only looks for good ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from samegrad.levers import Lever, find_levers
from samegrad.levers._variants import chunk_sizes
from samegrad.levers.recompute import Recompute
from samegrad.levers.split_rows import SplitRows
from samegrad.plan.chain import ChainChoice, chain_peak_bytes, plain_stages
from samegrad.plan.heights import Chain, Stage, Way
from samegrad.plan.options import Options
from samegrad.plan.solve import pareto
from samegrad.plan.whole_ways import has_room, is_allowed
from samegrad.records import Budget, Counting, Footprint
from samegrad.unit_tables import TracedWay, UnitTable

# What lies between a plan's tensors and its segments differs by up to so much, as a share, from levers to levers.
_GAP_FRACTION = 0.15
Plans = TypeVar("Plans")


class Candidate(NamedTuple):
    """Levers with their predicted peak, in bytes that are counted or allocated, and seconds of a step."""

    seconds: float
    peak_bytes: int
    levers: tuple[Lever, ...]


class FollowedPlan(NamedTuple):
    """What a plan is predicted to hold, on the device and pinned on the host, and to take."""

    peak_bytes: int
    seconds: float
    host_bytes: int


def traced_candidates(footprint: Footprint, options: Options, budget: Budget | None = None) -> list[Candidate]:
    """The plans that are worth trying at some budget, fastest first; see ``worth_trying``.

    ``budget``: whose host memory the plans keep within, for any amount on the device.
    """
    # Ways that differ in what is resident alone have the very same units.
    solved: dict[int, tuple[ChainChoice, ...]] = {}
    found = [
        candidate
        for way in footprint.traced
        if is_allowed(way, options.allow)
        for candidate in _of_way(way, footprint, options, budget, solved)
    ]
    found.sort(key=lambda c: (c.seconds, c.peak_bytes, len(c.levers)))
    return list(worth_trying(found, footprint.counting, kind=_names_of, peak_bytes=lambda c: c.peak_bytes))


def worth_trying(
    fastest_first: Iterable[Plans], counting: Counting, *, kind: Callable[[Plans], frozenset[str]],
    peak_bytes: Callable[[Plans], int],
) -> Iterator[Plans]:  # fmt: skip
    """Those that no faster one makes needless: each is smaller than all before it that have its levers.

    Where an allocator judges, a faster one with other levers counts only if it is clearly smaller, since segments lie
    otherwise under those.
    """
    gap = _GAP_FRACTION if counting is Counting.CUDA_ALLOCATOR else 0.0
    smallest: dict[frozenset[str], int] = {}
    for plan in fastest_first:
        levers, peak = kind(plan), peak_bytes(plan)
        others = min((other for name, other in smallest.items() if name != levers), default=None)
        if peak < smallest.get(levers, peak + 1) and (others is None or peak < (1 + gap) * others):
            smallest[levers] = peak
            yield plan


def _names_of(candidate: Candidate) -> frozenset[str]:
    return frozenset(lever.name for lever in candidate.levers)


def predict_traced(footprint: Footprint, levers: dict[str, dict[str, Any]]) -> FollowedPlan | None:
    """What a plan with these levers is predicted to hold and take; None where it was not followed."""
    own = {SplitRows.name, Recompute.name, "host_rows"}
    base = {name: knobs for name, knobs in levers.items() if name not in own}
    way = next((way for way in footprint.traced if way.levers == base), None)
    if way is None or levers.get(SplitRows.name, {}).get("kept_chunks"):
        return None
    rows = levers[SplitRows.name]["rows"] if SplitRows.name in levers else footprint.batch_rows
    blocks = levers[Recompute.name]["blocks"] if Recompute.name in levers else []
    sizes = chunk_sizes(rows, footprint.batch_rows)
    stages = _stages_of(way.tables[0], blocks)
    if stages is None or (len(sizes) > 1 and not _has_chunks(way)):
        return None
    return FollowedPlan(*_predicted(way, footprint, sizes, stages), way.pinned_bytes(rows=max(sizes)))


def _of_way(
    way: TracedWay,
    footprint: Footprint,
    options: Options,
    budget: Budget | None,
    solved_by_units: dict[int, tuple[ChainChoice, ...]],
) -> Iterator[Candidate]:
    """``solved_by_units``: the choices that were found before, by the units' ``id``."""
    splits = SplitRows.refusal(footprint) is None and options.allow >= SplitRows.exactness
    recomputes = Recompute.refusal(footprint) is None
    for rows in _rows_to_try(way, footprint, options):
        sizes = chunk_sizes(rows, footprint.batch_rows)
        if (len(sizes) > 1 and not (splits and _has_chunks(way))) or not has_room(way, budget, max(sizes)):
            continue
        tables = way.later_tables if len(sizes) > 1 and way.later_tables else way.tables
        table = _table_for(tables, max(sizes))
        if id(table.units) not in solved_by_units:
            solved_by_units[id(table.units)] = pareto(table.units if recomputes else _fixed(table))
        for choice in solved_by_units[id(table.units)]:
            solved = _Solved(table, table.resident_bytes + choice.peak_bytes)
            peak_bytes, seconds = _predicted(way, footprint, sizes, choice.stages, solved)
            split = [SplitRows(rows)] if len(sizes) > 1 else []
            yield Candidate(seconds, peak_bytes, (*_levers_of(way), *split, *_recompute(table, choice)))


def _has_chunks(way: TracedWay) -> bool:
    """Whether it was followed on fewer rows than the batch's as well."""
    return len(way.tables) > 1


def _rows_to_try(way: TracedWay, footprint: Footprint, options: Options) -> list[int | list[int]]:
    if options.rows is None:
        return [table.rows for table in way.tables]
    if isinstance(options.rows, int):
        return [min(options.rows, footprint.batch_rows)]
    return [list(options.rows)]


def _fixed(table: UnitTable) -> list[Any]:
    return [dataclasses.replace(unit, recomputable=False) for unit in table.units]


def _levers_of(way: TracedWay) -> list[Lever]:
    return [find_levers()[name](**knobs) for name, knobs in way.levers.items()]


def _recompute(table: UnitTable, choice: ChainChoice) -> list[Recompute]:
    """The lever that runs the units of ``choice`` again, none where it keeps them all."""
    blocks: list[str | list[str]] = []
    for stage in choice.stages:
        if stage.way is Way.RECOMPUTE:
            names = [name for unit in table.units[stage.first : stage.last + 1] for name in unit.modules]
            blocks.append(names if len(names) > 1 else names[0])
    return [Recompute(blocks)] if blocks else []


def _stages_of(table: UnitTable, blocks: Sequence[str | list[str]]) -> tuple[Stage, ...] | None:
    """The stages in which ``blocks`` run again; None where they are no units of the table."""
    places = {name: place for place, unit in enumerate(table.units) if unit.recomputable for name in unit.modules}
    runs = {}
    for entry in blocks:
        names = [entry] if isinstance(entry, str) else entry
        if any(name not in places for name in names):
            return None
        begin, end = places[names[0]], places[names[-1]]
        inside = table.units[begin : end + 1]
        # Code between modules, or a part of what is one unit.
        if not all(unit.recomputable for unit in inside) or [n for u in inside for n in u.modules] != list(names):
            return None
        runs[begin] = end
    stages, place = [], 0
    while place < len(table.units):
        last = runs.get(place)
        stages.append(Stage(place, place, Way.KEEP) if last is None else Stage(place, last, Way.RECOMPUTE))
        place = stages[-1].last + 1
    return tuple(stages)


class _Solved(NamedTuple):
    """A table whose peak under the stages in question the solver has found already."""

    table: UnitTable
    peak_bytes: int


def _predicted(
    way: TracedWay,
    footprint: Footprint,
    sizes: Sequence[int],
    stages: Sequence[Stage],
    solved: _Solved | None = None,
) -> tuple[int, float]:
    """Of a step in chunks of ``sizes``, each run by ``stages``."""
    if len(sizes) == 1:
        peak_bytes = max(way.optimizer_bytes, _peak_bytes(way.tables[0], stages, solved))
        return peak_bytes, way.optimizer_seconds + _seconds(way.tables[0], stages)
    passes = footprint.forwards_per_step
    arriving_bytes = way.arriving_row_bytes * max(sizes)
    beside_bytes = way.copied_bytes + arriving_bytes + (way.output_bytes if passes > 1 else 0)
    peak_bytes, seconds = way.optimizer_bytes + 2 * arriving_bytes, way.optimizer_seconds
    if passes > 1:
        whole = way.tables[0]
        peak_bytes = max(peak_bytes, whole.resident_bytes + way.copied_bytes + 2 * arriving_bytes + way.loss_bytes)
    later = _table_for(way.later_tables or way.tables, max(sizes[1:]))
    peak_bytes = max(peak_bytes, beside_bytes + way.accumulator_bytes + _peak_bytes(later, stages, solved))
    if sizes[0] > max(sizes[1:]):
        # The first chunk's gradients become the sums; it counts only where it is the largest.
        peak_bytes = max(peak_bytes, beside_bytes + _peak_bytes(_table_for(way.tables, sizes[0]), stages))
    for size in sorted(set(sizes)):
        table = _table_for(way.tables, size)
        each = _seconds(table, stages) + (passes - 1) * table.forward_seconds
        seconds += sizes.count(size) * (each * size / table.rows + way.chunk_seconds)
    return peak_bytes, seconds


def _peak_bytes(table: UnitTable, stages: Sequence[Stage], solved: _Solved | None = None) -> int:
    if solved is not None and solved.table is table:
        return solved.peak_bytes
    return chain_peak_bytes(Chain.of(table.units), stages, resident_bytes=table.resident_bytes)


def _seconds(table: UnitTable, stages: Sequence[Stage]) -> float:
    """Forward and backward of the units, and the forwards that run again."""
    again = [table.units[s.first : s.last + 1] for s in stages if s.way is Way.RECOMPUTE]
    return table.plain_seconds + sum(unit.forward_seconds for stretch in again for unit in stretch)


def plain_peak_bytes(table: UnitTable) -> int:
    """The peak of all rows of ``table`` with nothing run again."""
    return _peak_bytes(table, plain_stages(table.units))


def _table_for(tables: Sequence[UnitTable], rows: int) -> UnitTable:
    """The smallest table that is no smaller."""
    return min((table for table in tables if table.rows >= rows), key=lambda table: table.rows)
