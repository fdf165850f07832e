"""The file that inference starts from: weights, what the network is, the styles' names, and the codec if there is one.

Tensors, numbers and words only: it is read without running anything in it.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from samegrad.recipes._recipe.refused_files import refused_file
from samegrad.recipes._recipe.tensor_files import read_plain, tensors_problem

from .codec import LinearCodec, codec_problem
from .model import LGTUNet, StyleFlow
from .sampling import Sampler

FILE_NAME = "flow_style.pt"
_WHAT, _DO = "the checkpoint of a style flow", "give flow_style.pt of a run folder"
_SAMPLER = tuple(field.name for field in dataclasses.fields(Sampler))


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
    """What ``save_flow`` wrote, on the host. Raises BadInput for another file."""
    found = read_plain(path, what=_WHAT)
    problem = _problem(found)
    if problem is not None:
        raise refused_file(path, what=_WHAT, found=problem, do=_DO)
    try:
        network = LGTUNet(len(found["styles"]), found["base_channels"])
        network.load_state_dict(found["weights"])
    except (RuntimeError, ValueError) as error:
        told = f"weights of another network ({' '.join(str(error).split())[:200]})"
        raise refused_file(path, what=_WHAT, found=told, do=_DO) from None
    return SavedFlow(
        network=network.eval(),
        names=tuple(found["styles"]),
        sampler=Sampler(**found["sampler"]),
        codec=None if found["codec"] is None else LinearCodec(**found["codec"]),
    )


def _problem(found: Any) -> str | None:
    """Why ``found`` is not what ``save_flow`` writes; None where it is, but for names and shapes of the weights."""
    if not isinstance(found, dict):
        return f"it holds a {type(found).__name__}, not a dictionary"
    missing = [name for name in ("weights", "styles", "base_channels", "sampler", "codec") if name not in found]
    if missing:
        return f"no {missing[0]} in it"
    styles, width, weights, codec = (found[name] for name in ("styles", "base_channels", "weights", "codec"))
    if not isinstance(styles, list) or not styles or not all(isinstance(style, str) for style in styles):
        return "its styles are no list of names"
    if type(width) is not int:
        return "its base_channels are no whole number"
    if not _sound_sampler(found["sampler"]):
        return f"its sampler is not {', '.join(_SAMPLER)}, in numbers"
    problem = tensors_problem(weights)
    if problem is not None:
        return f"of its weights: {problem}"
    problem = None if codec is None else tensors_problem(codec) or codec_problem(codec)
    if problem is not None:
        return f"of its codec: {problem}"
    # Before a network as wide as the file says is made.
    first = weights.get("enter.weight")
    return None if first is not None and len(first) == width else "weights of another network"


def _sound_sampler(sampler: Any) -> bool:
    if not isinstance(sampler, dict) or set(sampler) != set(_SAMPLER):
        return False
    numbers = all(type(value) in (int, float) and math.isfinite(value) for value in sampler.values())
    return numbers and type(sampler["steps"]) is int and sampler["steps"] >= 1
