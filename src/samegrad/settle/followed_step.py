"""A step that is followed without being run: under any plan, on the whole batch or on fewer rows.

Nothing of the user's changes, and no data is needed: a model on the meta device will do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.data.prefetch import stream_chunks
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import CannotSplit
from samegrad.exact import losses
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.find_head import Head, find_head
from samegrad.exact.losses import LossForm
from samegrad.exact.split import sliced_chunks
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.unit_chain import UnitChain, find_units
from samegrad.execute.apply import applied, chunked_step, standing, stands_between_steps
from samegrad.execute.ways import Ways
from samegrad.measure.events import Trace
from samegrad.measure.target import Target
from samegrad.measure.trace import in_chunks, look_at, plainly, trace_step
from samegrad.records import Exactness, Plan
from samegrad.trees import RowLayout

_CUDA = torch.device("cuda", 0)
# Rows that a look at the step has.
LOOKED_AT_ROWS = 8
# Chunks of a planned step that are followed: what the later ones do repeats.
_FOLLOWED_CHUNKS = 4


@dataclasses.dataclass(frozen=True)
class Look:
    """What one look at the step without data shows: the loss's form, the units of the model, and its head.

    ``output_row_bytes``: of the model's outputs, for each row of the batch.
    """

    form: LossForm
    units: UnitChain
    head: Head | str
    output_row_bytes: int


def look_at_step(declared: DeclaredStep, batch: Any, layout: RowLayout) -> Look:
    """A look at a few rows of the step. Raises CannotTrace."""
    return look_at(declared, trees.first_rows(batch, layout, min(LOOKED_AT_ROWS, layout.rows)), _look)


def _look(declared: DeclaredStep, rows: Any) -> Look:
    # A batch may start on the host or on a disk; a chunk of it reaches the step on its device.
    [few] = sliced_chunks(rows, declared.layout(rows), [declared.layout(rows).rows], declared.device)
    leaves, spec = trees.flatten(declared.forward(declared.network, few))
    leaves = [
        leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    live = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    loss = checked_loss(declared.loss_fn(trees.unflatten(leaves, spec), few))
    layout = declared.layout(few)
    form = losses.recognise(loss, live, layout.rows)
    output_row_bytes = -(-sum(leaf.nbytes for leaf in live) // layout.rows)
    del leaves, live, loss
    try:
        head: Head | str = find_head(declared, few, layout)
    except CannotSplit as refused:
        head = refused.found
    return Look(form, find_units(declared, few), head, output_row_bytes)


@dataclasses.dataclass(frozen=True)
class FollowedStep:
    """A step that is planned for ``target``. ``ways``: to run it in chunks, as examined or, without data, assumed.

    ``look``: what one look at it shows. ``blocks``: the paths of modules that may run again in backward, each entry by
    itself or as one with those beside it. ``repeats``: whether the plain step did the same twice when it was followed,
    so that the second turn of others need not be.
    """

    declared: DeclaredStep
    aliases: ParameterAliases
    batch: Any
    layout: RowLayout
    target: Target
    ways: Ways
    look: Look
    blocks: tuple[tuple[str, ...], ...] = ()
    repeats: bool = False

    @property
    def batch_stands_on_device(self) -> bool:
        """Whether the batch lies on the device that is planned for: where the model is, but for one on the CPU."""
        own = self.declared.device
        leaves = trees.leaves_of(self.batch)
        return own.type != "cpu" and any(isinstance(leaf, Tensor) and leaf.device == own for leaf in leaves)

    def trace(self, plan: Plan) -> Trace:
        """The step under ``plan``, its first chunks where it has many alike. Raises CannotTrace.

        A batch on the device stands there as a whole, of which the rows that are followed are a part.
        """
        # Levers are asked for the device that is planned for; what stands between steps stands on the twins alone.
        there = dataclasses.replace(self.declared, device=_CUDA)
        stands = functools.partial(standing, plan)
        repeats = self.repeats and not stands_between_steps(plan)
        with applied(plan, there, self.layout.rows) as execution:
            declared = dataclasses.replace(execution.declared, device=self.declared.device)
            if execution.runs_whole or execution.sizes is None:
                plain = plainly(StepDraws(self.ways.sites))
                return trace_step(declared, self.batch, run=plain, stands=stands, repeats=repeats)
            sizes = self._followed_sizes(execution.sizes, whole=execution.scheme is not None)
            batch = trees.first_rows(self.batch, self.layout, sum(sizes))
            step = chunked_step(execution, self.aliases, self.ways, stream_chunks)
            return trace_step(
                declared, batch, run=in_chunks(step, sizes), sizes=sizes, stands=stands, repeats=repeats
            )

    def trace_whole(self, levers: dict[str, dict[str, Any]], rows: int | None = None) -> Trace:
        """The step with ``levers`` on its first ``rows`` rows (None: all of them) at once. Raises CannotTrace."""
        rows = self.layout.rows if rows is None else rows
        few = dataclasses.replace(
            self,
            batch=trees.first_rows(self.batch, self.layout, rows),
            layout=dataclasses.replace(self.layout, rows=rows),
        )
        return few.trace(Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=rows))

    def _followed_sizes(self, sizes: Sequence[int], *, whole: bool) -> tuple[int, ...]:
        """The chunks that are followed: all of few, and the first and last of many alike."""
        two_passes = self.ways.by_rows is not None and self.ways.by_rows.passes == 2
        if whole or two_passes or len(sizes) <= _FOLLOWED_CHUNKS + 1:
            return tuple(sizes)
        return (*sizes[:_FOLLOWED_CHUNKS], sizes[-1])
