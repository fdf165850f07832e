"""That the step's code is the same for a chunk's rows as for the whole batch's, looked at before chunks first run.

Trials on eight rows cannot see ``if len(x) > 16``. So the code is followed without data, on the rows of the trials, of
every chunk and of the batch, and must make the same calls with the same numbers (``exact/compare_calls.py``): the
model, or the parts of it that are in chunks, and the loss where it runs a chunk at a time. Where the code needs values
it is followed up to there, the outputs of a few rows alone are compared with those among as many as the plan runs, and
it is said that nobody looked further.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit, CannotTrace
from samegrad.exact.calls import Calls
from samegrad.exact.compare_calls import Difference, first_difference
from samegrad.exact.probes import PROBE_ROWS
from samegrad.exact.randomness import StepKey
from samegrad.exact.row_blind import is_row_blind
from samegrad.exact.row_comparisons import close
from samegrad.exact.sharded import ranks_of
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import step_undisturbed
from samegrad.execute.examined import Kind
from samegrad.execute.ways import Ways
from samegrad.levers import Execution, levers_of
from samegrad.levers.segments import Segments
from samegrad.measure.follow_calls import follow_calls
from samegrad.records import Plan
from samegrad.trees import RowLayout

_log = logging.getLogger("samegrad")


@dataclasses.dataclass(frozen=True)
class _Code:
    """What of the step's code runs in chunks: the modules below ``paths``, and the loss."""

    paths: tuple[str, ...]
    with_loss: bool

    @classmethod
    def in_chunks(cls, plan: Plan, execution: Execution, ways: Ways) -> _Code:
        segments = [lever for lever in levers_of(plan) if isinstance(lever, Segments)]
        paths = tuple(path for lever in segments for path in lever.paths)
        found = None if execution.mapping is not None else ways.by_rows
        # A loss that calls collectives waits for other ranks.
        return cls(paths, with_loss=found is not None and found.passes == 1 and not found.collectives)

    def of(self, run: Calls) -> Calls:
        """The calls of ``run`` that are this code's."""
        if not self.paths:
            return run
        below = tuple(f"{path}{end}" for path in self.paths for end in (" ", "."))
        return dataclasses.replace(run, calls=[call for call in run.calls if call.place.startswith(below)])


class RowCounts:
    """What was looked at, for each kind of batch and mode. ``notes``: what could not be, in words."""

    def __init__(self, declared: DeclaredStep) -> None:
        self._declared = declared
        self._seen: dict[tuple[Kind, _Code], _Seen] = {}
        self.notes: list[str] = []

    def check(self, plan: Plan, execution: Execution, ways: Ways, kind: Kind, batch: Any, layout: RowLayout) -> None:
        """That the code under ``plan`` is one function of its rows, however many run.

        Raises CannotSplit naming the module or the loss, and the line. Nothing of the user's changes.
        """
        sizes = [size for size in execution.sizes or () if size]
        if len(sizes) < 2:
            return
        code = _Code.in_chunks(plan, execution, ways)
        seen = self._seen.setdefault((kind, code), _Seen())
        rows = {min(PROBE_ROWS, layout.rows), *sizes, layout.rows} - seen.rows
        if not rows:
            return
        if not is_row_blind(self._declared, batch):
            if ranks_of(self._declared.modules) is None and not ways.collectives:
                self._look(seen, code, sorted(rows), batch, layout, (ways, max(sizes)))
            else:
                self._note("ranks wait for each other in the forward, so its code was not followed on other row counts")
        seen.rows |= rows

    def _look(
        self,
        seen: _Seen,
        code: _Code,
        rows: Sequence[int],
        batch: Any,
        layout: RowLayout,
        chunks: tuple[Ways, int],
    ) -> None:
        try:
            runs = self._follow(code, batch, layout, rows)
            found = first_difference([*seen.ends, *runs])
            if found is not None:
                # Code that fills a cache for so many rows takes another way once.
                known = {*rows, *(run.rows for run in seen.ends)}
                runs = self._follow(code, batch, layout, sorted(known), warm=max(known))
                if found := first_difference(runs):
                    raise _other_code(found)
        except CannotTrace as error:
            self._look_at_outputs(batch, layout, chunks, error.found)
            return
        if failures := [run.failure for run in runs if run.failure]:
            self._look_at_outputs(batch, layout, chunks, failures[0])
        if not seen.ends:
            seen.ends = [runs[0], runs[-1]]

    def _follow(
        self, code: _Code, batch: Any, layout: RowLayout, rows: Sequence[int], warm: int = 0
    ) -> list[Calls]:
        followed = follow_calls(self._declared, batch, layout, rows, with_loss=code.with_loss, warm=warm)
        return [code.of(run) for run in followed]

    def _look_at_outputs(self, batch: Any, layout: RowLayout, chunks: tuple[Ways, int], why: str) -> None:
        """The same rows among fewest and most, for real. Raises CannotSplit when they differ."""
        ways, most = chunks
        few = min(PROBE_ROWS, most)
        if ways.by_rows is not None and few < most:
            alone, among = (_outputs(self._declared, ways, batch, layout, n) for n in (few, most))
            for (path, a), b in zip(trees.flatten_with_paths(alone, "outputs"), trees.leaves_of(among)):
                if isinstance(a, Tensor) and not (isinstance(b, Tensor) and close(b[:few], a)):
                    raise CannotSplit(
                        asked="split the rows of a step",
                        found=f"{path} of the first {few} rows are others when {most} rows run with them",
                        do="make the model's rows independent of the batch's length, or run the step whole "
                        "(rows=<the batch's rows>)",
                    )
        self._note(
            f"whether the code does something else above {most} rows was not seen, since it could not be followed "
            f"without data ({why}); verify_step compares the gradients"
        )

    def _note(self, words: str) -> None:
        if words not in self.notes:
            self.notes.append(words)
            _log.warning("samegrad: %s", words)


@dataclasses.dataclass
class _Seen:
    """The numbers of rows that were looked at, and the runs on the fewest and the most of them."""

    rows: set[int] = dataclasses.field(default_factory=set)
    ends: list[Calls] = dataclasses.field(default_factory=list)


def _outputs(declared: DeclaredStep, ways: Ways, batch: Any, layout: RowLayout, rows: int) -> Any:
    draws = StepDraws(ways.sites, StepKey.fixed(0))
    chunk = trees.move(trees.slice_rows(batch, layout, 0, rows), declared.device)
    with step_undisturbed(declared), torch.no_grad(), draws.rows(torch.arange(rows, device=declared.device)):
        return trees.map_tensors(declared.forward(declared.network, chunk), torch.Tensor.detach)


def _other_code(found: Difference) -> CannotSplit:
    return CannotSplit(
        asked="split the rows of a step",
        found=f"{found.place} {found.words}: the code asks how many rows there are",
        do="take that out of the code, or make it the same for any number of rows, or run the step whole (a larger "
        "budget, or rows=<the batch's rows>)",
    )
