"""Latents by style, and logical batches drawn from them. Plain PyTorch.

Everything random about a batch is drawn here, once for the whole logical batch: which images, noise, times, which
labels are dropped, which patches are compared and along which directions. Rows of it may then be computed in any
chunks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

LATENT_CHANNELS = 4
# Stable Diffusion's factor: latents of its encoder have a standard deviation of 5.5, scaled ones of 1.
SCALING_FACTOR = 0.18215


class StyleBatch(NamedTuple):
    """A logical batch of B rows. The first six carry rows; what is drawn for all rows together follows.

    source, noised, reference: (B, 4, H, W). start: (B,) times in [0, 1]. target_style: (B,) int64. dropped: (B,) bool.
    places: for each patch size (M,) int64 positions among all rows'. directions: for each (D, P). positions: (N,)
    int64 of the self-similarity, or None for all.
    """

    source: Tensor
    noised: Tensor
    start: Tensor
    target_style: Tensor
    dropped: Tensor
    reference: Tensor
    places: tuple[Tensor, ...]
    directions: tuple[Tensor, ...]
    positions: Tensor | None

    def to(self, device: torch.device) -> StyleBatch:
        """The batch on ``device``."""
        rows = {name: getattr(self, name).to(device) for name in ROW_FIELDS}
        return self._replace(
            **rows,
            places=tuple(tensor.to(device) for tensor in self.places),
            directions=tuple(tensor.to(device) for tensor in self.directions),
            positions=None if self.positions is None else self.positions.to(device),
        )


ROW_FIELDS = StyleBatch._fields[:6]
# Where rows are in a StyleBatch: what is shared could have as many entries as there are rows. Axes stand where tensors
# are declared, so that they have the batch's own shape.
ROW_AXES = StyleBatch(0, 0, 0, 0, 0, 0, None, None, None)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Latents:
    """All latents of some styles: ``latents`` (N, 4, H, W) float on the host, ``style_ids`` (N,) int64, ``names``."""

    latents: Tensor
    style_ids: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.latents)

    def of_style(self, style: int) -> Tensor:
        """The latents of style number ``style``, (n, 4, H, W)."""
        return self.latents[self.style_ids == style]

    @property
    def largest_style(self) -> int:
        """How many latents the style with the most has."""
        return int(torch.bincount(self.style_ids, minlength=len(self.names)).max())

    def to(self, dtype: torch.dtype) -> Latents:
        return dataclasses.replace(self, latents=self.latents.to(dtype))


def split_latents(latents: Latents, held_out_fraction: float, *, seed: int) -> tuple[Latents, Latents]:
    """Training and held-out latents, each style split alike, at least one of every style on both sides.

    Raises ValueError for a style with a single latent.
    """
    order = np.random.default_rng(seed)
    kept, held = [], []
    for number, name in enumerate(latents.names):
        members = order.permutation(np.flatnonzero(latents.style_ids.numpy() == number))
        if len(members) < 2:
            raise ValueError(f"{name} has one latent, and both training and evaluation take one of every style")
        count = min(len(members) - 1, max(1, round(held_out_fraction * len(members))))
        held += members[:count].tolist()
        kept += members[count:].tolist()
    return _taken(latents, sorted(kept)), _taken(latents, sorted(held))


def _taken(latents: Latents, rows: list[int]) -> Latents:
    return Latents(latents.latents[rows], latents.style_ids[rows], latents.names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """How logical batches are drawn. ``max_samples`` and ``max_positions`` None mean all."""

    rows: int
    label_drop_probability: float = 0.1
    patch_sizes: tuple[int, ...] = (3,)
    projections: int = 64
    max_samples: int | None = 8192
    max_positions: int | None = None


def patches_in(rows: int, latents: Tensor) -> int:
    """Positions, and so patches, of ``rows`` latents like these (.., H, W)."""
    return rows * latents.shape[-2] * latents.shape[-1]


def draw_batch(latents: Latents, drawing: Drawing, *, earliest: float, seed: Sequence[int]) -> StyleBatch:
    """A logical batch on the host: a pure function of its arguments.

    Styles are drawn uniformly, then an image of that style. Targets are the batch's own styles in another order;
    references are real latents of the targets. Times are uniform in [``earliest``, 1].
    """
    generator = generator_of(*seed)
    dtype, rows = latents.latents.dtype, drawing.rows
    styles = torch.randint(len(latents.names), (rows,), generator=generator)
    targets = styles[torch.randperm(rows, generator=generator)]
    source = _of_styles(latents, styles, generator)
    reference = _of_styles(latents, targets, generator)
    noise = torch.randn(source.shape, generator=generator, dtype=dtype)
    start = earliest + (1 - earliest) * torch.rand(rows, generator=generator, dtype=dtype)
    time = start[:, None, None, None]
    places, directions = draw_projections(source, drawing, generator)
    spots = source.shape[2] * source.shape[3]
    return StyleBatch(
        source=source,
        noised=(1 - time) * noise + time * source,
        start=start,
        target_style=targets,
        dropped=torch.rand(rows, generator=generator) < drawing.label_drop_probability,
        reference=reference,
        places=places,
        directions=directions,
        positions=_some(spots, drawing.max_positions, generator),
    )


def draw_projections(
    latents: Tensor, drawing: Drawing, generator: Generator
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """For each patch size the places (M,) of patches among all of ``latents`` (B, 4, H, W), and directions (D, P)."""
    every = patches_in(len(latents), latents)
    places, directions = [], []
    for size in drawing.patch_sizes:
        chosen = _some(every, drawing.max_samples, generator)
        places.append(torch.arange(every) if chosen is None else chosen)
        width = latents.shape[1] * size * size
        drawn = torch.randn(width, drawing.projections, generator=generator, dtype=latents.dtype)
        directions.append(drawn / drawn.norm(dim=0))
    return tuple(places), tuple(directions)


def _of_styles(latents: Latents, styles: Tensor, generator: Generator) -> Tensor:
    """A latent of each of ``styles`` (B,), (B, 4, H, W)."""
    counts = torch.bincount(latents.style_ids, minlength=len(latents.names))
    order = torch.argsort(latents.style_ids, stable=True)
    first = counts.cumsum(0) - counts
    shares = torch.rand(len(styles), generator=generator, dtype=torch.float64)
    return latents.latents[order[first[styles] + (shares * counts[styles]).long()]]


def _some(count: int, most: int | None, generator: Generator) -> Tensor | None:
    """``most`` of ``count`` numbers without replacement, (most,); None where that is all of them."""
    if most is None or most >= count:
        return None
    return torch.randperm(count, generator=generator)[:most]


def generator_of(*seed: int) -> Generator:
    """A generator on the host for these numbers (seed, epoch, step, say): others give unrelated draws."""
    state = np.random.SeedSequence(seed).generate_state(2)
    return Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def earliest_time(epsilon: float, epoch: int, warmup_epochs: int) -> float:
    """The earliest time that rows start at: ``epsilon``, reached in a line over ``warmup_epochs`` epochs from 0."""
    return epsilon * min(1.0, epoch / warmup_epochs) if warmup_epochs else epsilon


def cosine_rate(rate: float, last_rate: float, epoch: int, epochs: int) -> float:
    """The learning rate of ``epoch``: half a cosine from ``rate`` to ``last_rate``."""
    share = min(1.0, epoch / max(1, epochs))
    return last_rate + 0.5 * (rate - last_rate) * (1 + math.cos(math.pi * share))


def style_pairs(styles: int) -> Iterator[tuple[int, int]]:
    """Every (source, target) of two different styles."""
    return ((a, b) for a in range(styles) for b in range(styles) if a != b)
