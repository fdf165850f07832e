"""What a run leaves, for whoever looks at it without samegrad: weights and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The state of ``module`` by name, on the host."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def save_weights(module: nn.Module, folder: Path, name: str) -> list[Path]:
    """The state of ``module`` twice, as safetensors and as a ``.pt`` for ``weights_only=True``; the two paths."""
    weights, written = weights_of(module), [folder / f"{name}.safetensors", folder / f"{name}.pt"]
    safetensors.torch.save_file(weights, written[0])
    torch.save(weights, written[1])
    return written


def save_picture(figure: Figure, path: Path) -> Path:
    """The figure as PNG at ``path``, without date or version in it: the same picture is the same file."""
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path
