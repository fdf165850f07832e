"""The fastest way through a chain of units under a budget, and all of them at once: budget against time.

Dynamic programming over where stages begin. Of the units from one on, what matters is how high they reach above what
stands before them: of one stage and what follows it that is ``max(own height, left bytes + height of the rest)``. So
for every amount of extra time the lowest height is found exactly, with every position bounded, and without a budget:
the answers for all budgets come out together, and a smaller budget can only give a slower choice with a smaller peak.
Only time is rounded, to a 4096th of the largest sum of extra seconds; the seconds of the choices themselves are not.

(Counting kept bytes in steps instead, one budget at a time, must round them up at every stage to be safe, which at 96
units and 400 steps may waste a quarter of the budget.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from samegrad.plan.chain import ChainChoice, HostLink, fastest_first
from samegrad.plan.heights import Bytes, Chain, Seconds, Stage, Way
from samegrad.plan.offload import choices_with_offload
from samegrad.plan.stage_options import StageOptions, largest_sum, options_from
from samegrad.unit_tables import Unit

_LEVELS = 4096
_NOWHERE, _NOTHING = np.int64(2**60), np.int64(-(2**60))
# Budgets between the resident bytes and the plain peak, at which a choice with a limited way to the host is sought.
_OFFLOAD_BUDGETS = 12


def choose_for(
    units: Sequence[Unit],
    budget_bytes: int,
    *,
    resident_bytes: int = 0,
    chunk_counts: Sequence[int] = (),
    link: HostLink | None = None,
) -> ChainChoice | None:
    """The fastest choice whose predicted peak is within ``budget_bytes``, of equals what does least; None if none is.

    ``chunk_counts``: into how many chunks a row-independent stretch may be cut. ``link``: units may wait on the host.
    Raises BadInput for a table of units that cannot be, and EnvironmentProblem where a limited link needs scipy.
    """
    chain = Chain.of(units)
    front = _Front.of(chain, chunk_counts, may_offload=link is not None and link.is_free)
    within = np.flatnonzero(front.peaks + resident_bytes <= budget_bytes)
    found = [front.choice(int(within[0]), resident_bytes)] if len(within) else []
    if link is not None and not link.is_free and not (found and found[0].seconds <= chain.plain_seconds):
        worth_taking = front.stages_taken()
        found += choices_with_offload(chain, [budget_bytes], resident_bytes, chunk_counts, link, worth_taking)
    return min(found, key=lambda choice: (choice.seconds, choice.peak_bytes), default=None)


def pareto(
    units: Sequence[Unit],
    *,
    resident_bytes: int = 0,
    chunk_counts: Sequence[int] = (),
    link: HostLink | None = None,
) -> tuple[ChainChoice, ...]:
    """Budget against time: the choices that are worth taking, fastest first, each next one smaller."""
    chain = Chain.of(units)
    front = _Front.of(chain, chunk_counts, may_offload=link is not None and link.is_free)
    choices = [front.choice(index, resident_bytes) for index in range(len(front.peaks))]
    if link is not None and not link.is_free:
        peaks = np.linspace(resident_bytes, choices[0].peak_bytes, _OFFLOAD_BUDGETS + 1, dtype=np.int64)
        budgets_bytes, worth_taking = peaks[1:-1].tolist(), front.stages_taken()
        choices += choices_with_offload(chain, budgets_bytes, resident_bytes, chunk_counts, link, worth_taking)
    return fastest_first(choices)


@dataclasses.dataclass(frozen=True)
class _Front:
    """The choices that no other one beats in both peak and time, fastest first, and how to get to each.

    ``picks[unit][level]`` is the option taken at ``unit`` with ``level`` ticks left to spend; a choice begins at the
    first unit with ``levels[choice]`` of them.
    """

    chain: Chain
    options: list[StageOptions]
    ticks: list[NDArray[np.int64]]
    picks: list[NDArray[np.int32]]
    levels: NDArray[np.int64]
    peaks: Bytes
    seconds: Seconds

    @classmethod
    def of(cls, chain: Chain, chunk_counts: Sequence[int], *, may_offload: bool) -> _Front:
        options = [options_from(chain, k, chunk_counts, may_offload=may_offload) for k in range(len(chain))]
        ticks = _in_ticks(options)
        rest = [np.full(_LEVELS + len(chain) + 1, _NOTHING)]
        picks = []
        for first in reversed(range(len(chain))):
            lowest, pick = _lowest(options[first], ticks[first], rest)
            rest.append(lowest)
            picks.append(pick)
        # As far as more time lowers the peak.
        levels = np.flatnonzero(np.diff(rest[-1], prepend=_NOWHERE) < 0)
        front = cls(chain, options, ticks, picks[::-1], levels, rest[-1][levels], np.zeros(len(levels)))
        return front._in_seconds()

    def choice(self, index: int, resident_bytes: int) -> ChainChoice:
        stages = self._stages(index)
        return ChainChoice(
            stages=tuple(stages),
            peak_bytes=int(self.peaks[index]) + resident_bytes,
            seconds=self.chain.plain_seconds + float(self.seconds[index]),
            host_bytes=sum(self.chain.units[s.first].moved_bytes for s in stages if s.way is Way.OFFLOAD),
        )

    def stages_taken(self) -> set[Stage]:
        """The stages that some budget makes worth taking."""
        return {stage for index in range(len(self.levels)) for stage in self._stages(index)}

    def _stages(self, index: int) -> list[Stage]:
        stages: list[Stage] = []
        unit, level, end = 0, int(self.levels[index]), len(self.chain)
        while unit < end:
            pick = int(self.picks[unit][level])
            stages.append(self.options[unit].stages[pick])
            level -= int(self.ticks[unit][pick])
            unit = stages[-1].last + 1
        return stages

    def _in_seconds(self) -> _Front:
        """The same with the time as it is, and without what that shows to be beaten."""
        units, left = np.zeros(len(self.levels), dtype=np.int64), self.levels.copy()
        seconds = np.zeros(len(self.levels))
        for unit, own in enumerate(self.options):
            [here] = np.nonzero(units == unit)
            pick = self.picks[unit][left[here]]
            seconds[here] += own.seconds[pick]
            left[here] -= self.ticks[unit][pick]
            units[here] = np.array([stage.last + 1 for stage in own.stages])[pick]
        order = np.lexsort((self.levels, seconds))
        lowest = np.minimum.accumulate(self.peaks[order])
        kept = order[np.diff(lowest, prepend=_NOWHERE) < 0]
        return dataclasses.replace(self, levels=self.levels[kept], peaks=self.peaks[kept], seconds=seconds[kept])


def _in_ticks(options: list[StageOptions]) -> list[NDArray[np.int64]]:
    """Extra seconds in whole ticks. Whatever is not kept costs one at least, so that nothing is done for nothing."""
    tick_seconds = largest_sum(options) / _LEVELS or 1.0
    return [
        np.where([stage.way is Way.KEEP for stage in own.stages], 0, np.maximum(np.rint(own.seconds / tick_seconds), 1))
        .astype(np.int64)
        for own in options
    ]  # fmt: skip


def _lowest(
    options: StageOptions, ticks: NDArray[np.int64], rest: list[Bytes]
) -> tuple[Bytes, NDArray[np.int32]]:
    """For each level the lowest height of the units from one on, and the option that gives it.

    ``rest[-1]`` is that of the units after it, ``rest[-2]`` of those after the next one, and so on.
    """
    lowest = np.full_like(rest[0], _NOWHERE)
    pick = np.zeros(len(lowest), dtype=np.int32)
    for index, stage in enumerate(options.stages):
        spent, height = int(ticks[index]), int(options.heights[index])
        if spent >= len(lowest) or height >= lowest[spent]:
            continue
        following = rest[stage.first - stage.last - 1][: len(lowest) - spent]
        reached = np.maximum(options.left[index] + following, height)
        better = reached < lowest[spent:]
        np.copyto(lowest[spent:], reached, where=better)
        np.copyto(pick[spent:], np.int32(index), where=better)
    return lowest, pick
