"""What can be asked of the autoencoder. No torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from samegrad.recipes._recipe import CommonOptions

DOCUMENT_PARTITIONS = 6
DTYPES = ("float32", "float64", "bfloat16", "float16")
PURE_HALF = ("half", "fp16", "pure_float16", "float16_weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderOptions(CommonOptions):
    """The options the document names, with its values, and those of the data and the start."""

    changes_on_resume = CommonOptions.changes_on_resume | {"num_epochs"}

    num_epochs: int = 300
    """Optimizer steps at most: one step an epoch, on the whole training set."""
    learning_rate: float = 1e-3
    """Step size of the optimizer."""
    patience: int = 20
    """Epochs without a better validation loss after which training stops."""
    num_partitions: int | None = None
    """Partitions of the training set in one step; pins the plan. Unset: the budget decides, without budget 6."""
    accumulation_steps: int | None = None
    """The same as num_partitions."""
    latent_dim: int = 50
    """Numbers a row is squeezed into."""
    hidden: int | None = None
    """Width of the hidden layers. Unset: halfway between row and latent, as in the document."""
    tied: bool = False
    """Let the decoder use the encoder's matrices, transposed."""
    weight_penalty: float = 0.0
    """With tied: weight of the penalty that pulls the matrices towards orthonormal columns (the document: 0.1-10)."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer."""
    start: Literal["principal", "centred", "random"] = "principal"
    """Weights to start from: the principal components, random ones on centred rows, or random ones (the document)."""
    train_fraction: float = 0.5
    """Share of the rows to train on; the rest is validation and test, two to three."""
    data_root: Path | None = None
    """Your rows: a .parquet, .npy or .safetensors file or a folder of them. Unset: patches of bundled pictures."""
    layer_for_activation: int = 18
    """Parquet column to read: activation_layer_<this>."""
    patch_rows: int = 20_000
    """Rows of the offline data, in all: 48 x 48 patches of scikit-image's pictures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "num_epochs", "patience", "latent_dim", "patch_rows")
        self._at_least(
            1, "num_partitions", "accumulation_steps", "hidden", do="give a positive whole number, or leave it out"
        )
        self._positive("learning_rate", do="give for example 1e-3")
        if not 0 < self.train_fraction < 1:
            self._out_of_range("train_fraction", "it must lie between 0 and 1", "give for example 0.5")
        self._not_negative("weight_penalty", do="give for example 0.1")
        self._check_dtype()
        if self.weight_penalty and not self.tied:
            self._refuse("weight_penalty", "only the tied model has that penalty", "add --tied, or leave it out")
        if None not in (self.num_partitions, self.accumulation_steps) and (
            self.num_partitions != self.accumulation_steps
        ):
            self._refuse(
                "accumulation_steps",
                f"--num_partitions {self.num_partitions} says otherwise, and both mean the partitions of one step",
                "give one of the two",
            )

    @property
    def pinned_partitions(self) -> int | None:
        """The partitions somebody asked for, under either name."""
        return self.num_partitions if self.num_partitions is not None else self.accumulation_steps

    @property
    def fractions(self) -> tuple[float, float, float]:
        """Shares of train, validation and test rows; they add up to 1."""
        rest = 1 - self.train_fraction
        return self.train_fraction, 0.4 * rest, 0.6 * rest

    def _check_dtype(self) -> None:
        if self.dtype in PURE_HALF:
            self._out_of_range(
                "dtype",
                "weights in float16 do not train: Adam's eps of 1e-8 is 0 there (the smallest positive number is "
                "6e-8), so it divides by zero, and squared errors overflow above 65504",
                "--dtype float16 keeps float32 weights, computes in float16 and scales the loss; or --dtype bfloat16",
            )
        self._known_dtype(DTYPES)


Options = AutoencoderOptions
