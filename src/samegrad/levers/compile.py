"""The loss of a chunk, forward and backward, compiled as one function; the model itself is not wrapped.

Saves: what fused kernels do not keep for backward, the temporaries between them, and a second set of gradients: the
backward of a chunk adds to the sums of the step.
Costs: compilation, once for each size of chunk: seconds to minutes, which many steps must pay back.
Why the gradient is the same: the same function of the same rows under the same draws; kernels are fused, so rounding
and the order of sums are others, and no dtype is narrower.
Refuses: steps that take two passes and parts in chunks; a forward that changes state; beside chunk_loss a model that
does more to its logits than give them out; and on the way whatever the compiler cannot take.
Source: Ansel et al. 2024, "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph
Compilation".
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from samegrad.errors import BadInput
from samegrad.exact.compiler import CompilerSettings
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._variants import predicted_without
from samegrad.records import Exactness, Footprint

_MODES = ("default", "max-autotune-no-cudagraphs")


@dataclasses.dataclass(frozen=True)
class Compile:
    """``mode`` and ``fullgraph`` as in torch.compile; ``recompile_limit``: after which Python runs the chunk."""

    mode: str = "default"
    fullgraph: bool = False
    recompile_limit: int = 8

    name: ClassVar[str] = "compile"
    slot: ClassVar[Slot] = Slot.COMPILE
    exactness: ClassVar[Exactness] = Exactness.SAME_SUM

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise BadInput(
                asked=f"{self.name} with mode={self.mode!r}",
                found="not one of " + ", ".join(_MODES),
                do="for graphs of kernels take the lever graphs, which keeps its memory within the plan",
            )

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        """The compiler's own defaults. What they save is measured, not predicted."""
        yield cls()

    def predict(self, footprint: Footprint) -> Footprint:
        """As without it: what a compiler keeps is known when it has compiled."""
        return predicted_without(footprint)

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        sizes = (execution.batch_rows,) if execution.sizes is None else execution.sizes
        # Blocks that run again are told to the compiler; it does not see hooks.
        settings = CompilerSettings(**self.knobs(), again=execution.again)
        yield dataclasses.replace(execution, sizes=sizes, compiler=settings, inside=None)

    def knobs(self) -> dict[str, Any]:
        return {"mode": self.mode, "fullgraph": self.fullgraph, "recompile_limit": self.recompile_limit}
