"""The file that inference starts from: weights, what the network is, the styles' names, and the codec if there is one.

Tensors, numbers and words only: it is read without running anything in it. Plain PyTorch.
"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import torch

from .codec import LinearCodec
from .model import LGTUNet, StyleFlow
from .sampling import Sampler

FILE_NAME = "flow_style.pt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedFlow:
    """A trained network with all that styling needs."""

    network: LGTUNet
    names: tuple[str, ...]
    sampler: Sampler
    codec: LinearCodec | None


def save_flow(
    path: Path, model: StyleFlow, *, names: tuple[str, ...], base_channels: int, sampler: Sampler,
    codec: LinearCodec | None,
) -> Path:  # fmt: skip
    """Writes ``model``'s network to ``path``; ``torch.load(path, weights_only=True)`` reads it."""
    torch.save(
        {
            "weights": {name: value.detach().cpu() for name, value in model.network.state_dict().items()},
            "styles": list(names),
            "base_channels": base_channels,
            "sampler": dataclasses.asdict(sampler),
            "codec": None if codec is None else dict(vars(codec)),
        },
        path,
    )
    return path


def load_flow(path: Path) -> SavedFlow:
    """What ``save_flow`` wrote, on the host. Raises ValueError for another file."""
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        network = LGTUNet(len(found["styles"]), found["base_channels"])
        network.load_state_dict(found["weights"])
        codec = None if found["codec"] is None else LinearCodec(**found["codec"])
        sampler = Sampler(**found["sampler"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError) as error:
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: no checkpoint of a style flow ({told})") from None
    return SavedFlow(network=network.eval(), names=tuple(found["styles"]), sampler=sampler, codec=codec)
