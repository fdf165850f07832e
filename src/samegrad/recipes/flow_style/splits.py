"""Where the latents come from: real ones under ``--data_root``, or crops of bundled pictures through a linear codec."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe import INSTALL
from samegrad.recipes._recipe.precision import weight_dtype

from . import codec as codecs
from . import crops, data
from .data import Latents
from .latent_files import LAYOUT, read_latents
from .options import FlowStyleOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """Latents to train on and to judge by, what they are, and a decoder to look at them where there is one."""

    training: Latents
    held_out: Latents
    described: str
    codec: codecs.LinearCodec | None


def open_splits(options: FlowStyleOptions) -> Splits:
    """The latents that ``options`` name, in memory. Raises BadInput for files that are none, EnvironmentProblem."""
    splits = _bundled(options) if options.data_root is None else _read(options)
    styles = splits.training.names
    if options.style_weights and len(options.style_weights) != len(styles):
        raise sg.UsageError(
            asked=f"--style_weights {' '.join(map(str, options.style_weights))}",
            found=f"there are {len(styles)} styles: {', '.join(styles)}",
            do="give one weight for each, in that order",
            option="style_weights",
        )
    dtype = weight_dtype(options.dtype)
    return dataclasses.replace(
        splits, training=splits.training.to(dtype), held_out=splits.held_out.to(dtype)
    )


def _bundled(options: FlowStyleOptions) -> Splits:
    try:
        found = crops.bundled_crops(options.crops, options.held_out_crops, seed=options.random_seed)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise sg.EnvironmentProblem(
            asked="the pictures that scikit-image and scikit-learn ship", found=str(error), do=INSTALL
        ) from None
    codec = codecs.fit_codec(torch.cat(found.training))
    return Splits(
        training=_encoded(found.training, found.names, codec),
        held_out=_encoded(found.held_out, found.names, codec),
        described=f"crops of {crops.CROP_SIDE} x {crops.CROP_SIDE} of scikit-image's and scikit-learn's pictures, "
        "as four principal components of 8 x 8 blocks",
        codec=codec,
    )


def _encoded(by_style: tuple[Tensor, ...], names: tuple[str, ...], codec: codecs.LinearCodec) -> Latents:
    counts = torch.tensor([len(pictures) for pictures in by_style])
    latents = torch.cat([codec.encode(pictures) for pictures in by_style])
    return Latents(latents, torch.arange(len(names)).repeat_interleave(counts), names)


def _read(options: FlowStyleOptions) -> Splits:
    assert options.data_root is not None
    latents = read_latents(options.data_root)
    try:
        training, held_out = data.split_latents(latents, options.held_out_fraction, seed=options.random_seed)
    except ValueError as error:
        raise sg.BadInput(
            asked=f"latents in {options.data_root}", found=str(error), do=LAYOUT, file=str(options.data_root)
        ) from None
    beside = options.data_root / codecs.FILE_NAME
    codec = codecs.load_codec(beside) if beside.is_file() else None
    described = f"{len(latents)} latents of {tuple(latents.latents.shape[1:])} in {options.data_root}"
    return Splits(training=training, held_out=held_out, described=described, codec=codec)
