"""How styled latents are judged: distance to the target style's held-out patches, and how far structure has moved.

These are the held-out SWD and SSM: of what the sampler makes, with all patches. The SWD and SSM losses, also where
validation takes them on the same latents, are of the flow as it is trained, with the patches that a batch draws.

Two anchors stand beside every figure: the identity, which keeps all structure and no style, and real latents of the
target style in no order, which have the style and none of the structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .data import Drawing, Latents, draw_projections, generator_of, style_pairs
from .losses import patch_distance, self_similarity_distance

PROJECTIONS = 128
_SEED = 2021


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """SWD to the target style and SSM to the source, means over all pairs of styles."""

    swd: float
    ssm: float
    identity_swd: float
    shuffled_swd: float
    shuffled_ssm: float

    @property
    def identity_ssm(self) -> float:
        return 0.0


# (source latents, ids of their styles, ids of the target styles) -> styled latents on the host
Restyle = Callable[[Tensor, Tensor, Tensor], Tensor]


def judge_styled(restyle: Restyle, held_out: Latents, training: Latents, patch_sizes: tuple[int, ...]) -> Judgement:
    """The figures on all held-out latents, every style turned into every other, with all patches.

    ``training`` gives the real latents of the second anchor, so that they are others than those compared with.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    pairs = list(style_pairs(len(held_out.names)))
    for source_style, target_style in pairs:
        source, reference = held_out.of_style(source_style), held_out.of_style(target_style)
        count = len(source)
        ids = torch.full((count,), source_style), torch.full((count,), target_style)
        styled = restyle(source, *ids)
        shuffled = _as_many(training.of_style(target_style), count)
        reference = _as_many(reference, count)
        sums += torch.tensor(
            [
                all_patches_distance(styled, reference, patch_sizes),
                float(self_similarity_distance(styled, source).mean()),
                all_patches_distance(source, reference, patch_sizes),
                all_patches_distance(shuffled, reference, patch_sizes),
                float(self_similarity_distance(shuffled, source).mean()),
            ],
            dtype=torch.float64,
        )
    return Judgement(
        **dict(zip([field.name for field in dataclasses.fields(Judgement)], (sums / len(pairs)).tolist()))
    )


def all_patches_distance(styled: Tensor, reference: Tensor, patch_sizes: tuple[int, ...]) -> float:
    """The mean SWD over patch sizes between all patches of as many latents, along PROJECTIONS fixed directions."""
    drawing = Drawing(rows=len(styled), patch_sizes=patch_sizes, projections=PROJECTIONS, max_samples=None)
    places, directions = draw_projections(styled, drawing, generator_of(_SEED))
    weights = [1 / len(patch_sizes)] * len(patch_sizes)
    return float(patch_distance(styled, reference, places, directions, patch_sizes, weights))


def _as_many(latents: Tensor, count: int) -> Tensor:
    """``count`` latents, from the first on and round again."""
    return latents[torch.arange(count) % len(latents)]
