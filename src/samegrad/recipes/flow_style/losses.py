"""The energy of styled latents: sliced Wasserstein distance of patches, cosine self-similarity, velocity penalty.

    E = w_style · mean(style weight of the rows' targets) · SWD + w_content · SSM + w_velocity · mean squared velocity

The SWD sorts the projected patches of *all* rows, so it is no mean over rows: the mean of two halves' distances is
another number with another gradient. Whatever is drawn (patches, directions, positions) comes with the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import StyleBatch
from .model import Styled


def take_patches(latents: Tensor, places: Tensor, size: int) -> Tensor:
    """The ``size`` x ``size`` patches around ``places``, (M, size · size · C), zeros outside the latents.

    latents: (B, C, H, W); places: (M,) int64 numbers of positions, row by row: b · H · W + y · W + x. Only patches
    that are asked for are made. On fewer rows than the places were drawn for (a trial of some rows of a batch) they
    wrap round, so that there are as many patches as ever.
    """
    rows, channels, height, width = latents.shape
    places = places % (rows * height * width)
    reach = size // 2
    padded = F.pad(latents, (reach,) * 4).permute(0, 2, 3, 1)
    offsets = torch.arange(size, device=latents.device)
    row = places // (height * width)
    down = (places // width % height)[:, None] + offsets
    right = (places % width)[:, None] + offsets
    patches = padded[row[:, None, None], down[:, :, None], right[:, None, :]]
    return patches.reshape(len(places), size * size * channels)


def sliced_wasserstein(first: Tensor, second: Tensor, directions: Tensor, groups: Tensor | None = None) -> Tensor:
    """The squared sliced Wasserstein-2 distance of two clouds of as many points, a scalar.

    first, second: (M, D); directions: (D, P), unit columns. Both clouds are projected on each direction and sorted,
    and the squared differences of equal ranks are averaged: Rabin, Peyré, Delon, Bernot 2011; for textures Heitz,
    Vanhoey, Chambon, Belcour 2021. ``groups`` (M,) int64: points of a group are sorted among themselves, which is the
    mean of the groups' distances, each weighted by its points.
    """
    ranked, other = (_ranked(points @ directions, groups) for points in (first, second))
    return (ranked - other).square().mean()


def _ranked(projected: Tensor, groups: Tensor | None) -> Tensor:
    """Columns of (M, P) in rising order, within each group where there are groups."""
    if groups is None:
        return torch.sort(projected, dim=0).values
    order = torch.argsort(projected.detach(), dim=0)
    # Stable, so that within a group the first order stands. Shapes do not depend on who is in which group.
    order = order.gather(0, torch.argsort(groups[order], dim=0, stable=True))
    return projected.gather(0, order)


def patch_distance(
    styled: Tensor,
    reference: Tensor,
    places: Sequence[Tensor],
    directions: Sequence[Tensor],
    sizes: Sequence[int],
    weights: Sequence[float],
    style_ids: Tensor | None = None,
) -> Tensor:
    """The weighted sum over patch sizes of the sliced Wasserstein distance between two batches' patches, a scalar.

    ``style_ids`` (B,) int64: patches are compared with references of their row's style alone, None with all.
    """
    total = styled.new_zeros(())
    spots = styled.shape[2] * styled.shape[3]
    for size, weight, chosen, along in zip(sizes, weights, places, directions):
        mine, theirs = take_patches(styled, chosen, size), take_patches(reference, chosen, size)
        groups = None if style_ids is None else style_ids[chosen // spots % len(style_ids)]
        total = total + weight * sliced_wasserstein(mine, theirs, along, groups)
    return total


def self_similarity_distance(styled: Tensor, source: Tensor, positions: Tensor | None = None) -> Tensor:
    """How far the cosine similarities between all positions of a row have moved, (B,), a mean over N x N pairs.

    styled, source: (B, C, H, W); ``positions`` (N,) int64: those that are compared, None for all H · W. With unit
    columns Z, S (C x N) and D = Z − S it is ‖ZᵀZ − SᵀS‖² / N² = tr(DDᵀ(ZZᵀ + SSᵀ)) + 2 tr(DZᵀDSᵀ), over N²: C x C
    matrices instead of N x N, and nothing cancels where the two are close.
    """
    mine, theirs = _unit_columns(styled, positions), _unit_columns(source, positions)
    moved = mine - theirs
    squares = moved @ moved.mT
    both = mine @ mine.mT + theirs @ theirs.mT
    crossed = (moved @ mine.mT) @ (moved @ theirs.mT)
    total = (squares * both).sum(dim=(1, 2)) + 2 * crossed.diagonal(dim1=1, dim2=2).sum(dim=1)
    return total / mine.shape[2] ** 2


def _unit_columns(latents: Tensor, positions: Tensor | None) -> Tensor:
    columns = latents.flatten(2)
    if positions is not None:
        columns = columns[:, :, positions]
    return F.normalize(columns, dim=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Energy:
    """The document's loss of a whole logical batch; ``energy(outputs, batch)`` is a scalar.

    ``by_style``: a row's patches are compared with those of its own target style. Without it all rows are one cloud, as
    in the document; but the targets are the batch's own styles in another order, so that the cloud of the sources is
    that of the references already, and the identity is as good as it gets. ``style_weights``: one for each style, or
    none. ``velocity_weight`` 0 leaves the penalty out.
    """

    style_weight: float = 1.0
    content_weight: float = 1.0
    velocity_weight: float = 0.0
    patch_sizes: tuple[int, ...] = (3,)
    size_weights: tuple[float, ...] = (1.0,)
    style_weights: tuple[float, ...] = ()
    by_style: bool = True

    def __call__(self, outputs: Styled, batch: StyleBatch) -> Tensor:
        distance, similarity = self.parts(outputs.latents, batch)
        total = self.style_weight * distance + self.content_weight * similarity
        if self.velocity_weight:
            total = total + self.velocity_weight * outputs.velocity_energy.mean()
        return total

    def parts(self, styled: Tensor, batch: StyleBatch) -> tuple[Tensor, Tensor]:
        """SWD, with the style weights, and SSM: two scalars, in float32 or wider whatever the latents' dtype."""
        wide = styled.to(torch.promote_types(styled.dtype, torch.float32))
        distance = patch_distance(
            wide, batch.reference, batch.places, batch.directions, self.patch_sizes, self.size_weights,
            batch.target_style if self.by_style else None,
        )  # fmt: skip
        if self.style_weights:
            weights = torch.tensor(self.style_weights, dtype=wide.dtype, device=wide.device)
            distance = distance * weights[batch.target_style].mean()
        return distance, self_similarity_distance(wide, batch.source, batch.positions).mean()
