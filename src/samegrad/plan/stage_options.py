"""Every stage that may begin at a unit of a chain, with what solvers need to know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from samegrad.plan.heights import Bytes, Chain, Seconds, Stage, Way


@dataclasses.dataclass(frozen=True)
class StageOptions:
    """Stages that begin at one unit: where each ends, its way, its height, what it leaves, and its extra seconds."""

    stages: list[Stage]
    heights: Bytes
    left: Bytes
    seconds: Seconds


def options_from(chain: Chain, first: int, chunk_counts: Sequence[int], *, may_offload: bool) -> StageOptions:
    """Every stage that may begin at unit ``first``, keeping it being the first of them."""
    ways = [Stage(first, first, Way.KEEP)]
    if may_offload and chain.units[first].offloadable_bytes:
        ways.append(Stage(first, first, Way.OFFLOAD))
    kept = chain.kept_heights(first)
    own = max(int(kept.forward.max()), int(kept.backward.max()))
    heights = [np.full(len(ways), own)]
    left = [np.array([chain.left_bytes(stage) for stage in ways])]
    seconds = [np.zeros(len(ways))]
    stretch = chain.stretch_from(first)
    for way, chunks, length in _cuts(len(stretch), stretch.row_independent_length, chunk_counts):
        peaks = stretch.recomputed_peaks() if way is Way.RECOMPUTE else stretch.chunked_peaks(chunks)
        ways += [Stage(first, first + k, way, chunks) for k in range(length)]
        heights.append(np.maximum(*peaks)[:length])
        left.append(stretch.left_bytes[:length])
        seconds.append(stretch.extra_seconds(chunks)[:length])
    return StageOptions(ways, np.concatenate(heights), np.concatenate(left), np.concatenate(seconds))


def _cuts(recomputable: int, independent: int, chunk_counts: Sequence[int]) -> Iterator[tuple[Way, int, int]]:
    if recomputable:
        yield Way.RECOMPUTE, 1, recomputable
    for chunks in sorted(set(chunk_counts)):
        if independent and chunks > 1:
            yield Way.CHUNKED, chunks, independent


def largest_sum(options: list[StageOptions]) -> float:
    """The most extra seconds that stages of one unit add up to; longer stages take no more."""
    singles = (
        [seconds for seconds, stage in zip(own.seconds, own.stages) if stage.first == stage.last] for own in options
    )
    return float(sum(max(seconds) for seconds in singles))
