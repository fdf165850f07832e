"""The planned step with fewer of its levers: what one of them is to blame for, and what some are to be held to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from samegrad import trees
from samegrad.exact.mapped import MappedExamination, MappedStep
from samegrad.exact.one_chunk import OneChunkStep
from samegrad.exact.split import SplitStep, sliced_chunks
from samegrad.execute.apply import applied, programs_of
from samegrad.levers import Lever, Slot, levers_of
from samegrad.records import Exactness
from samegrad.verify.sides import Planned


def without(planned: Planned, name: str) -> Planned:
    """The same step under the plan without the lever ``name``."""
    return only(planned, [lever for lever in levers_of(planned.plan) if lever.name != name])


def promising_bits(planned: Planned) -> Planned | None:
    """The levers of ``planned`` that promise bits, on all rows at once; None where there is none.

    Those of the class SAME_BITS promise the bits of the step they are taken in, those that round the bits of the plain
    step under that rounding. Beside a lever that adds up in another order neither would show.
    """
    promising = [lever for lever in levers_of(planned.plan) if _promises_bits(lever)]
    return only(planned, promising) if promising else None


def _promises_bits(lever: Lever) -> bool:
    if lever.exactness is Exactness.SAME_BITS:
        # Where the batch, the optimizer's state or a tensor lies is nothing that a gradient sees.
        return lever.slot not in (Slot.DATA, Slot.STATE, Slot.ALLOCATOR)
    return lever.exactness >= Exactness.ROUNDED


def only(planned: Planned, levers: Sequence[Lever]) -> Planned:
    """The same step under a plan of ``levers``, which are among its own. Raises what applying them raises."""
    plan = dataclasses.replace(planned.plan, levers={lever.name: lever.knobs() for lever in levers})
    with applied(planned.plan, planned.declared, planned.plan_rows) as before:
        travelled = before.rows_on_host
    with applied(plan, planned.declared, planned.plan_rows) as execution:
        sizes = execution.sizes
        stays = travelled and not execution.rows_on_host
    rows = planned.layout.rows
    if planned.split is None or sizes is None or execution.runs_whole:
        return dataclasses.replace(planned, plan=plan, split=None, parts=(rows,))
    split = planned.split
    if execution.mapping is not None:
        split = MappedStep(planned.declared, split.aliases, _mapped_examination(planned), execution.mapping)
    elif isinstance(split, OneChunkStep):
        split = dataclasses.replace(split, inside=execution.inside, programs=programs_of(execution))
    elif isinstance(split, SplitStep):
        split = dataclasses.replace(
            split, inside=execution.inside, chunks=sliced_chunks if stays else split.chunks,
            programs=programs_of(execution),
        )  # fmt: skip
    return dataclasses.replace(planned, plan=plan, split=split, parts=parts_of(sizes, rows, planned.plan_rows))


def _mapped_examination(planned: Planned) -> MappedExamination:
    split = planned.split
    if isinstance(split, (MappedStep, OneChunkStep)):
        return split.examination
    by_rows = None if split is None else split.examination
    return MappedExamination("", planned.sites, by_rows, sites_are_all=by_rows is not None)


def parts_of(sizes: Sequence[int], checked: int, batch_rows: int) -> tuple[int, ...]:
    """The plan's chunks where they show on ``checked`` rows, else chunks of uneven size."""
    if checked == batch_rows:
        return tuple(sizes)
    rows = max(sizes)
    if rows < checked:
        return tuple(trees.even_sizes(checked, rows))
    return tuple(trees.even_sizes(checked, max(1, 2 * checked // 5)))
