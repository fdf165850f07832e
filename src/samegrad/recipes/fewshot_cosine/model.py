"""The Few-Shot Cosine Transformer of the document, in plain PyTorch: nothing here knows that a budget exists.

An episode is N = n_way · (k_shot + n_query) images in the order of ``EpisodeShape``; the backbone sees all of them in
one call, so that BatchNorm in training mode takes the statistics of the episode. Its rows then go to the head.

Axes: N images of an episode, n classes, k images of a class to learn from, m queries, d embedding width, h heads,
e width of a head.

Source: Nguyen et al. 2023, "Enhancing Few-Shot Image Classification With Cosine Transformer", arXiv:2211.06828.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Method = Literal["FSCT_cosine", "FSCT_softmax"]

COSINE_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeShape:
    """What an episode is made of, and in which order its images stand.

    Images to learn from (support) and to judge (query) alternate as evenly as their numbers allow, and within each
    kind the class changes fastest. So the first few images of an episode are an episode too, only a smaller one.
    """

    n_way: int
    k_shot: int
    n_query: int

    @property
    def per_class(self) -> int:
        return self.k_shot + self.n_query

    @property
    def images(self) -> int:
        """Images of a whole episode: N."""
        return self.n_way * self.per_class

    def places(self) -> tuple[list[int], list[int]]:
        """The places of support and of query images, ascending."""
        support = [r for r in range(self.images) if r * self.k_shot % self.per_class < self.k_shot]
        taken = set(support)
        return support, [r for r in range(self.images) if r not in taken]

    def order(self) -> list[int]:
        """For each place the image it takes from (n_way, k_shot + n_query), flattened, support images first."""
        support, queries = self.places()
        chosen = [0] * self.images
        for kind, start in ((support, 0), (queries, self.k_shot)):
            for number, place in enumerate(kind):
                image, of_class = divmod(number, self.n_way)
                chosen[place] = of_class * self.per_class + start + image
        return chosen


class SupportAndQueries(nn.Module):
    """Rows of an episode told apart by their places, without asking a tensor what stands where."""

    support: Tensor
    queries: Tensor

    def __init__(self, shape: EpisodeShape) -> None:
        super().__init__()
        self.shape = shape
        self._places = shape.places()
        for name, places in zip(("support", "queries"), self._places):
            self.register_buffer(name, torch.tensor(places), persistent=False)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n, k, d) and (m, d) of the first (N', d) rows of an episode; what a short one lacks to learn from is 0."""
        n_support, n_queries = (sum(place < len(rows) for place in kind) for kind in self._places)
        support = rows.index_select(0, self.support[:n_support])
        lacking = self.shape.n_way * self.shape.k_shot - n_support
        if lacking:
            support = torch.cat([support, support.new_zeros(lacking, *support.shape[1:])])
        support = support.view(self.shape.k_shot, self.shape.n_way, *rows.shape[1:]).transpose(0, 1)
        return support, rows.index_select(0, self.queries[:n_queries])


class PrototypeAttention(nn.Module):
    """Each query attends to itself, as often as there are prototypes, and weighs that by how alike the two are.

    cosine: the weight is the cosine of prototype and query, with no softmax over it. softmax: over the one key there
    is, so the weight is 1 (the published ablation).
    """

    def __init__(self, width: int, *, cosine: bool, heads: int = 8, head_width: int = 64) -> None:
        super().__init__()
        self.heads, self.cosine, self.scale = heads, cosine, head_width**-0.5
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, heads * head_width, bias=False)
        self.leave = nn.Linear(heads * head_width, width)

    def forward(self, prototypes: Tensor, queries: Tensor) -> Tensor:
        """(m, n, d) of prototypes (n, d) and queries (m, d)."""
        asked, keys = (self.enter(self.norm(x)).unflatten(-1, (self.heads, -1)) for x in (prototypes, queries))
        weights = self._cosines(asked, keys) if self.cosine else self._softmax(asked, keys)
        weighted = weights.unsqueeze(-1) * keys.unsqueeze(1)
        left: Tensor = self.leave(weighted.flatten(2))
        return left

    def _cosines(self, asked: Tensor, keys: Tensor) -> Tensor:
        """(m, n, h), in full precision whatever runs around it."""
        with torch.autocast(keys.device.type, enabled=False):
            asked, keys = (F.normalize(widened(x), dim=-1, eps=COSINE_EPSILON) for x in (asked, keys))
            cosines: Tensor = torch.einsum("nhe,mhe->mnh", asked, keys)
        return cosines

    def _softmax(self, asked: Tensor, keys: Tensor) -> Tensor:
        products: Tensor = self.scale * torch.einsum("nhe,mhe->mnh", asked, keys)
        return products.unsqueeze(-1).softmax(dim=-1).squeeze(-1)


