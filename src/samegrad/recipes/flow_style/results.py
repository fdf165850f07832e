"""What is written at the end of a run: the checkpoint, the weights once more as safetensors, and the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from samegrad.recipes._recipe.written import save_picture, weights_of

from .checkpoint import FILE_NAME, save_flow
from .codec import LinearCodec
from .data import Latents, style_pairs
from .history import read_history
from .judging import Restyle
from .model import StyleFlow
from .sampling import Sampler
from .splits import Splits

SHOWN_EACH = 3


def write_results(
    model: StyleFlow, folder: Path, *, restyle: Restyle, splits: Splits, base_channels: int, sampler: Sampler
) -> list[Path]:
    """Writes checkpoint, weights and pictures into ``folder``; their paths. Raises ModuleNotFoundError.

    The curves are drawn where the folder holds a run's metrics.jsonl.
    """
    from . import pictures

    names = splits.training.names
    written = [
        save_flow(
            folder / FILE_NAME, model, names=names, base_channels=base_channels, sampler=sampler, codec=splits.codec
        ),
        folder / "flow_style.safetensors",
    ]
    safetensors.torch.save_file(weights_of(model.network), written[1])
    written += _write_pairs(folder, restyle, splits)
    sources = _spread(splits.held_out)
    columns = [[source, *_all_styles(restyle, source, style, len(names))] for source, style in sources]
    figure = pictures.draw_grid(
        [[shown(latent, splits.codec) for latent in column] for column in columns],
        ["source", *(f"as {name}" for name in names)],
        [names[style] for _, style in sources],
    )
    written.append(save_picture(figure, folder / "style_grid.png"))
    history = read_history(folder)
    if history.steps and history.validations:
        written.append(save_picture(pictures.draw_curves(history), folder / "loss_curves.png"))
    return written


def _write_pairs(folder: Path, restyle: Restyle, splits: Splits) -> list[Path]:
    """For every pair of two styles: a source, what the flow makes of it, and a real latent of the target style."""
    from . import pictures

    names, written = splits.held_out.names, []
    for source_style, target_style in list(style_pairs(len(names)))[:SHOWN_EACH]:
        source = splits.held_out.of_style(source_style)[0]
        styled = _all_styles(restyle, source, source_style, len(names))[target_style]
        real = splits.held_out.of_style(target_style)[0]
        figure = pictures.draw_side_by_side(
            [shown(latent, splits.codec) for latent in (source, styled, real)],
            [f"source: {names[source_style]}", f"styled as {names[target_style]}", f"real: {names[target_style]}"],
        )
        name = f"{names[source_style]}_as_{names[target_style]}.png"
        written.append(save_picture(figure, folder / name))
    return written


def _spread(latents: Latents) -> list[tuple[Tensor, int]]:
    """A few latents of every style, with the number of their style."""
    return [
        (latent, style) for style in range(len(latents.names)) for latent in latents.of_style(style)[:SHOWN_EACH]
    ]


def _all_styles(restyle: Restyle, source: Tensor, style: int, styles: int) -> list[Tensor]:
    """``source`` (4, H, W) in each style."""
    repeated = source.expand(styles, *source.shape)
    return list(restyle(repeated, torch.full((styles,), style), torch.arange(styles)))


def shown(latent: Tensor, codec: LinearCodec | None) -> npt.NDArray[np.float64]:
    """A latent (4, H, W) to look at, (height, width, 3) in [0, 1]: decoded, or without a codec its first channels."""
    if codec is not None:
        picture = codec.decode(latent[None])[0]
    else:
        picture = (latent[:3] / 6 + 0.5).clamp(0, 1)
    found: npt.NDArray[Any] = picture.permute(1, 2, 0).double().numpy()
    return found
