"""The model's forward on some rows of a step: under the step's draws, and on a copy of the state that it changes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from samegrad.declared import DeclaredStep
from samegrad.exact import program
from samegrad.exact.state import StateRule, StateTransaction
from samegrad.exact.step_draws import StepDraws


@dataclasses.dataclass(frozen=True)
class StepForward:
    """What runs chunks of one step of ``batch_rows`` rows.

    ``first`` computes rows for the first time and keeps what they make of the state, ``again`` recomputes them.
    """

    declared: DeclaredStep
    batch_rows: int
    draws: StepDraws
    state: StateTransaction
    row_ids: Tensor | None = None

    @classmethod
    def of(
        cls, declared: DeclaredStep, batch_rows: int, draws: StepDraws, rules: Sequence[StateRule] = ()
    ) -> StepForward:
        """For a new step of ``batch_rows`` rows."""
        state = StateTransaction(declared.network, rules)
        asked = draws.sites is not None or bool(rules)
        ids = torch.arange(batch_rows, device=declared.device) if asked else None
        return cls(declared, batch_rows, draws, state, ids)

    def ids(self, part: slice) -> Tensor | None:
        """(rows,) int64 on the device: the places in the batch of the rows ``part``; None where nobody asks."""
        return None if self.row_ids is None else self.row_ids[part]

    def first(self, chunk: Any, ids: Tensor | None) -> Any:
        return self._run(chunk, ids, 1.0 if ids is None else len(ids) / self.batch_rows)

    def again(self, chunk: Any, ids: Tensor | None) -> Any:
        return self._run(chunk, ids, None)

    def idle(self, chunk: Any) -> Any:
        """A chunk that is run for other ranks' sake, on rows that another chunk brings."""
        ids = None if self.row_ids is None else self.row_ids[:1]
        return self._run(chunk, ids, None)

    def only_state(self, chunk: Any, ids: Tensor | None) -> None:
        """A chunk without a share of the loss: run only for what it makes of the state."""
        if self.state.kept:
            with torch.no_grad():
                self.first(chunk, ids)

    def check(self, loss: Tensor) -> None:
        """Raises CannotSplit for a loss whose gradients have no place; what was examined needs no look."""

    def warming_up(self) -> AbstractContextManager[None]:
        """A block in which chunks run that are not the step's: the state that they change is put aside as ever."""
        return contextlib.nullcontext()

    def committed(self) -> AbstractContextManager[None]:
        return self.state.committed()

    def _run(self, chunk: Any, ids: Tensor | None, share: float | None) -> Any:
        with self.draws.rows(ids) as running, self.draws.drawn_by(running), self.state.chunk(share):
            return program.seen(self.declared.forward(self.declared.network, chunk))
