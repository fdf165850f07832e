"""Modules of known truth: split by rows exactly, run in parts exactly, or refused by name; nothing in between.

``BY_ROWS`` are split through the whole model. ``BY_PARTS`` couple rows somewhere: the refusal names where, and the
lever that runs the rest in chunks is exact. ``REFUSED`` run whole only.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from . import zoo
from .zoo_modules import (
    Alone,
    Attending,
    ByLength,
    Checkpointed,
    ClampedWeight,
    Complex,
    D,
    Experts,
    Fn,
    FromFirstBatch,
    Listed,
    Looping,
    OneWeight,
    Output,
    Outside,
    Pair,
    Parameters,
    Quantised,
    Recurrent,
    Remembered,
    Rotary,
    StochasticDepth,
    Tokens,
    between,
    faint_straight_through,
    frozen,
    hooked,
    images,
    linear,
    parameter_hooked,
    signals,
    tied,
    with_state,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Coupled:
    """A model that does not split by rows: ``named`` is in the refusal, ``lever`` runs parts of it, if any does."""

    make: Callable[[], nn.Module]
    named: str
    lever: str = "segments"


def _count(self: Any, z: Tensor) -> None:
    self.calls += 1


def _average(self: Any, z: Tensor) -> None:
    self.mean.mul_(0.9).add_(z.mean(0), alpha=0.1)


def _row_norms(self: Any, z: Tensor) -> None:
    self.seen = self.seen + float(z.norm(dim=1).sum())


def _in_place(self: Any, z: Tensor) -> Tensor:
    return F.relu(z, inplace=True).cos()


BY_ROWS: dict[str, Callable[[], nn.Module]] = {
    "mlp": zoo.mlp,
    "convolution": lambda: signals(nn.Conv1d(2, 4, 2, padding=1), nn.GELU(), width=16),
    "depthwise convolution": lambda: signals(nn.Conv1d(2, 4, 3, padding=1, groups=2)),
    "transposed convolution": lambda: signals(nn.ConvTranspose1d(2, 3, 2), width=12),
    "max pooling": lambda: images(nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2), width=16),
    "adaptive pooling": lambda: images(nn.AdaptiveAvgPool2d((3, 2)), width=24),
    "pixel shuffle": lambda: images(nn.PixelShuffle(2), nn.Conv2d(1, 1, 3), width=36),
    "upsampling": lambda: images(nn.Upsample(scale_factor=1.5, mode="bilinear"), width=144),
    "group norm": lambda: signals(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4)),
    "layer norm": lambda: between(nn.LayerNorm(8)),
    "rms norm": lambda: between(nn.RMSNorm(8)),
    "local response norm": lambda: signals(nn.Conv1d(2, 4, 1), nn.LocalResponseNorm(2)),
    "instance norm": lambda: signals(nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4, affine=True)),
    "instance norm with running statistics": lambda: signals(
        nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4, track_running_stats=True)
    ),
    "instance norm without momentum": lambda: signals(
        nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4, momentum=None, track_running_stats=True)
    ),
    "batch norm in eval mode": lambda: between(nn.BatchNorm1d(8)).eval(),
    "dropout": lambda: between(nn.Dropout(0.3), nn.Tanh(), nn.Dropout(0.2)),
    "dropout of channels": lambda: images(nn.Dropout2d(0.3), nn.Tanh(), nn.Dropout2d(0.2), width=64),
    "dropout of sequence channels": lambda: signals(nn.Conv1d(2, 5, 1), nn.Dropout1d(0.4), width=15),
    "alpha dropout": lambda: between(nn.AlphaDropout(0.3), nn.SELU(), nn.AlphaDropout(0.2)),
    "feature alpha dropout": lambda: images(nn.FeatureAlphaDropout(0.3), width=64),
    "embedding": lambda: Tokens(nn.Embedding(11, 6, dtype=D)),
    "sparse embedding": lambda: Tokens(nn.Embedding(11, 6, sparse=True, dtype=D)),
    "embedding with padding": lambda: Tokens(nn.Embedding(11, 6, padding_idx=3, dtype=D)),
    "embedding bag": lambda: Tokens(nn.EmbeddingBag(11, 6, mode="mean", dtype=D)),
    "embedding bag with offsets": lambda: Tokens(nn.EmbeddingBag(11, 6, mode="sum", dtype=D), offsets=True),
    "lstm": lambda: Recurrent(nn.LSTM(2, 5, batch_first=True, dtype=D)),
    "lstm with dropout": lambda: Recurrent(nn.LSTM(2, 5, 2, dropout=0.3, batch_first=True, dtype=D)),
    "gru in both directions": lambda: Recurrent(nn.GRU(2, 4, batch_first=True, bidirectional=True, dtype=D)),
    "attention with masks": lambda: Attending(nn.MultiheadAttention(6, 2, batch_first=True, dtype=D)),
    "transformer encoder layer": lambda: Attending(
        nn.TransformerEncoderLayer(6, 2, 12, dropout=0.2, batch_first=True, dtype=D)
    ),
    "transformer decoder layer": lambda: Attending(
        nn.TransformerDecoderLayer(6, 2, 12, dropout=0.1, batch_first=True, dtype=D), decoder=True
    ),
    "bilinear": lambda: between(Alone(lambda z: torch.einsum("ni,nj->nij", z, z).flatten(1)[:, :8])),
    "weight norm": lambda: between(parametrizations.weight_norm(linear(8, 8))),
    "weight norm as a hook": lambda: between(nn.utils.weight_norm(linear(8, 8))),
    "spectral norm": lambda: between(parametrizations.spectral_norm(linear(8, 8))),
    "spectral norm as a hook": lambda: between(nn.utils.spectral_norm(linear(8, 8))),
    "orthogonal weights": lambda: between(parametrizations.orthogonal(linear(8, 8))),
    "tied weights": tied,
    "frozen layer": frozen,
    "a list of parameters": Parameters,
    "complex weights": Complex,
    "stochastic depth of rows": lambda: between(StochasticDepth(None), StochasticDepth(None)),
    "faint noise": lambda: Fn(lambda self, z: z + 1e-10 * torch.randn_like(z)),
    "gumbel softmax": lambda: Fn(lambda self, z: F.gumbel_softmax(z, dim=1)),
    "experts without a limit": lambda: Experts(None),
    "a count of calls": lambda: with_state(_count, calls=0),
    "a count of calls, a buffer": lambda: with_state(_count, calls=torch.zeros((), dtype=torch.int64)),
    "a moving average": lambda: with_state(_average, mean=torch.zeros(zoo.CLASSES, dtype=D)),
    "a sum over rows": lambda: with_state(_row_norms, seen=0.0),
    "a table built once": Rotary,
    "outputs in a tuple": lambda: Fn(lambda self, z: (z, z.tanh())),
    "outputs in a list of dicts": lambda: Fn(lambda self, z: [{"a": z}, {"b": z.tanh(), "n": 3}]),
    "outputs in a named tuple": lambda: Fn(lambda self, z: Pair(z, z.exp())),
    "outputs in an object": lambda: Fn(lambda self, z: Output(logits=z, hidden=z.tanh())),
    "activation in place": lambda: Fn(_in_place),
    "a checkpoint": lambda: Checkpointed(reentrant=False),
    "a reentrant checkpoint": lambda: Checkpointed(reentrant=True),
    "a loop as long as the row says": Looping,
    "a sort of features": lambda: Fn(lambda self, z: z.sort(1).values),
    "a hook on outputs": lambda: hooked("forward", lambda module, inputs, output: output * 2),
    "a backward hook that scales": lambda: hooked("full_backward", lambda module, given, came: (given[0] * 0.5,)),
    "a parameter's hook that clamps": parameter_hooked,
}


def _straight_through(self: Any, z: Tensor) -> Tensor:
    mean = z.mean(0)
    return z + (mean - mean.detach())


def _rounded_by_largest(self: Any, z: Tensor) -> Tensor:
    scale = z.detach().abs().max() / 127
    return z + ((z / scale).round() * scale - z).detach()


def _queue_in_a_list(self: Any, z: Tensor) -> None:
    for row in z:
        self.queue[self.place] = row.clone()
        self.place = (self.place + 1) % len(self.queue)


def _queue_in_a_buffer(self: Any, z: Tensor) -> None:
    for row in z:
        self.queue[self.place] = row
        self.place = (self.place + 1) % len(self.queue)


def _newest(self: Any, z: Tensor) -> None:
    self.last.extend(z.mean(0).tolist())


def _clipped(module: nn.Module, given: Any, came: Any) -> Any:
    return (given[0] * (1e-3 / given[0].norm()).clamp(max=1),)


def _noisy(module: nn.Module, given: Any, came: Any) -> Any:
    return (given[0] * torch.rand_like(given[0]),)


def _keeping_score(module: nn.Module, given: Any, came: Any) -> None:
    module.backwards = getattr(module, "backwards", 0) + 1


def _own_loss(self: Any, z: Tensor) -> Any:
    return Output(loss=z.pow(2).mean().sqrt(), logits=z)


BY_PARTS: dict[str, Coupled] = {
    "batch norm": Coupled(lambda: between(nn.BatchNorm1d(8)), r"1 \(BatchNorm1d in training mode", "exact_batchnorm"),
    "batch norm without running statistics": Coupled(
        lambda: between(nn.BatchNorm1d(8, track_running_stats=False)), r"1 \(BatchNorm1d", "exact_batchnorm"
    ),
    "synchronised batch norm, alone": Coupled(
        lambda: between(nn.SyncBatchNorm(8)), r"1 \(SyncBatchNorm in training mode", "exact_batchnorm"
    ),
    "softmax over the batch": Coupled(lambda: between(nn.Softmax(0)), r"1 \(Softmax\) mixes rows"),
    "mixup by rolling": Coupled(lambda: between(Alone(lambda z: 0.7 * z + 0.3 * z.roll(1, 0))), r"1 \(Alone\) mixes"),
    "less the mean": Coupled(lambda: between(Alone(lambda z: z - z.mean(0))), r"1 \(Alone\) mixes rows"),
    "less the detached mean": Coupled(lambda: between(Alone(lambda z: z - z.detach().mean(0))), r"1 \(Alone\) mixes"),
    "rounded by the largest": Coupled(lambda: Fn(_rounded_by_largest), "mixes rows"),
    "similarity to all": Coupled(lambda: between(Alone(lambda z: (z @ z.T).softmax(1) @ z)), r"1 \(Alone\) mixes"),
    "a switch on a mean of all": Coupled(
        lambda: Fn(lambda self, z: torch.where(z.mean() > 0, z.tanh(), 2 * z)), "mixes rows"
    ),
    "a straight-through mean": Coupled(lambda: Fn(_straight_through), r"is no sum over rows"),
    "experts with a limit": Coupled(lambda: Experts(lambda rows: rows // 3), "depends on how many rows|mixes rows"),
    "divided by the length": Coupled(lambda: Fn(lambda self, z: z / len(z)), "how many rows"),
    "position in the batch": Coupled(lambda: Fn(lambda self, z: z + torch.arange(len(z))[:, None]), "position"),
    "row numbers among the outputs": Coupled(
        lambda: Fn(lambda self, z: {"z": z, "row": torch.arange(len(z))}), r"outputs\['row'\] of a row depends"
    ),
    "stochastic depth of batches": Coupled(
        lambda: between(StochasticDepth((1, 1)), nn.Tanh()), r"1 \(StochasticDepth\) draws random numbers"
    ),
    "a permutation of rows": Coupled(
        lambda: between(Alone(lambda z: z + z[torch.randperm(len(z))])), r"1 \(Alone\) draws random numbers"
    ),
    "noise of numpy": Coupled(
        lambda: between(Alone(lambda z: z * float(np.random.rand()))), r"1 \(Alone\) draws random .*numpy"
    ),
    "noise of python": Coupled(
        lambda: between(Alone(lambda z: z * random.random())), r"1 \(Alone\) draws random .*python"
    ),
    "a codebook that follows the rows": Coupled(Quantised, "changes (codes|counts|sums), which is neither"),
    "a queue in a buffer": Coupled(
        lambda: with_state(_queue_in_a_buffer, queue=torch.zeros(16, zoo.CLASSES, dtype=D), place=0), "changes queue"
    ),
    "a queue in a list": Coupled(
        lambda: with_state(_queue_in_a_list, queue=[torch.zeros(zoo.CLASSES, dtype=D)] * 16, place=0), "changes queue"
    ),
    "a deque of averages": Coupled(lambda: with_state(_newest, last=deque(maxlen=16)), "changes last"),
    "a loss of its own": Coupled(lambda: Fn(_own_loss), r"outputs\['loss'\].* not one entry a row"),
    "a checkpoint that keeps state": Coupled(
        lambda: Checkpointed(False, nn.Sequential(linear(8, 6), with_state(_count, calls=0), linear(7))),
        "backward changes .*calls",
    ),
    "a backward hook that clips": Coupled(lambda: hooked("full_backward", _clipped), r"1 \(Tanh\) is no sum over rows"),
    "a backward hook that draws": Coupled(lambda: hooked("full_backward", _noisy), "backward draws random numbers"),
    "a backward hook that counts": Coupled(
        lambda: hooked("full_backward", _keeping_score), "backward changes 1.backwards"
    ),
}


def _writes_on_its_input(x: Tensor) -> Tensor:
    return x.mul_(1.5)


def _closure() -> nn.Module:
    scale = nn.Parameter(torch.tensor(2.0, dtype=D))
    return OneWeight(lambda z: z * scale)


REFUSED: dict[str, Coupled] = {
    "less the mean, without parts": Coupled(lambda: OneWeight(lambda z: z - z.mean(0)), r"OneWeight\) mixes rows", ""),
    "a faint mean": Coupled(lambda: OneWeight(lambda z: z + 1e-10 * z.detach().mean(0)), r"OneWeight\) mixes rows", ""),
    "a faint straight-through mean": Coupled(
        lambda: OneWeight(faint_straight_through), r"OneWeight\) mixes rows in its backward", ""
    ),
    "a mean over rows": Coupled(lambda: OneWeight(lambda z: z.mean(0)), "not one entry a row", ""),
    "parameters past their place": Coupled(Listed, "inner.weight is reached past its place", ""),
    "a parameter in a closure": Coupled(_closure, r"shape \(\) that requires grad and is not a registered", ""),
    "a count outside": Coupled(lambda: OneWeight(Outside()), r"OneWeight\) gives other outputs", ""),
    "a cache of fewer digits": Coupled(lambda: OneWeight(Remembered()), r" gives other outputs", ""),
    "a scale from the first batch": Coupled(FromFirstBatch, "changes its parameters scale", ""),
    "a clamp on what is made of a weight": Coupled(ClampedWeight, r"ClampedWeight\) is no sum over rows", ""),
    "a gradient divided by the length": Coupled(
        lambda: OneWeight(ByLength.apply), r"OneWeight\) is no sum over rows", ""
    ),
    "writing on its input": Coupled(
        lambda: nn.Sequential(Alone(_writes_on_its_input), OneWeight(torch.tanh)), "writes on its input", ""
    ),
    "a checkpoint that draws": Coupled(
        lambda: Checkpointed(False, nn.Sequential(linear(8, 8), nn.Dropout(0.3), linear(8), nn.Dropout(0.3))),
        "in torch.utils.checkpoint", "",
    ),
    "a reentrant checkpoint beside a mean": Coupled(
        lambda: nn.Sequential(Checkpointed(True), Alone(lambda z: z - z.mean(0)), linear(7)), r"1 \(Alone\) mixes", ""
    ),
}
