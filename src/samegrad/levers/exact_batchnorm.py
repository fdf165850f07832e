"""BatchNorm a few rows at a time with the statistics of all of them: chunks go from one layer to the next together.

Saves: what is kept between BatchNorm layers, of all rows but one chunk's; of the layers' inputs all but every
``keep_every``-th; of ``together`` layers' also while the next one's are made.
Costs: lockstep, a second forward (a third at most where not every boundary is kept; g + 1 forwards and half as many
backwards for g layers together) and launches for every chunk;
rendezvous, no forward but transfers to the host of everything that backward needs.
Why the gradient is the same: statistics are those of all rows, merged as counts, means and sums of squares, and they
are differentiated as such: what they contribute reaches every row. Running statistics are updated once, and in
lockstep so is other state that chunks' contributions add up to (codebooks, counts).
Refuses: models without BatchNorm in training mode, and those that lockstep cannot record and rendezvous cannot meet in.
Source: Ioffe, Szegedy 2015, arXiv:1502.03167; Chan, Golub, LeVeque 1983 for the merge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from samegrad.errors import BadInput
from samegrad.exact.lockstep import lockstep
from samegrad.exact.rendezvous import rendezvous
from samegrad.exact.schemes import Scheme
from samegrad.exact.state import StateRule
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.tracings import Tracings
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._variants import candidates_of, check_rows, chunk_sizes, predicted
from samegrad.records import Exactness, Footprint

_LOCKSTEP, _RENDEZVOUS = "lockstep", "rendezvous"


@dataclasses.dataclass(frozen=True)
class ExactBatchNorm:
    """``rows`` at a time; ``scheme`` "lockstep" (recorded, run again in backward) or "rendezvous" (any Python).

    ``keep_every``: how many BatchNorm layers lie between inputs that are kept for all rows; lockstep only.
    ``together``: of how many layers the inputs are there for one chunk only, made again for each of them; likewise.
    """

    rows: int | list[int]
    scheme_name: str = _LOCKSTEP
    keep_every: int = 1
    together: int = 1

    name: ClassVar[str] = "exact_batchnorm"
    slot: ClassVar[Slot] = Slot.SPLIT
    exactness: ClassVar[Exactness] = Exactness.SAME_SUM

    def __post_init__(self) -> None:
        check_rows(self.name, self.rows)
        if self.scheme_name not in (_LOCKSTEP, _RENDEZVOUS):
            raise BadInput(
                asked=f"{self.name} with scheme_name={self.scheme_name!r}",
                found="no such scheme",
                do=f"use {_LOCKSTEP!r} or {_RENDEZVOUS!r}",
            )

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        """For each way that was measured, the most rows predicted to fit, then rungs down to one row."""
        for variant, rows in candidates_of(cls.name, footprint, budget_bytes):
            yield cls(rows, **variant.knobs)

    def predict(self, footprint: Footprint) -> Footprint:
        return predicted(self.name, self.knobs(), footprint, self.rows)

    @property
    def forwards(self) -> float:
        if self.scheme_name == _RENDEZVOUS:
            return 1.0
        if self.together > 1:
            # One more than there are together, and for each further two the backward of all, which takes two forwards.
            return 2.0 * self.together
        return 2.0 if self.keep_every == 1 else 3.0

    def scheme(self) -> Scheme:
        if self.scheme_name == _RENDEZVOUS:
            return _met
        return functools.partial(_in_lockstep, keep_every=self.keep_every, together=self.together)

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        sizes = chunk_sizes(self.rows, execution.batch_rows)
        yield dataclasses.replace(execution, sizes=sizes, scheme=self.scheme(), calls_submodules=False)

    def knobs(self) -> dict[str, Any]:
        return {
            "rows": self.rows, "scheme_name": self.scheme_name, "keep_every": self.keep_every,
            "together": self.together,
        }  # fmt: skip


def _in_lockstep(
    network: nn.Module,
    *,
    sizes: Sequence[int],
    draws: StepDraws,
    rules: Sequence[StateRule],
    keep_every: int,
    together: int,
) -> AbstractContextManager[None]:
    return lockstep(
        network, sizes=sizes, keep_every=keep_every, together=together, chunk_context=_by_stage(draws),
        tracings=Tracings.kept_for(network), rules=rules,
    )  # fmt: skip


def _met(
    network: nn.Module, *, sizes: Sequence[int], draws: StepDraws, rules: Sequence[StateRule]
) -> AbstractContextManager[None]:
    # Whatever else a chunk changes is refused there.
    return rendezvous(network, sizes=sizes, chunk_context=_by_stage(draws))


def _by_stage(draws: StepDraws) -> Callable[[Tensor, int], AbstractContextManager[object]] | None:
    """The draws of a stage, which is first entered in forward, after the stages before it."""
    if draws.sites is None:
        return None
    stages: dict[int, Callable[[Tensor], AbstractContextManager[object]]] = {}

    def drawing(rows: Tensor, stage: int) -> AbstractContextManager[object]:
        if stage not in stages:
            stages[stage] = draws.part()
        return stages[stage](rows)

    return drawing
