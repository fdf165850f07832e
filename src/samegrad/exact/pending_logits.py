"""What logits will be made of, before they are: the hidden rows, the head, and what was done since.

The head is linear in each hidden row, so whatever only moves positions about (slices, views, transposes) is done to the
hidden rows instead, and autograd follows it there. Casts and products with numbers are noted for later.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from samegrad.errors import CannotSplit
from samegrad.exact.chunked_head import ChunkLosses, losses_of_chunk
from samegrad.exact.logit_rows import LogitRows


@dataclasses.dataclass
class Uses:
    """What became of one head's outputs: calls, losses in chunks, and the operations that made the logits whole.

    ``positions``: of the largest loss. Whole logits must not change in place: those that are made later would not show
    it.
    """

    head: str
    calls: int = 0
    losses: int = 0
    positions: int = 0
    met: list[str] = dataclasses.field(default_factory=list)
    _whole: list[tuple[Tensor, int]] = dataclasses.field(default_factory=list)

    def note_loss(self, positions: int) -> None:
        self.losses += 1
        self.positions = max(self.positions, positions)

    def note_whole(self, operation: str, logits: Tensor) -> None:
        if operation not in self.met:
            self.met.append(operation)
        self._whole.append((logits, logits._version))

    def check_unchanged(self) -> None:
        """Raises CannotSplit when whole logits were written to."""
        if any(logits._version != version for logits, version in self._whole):
            raise CannotSplit(
                asked=f"the loss of {self.head} in chunks",
                found="its logits were changed in place, which logits made later would not show",
                do="write that operation out of place, or leave the lever chunk_loss out of the plan",
            )


@dataclasses.dataclass(frozen=True, eq=False)
class PendingLogits:
    """Logits of ``hidden`` (*positions, width) with their classes at ``class_axis``, to be made ``rows`` at a time.

    ``losses``: what computes the losses of so many.
    """

    hidden: Tensor
    logits: LogitRows
    class_axis: int
    dtype: torch.dtype
    rows: int
    uses: Uses
    losses: ChunkLosses = losses_of_chunk
    _made: dict[bool, Tensor] = dataclasses.field(init=False, default_factory=dict, repr=False)

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(self.hidden.shape[:-1])

    @property
    def classes(self) -> int:
        return self.logits.weight.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.positions[: self.class_axis], self.classes, *self.positions[self.class_axis :])

    def moved(self, hidden: Tensor, class_axis: int) -> PendingLogits:
        return dataclasses.replace(self, hidden=hidden, class_axis=class_axis)

    def then(self, step: Callable[[Tensor], Tensor], dtype: torch.dtype) -> PendingLogits:
        logits = dataclasses.replace(self.logits, then=(*self.logits.then, step))
        return dataclasses.replace(self, logits=logits, dtype=dtype)

    def detached(self) -> PendingLogits:
        return dataclasses.replace(self, hidden=self.hidden.detach(), logits=self.logits.detached())

    def whole(self, operation: str) -> Tensor:
        """The logits themselves, as the plain step makes them; once with a graph and once without."""
        with_graph = torch.is_grad_enabled()
        if with_graph not in self._made:
            if operation not in self.uses.met:
                warnings.warn(
                    f"samegrad: {operation} needs the whole logits of {self.uses.head}, which chunk_loss was to spare",
                    stacklevel=4,
                )
            self._made[with_graph] = self.logits.of(self.hidden).movedim(-1, self.class_axis)
            self.uses.note_whole(operation, self._made[with_graph])
        return self._made[with_graph]
