"""Blocks of the model keep nothing inside and run again in backward: on the whole batch, or in each chunk of it.

Saves: what is kept inside the blocks, but for one block at a time; of a run of blocks, also what one hands to the next.
Costs: a second forward of the blocks, but for what comes after the last tensor that is needed.
Why the gradient is the same: the same kernels run on the same rows twice; the second run sees the buffers as they
stood before the first and changes none, so running statistics are updated once (torch.utils.checkpoint alone updates
them twice, pytorch#96136), and it makes the same draws.
Refuses: blocks whose second run is another one (caches that they write, inputs changed in place, gradients asked for
inside), sharded parameters, and exact_batchnorm, whose stretches lie across the blocks.
Source: Chen, Xu, Zhang, Guestrin 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from samegrad.errors import BadInput
from samegrad.exact.recomputed import as_runs, recomputed_blocks
from samegrad.exact.schemes import Scheme
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._variants import predicted
from samegrad.records import Exactness, Footprint


@dataclasses.dataclass(frozen=True)
class Recompute:
    """``blocks``: submodules that run again in backward. A list among them is a run that runs again as one."""

    blocks: list[str | list[str]]

    name: ClassVar[str] = "recompute"
    slot: ClassVar[Slot] = Slot.RECOMPUTE
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    def __post_init__(self) -> None:
        listed = self.blocks if isinstance(self.blocks, list) else []
        runs = as_runs([entry for entry in listed if isinstance(entry, (str, list))])
        if not runs or len(runs) < len(listed) or not all(run and all(isinstance(n, str) for n in run) for run in runs):
            raise BadInput(
                asked=f"{self.name} with blocks={self.blocks!r}",
                found="not a list of submodules' names and lists of such names",
                do='give names, or lists of blocks called one after another: ["stem", ["layers.0", "layers.1"]]',
            )

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
        return functools.partial(recomputed_blocks, blocks=self.blocks)

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        sizes = (execution.batch_rows,) if execution.sizes is None else execution.sizes
        again = tuple(tuple(run) for run in as_runs(self.blocks))
        yield dataclasses.replace(execution, sizes=sizes, inside=self.scheme(), again=again)

    def knobs(self) -> dict[str, Any]:
        return {"blocks": self.blocks}
