"""Autoencoder of rows that do not fit the device: exact full-batch descent, one step an epoch (document 000).

One optimizer step an epoch on the mean squared error over *all* training rows; the rows stay on the host and travel
in partitions. Rows: D numbers each, the document's are 2304 wide.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

import samegrad as sg
from samegrad.recipes._recipe import Cell, Program, Recipe, needed_for_pictures
from samegrad.recipes._recipe.pinned import pinned_step
from samegrad.recipes._recipe.precision import autocast, forward_under, narrow_dtype, weight_dtype

from . import data
from .model import Autoencoder, PenalisedReconstruction, TiedAutoencoder, reconstruction_loss
from .options import DOCUMENT_PARTITIONS, AutoencoderOptions
from .results import mean_squared_error, row_errors, write_results
from .splits import EpochRows, Splits, open_splits

TABLE_PARTITIONS = (1, 2, 3, 6, 12)


def partition_sizes(rows: int, partitions: int) -> list[int]:
    """``rows`` in ``partitions`` parts, none empty, none more than one row larger than another. Raises UsageError."""
    if partitions > rows:
        raise sg.UsageError(
            asked=f"--num_partitions {partitions}",
            found=f"there are {rows} training rows, and the mean over an empty partition is no number",
            do=f"ask for at most {rows}",
            option="num_partitions",
        )
    small, larger = divmod(rows, partitions)
    return [small + 1] * larger + [small] * (partitions - larger)


@dataclasses.dataclass(kw_only=True)
class AutoencoderProgram(Program):
    """Full-batch descent on ``splits``: an epoch is one batch, all training rows, and one optimizer step."""

    model: Autoencoder | TiedAutoencoder
    options: AutoencoderOptions
    splits: Splits

    def start(self) -> None:
        if self.options.start == "principal":
            self.model.begin_at_components(self.principal.mean_row, self.principal.components)
            # The PCA is the first candidate: what is kept is never worse on the validation rows.
            self.best.update(self.validate())
        elif self.options.start == "centred":
            self.model.centre(data.mean_row_of(self.splits.train))

    def batches(self, epoch: int) -> Iterable[Any]:
        return [self.splits.train.shuffled(seed=self.options.random_seed, epoch=epoch)]

    def validate(self) -> float:
        return mean_squared_error(self.reconstruct, self.splits.validation, self.partition_rows)

    def evaluate(self) -> dict[str, float]:
        errors = row_errors(self.reconstruct, self.splits.test, self.partition_rows)
        return {
            "test_mse": float(errors.mean()),
            "test_mse_std": float(errors.std(correction=0)),
            "pca_test_mse": self.pca_test_mse,
            "test_rows": len(errors),
        }

    def write(self, folder: Path) -> list[Path]:
        errors = row_errors(self.reconstruct, self.splits.test, self.partition_rows)
        with needed_for_pictures():
            return write_results(
                self.model, folder, test=self.splits.test, errors=errors, pca_test_mse=self.pca_test_mse
            )

    def describe(self) -> list[str]:
        parts = (self.splits.train, self.splits.validation, self.splits.test)
        parameters = sum(p.numel() for p in self.model.parameters())
        return [
            f"rows: {self.splits.described}; train, validation, test: " + ", ".join(str(len(part)) for part in parts),
            f"model: {type(self.model).__name__} {self.model.width} - {self.model.hidden} - {self.model.hidden} - "
            f"{self.model.latent_dim}, {parameters:,} parameters, start {self.options.start}",
            f"objective: mean squared error over all elements of all training rows; {self.options.dtype}",
            f"optimizer: {self.options.optimizer}, learning rate {self.options.learning_rate:g}, one step an epoch",
        ]

    def reconstruct(self, rows: Tensor) -> Tensor:
        """Reconstructions (B, D) of rows (B, D) on any device, computed as in training."""
        with autocast(narrow_dtype(self.options.dtype), self.step.declared.device):
            reconstructed: Tensor = self.model(rows.to(self.step.declared.device))
        return reconstructed

    @property
    def partition_rows(self) -> int:
        """Rows of the largest partition of a training step; what fits with gradients fits without."""
        return int(max(self.step.sizes_for(self.splits.train)))

    @functools.cached_property
    def principal(self) -> data.Principal:
        """The PCA of the training rows, of the model's rank."""
        return data.fit_principal(self.splits.train, self.options.latent_dim)

    @functools.cached_property
    def pca_test_mse(self) -> float:
        return data.principal_mse(self.principal, self.splits.test)


def build(options: AutoencoderOptions) -> AutoencoderProgram:
    """The program that ``options`` describe; data are opened, nothing is trained. Raises what is wrong with them."""
    splits = open_splits(options)
    device = sg.find_device(options.device)
    model = _make_model(options, splits.train.shape[1]).to(device)
    return program_of(options, model, splits)


def _make_model(options: AutoencoderOptions, width: int) -> Autoencoder | TiedAutoencoder:
    hidden = options.hidden
    model = (TiedAutoencoder if options.tied else Autoencoder)(
        width,
        options.latent_dim,
        hidden=hidden,
        generator=Generator().manual_seed(options.random_seed),
        dtype=weight_dtype(options.dtype),
    )
    if options.start == "principal" and model.hidden < 2 * options.latent_dim:
        raise sg.UsageError(
            asked=f"--start principal with --latent_dim {options.latent_dim}",
            found=f"a component takes two hidden units, the layers have {model.hidden}",
            do=f"--hidden {2 * options.latent_dim} or more, or --start centred",
            option="start",
        )
    return model


