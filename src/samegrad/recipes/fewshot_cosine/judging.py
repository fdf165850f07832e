"""What the model is judged by: the accuracy of many episodes, beside nearest prototypes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from samegrad.recipes._recipe.precision import autocast

from .data import Episodes, prototype_predictions
from .model import EpisodeShape, FewShotTransformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """One episode: images (n, k + n_query, ...), names of its classes, and for each query what was predicted.

    ``of_model``, ``of_pixels``, ``of_embeddings``: (n, n_query) classes by the model, and by the nearest prototype of
    the images themselves and of the model's embeddings.
    """

    images: Tensor
    names: list[str]
    of_model: Tensor
    of_pixels: Tensor
    of_embeddings: Tensor


def arranged(images: Tensor, shape: EpisodeShape) -> Tensor:
    """(n, k + n_query, ...) of an episode as the (N, ...) rows of a step."""
    return images.flatten(0, 1)[shape.order()]


def unarranged(rows: Tensor, shape: EpisodeShape) -> Tensor:
    """The inverse of ``arranged``."""
    by_class = torch.empty_like(rows)
    by_class[shape.order()] = rows
    return by_class.view(shape.n_way, shape.per_class, *rows.shape[1:])


def judged_episodes(
    model: FewShotTransformer,
    episodes: Episodes,
    count: int,
    *,
    rows_at_a_time: int,
    amp: torch.dtype | None,
) -> Iterator[Judged]:
    """The first ``count`` episodes, in eval mode (BatchNorm by its running statistics), the mode put back afterwards.

    The backbone sees ``rows_at_a_time`` images, since in eval mode each is by itself.
    """
    device, training = next(model.parameters()).device, model.training
    shape = dataclasses.replace(model.shape, n_query=episodes.per_class - model.shape.k_shot)
    model.eval()
    try:
        for number in range(count):
            images, names = episodes.draw(number)
            rows = arranged(images, shape).to(device, next(model.parameters()).dtype)
            with torch.no_grad(), autocast(amp, device):
                embeddings = torch.cat([model.backbone(part) for part in torch.split(rows, rows_at_a_time)])
                support, queries = model.told_apart(embeddings)
                logits = model.head(model.head.prototypes(support), queries)
            # Of the queries the class changes fastest.
            predicted = logits.argmax(dim=1).cpu().view(shape.n_query, shape.n_way).t()
            yield Judged(
                images=images,
                names=names,
                of_model=predicted,
                of_pixels=prototype_predictions(images, shape.k_shot),
                of_embeddings=prototype_predictions(unarranged(embeddings.float().cpu(), shape), shape.k_shot),
            )
    finally:
        model.train(training)


def accuracies(judged: Iterable[Judged]) -> dict[str, float]:
    """Mean accuracies over episodes, each with the half width of its 95 % interval, 1.96 · deviation / √episodes."""
    found: dict[str, list[float]] = {"accuracy": [], "prototype_accuracy": [], "embedding_prototype_accuracy": []}
    for episode in judged:
        truth = torch.arange(len(episode.of_model)).unsqueeze(1)
        for name, predicted in zip(found, (episode.of_model, episode.of_pixels, episode.of_embeddings)):
            found[name].append(float((predicted == truth).double().mean()))
    metrics: dict[str, float] = {}
    for name, values in found.items():
        mean = math.fsum(values) / len(values)
        metrics[name] = mean
        squares = math.fsum((value - mean) ** 2 for value in values)
        # One episode says nothing about how far others would be from it.
        metrics[f"{name}_ci95"] = 1.96 * (squares / (len(values) - 1) / len(values)) ** 0.5 if len(values) > 1 else 1.0
    metrics["episodes"] = len(found["accuracy"])
    return metrics
