"""Candidates that only a run can tell: each is measured as the ladder measures its rungs, under the same cap."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from typing import Any

from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.captured_chunk import ASKED as CAPTURED
from samegrad.exact.pass_programs import LossMaker, Programs
from samegrad.execute.apply import applied, loss_maker_of, programs_of
from samegrad.levers import Execution
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.levers.compile import Compile
from samegrad.levers.convolution_algorithms import ConvolutionAlgorithms
from samegrad.levers.expandable_segments import ExpandableSegments
from samegrad.levers.graphs import Graphs
from samegrad.levers.layout import Layout
from samegrad.measure import counters
from samegrad.measure.rungs import Rung
from samegrad.measure.within_memory import WithinMemory
from samegrad.records import Budget, Plan
from samegrad.settle.again_ways import blocks_of
from samegrad.settle.edits import Levers
from samegrad.settle.ladder import measured, measured_whole, most_bytes
from samegrad.settle.making_room import GrowingWhereNeeded
from samegrad.settle.own_code import of_a_compiler, own_code_under
from samegrad.settle.probing import Measurement
from samegrad.settle.progress import trying
from samegrad.units import format_seconds

# Levers that are tried so, the one that is tried last first.
TRIED_LEVERS = (ConvolutionAlgorithms.name, Compile.name, Graphs.name, Layout.name, ChunkLoss.name)
# Compiling looks on for this share of what all steps take: a twentieth is a small bet on a faster one.
_LOOKING_SHARE = 0.05
# What compiling takes at least, and what it leaves at least of a step's time: fewer steps cannot pay it back.
_LEAST_COMPILING_SECONDS, _LEAST_COMPILED_SHARE = 4.0, 0.4
# Logits of a chunk of a head's loss: of what the budget leaves above all that stands.
_HEAD_FRACTION = 0.1
_LOGIT_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate as it was measured. ``once_seconds``: what it cost before its first step."""

    plan: Plan
    rung: Rung
    once_seconds: float


@dataclasses.dataclass
class Search:
    """Measures candidates of one settled plan, and remembers why others are none.

    ``fitted``: the levers of those that fit. ``all_steps_seconds``: what all steps to come take as they are, where
    their number is known; what is compiled to be measured is bounded by a share of it.
    """

    declared: DeclaredStep
    aliases: ParameterAliases
    measurement: Measurement
    batch: Any
    budget: Budget
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    fitted: set[str] = dataclasses.field(default_factory=set)
    all_steps_seconds: float = math.inf
    _compiling_seconds: float = 0.0
    _compiled: dict[str, LossMaker] = dataclasses.field(default_factory=dict)
    _segments: GrowingWhereNeeded = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self._segments = GrowingWhereNeeded(self.measurement.footprint, self.most)

    @property
    def most(self) -> int:
        return most_bytes(self.budget)

    def measured(self, plan: Plan) -> Tried | None:
        """``plan`` as it runs; None where it does not fit, or cannot run."""
        if Graphs.name not in plan.levers:
            self.forget_captures()
        if Compile.name in plan.levers and not self._may_compile(plan):
            return None
        start, outcome = time.perf_counter(), trying(plan)
        try:
            plan, rung = self._segments.measured(plan, self._rung)
        except CannotSplit as refused:
            # Of several levers, the one that was tried last.
            last = next(name for name in TRIED_LEVERS if name in plan.levers)
            self._refuse(Graphs.name if refused.asked == CAPTURED else last, refused.found)
            outcome.refused(refused.found)
            return None
        except RuntimeError as error:
            if not of_a_compiler(error):
                raise
            self._refuse(Compile.name, f"the compiler cannot take it ({str(error).splitlines()[0]})")
            outcome.refused("the compiler cannot take it")
            return None
        finally:
            if Compile.name in plan.levers:
                self._compiling_seconds += time.perf_counter() - start
        outcome.found(rung, self.most)
        if rung is None or rung.peak_bytes > self.most:
            return None
        self.fitted |= plan.levers.keys()
        return Tried(plan, rung, time.perf_counter() - start)

    def head(self) -> Levers:
        """The lever that runs the loss of a large head in chunks, where there is one."""
        footprint = self.measurement.footprint
        if footprint.head is None:
            return {}
        above_bytes = self.most - sum(footprint.resident_bytes.values())
        positions = max(1, int(above_bytes * _HEAD_FRACTION / (_LOGIT_BYTES * footprint.head.classes)))
        power_of_two = 1 << positions.bit_length() - 1
        rows = max(ChunkLoss.fewest_positions, min(ChunkLoss.most_positions, power_of_two))
        return {ChunkLoss.name: {"head": footprint.head.path, "rows": rows}}

    def blocks(self) -> list[str | list[str]]:
        """The blocks of the model that can run again, where it has any."""
        # Where memory runs out, the settled plan stands all the same.
        with WithinMemory(self.declared), contextlib.suppress(CannotSplit):
            return blocks_of(self.declared, self.batch)
        return []

    def forget_captures(self) -> None:
        """Gives back what libraries took for the stream of captures: no plan without them holds it."""
        counters.take_workspaces(self.declared.device)

    def _may_compile(self, plan: Plan) -> bool:
        """Whether that is worth the seconds, or done already; the reason is kept where it is not."""
        if _as_compiled(plan) in self._compiled:
            return True
        gained_seconds = self.all_steps_seconds * (1 - _LEAST_COMPILED_SHARE)
        if gained_seconds < _LEAST_COMPILING_SECONDS:
            self.reasons[Compile.name] = (
                f"not tried: all steps together take {format_seconds(self.all_steps_seconds)}, "
                "which compiling would not pay back"
            )
        elif self._compiling_seconds > _LOOKING_SHARE * self.all_steps_seconds:
            self.reasons[Compile.name] = (
                f"looked for during {format_seconds(self._compiling_seconds)}, and no longer: all steps together take "
                f"{format_seconds(self.all_steps_seconds)}"
            )
        else:
            return True
        return False

    def _rung(self, plan: Plan) -> Rung | None:
        with own_code_under(plan.levers, self.declared):
            return self._measured(plan)

    def _measured(self, plan: Plan) -> Rung | None:
        with applied(plan, self.declared, plan.batch_rows) as execution:
            runs_whole = execution.runs_whole
        if runs_whole:
            return measured_whole(self.declared, self.batch, self.measurement, plan, self.most)
        return measured(
            self.declared, self.aliases, self.measurement, self.batch, plan, self.budget.counting, self.most,
            functools.partial(self._programs, plan),
        )  # fmt: skip

    def _programs(self, plan: Plan, execution: Execution) -> Programs:
        """What runs ``plan``; what was compiled for it before is captured as it is."""
        if execution.compiler is None:
            return programs_of(execution)
        return programs_of(execution, self._compiled.setdefault(_as_compiled(plan), loss_maker_of(execution)))

    def _refuse(self, name: str, found: str) -> None:
        self.reasons[name] = f"refused: {found}"


def _as_compiled(plan: Plan) -> str:
    """What is equal for plans whose chunks the compiler makes one function of."""
    same = (Graphs.name, ConvolutionAlgorithms.name, ExpandableSegments.name)
    return repr({name: knobs for name, knobs in plan.levers.items() if name not in same})
