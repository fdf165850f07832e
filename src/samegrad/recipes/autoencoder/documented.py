"""The document's function and class by their names: the program of ``recipe.py`` for a model and rows of the caller."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samegrad.recipes._recipe import run_epochs

from . import data
from .model import Autoencoder
from .options import DOCUMENT_PARTITIONS, AutoencoderOptions
from .recipe import check_weights, program_of
from .splits import Splits, as_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """Losses by epoch: training as the step saw it, validation after it. ``best_epoch`` is whose weights are kept."""

    train_losses: tuple[float, ...]
    validation_losses: tuple[float, ...]
    best_epoch: int | None
    stopped_early: bool


def train_with_gradient_accumulation(
    model: nn.Module,
    train_data: Any,
    val_data: Any,
    num_epochs: int = 300,
    learning_rate: float = 1e-3,
    patience: int = 20,
    num_partitions: int | None = DOCUMENT_PARTITIONS,
    *,
    random_seed: int = 42,
    budget: str | None = None,
    optimizer: Literal["adam", "sgd"] = "adam",
    dtype: str = "float32",
) -> History:
    """Trains ``model`` as it is, on its own device, and leaves the best weights in it: the document's function.

    Data are host tensors, numpy arrays, rows or paths, (N, D). With a ``budget``, ``num_partitions=None`` lets the
    plan choose them. ``dtype`` "bfloat16" or "float16" means autocast. The gradient is that of the whole training
    set in any case. Raises UsageError for float16 weights.
    """
    check_weights(model)
    options = AutoencoderOptions(
        num_epochs=num_epochs, learning_rate=learning_rate, patience=patience, num_partitions=num_partitions,
        random_seed=random_seed, budget=budget, start="random", optimizer=optimizer, dtype=dtype,
    )  # fmt: skip
    weights_dtype = next(model.parameters()).dtype
    train, validation = as_rows(train_data, dtype=weights_dtype), as_rows(val_data, dtype=weights_dtype)
    splits = Splits(train=train, validation=validation, test=validation, described="rows of the caller")
    program = program_of(options, model, splits)
    with program.step:
        results = tuple(run_epochs(program))
    return History(
        train_losses=tuple(result.loss for result in results),
        validation_losses=tuple(math.nan if r.validation is None else r.validation for r in results),
        best_epoch=program.best.best_index,
        stopped_early=program.stopped,
    )


class MemoryEfficientAutoencoder(Autoencoder):
    """``Autoencoder`` with the document's two methods."""

    def train_with_accumulation(
        self,
        train_data: Any,
        val_data: Any,
        num_epochs: int = 300,
        learning_rate: float = 1e-3,
        patience: int = 20,
        accumulation_steps: int | None = DOCUMENT_PARTITIONS,
        **also: Any,
    ) -> History:
        """``train_with_gradient_accumulation`` of this model: same weights, same history, bit for bit.

        ``also`` are that function's keywords.
        """
        return train_with_gradient_accumulation(
            self, train_data, val_data, num_epochs, learning_rate, patience, accumulation_steps, **also
        )

    @torch.no_grad()
    def predict_in_batches(self, rows: Any, batch_size: int = 4096) -> Tensor:
        """Reconstructions (N, D) on the host; ``batch_size`` rows are on the model's device at a time."""
        source = as_rows(rows)
        here = next(self.parameters())
        predicted = torch.empty(tuple(source.shape), dtype=here.dtype)
        for start, stop in data.partitions(len(source), batch_size):
            predicted[start:stop] = self(source.read(start, stop).to(here))
        return predicted
