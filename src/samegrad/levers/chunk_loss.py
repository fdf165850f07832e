"""The loss of a large head a few positions at a time, its gradients formed in the forward.

Saves: the logits of all positions but one chunk's, and with them the copies a loss makes of them: the cast to float32,
the log-softmax, and the gradient of each.
Costs: no operation twice. The head's gradient is held from the loss on, and its weight is added up once a chunk.
Why the gradient is the same: a cross-entropy is a sum of terms over positions, each of one row of logits, over a count
that the targets alone decide. The gradient of that sum is the sum of the chunks' gradients, in float32 at least, times
the cotangent of the loss over the count. A loss with reduction="none" runs its chunks again in backward instead.
Refuses: heads whose logits meet anything but views, slices, casts, products with numbers, argmax and cross-entropy
(named with the operation when the step is examined); targets that are probabilities; two passes, whose first pass has
logits as its output rows; sharded parameters; compiled models. Beside the lever compile, models that do more to their
logits than give them out.
Source: Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989; Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary
Language Models", arXiv:2411.09009 (its exact mode).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from samegrad.declared import DeclaredStep
from samegrad.exact.find_head import HeadInChunks, named_head
from samegrad.exact.schemes import unchanged
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._variants import check_rows, peaks_by_phase, predicted_at
from samegrad.records import Exactness, Footprint, Origin

# Logits of a chunk where nobody chose: 256 MiB of them in float32.
_LOGITS_OF_A_CHUNK = 2**26


@dataclasses.dataclass(frozen=True)
class ChunkLoss:
    """``head``: path of the nn.Linear that gives the logits. ``rows``: positions whose logits exist at a time."""

    head: str
    rows: int

    name: ClassVar[str] = "chunk_loss"
    slot: ClassVar[Slot] = Slot.LOSS
    exactness: ClassVar[Exactness] = Exactness.SAME_SUM
    # Of a chunk: with fewer the head's products are too small to be worth their launches.
    fewest_positions: ClassVar[int] = 64
    # More are no faster.
    most_positions: ClassVar[int] = 4096

    def __post_init__(self) -> None:
        check_rows(self.name, self.rows)

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @classmethod
    def asked_for(cls, declared: DeclaredStep) -> list[Self]:
        """The lever on the declared head, if there is one, for a step whose plan leaves nothing to choose."""
        if declared.head is None:
            return []
        rows = max(1, _LOGITS_OF_A_CHUNK // named_head(declared.network, declared.head).out_features)
        power_of_two = 1 << (rows.bit_length() - 1)
        return [cls(declared.head, max(cls.fewest_positions, min(cls.most_positions, power_of_two)))]

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        """Chunks that are predicted to fit, halved from one to the next."""
        head = footprint.head
        if head is None:
            return
        positions = head.positions_per_row * _rows_at_a_time(footprint)
        rows = cls.most_positions
        while rows >= cls.fewest_positions:
            candidate = cls(head.path, rows)
            if rows < positions and candidate.predict(footprint).peak_allocated_bytes <= budget_bytes:
                yield candidate
            rows //= 2

    @classmethod
    def smallest(cls, footprint: Footprint) -> Iterator[int]:
        """The peak of the smallest chunk, if there is a head."""
        if footprint.head is not None:
            yield cls(footprint.head.path, cls.fewest_positions).predict(footprint).peak_allocated_bytes

    def predict(self, footprint: Footprint) -> Footprint:
        """By laws in the positions of a chunk and the rows that run at a time, all of them or a split's."""
        head = footprint.head
        if head is None:
            return footprint
        rows = _rows_at_a_time(footprint)
        by_phase = peaks_by_phase(head.laws, rows=self.rows, batch_rows=rows)
        return predicted_at(footprint, rows, by_phase, footprint.predicted_seconds(rows=rows))

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        head = HeadInChunks(self.head, self.rows)
        if execution.scheme is None and execution.sizes is None:
            execution = dataclasses.replace(execution, sizes=(execution.batch_rows,), scheme=unchanged)
        declared = head.deferred_in(execution.declared)
        yield dataclasses.replace(execution, declared=declared, head=head, one_pass_for=self.name)

    def knobs(self) -> dict[str, Any]:
        return {"head": self.head, "rows": self.rows}


def _rows_at_a_time(footprint: Footprint) -> int:
    """Of the plain step, or of a split that was taken before."""
    return footprint.rows if footprint.origin is Origin.PREDICTED else footprint.batch_rows
