"""Blocks of the model keep nothing inside and run again in backward, each on the whole batch.

Saves: what is kept inside the blocks, for all rows, but for one block at a time.
Costs: a second forward of the blocks.
Why the gradient is the same: the same kernels run on the same rows twice; the second run sees the buffers as they
stood before the first and changes none, so running statistics are updated once (torch.utils.checkpoint alone updates
them twice, pytorch#96136), and it makes the same draws.
Refuses: models without such blocks (children of a Sequential or ModuleList that contain a BatchNorm), so far.
Source: Chen, Xu, Zhang, Guestrin 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from samegrad.exact.mapped import Scheme
from samegrad.exact.recomputed import recomputed_blocks
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._variants import predicted
from samegrad.records import Exactness, Footprint


@dataclasses.dataclass(frozen=True)
class Recompute:
    """``blocks``: submodules that run again in backward."""

    blocks: list[str]

    name: ClassVar[str] = "recompute"
    slot: ClassVar[Slot] = Slot.RECOMPUTE
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        for variant in footprint.variants:
            if variant.lever == cls.name:
                yield cls(variant.knobs["blocks"])

    def predict(self, footprint: Footprint) -> Footprint:
        return predicted(self.name, self.knobs(), footprint, footprint.batch_rows)

    @property
    def forwards(self) -> float:
        return 2.0

    def scheme(self) -> Scheme:
        return functools.partial(recomputed_blocks, blocks=tuple(self.blocks))

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        sizes = (execution.batch_rows,) if execution.sizes is None else execution.sizes
        yield dataclasses.replace(execution, sizes=sizes, scheme=execution.scheme or self.scheme())

    def knobs(self) -> dict[str, Any]:
        return {"blocks": self.blocks}
