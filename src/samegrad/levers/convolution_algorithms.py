"""cuDNN tries its algorithms on each new shape of a convolution, and keeps the fastest (its "benchmark" switch).

Saves: nothing; time, where cuDNN's first guess is not its best algorithm.
Costs: trials in the first step of each shape of chunk, and the workspaces that faster algorithms want. Trials take
memory too; the plan is measured with them, under the budget's cap.
Why the gradient is the same: every algorithm computes the same convolution; they round and add up in other orders.
Which one is taken may differ from run to run.
Refuses: models without a convolution, and steps off CUDA; nothing is to be done where it is switched on already.
Source: PyTorch documentation, "Reproducibility", section "CUDA convolution benchmarking".
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch

from samegrad.declared import DeclaredStep
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._variants import predicted_without
from samegrad.module_walk import convolves
from samegrad.records import Exactness, Footprint


@dataclasses.dataclass(frozen=True)
class ConvolutionAlgorithms:
    """No knobs: trials while the step runs, and no change of what the user set at any other time."""

    name: ClassVar[str] = "convolution_algorithms"
    slot: ClassVar[Slot] = Slot.ALGORITHMS
    exactness: ClassVar[Exactness] = Exactness.SAME_SUM

    @classmethod
    def unsuited(cls, declared: DeclaredStep) -> str | None:
        if declared.device.type != "cuda":
            return f"cuDNN's algorithms are CUDA's, and the model is on {declared.device}"
        if not convolves(declared.modules):
            return "the model has no convolution layer"
        if torch.backends.cudnn.benchmark:
            return "not needed: torch.backends.cudnn.benchmark is on"
        return None

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        yield cls()

    def predict(self, footprint: Footprint) -> Footprint:
        """As without it: what another algorithm wants and gains is measured."""
        return predicted_without(footprint)

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            yield execution
        finally:
            torch.backends.cudnn.benchmark = before

    def knobs(self) -> dict[str, Any]:
        return {}
