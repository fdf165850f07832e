"""The steps of the sweep over budgets: a network, its batch and its optimizer, as a training loop has them."""

from __future__ import annotations

import dataclasses

import _steps
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Workload:
    """``couples_rows``: micro-batches compute another function."""

    case: _steps.StepCase
    couples_rows: bool = False


WORKLOADS = {
    "gpt2": Workload(_steps.StepCase("gpt2 32 bf16", "gpt2", 32, "bf16")),
    "vit_b16": Workload(_steps.StepCase("vit_b16 128 bf16", "vit_b16", 128, "bf16")),
    "resnet50_gn": Workload(_steps.StepCase("resnet50_gn 128 bf16", "resnet50_gn", 128, "bf16")),
    "unet": Workload(_steps.StepCase("unet 64 bf16", "unet", 64, "bf16")),
    "resnet50": Workload(_steps.StepCase("resnet50 128 bf16", "resnet50", 128, "bf16"), couples_rows=True),
}


def loss_of(outputs: Tensor, batch: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """As most training loops have it: classes and tokens by cross-entropy in float32."""
    if batch[1].is_floating_point():
        return F.mse_loss(outputs.to(dtype), batch[1])
    return F.cross_entropy(outputs.flatten(0, -2).to(dtype), batch[1].flatten())


@dataclasses.dataclass
class Training:
    """A model, its batch and its optimizer on the device."""

    workload: Workload
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, workload: Workload) -> Training:
        case = workload.case
        model = _steps.make_model(case, "cuda")
        torch.manual_seed(1)
        inputs, targets = _steps.make_batch(case, "cuda")
        if inputs.is_floating_point():
            inputs = torch.randn_like(inputs)
            targets = torch.randn_like(targets) if targets.is_floating_point() else torch.randint_like(targets, 1000)
        return cls(workload, model, (inputs, targets), torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))

    @property
    def rows(self) -> int:
        return self.workload.case.rows

    def loss(self, rows: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(self.forward(self.model, rows), rows)

    @staticmethod
    def forward(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cuda", NARROW):
            outputs: Tensor = model(rows[0])
        return outputs
