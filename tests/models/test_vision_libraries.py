"""torchvision and timm architectures, built small; skipped where their wheels were built for another torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import suite
from .suite import Batch, Case

CLASSES = 5


def pictures(rows: int, size: int = 32) -> Batch:
    """(rows, 3, size, size), and more of one class than of the others."""
    generator = torch.Generator().manual_seed(rows)
    return {"x": torch.randn(rows, 3, size, size, generator=generator), "labels": torch.arange(rows) % (CLASSES - 2)}


def classified(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch["labels"])


def classified_thrice(outputs: Any, batch: Batch) -> Tensor:
    """GoogLeNet's loss: its two classifiers on the way count less, and are there in training mode only."""
    if isinstance(outputs, Tensor):
        return classified(outputs, batch)
    last, *others = (outputs.logits, outputs.aux_logits1, outputs.aux_logits2)
    return classified(last, batch) + 0.3 * sum(classified(other, batch) for other in others)


def shown(model: nn.Module, batch: Batch) -> Any:
    return model(batch["x"])


def torchvision(make: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make(suite.imported("torchvision").models)


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: suite.imported("timm").create_model(name, num_classes=CLASSES, **options)


def small_convnext(models: Any) -> nn.Module:
    block = models.convnext.CNBlockConfig
    return models.ConvNeXt([block(8, 16, 2), block(16, None, 2)], 0.1, num_classes=CLASSES)


def small_swin(models: Any) -> nn.Module:
    return models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.1, num_classes=CLASSES)


def small_efficientnet(models: Any) -> nn.Module:
    block = models.efficientnet.MBConvConfig
    settings = [block(1, 3, 1, 8, 8, 1, 1.0, 1.0), block(4, 3, 2, 8, 12, 2, 1.0, 1.0)]
    return models.EfficientNet(settings, 0.0, 0.0, num_classes=CLASSES, last_channel=16)


def small_vit(models: Any) -> nn.Module:
    return models.VisionTransformer(32, 8, 3, 2, 16, 24, dropout=0.1, num_classes=CLASSES)


seen = functools.partial(Case, batch=pictures, loss_fn=classified, forward=shown)
# Of less, the last stages leave one pixel a channel, and BatchNorm five numbers to take a variance of.
large = functools.partial(seen, batch=functools.partial(pictures, size=64))
RESNET = tuple(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2))

CASES: dict[str, Case] = {
    "ConvNeXt": seen(torchvision(small_convnext), blocks=("features.1.0", "features.1.1", "features.3.0")),
    "Swin": seen(torchvision(small_swin), blocks=("features.1.0", "features.1.1", "features.3.0")),
    "EfficientNet": seen(torchvision(small_efficientnet), blocks=("features.1", "features.2.0", "features.2.1")),
    "vision transformer": seen(
        torchvision(small_vit), blocks=("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1")
    ),
    "timm vision transformer": seen(
        timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, drop_path_rate=0.1),
        blocks=("blocks.0", "blocks.1", "blocks.2"),
    ),
    "timm ConvNeXt": seen(timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 16, 16)), blocks=("stages.0",)),
}  # fmt: skip
LARGE: dict[str, Case] = {
    "ResNet-18": large(torchvision(lambda models: models.resnet18(num_classes=CLASSES)), blocks=RESNET),
    "ResNet-50": large(torchvision(lambda models: models.resnet50(num_classes=CLASSES)), blocks=RESNET),
    "GoogLeNet": large(
        torchvision(lambda models: models.googlenet(num_classes=CLASSES, init_weights=False)),
        loss_fn=classified_thrice, blocks=("inception3a", "inception4e", "inception5b"),
    ),
    "timm ResNet-18": large(timm("resnet18"), blocks=RESNET),
}  # fmt: skip


@pytest.mark.parametrize("check", suite.CHECKS)
@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_the_promises_hold(name: str, check: str) -> None:
    suite.CHECKS[check]((CASES | LARGE)[name])
