"""What can be asked of the vector-quantised autoencoder. No torch here."""

from __future__ import annotations

import dataclasses
import difflib
import math
from pathlib import Path
from typing import Literal

from samegrad.recipes._recipe import CommonOptions

DTYPES = ("float32", "float64", "bfloat16", "float16")
RECORDED = ("ToyCar", "ToyConveyor", "fan", "pump", "slider", "valve")
OFFLINE = ("generated_fan", "faces")
PATCH_MULTIPLE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQSpectrogramOptions(CommonOptions):
    """The options the document and its program name, with their values, and those of the offline data.

    Where a default depends on the data, the recordings' is the document's and the offline one is smaller.
    """

    data_root: Path | None = None
    """Log-mels of recordings: <data_root>/<machine>/{train,test}/*.npy. Unset: made-up fans, or faces."""
    machine_type: str | None = None
    """With data_root: fan, pump, slider, valve, ToyCar, ToyConveyor, or all of them if unset. Without:
    generated_fan or faces."""
    subset_fraction: float | None = None
    """Use this share of every machine id's clips."""
    norm_stats_path: Path | None = None
    """Mean and deviation of every mel band: a .npz with mean and std. Unset: those of the training clips."""
    clips_per_id: int = 30
    """Of generated_fan: normal clips to train on, for each of four machine ids; two thirds as many are to test."""
    batch_size: int | None = None
    """Clips a batch. Unset: 32 of recordings, 12 of generated fans, 10 faces."""
    gradient_accumulation_steps: int = 1
    """Batches that make one optimizer step, exactly as one batch of that size would; pins the rows at a time."""
    patch_len: int = 64
    """Frames of a patch."""
    stride: int | None = None
    """Frames from one patch to the next. Unset: 16 of recordings, 32 of generated fans."""
    n_patches: int | None = None
    """Patches of a clip, drawn or repeated to this number. Unset: 16 of recordings, 4 of generated fans."""
    use_amp: bool = False
    """Compute in bfloat16 where the device has it, else in float16 with a scaled loss; weights stay float32."""
    use_gradient_checkpointing: bool = False
    """Run encoder and decoder again in backward instead of keeping what they compute; pins the plan."""
    memory_saver: bool = False
    """Both use_amp and use_gradient_checkpointing."""
    norm: Literal["batch", "group"] = "batch"
    """BatchNorm over all patches of a logical batch, or GroupNorm, which is another model."""
    latent_dim: int = 64
    """Numbers at each place of the latent; another value is another model."""
    channels: tuple[int, int, int] = (32, 64, 96)
    """Widths of the encoder's first three layers and, backwards, of the decoder's; others are another model."""
    num_codes: int = 128
    """Codes in the codebook; another number is another model."""
    codebook_start: Literal["data", "random"] = "data"
    """Codes to start from: latents of training clips, or normal numbers (the document)."""
    recon_target: Literal["transformed", "original"] = "transformed"
    """What is reconstructed: the patches as the encoder sees them, or as they were before their transformation."""
    transform_head_per_patch: bool = False
    """Ask every patch for the transformation, not the clip."""
    score: Literal["reconstruction", "codes"] | None = None
    """Which clip score auc and pauc are of; both are printed. Unset: reconstruction, of faces the codes."""
    epochs: int | None = None
    """Passes over the training clips. Unset: 50 of recordings, 12 of generated fans, 30 of faces."""
    lr: float = 1e-3
    """Learning rate of AdamW."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of a step; 0 leaves it alone."""
    lambda_recon: float = 1.0
    """Weight of the reconstruction's mean squared error."""
    lambda_vq: float = 1.0
    """Weight of the commitment loss, which is 0.25 of the squared distance to the code."""
    lambda_machine_id: float = 0.5
    """Weight of telling the machine id."""
    lambda_transform: float = 0.5
    """Weight of telling the transformation."""
    no_staged_training: bool = False
    """Train on the full loss from the first epoch to the last, the codebook never frozen."""
    phase1_frac: float = 0.2
    """Share of the epochs without the two heads' losses."""
    phase2_frac: float = 0.6
    """Share of the epochs with the full loss."""
    phase3_frac: float = 0.2
    """Share of the epochs with the codebook frozen."""
    commitment_warmup_epochs: int = 5
    """Epochs over which the commitment's weight grows to lambda_vq; 0 for none."""
    commitment_warmup_start: float = 0.25
    """Where that growth starts, as a share."""
    lr_warmup_epochs: int = 3
    """Epochs over which the learning rate grows to lr; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(
            1, "gradient_accumulation_steps", "clips_per_id", "latent_dim", "num_codes", "batch_size", "stride",
            "n_patches", "epochs",
        )  # fmt: skip
        if self.patch_len < PATCH_MULTIPLE or self.patch_len % PATCH_MULTIPLE:
            self._out_of_range("patch_len", "the encoder halves it three times", "give a multiple of 8, such as 64")
        if min(self.channels) < 1:
            self._out_of_range("channels", "a layer without channels", "give three positive whole numbers")
        self._positive("lr", do="give for example 1e-3")
        self._not_negative(
            "lambda_recon", "lambda_vq", "lambda_machine_id", "lambda_transform", "grad_clip", do="give for example 1.0"
        )
        for name in ("commitment_warmup_epochs", "lr_warmup_epochs"):
            if getattr(self, name) < 0:
                self._out_of_range(name, "a negative number of epochs", "give 0 or more")
        if not 0 <= self.commitment_warmup_start <= 1:
            self._out_of_range("commitment_warmup_start", "it must lie between 0 and 1", "give for example 0.25")
        if self.subset_fraction is not None and not 0 < self.subset_fraction <= 1:
            self._out_of_range("subset_fraction", "it must lie between 0 and 1", "give for example 0.2")
        self._known_dtype(DTYPES)
        self._check_phases()
        self._check_machine_type()
        self._check_dtype()

    @property
    def offline(self) -> str | None:
        """Which offline data stand in for recordings, None with recordings."""
        return None if self.data_root is not None else self.machine_type or OFFLINE[0]

    @property
    def machine_types(self) -> tuple[str, ...]:
        return (self.machine_type,) if self.machine_type else RECORDED if self.offline is None else (OFFLINE[0],)

    @property
    def batch_clips(self) -> int:
        """Clips of one ``batch_size``."""
        return self.batch_size or {None: 32, "faces": 10}.get(self.offline, 12)

    @property
    def logical_clips(self) -> int:
        """Clips of one optimizer step."""
        return self.batch_clips * self.gradient_accumulation_steps

    @property
    def patch_stride(self) -> int:
        return self.stride or (16 if self.offline is None else 32)

    @property
    def clip_patches(self) -> int:
        return self.n_patches or {None: 16, "faces": 1}.get(self.offline, 4)

    @property
    def total_epochs(self) -> int:
        return self.epochs or {None: 50, "faces": 30}.get(self.offline, 12)

    @property
    def chosen_score(self) -> str:
        # Backgrounds are smoother than faces and easily reconstructed; what is odd of them is where their codes are.
        return self.score or ("codes" if self.offline == "faces" else "reconstruction")

    @property
    def checkpoints(self) -> bool:
        """Whether encoder and decoder are to run again in backward."""
        return self.use_gradient_checkpointing or self.memory_saver

    @property
    def narrow(self) -> bool:
        """Whether to compute in half precision over float32 weights."""
        return self.use_amp or self.memory_saver or self.dtype in ("bfloat16", "float16")

    def _check_phases(self) -> None:
        fractions = (self.phase1_frac, self.phase2_frac, self.phase3_frac)
        for name, value in zip(("phase1_frac", "phase2_frac", "phase3_frac"), fractions):
            if not 0 <= value <= 1:
                self._out_of_range(name, "it must lie between 0 and 1", "give for example 0.2")
        if abs(math.fsum(fractions) - 1) > 1e-6:
            self._refuse(
                "phase1_frac", f"the three phases are {math.fsum(fractions):g} of the epochs together",
                "make phase1_frac, phase2_frac and phase3_frac add up to 1",
            )  # fmt: skip

    def _check_machine_type(self) -> None:
        known = OFFLINE if self.data_root is None else RECORDED
        if self.machine_type is None or self.machine_type in known:
            return
        if self.data_root is None and self.machine_type in RECORDED:
            self._refuse(
                "machine_type",
                "recordings are not shipped, and nothing is put in their place",
                f"--data_root DIR with DIR/{self.machine_type}/{{train,test}}/normal_id_XX_*.npy (see the recipe's "
                f"README for making them of WAV files), or --machine_type {OFFLINE[0]} for made-up ones",
            )
        near = difflib.get_close_matches(self.machine_type, (*RECORDED, *OFFLINE), n=1)
        self._refuse(
            "machine_type",
            "no such machine" + (f"; did you mean {near[0]!r}?" if near else ""),
            f"use one of {', '.join(known)}",
        )

    def _check_dtype(self) -> None:
        if self.dtype == "float64" and (self.use_amp or self.memory_saver):
            self._refuse("dtype", "--use_amp computes in half precision", "give one of the two")


Options = VQSpectrogramOptions
