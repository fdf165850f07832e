"""Training steps whose memory is predicted and measured: a network, its rows, its precision, and how it is run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import _networks as networks
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import samegrad as sg


@dataclasses.dataclass(frozen=True)
class StepCase:
    """``rows_at_a_time``: None for the plain call. ``recomputed``: every block under torch.utils.checkpoint.

    ``precision``: "fp32" or "bf16" (autocast). ``calibrates``: measured to fit a card's table, never to judge it.
    """

    name: str
    network: str
    rows: int
    precision: str = "fp32"
    recomputed: bool = False
    rows_at_a_time: int | None = None
    optimizer: str = "adamw"
    calibrates: bool = False


# Network: how it is made, and the shape of a row; token models say so with a vocabulary.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet34": (lambda: networks.ResNet(networks.BasicBlock, [3, 4, 6, 3]), (3, 224, 224)),
    "resnet50_gn": (lambda: networks.ResNet(networks.Bottleneck, [3, 4, 6, 3], "group"), (3, 224, 224)),
    "resnet50": (lambda: networks.ResNet(networks.Bottleneck, [3, 4, 6, 3]), (3, 224, 224)),
    "vit_b16": (networks.VisionTransformer, (3, 224, 224)),
    "gpt2": (networks.GPT, (1024,)),
    "gpt_small": (lambda: networks.GPT(6, 512, 8, 32000), (512,)),
    "unet": (networks.UNet, (3, 128, 128)),
    "lstm": (networks.Recurrent, (256, 256)),
    "mlp": (networks.Perceptron, (1024,)),
    # Only to calibrate with: the smaller brothers.
    "resnet18": (lambda: networks.ResNet(networks.BasicBlock, [2, 2, 2, 2]), (3, 160, 160)),
    "resnet26_gn": (lambda: networks.ResNet(networks.Bottleneck, [2, 2, 2, 2], "group"), (3, 192, 192)),
    "vit_s16": (lambda: networks.VisionTransformer(8, 384, 6, 192), (3, 192, 192)),
    "gpt_mini": (lambda: networks.GPT(4, 384, 6, 16000), (256,)),
    "unet_thin": (lambda: networks.UNet(32), (3, 96, 96)),
    "lstm_small": (lambda: networks.Recurrent(128, 512, 2), (128, 128)),
    "mlp_small": (lambda: networks.Perceptron(512, 2048, 4), (512,)),
}

CASES = [
    StepCase("resnet34 105 fp32 sgd", "resnet34", 105, optimizer="sgd"),
    StepCase("resnet34 105 bf16", "resnet34", 105, "bf16"),
    StepCase("resnet34 64 fp32", "resnet34", 64),
    StepCase("resnet34 35 fp32", "resnet34", 35),
    StepCase("resnet34 105 fp32 recomputed", "resnet34", 105, recomputed=True),
    StepCase("resnet34 105 bf16 recomputed", "resnet34", 105, "bf16", recomputed=True),
    StepCase("resnet50 48 fp32", "resnet50", 48),
    StepCase("resnet50 64 bf16", "resnet50", 64, "bf16"),
    StepCase("resnet50 64 bf16 recomputed", "resnet50", 64, "bf16", recomputed=True),
    StepCase("resnet50_gn 48 fp32", "resnet50_gn", 48),
    StepCase("resnet50_gn 64 bf16", "resnet50_gn", 64, "bf16"),
    StepCase("resnet50_gn 64 bf16 recomputed", "resnet50_gn", 64, "bf16", recomputed=True),
    StepCase("resnet50_gn 64 bf16 by 16", "resnet50_gn", 64, "bf16", rows_at_a_time=16),
    StepCase("vit_b16 48 fp32", "vit_b16", 48),
    StepCase("vit_b16 96 bf16", "vit_b16", 96, "bf16"),
    StepCase("vit_b16 96 bf16 recomputed", "vit_b16", 96, "bf16", recomputed=True),
    StepCase("vit_b16 96 bf16 by 16", "vit_b16", 96, "bf16", rows_at_a_time=16),
    StepCase("gpt2 4 fp32", "gpt2", 4),
    StepCase("gpt2 8 bf16", "gpt2", 8, "bf16"),
    StepCase("gpt2 8 bf16 recomputed", "gpt2", 8, "bf16", recomputed=True),
    StepCase("gpt2 8 fp32 recomputed", "gpt2", 8, recomputed=True),
    StepCase("gpt2 8 bf16 by 2", "gpt2", 8, "bf16", rows_at_a_time=2),
    StepCase("gpt_small 24 fp32", "gpt_small", 24),
    StepCase("gpt_small 32 bf16", "gpt_small", 32, "bf16"),
    StepCase("gpt_small 32 fp32 by 6", "gpt_small", 32, rows_at_a_time=6),
    StepCase("unet 16 fp32", "unet", 16),
    StepCase("unet 32 bf16", "unet", 32, "bf16"),
    StepCase("unet 32 bf16 recomputed", "unet", 32, "bf16", recomputed=True),
    StepCase("unet 32 bf16 by 5", "unet", 32, "bf16", rows_at_a_time=5),
    StepCase("lstm 64 fp32", "lstm", 64),
    StepCase("lstm 96 bf16", "lstm", 96, "bf16"),
    StepCase("lstm 96 fp32 by 20", "lstm", 96, rows_at_a_time=20),
    StepCase("mlp 8192 fp32", "mlp", 8192),
    StepCase("mlp 16384 bf16", "mlp", 16384, "bf16"),
    StepCase("mlp 16384 fp32 recomputed", "mlp", 16384, recomputed=True),
    StepCase("mlp 16384 fp32 by 3000", "mlp", 16384, rows_at_a_time=3000),
    StepCase("resnet18 48 fp32", "resnet18", 48, calibrates=True),
    StepCase("resnet18 80 bf16", "resnet18", 80, "bf16", calibrates=True),
    StepCase("resnet26_gn 32 fp32", "resnet26_gn", 32, calibrates=True),
    StepCase("resnet26_gn 48 bf16", "resnet26_gn", 48, "bf16", calibrates=True),
    StepCase("vit_s16 64 fp32", "vit_s16", 64, calibrates=True),
    StepCase("vit_s16 96 bf16", "vit_s16", 96, "bf16", calibrates=True),
    StepCase("gpt_mini 32 fp32", "gpt_mini", 32, calibrates=True),
    StepCase("gpt_mini 48 bf16", "gpt_mini", 48, "bf16", calibrates=True),
    StepCase("unet_thin 32 fp32", "unet_thin", 32, calibrates=True),
    StepCase("unet_thin 48 bf16", "unet_thin", 48, "bf16", calibrates=True),
    StepCase("lstm_small 64 fp32", "lstm_small", 64, calibrates=True),
    StepCase("lstm_small 96 bf16", "lstm_small", 96, "bf16", calibrates=True),
    StepCase("mlp_small 4096 fp32", "mlp_small", 4096, calibrates=True),
    StepCase("mlp_small 8192 bf16", "mlp_small", 8192, "bf16", calibrates=True),
]


def make_model(case: StepCase, device: str) -> nn.Module:
    make, _ = NETWORKS[case.network]
    torch.manual_seed(0)
    with torch.device(device):
        model = make()
    if case.recomputed:
        for block in _blocks_of(model):
            block.forward = _recomputing(block.forward)  # type: ignore[method-assign]  # the user's own way to do it
    return model


def _blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    for name in ("blocks", "down", "up", "layers"):
        yield from getattr(model, name, ())


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def make_batch(case: StepCase, device: str) -> tuple[Tensor, Tensor]:
    _, shape = NETWORKS[case.network]
    rows = case.rows
    if len(shape) == 1 and case.network.startswith("gpt"):
        tokens = torch.randint(16000, (rows, *shape), device=device)
        return tokens, tokens.roll(-1, 1)
    inputs = torch.zeros(rows, *shape, device=device)
    if case.network.startswith("unet"):
        return inputs, torch.zeros_like(inputs)
    return inputs, torch.zeros(rows, dtype=torch.int64, device=device)


def make_optimizer(case: StepCase, model: nn.Module) -> torch.optim.Optimizer:
    if case.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def loss_of(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error for pictures, cross-entropy for classes and tokens."""
    if batch[1].is_floating_point():
        return F.mse_loss(outputs.float(), batch[1])
    return F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


def forward_of(case: StepCase) -> Callable[[nn.Module, Any], Any]:
    """The user's own autocast, where the case asks for it."""

    def forward(model: nn.Module, batch: Any) -> Any:
        inputs = batch[0]
        narrow = case.precision == "bf16"
        context = torch.autocast("cuda", torch.bfloat16) if narrow else contextlib.nullcontext()
        with context:
            return model(inputs)

    return forward


def make_step(case: StepCase, device: str) -> tuple[sg.Step, tuple[Tensor, Tensor]]:
    model = make_model(case, device)
    step = sg.Step(
        model, loss_of, optimizer=make_optimizer(case, model), forward=forward_of(case),
        rows=case.rows_at_a_time or case.rows,
    )  # fmt: skip
    return step, make_batch(case, device)
