"""Chains of units for the planner's tests, every choice for a small one, and the bytes of a choice counted plainly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from samegrad.plan.heights import Stage, Way
from samegrad.unit_tables import Unit

_SIZES = st.integers(0, 400)
_TIMES = st.floats(0.01, 3.0)


def unit(**changes: Any) -> Unit:
    """A block that keeps ten of its output, with what it adds up to."""
    given: dict[str, Any] = {
        "name": "block", "kept_bytes": 100, "output_bytes": 10, "forward_extra_bytes": 110, "backward_extra_bytes": 30,
        "arrival_extra_bytes": 10, "incoming_bytes": 10, "forward_seconds": 1.0, "backward_seconds": 2.0,
        "recomputable": True, "offloadable_bytes": 90, "moved_bytes": 90,
    }  # fmt: skip
    return Unit(**given | changes)


@st.composite
def chains(draw: Any, *, most_units: int = 6) -> list[Unit]:
    """Uneven units, some not recomputable, some row-independent, here and there with a skip connection."""
    units, later_gradients = [], 0
    for _ in range(draw(st.integers(1, most_units))):
        output = draw(st.integers(1, 80))
        inner = draw(_SIZES)
        recomputable = draw(st.integers(0, 4)) > 0
        gradient = draw(st.integers(0, 40))
        units.append(
            unit(
                name="block" if recomputable else "",
                kept_bytes=output + inner,
                output_bytes=output,
                crossing_bytes=draw(st.sampled_from([0, 0, output])),
                forward_extra_bytes=output + inner + draw(_SIZES),
                backward_extra_bytes=gradient + draw(_SIZES),
                arrival_extra_bytes=later_gradients + draw(st.integers(-output, 60)),
                incoming_bytes=later_gradients + output + draw(st.integers(0, 60)),
                forward_seconds=draw(_TIMES),
                backward_seconds=draw(_TIMES),
                recomputable=recomputable,
                gradient_bytes=gradient,
                row_independent=recomputable and draw(st.booleans()),
                chunk_seconds=draw(_TIMES) / 10,
                offloadable_bytes=inner,
                moved_bytes=inner,
            )
        )
        later_gradients += gradient
    return units


def every_choice(
    units: Sequence[Unit], *, chunk_counts: Sequence[int] = (), may_offload: bool = False
) -> Iterator[list[Stage]]:
    """All ways through the chain."""
    for cuts in itertools.product([False, True], repeat=len(units) - 1):
        edges = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), len(units)]
        stretches = [(first, stop - 1) for first, stop in itertools.pairwise(edges)]
        ways = [list(_ways(units, *ends, chunk_counts, may_offload)) for ends in stretches]
        for chosen in itertools.product(*ways):
            yield [Stage(*ends, way, chunks) for ends, (way, chunks) in zip(stretches, chosen)]


def _ways(
    units: Sequence[Unit], first: int, last: int, chunk_counts: Sequence[int], may_offload: bool
) -> Iterator[tuple[Way, int]]:
    inside = units[first : last + 1]
    if first == last:
        yield Way.KEEP, 1
        if may_offload:
            yield Way.OFFLOAD, 1
    if all(one.recomputable for one in inside):
        yield Way.RECOMPUTE, 1
        if all(one.row_independent for one in inside):
            yield from ((Way.CHUNKED, chunks) for chunks in chunk_counts)


def counted_bytes(units: Sequence[Unit], stages: Sequence[Stage]) -> list[tuple[int, str, int]]:
    """The bytes of a choice without a queue at every position, one unit after the other, as the definitions say."""
    live, found, before = 0, [], {}
    for stage in stages:
        before[stage] = live
        inside = range(stage.first, stage.last + 1)
        if stage.way is Way.KEEP or stage.way is Way.OFFLOAD:
            [k] = inside
            found.append((k, "forward", live + units[k].forward_extra_bytes))
            live += units[k].kept_bytes - (units[k].offloadable_bytes if stage.way is Way.OFFLOAD else 0)
            continue
        standing = live
        left = units[stage.last].output_bytes + sum(units[p].crossing_bytes for p in inside if p < stage.last)
        whole = live + left if stage.way is Way.CHUNKED else live
        for k in inside:
            crossed = sum(units[p].crossing_bytes for p in inside if p < k - 1)
            entering = units[k - 1].output_bytes + crossed if k > stage.first else 0
            found.append((k, "forward", whole + -(-(entering + units[k].forward_extra_bytes) // stage.chunks)))
        live = standing + left
    for stage in reversed(stages):
        inside = range(stage.first, stage.last + 1)
        live = before[stage]
        kept = [sum(units[p].kept_bytes for p in inside if p < k) for k in range(stage.first, stage.last + 2)]
        if stage.way is Way.CHUNKED:
            found += _counted_chunks(units, stage, live, kept)
            continue
        if stage.way is Way.RECOMPUTE:
            arrived = live + units[stage.last].incoming_bytes
            found += [(k, "recompute", arrived + kept[k - stage.first] + units[k].forward_extra_bytes) for k in inside]
        for k in reversed(inside):
            at_arrival = live + kept[k - stage.first + 1] + units[k].arrival_extra_bytes
            found.append((k, "backward", at_arrival + units[k].backward_extra_bytes))
    return found


def _counted_chunks(units: Sequence[Unit], stage: Stage, live: int, kept: list[int]) -> list[tuple[int, str, int]]:
    inside = range(stage.first, stage.last + 1)
    whole = live + units[stage.last].incoming_bytes + sum(units[k].gradient_bytes for k in inside)
    whole += units[stage.first - 1].output_bytes if stage.first else 0
    found = [
        (k, "recompute", whole + -(-(kept[k - stage.first] + units[k].forward_extra_bytes) // stage.chunks))
        for k in inside
    ]
    for k in reversed(inside):
        # Those of this chunk, before they are added to the sums.
        fresh = sum(units[p].gradient_bytes for p in inside if p >= k)
        later = sum(one.gradient_bytes for one in units[k + 1 :])
        arriving = max(0, units[k].arrival_extra_bytes - later)
        own = max(0, units[k].backward_extra_bytes - units[k].gradient_bytes)
        rows = kept[k - stage.first + 1] + arriving + own
        found.append((k, "backward", whole + fresh + -(-rows // stage.chunks)))
    return found
