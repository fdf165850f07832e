"""What of a followed step may run again in backward: its blocks, and single layers where they keep much.

Most single layers keep little beside what enters them, and every unit more makes plans slower to find. Not so in the
stem of a convolutional network: at its resolution the outputs of a convolution and of its BatchNorm, and the whole
numbers by which a pooling remembers its maxima, are more than any block keeps. Runs of single layers that keep as much
are units beside the blocks, layer by layer, so that a plan may take any stretch of them, or one with the block after.
Code between two layers runs once, as ever, and what it hands on is kept: layers on its two sides are runs of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from samegrad.exact.unit_chain import Unit
from samegrad.measure.events import Trace
from samegrad.measure.trace_reading import CUDA_BLOCK_BYTES, find_peak
from samegrad.measure.units import units_of
from samegrad.settle.followed_step import FollowedStep
from samegrad.unit_tables import Unit as TableUnit

# Of the plain step's peak, from which on what single layers keep inside is worth units of their own.
_WORTH_FRACTION = 0.01


def with_blocks(step: FollowedStep, plain: Trace) -> FollowedStep:
    """``step`` with the blocks that may run again. ``plain``: the plain step, followed on the whole batch."""
    units = step.look.units.units
    worth = set(_paths_worth(units, step, plain))
    blocks = tuple(unit.paths for unit in units if unit.has_parts or unit.paths in worth)
    return dataclasses.replace(step, blocks=blocks)


def _paths_worth(units: tuple[Unit, ...], step: FollowedStep, plain: Trace) -> Iterator[tuple[str, ...]]:
    """The single layers of every run that keeps enough inside, of one layer too: indices or masks, say."""
    # What works in place is one with the layer before it.
    single = {unit.paths for unit in units if not unit.has_parts or len(unit.paths) > 1}
    if not single:
        return
    least_bytes = _WORTH_FRACTION * find_peak(plain, round_to=CUDA_BLOCK_BYTES).live_bytes
    # Here bytes are asked for alone.
    seconds = [0.0] * len(plain.operations)
    table = units_of(plain, [unit.paths for unit in units], seconds, round_to_bytes=CUDA_BLOCK_BYTES)
    for is_run, members in itertools.groupby(table.units, key=lambda u: u.recomputable and u.modules in single):
        run = list(members)
        if is_run and _inner_bytes(run) >= least_bytes:
            yield from (unit.modules for unit in run)


def _inner_bytes(run: list[TableUnit]) -> int:
    """What a run keeps beside what it hands on."""
    return sum(unit.kept_bytes for unit in run) - run[-1].output_bytes