def program_of(options: AutoencoderOptions, model: Any, splits: Splits) -> AutoencoderProgram:
    """The program that trains ``model`` on ``splits``. Raises UsageError for float16 weights."""
    check_weights(model)
    make = torch.optim.Adam if options.optimizer == "adam" else torch.optim.SGD
    optimizer = make(model.parameters(), lr=options.learning_rate)
    step = _make_step(options, model, optimizer, splits.train)
    device = step.declared.device
    return AutoencoderProgram(
        step=step,
        model=model,
        optimizer=optimizer,
        best=sg.BestWeights(model, patience=options.patience),
        epochs=options.num_epochs,
        scaler=torch.amp.GradScaler(device.type) if options.dtype == "float16" else None,
        empty_cache=options.empty_cache,
        options=options,
        splits=splits,
    )


def _make_step(
    options: AutoencoderOptions, model: Any, optimizer: torch.optim.Optimizer, train: EpochRows
) -> sg.Step:
    loss: Any = reconstruction_loss
    if options.weight_penalty:
        loss = PenalisedReconstruction(model.weights, options.weight_penalty)
    declare = functools.partial(
        sg.Step, model, loss, optimizer=optimizer, normalise="mean", forward=forward_under(narrow_dtype(options.dtype))
    )
    partitions = options.pinned_partitions
    if options.budget is None:
        # rule of all recipes: the document's own number holds where there is neither a budget nor a pin
        sizes = partition_sizes(len(train), partitions or min(DOCUMENT_PARTITIONS, len(train)))
        return declare(plan=_partition_plan(sizes, pinned=partitions is not None))
    if partitions is None:
        return declare(budget=options.budget)
    return pinned_step(
        declare,
        train,
        budget=options.budget,
        rows=partition_sizes(len(train), partitions),
        asked=f"--num_partitions {partitions} within {options.budget}",
        do="ask for more partitions, leave --num_partitions out, or raise the budget",
        option="num_partitions",
    )


def _partition_plan(sizes: list[int], *, pinned: bool) -> sg.Plan:
    return sg.Plan(
        levers={"host_rows": {}, "split_rows": {"rows": sizes}} if len(sizes) > 1 else {},
        exactness=sg.Exactness.SAME_SUM if len(sizes) > 1 else sg.Exactness.SAME_BITS,
        batch_rows=sum(sizes),
        knob_origins={"split_rows.rows": sg.KnobOrigin.PINNED if pinned else sg.KnobOrigin.DEFAULT},
    )


def check_weights(model: nn.Module) -> None:
    """Raises UsageError for float16 weights, which the document's training cannot have."""
    half = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16]
    if half:
        raise sg.UsageError(
            asked="train an autoencoder with float16 weights",
            found=f"{half[0]} is float16: Adam's eps of 1e-8 is 0 there, and squared errors overflow above 65504",
            do="keep the weights in float32 and pass dtype='float16' (autocast with a scaled loss) or 'bfloat16'",
        )


def table(options: AutoencoderOptions) -> list[Mapping[str, Cell]]:
    """The document's table: for 1, 2, 3, 6 and 12 partitions the predicted peak and time of an epoch.

    The document claims about six times less memory for six partitions; ``times_smaller`` is what the whole step gets.
    """
    plain = dataclasses.replace(options, budget=None, num_partitions=None, accumulation_steps=None)
    program = build(plain)
    rows = len(program.splits.train)
    footprint = sg.measure_step(program.step, program.splits.train)
    whole_bytes = footprint.predicted_peak_bytes(rows=rows)
    lines: list[Mapping[str, Cell]] = []
    for partitions in (n for n in TABLE_PARTITIONS if n <= rows):
        largest = max(partition_sizes(rows, partitions))
        peak_bytes = footprint.predicted_peak_bytes(rows=largest)
        lines.append(
            {
                "partitions": partitions,
                "rows_at_a_time": largest,
                "predicted_peak_bytes": peak_bytes,
                "predicted_seconds": footprint.predicted_seconds(rows=largest),
                "times_smaller": whole_bytes / peak_bytes,
                "document_times_smaller": {1: 1.0, DOCUMENT_PARTITIONS: float(DOCUMENT_PARTITIONS)}.get(partitions),
            }
        )
    return lines


RECIPE = Recipe(
    name="autoencoder",
    summary=__doc__.splitlines()[0],
    document="000",
    options=AutoencoderOptions,
    build=build,
    table=table,
    pins={"num_partitions": "split_rows.rows", "accumulation_steps": "split_rows.rows"},
    troubleshooting=(
        "float16 overflows: with float16 *weights* it must, and Adam's eps of 1e-8 is 0 there besides. "
        "--dtype float16 keeps float32 weights, computes in float16 and scales the loss; --dtype bfloat16 needs no "
        "scaling.",
        "float32 runs out of memory when all rows are on the device: they never are; they stay on the host or on "
        "disk and two partitions travel at a time. Give --budget and the plan chooses the partitions.",
        "More partitions need less memory, down to a floor: weights, gradients and optimizer state (16 bytes a "
        "parameter with Adam) do not shrink, so six partitions are not six times less. --table shows how much. "
        "--optimizer sgd holds no state; a smaller --hidden or --latent_dim is another model.",
        "Fewer partitions are faster only while launches or transfers dominate; on large partitions the time is "
        "that of the arithmetic, whatever their number. --table shows the times.",
        "Six partitions and one give the same gradient, also when the last one is shorter: each counts by its rows.",
        "torch.cuda.empty_cache() between partitions costs time and lowers no peak of the step; --empty_cache "
        "measures both.",
        "Training ends at once with a validation loss that only rises: --start principal begins at the PCA, so a "
        "learning rate that was right for random weights is too large; try a tenth of it.",
    ),
)
