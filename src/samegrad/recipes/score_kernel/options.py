"""What can be asked of the kernel score model. No torch here."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Literal

from samegrad.recipes._recipe import CommonOptions

DataName = Literal[
    "digits", "cifar10", "swissroll", "8gaussians", "pinwheel", "circles", "moons", "2spirals", "checkerboard", "rings",
    "swissroll_6D_xy1",
]  # fmt: skip
StrategyName = Literal["auto", "single_gpu", "model_parallel", "chunked", "gradient_accumulation"]
DTYPES = ("float32", "float64")
TEST_BATCHES = 10
# Without it pixels have no density: they take few values.
DEFAULT_NOISE = {"digits": 0.3, "cifar10": 0.05}
VALIDATION_BATCHES = 5
# The document's, for the strategies that go by them, where there is neither a number nor a budget.
DOCUMENT_CHUNK_SIZE, DOCUMENT_STEPS = 50, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreKernelOptions(CommonOptions):
    """The options the document names, and those of the data and the devices."""

    # Where a copy goes makes no other training of it.
    changes_on_resume = CommonOptions.changes_on_resume | {"save"}

    dtype: str = "float32"
    """Number format: float32 or float64."""
    data: DataName = "digits"
    """Points whose score is matched: a toy distribution, scikit-learn's digits, or cifar10 from --data_root."""
    data_root: Path | None = None
    """Folder with CIFAR-10's batches, in the python or the binary layout."""
    noise: float | None = None
    """Deviation of Gaussian noise on the points; on training samples anew in every batch. Unset: 0.3 for digits, 0.05
    for cifar10, else none."""
    depth: int = 5
    """Hidden layers of the factor network."""
    hiddenunits: int = 64
    """Units of each hidden layer."""
    start: Literal["covariance", "document"] = "covariance"
    """Precisions to start from: the training samples' own covariance at the scale that matches best, or softplus(0.1)
    on the diagonal (the document)."""
    niters: int = 600
    """Optimizer steps. It validates, and can log, save and stop (--log_every, --save_every, --steps), after every
    fiftieth and the last: these are rounded up to fifties."""
    batch_size: int = 64
    """Training samples of one step."""
    lr: float = 5e-4
    """Largest learning rate."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    scheduler_type: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    """How the learning rate goes over the steps."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, once a step; 0 leaves them."""
    train_kernel_size: int = 100
    """Centers of the mixture; with --load_centers_path those of the file."""
    train_samples_size: int | None = None
    """Training samples to draw batches from; centers are none of them. Unset: 800 of the digits, else 10000."""
    test_samples_size: int = 50
    """Samples of each of the ten test batches and of the five validation batches."""
    centers: Literal["disjoint", "leave_one_out"] = "disjoint"
    """Centers of their own, or the first training samples, each without weight at its own center."""
    stability: float = 0.01
    """Smallest entry of a factor's diagonal, so that log det P exists. The document: the same option, added to P."""
    strategy: StrategyName = "auto"
    """How the centers are gone through. All give the same gradient and differ in bytes and time."""
    chunk_size: int | None = None
    """Centers at a time, for --strategy chunked; pins the plan. 0 or unset: the budget decides; unset without a budget
    under --strategy chunked: 50."""
    accumulation_steps: int | None = None
    """Chunks of one step, for --strategy gradient_accumulation; pins the plan. Unset: the budget decides; without a
    budget under that strategy: 4."""
    devices: tuple[str, ...] = ()
    """Devices of --strategy model_parallel in one process: cuda:0 cuda:1. Unset: all that are visible."""
    process_timeout: int = 300
    """Seconds that ranks under torchrun wait for each other."""
    load_model_path: Path | None = None
    """Weights of a factor network to start from: factornet.pt or factornet.safetensors of an earlier run."""
    load_centers_path: Path | None = None
    """Centers of an earlier run: centers.pt or centers.safetensors."""
    save: Path | None = None
    """Folder to write weights and centers to as well, after the run's own. A resumed run may be given another."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(
            1, "depth", "hiddenunits", "niters", "batch_size", "train_kernel_size", "test_samples_size",
            "process_timeout",
        )  # fmt: skip
        self._at_least(1, "train_samples_size", do="give a positive whole number, or leave it out")
        self._at_least(0, "chunk_size", do="give centers at a time, or 0 for the budget's choice")
        self._at_least(1, "accumulation_steps")
        self._positive("lr", do="give for example 5e-4")
        self._not_negative("weight_decay", "max_grad_norm", do="give for example 1e-4, or 0 to leave it off")
        if not (math.isfinite(self.stability) and self.stability > 0):
            self._out_of_range("stability", "log det P needs a positive diagonal", "give for example 0.01")
        self._not_negative("noise", do="give for example 0.1")
        if self.dtype not in DTYPES:
            self._out_of_range(
                "dtype", "log-weights of hundreds go through a softmax, where half precision has no digits left",
                f"use one of {', '.join(DTYPES)}",
            )  # fmt: skip
        self._check_save()
        if self.data == "cifar10" and self.data_root is None:
            self._refuse(
                "data", "no --data_root, and CIFAR-10 is not shipped",
                "give --data_root FOLDER with cifar-10-batches-py/data_batch_1 ... test_batch, or "
                "cifar-10-batches-bin/data_batch_1.bin ... test_batch.bin; offline there is --data digits",
            )  # fmt: skip
        if self.data != "cifar10" and self.data_root is not None:
            told = "shipped" if self.data == "digits" else "drawn"
            self._refuse("data_root", f"--data {self.data} is {told}, and nothing is read from a folder",
                         "give --data cifar10, or leave it out")  # fmt: skip
        self._check_strategy()

    def _check_save(self) -> None:
        """Refuses what can be no folder now, and not when all is trained."""
        if self.save is None:
            return
        # What is not there will be made below the nearest that is.
        nearest = next((place for place in (self.save, *self.save.parents) if os.path.lexists(place)), None)
        do = "give a folder, which need not exist yet"
        if nearest is not None and not os.path.isdir(nearest):
            self._out_of_range("save", f"{nearest} stands there and is no folder", do)
        if nearest is not None and not os.access(nearest, os.W_OK | os.X_OK):
            self._out_of_range("save", f"{nearest}: this user may not write there", do)

    def _check_strategy(self) -> None:
        if self.chunk_size and self.accumulation_steps is not None:
            self._refuse(
                "accumulation_steps", f"--chunk_size {self.chunk_size} says it too: both cut the centers of one step",
                "give one of the two",
            )  # fmt: skip
        if self.load_centers_path is None:
            self.check_centers(self.train_kernel_size)
        if self.strategy == "single_gpu" and (self.chunk_size or self.accumulation_steps not in (None, 1)):
            self._refuse("strategy", "it takes all centers at once, not in chunks", "give --strategy chunked")
        if self.devices and self.strategy not in ("auto", "model_parallel"):
            self._refuse("devices", f"--strategy {self.strategy} runs on one", "give --strategy model_parallel")

    def check_centers(self, count: int) -> None:
        """Refuses what does not go with ``count`` centers; known here without a file, else when that is read."""
        # The default asks for nothing, and the file decides.
        if self.train_kernel_size not in (count, type(self).train_kernel_size):
            self._refuse(
                "train_kernel_size", f"there are {count} centers in {self.load_centers_path}",
                f"leave it out or give {count}",
            )  # fmt: skip
        if self.accumulation_steps is not None and self.accumulation_steps > count:
            self._refuse(
                "accumulation_steps", f"there are {count} centers, and a chunk has at least one",
                f"give at most {count}",
            )  # fmt: skip

    @property
    def training_samples(self) -> int:
        """How many there are, asked for or not."""
        return self.train_samples_size or (800 if self.data == "digits" else 10_000)

    @property
    def noise_deviation(self) -> float:
        """Of the noise on points, asked for or not."""
        return DEFAULT_NOISE.get(self.data, 0.0) if self.noise is None else self.noise

    def pinned_rows(self, centers: int) -> int | list[int] | None:
        """Of ``centers``, those at a time that somebody asked for, or those of every chunk; None: nobody did."""
        if self.strategy == "single_gpu":
            return centers
        if self.accumulation_steps is not None:
            return even_sizes(centers, self.accumulation_steps)
        return min(self.chunk_size, centers) if self.chunk_size else None

    def default_rows(self, centers: int) -> int | list[int] | None:
        """The document's own, for a strategy that goes by chunks; None where the budget is to decide."""
        # 0 asks for what fits, also of what is free.
        if self.budget is not None or self.chunk_size is not None or self.accumulation_steps is not None:
            return None
        if self.strategy == "chunked":
            return min(DOCUMENT_CHUNK_SIZE, centers)
        return even_sizes(centers, min(DOCUMENT_STEPS, centers)) if self.strategy == "gradient_accumulation" else None


def even_sizes(centers: int, chunks: int) -> list[int]:
    """``centers`` in exactly ``chunks`` chunks, the larger ones first and larger by one."""
    size, larger = divmod(centers, chunks)
    return [size + 1] * larger + [size] * (chunks - larger)


Options = ScoreKernelOptions