class FeedForward(nn.Module):
    """LayerNorm, then two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layers(x)
        return hidden


class CosineClassifier(nn.Module):
    """LayerNorm and a linear layer to 64 numbers, then their cosine with one learned direction, times a learned gain.

    As published the 64 numbers are normalised across the classes of a query (axis 1 of (m, n, 64)), not across
    themselves; ``across`` "features" does the latter.
    """

    def __init__(self, width: int, *, across: Literal["ways", "features"] = "ways", inner: int = 64) -> None:
        super().__init__()
        self.axis = 1 if across == "ways" else 2
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, inner)
        self.direction = nn.Parameter(torch.empty(inner).uniform_(-(inner**-0.5), inner**-0.5))
        self.gain = nn.Parameter(self.direction.detach().norm())
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        """Logits (m, n) of (m, n, d)."""
        entered = self.enter(self.norm(x))
        with torch.autocast(x.device.type, enabled=False):
            entered = widened(entered)
            normalised = entered / (entered.norm(dim=self.axis, keepdim=True) + COSINE_EPSILON)
            cosines: Tensor = normalised @ F.normalize(self.direction, dim=0)
        return self.scale * self.gain * cosines


class Head(nn.Module):
    """Logits of the queries: learned means of each class, one transformer block, a cosine classifier.

    ``full_precision``: names of parts that autocast leaves alone.
    """

    def __init__(
        self, shape: EpisodeShape, width: int, *, method: Method, across: Literal["ways", "features"] = "ways"
    ) -> None:
        super().__init__()
        self.prototype_weights = nn.Parameter(torch.ones(shape.n_way, shape.k_shot))
        self.attention = PrototypeAttention(width, cosine=method == "FSCT_cosine")
        self.feed_forward = FeedForward(width)
        self.classifier = CosineClassifier(width, across=across)
        self.full_precision: Collection[str] = ()

    def prototypes(self, support: Tensor) -> Tensor:
        """(n, d) of support embeddings (n, k, d): means with learned weights, which a softmax makes add up to 1."""
        return (self.prototype_weights.softmax(dim=1).unsqueeze(-1) * support).sum(dim=1)

    def forward(self, prototypes: Tensor, queries: Tensor) -> Tensor:
        """Logits (m, n) of prototypes (n, d) and queries (m, d); each query by itself."""
        x = self._part("attention", prototypes, queries) + prototypes
        x = self._part("feed_forward", x) + x
        return self._part("classifier", x)

    def _part(self, name: str, *given: Tensor) -> Tensor:
        part, alone = getattr(self, name), name in self.full_precision
        with torch.autocast(given[0].device.type, enabled=False) if alone else contextlib.nullcontext():
            found: Tensor = part(*(map(widened, given) if alone else given))
        return found


class FewShotTransformer(nn.Module):
    """Backbone and head: logits of an episode's queries from its images."""

    def __init__(self, backbone: nn.Module, head: Head, shape: EpisodeShape) -> None:
        super().__init__()
        self.backbone, self.head, self.shape = backbone, head, shape
        self.told_apart = SupportAndQueries(shape)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (m, n) of the episode's images (N, channels, height, width)."""
        support, queries = self.told_apart(self.backbone(images))
        logits: Tensor = self.head(self.head.prototypes(support), queries)
        return logits


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 where it is narrower."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
