"""What can be asked of the style flow. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from samegrad.recipes._recipe import CommonOptions

DTYPES = ("float32", "float64", "bfloat16")
# Of an option that is unset: (the document's, for real latents; smaller, for the bundled pictures on two cores).
SIZES: Mapping[str, tuple[Any, Any]] = {
    "batch_size": (32, 8),
    "num_epochs": (100, 20),
    "base_channels": (128, 16),
    "learning_rate": (1e-4, 1e-3),
    "w_style": (1.0, 3.0),
}
# The document's file has its options in these mappings; here they are options like all others.
CONFIG_SECTIONS = ("training", "loss", "model", "data", "inference")
_BUNDLED_STEPS_PER_EPOCH = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowStyleOptions(CommonOptions):
    """The keys of the document's config.json, with its values, and those of the data."""

    # Without a type, so that it is no option itself.
    config_sections = CONFIG_SECTIONS

    dtype: str = "float32"
    """Number format: float32, float64, or bfloat16, which means autocast over float32 weights."""
    batch_size: int | None = None
    """With accumulation_steps, the logical batch. Unset: the document's 32, or 8 for the bundled pictures."""
    accumulation_steps: int = 2
    """The logical batch is batch_size times this; its loss and gradient are those of one plain batch."""
    ode_integration_steps: int = 10
    """Euler steps from a row's time to 1."""
    use_gradient_checkpointing: bool | None = None
    """Run ODE steps again in backward, or with --no_use_gradient_checkpointing never. Unset: the budget decides."""
    checkpoint_every: int | None = None
    """With checkpointing, what enters every so manyth ODE step is kept. Unset: every step."""
    use_compile: bool = False
    """Compile the ODE step (torch.compile)."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode; reduce-overhead adds memory (CUDA graphs)."""
    fullgraph: bool = False
    """Refuse graph breaks when compiling."""
    cache_size_limit: int = 16
    """Compiled variants before torch.compile gives up on a function (its recompile limit)."""
    use_cudnn_benchmark: bool = False
    """Let cuDNN try its convolution algorithms while training, on CUDA; shapes must not change."""
    num_epochs: int | None = None
    """Epochs. Unset: 100, or 20 for the bundled pictures."""
    steps_per_epoch: int | None = None
    """Optimizer steps in an epoch. Unset: largest style x styles^2 over the logical batch, or bundled 5."""
    learning_rate: float | None = None
    """First step size of AdamW. Unset: the document's 1e-4, or 1e-3 for the bundled pictures."""
    last_learning_rate: float = 1e-6
    """Step size at the end of the cosine."""
    weight_decay: float = 1e-5
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradient norm that a logical step is clipped to, once."""
    epsilon: float = 0.01
    """Earliest time that a row starts at."""
    epsilon_warmup_epochs: int = 10
    """Epochs over which that earliest time rises to epsilon, from 0."""
    label_drop_prob: float = 0.1
    """Share of rows that are trained without their style, for guidance; drawn once a logical batch."""
    w_style: float | None = None
    """Weight of the sliced Wasserstein distance of patches. Unset: 1, or 3 for the bundled pictures."""
    w_content: float = 1.0
    """Weight of the change of self-similarity."""
    use_velocity_reg: bool = False
    """Penalise the mean squared velocity."""
    vel_reg_weight: float = 0.01
    """Weight of that penalty."""
    patch_size: int = 3
    """Side of a patch, odd."""
    swd_scales: tuple[int, ...] = ()
    """Patch sides when there are several (the document: 1 3 7); instead of patch_size."""
    swd_scale_weights: tuple[float, ...] = ()
    """A weight for each of swd_scales; 1 each when unset."""
    num_projections: int = 64
    """Directions that patches are projected on."""
    max_samples: int = 8192
    """Patches of the logical batch that are compared; 0 is all of them."""
    max_spatial_samples: int = 0
    """Positions whose self-similarity is compared; 0 is all of them."""
    style_weights: tuple[float, ...] = ()
    """A weight for each style's part of the style loss, in the order of the styles' names."""
    patch_pool: Literal["style", "batch"] = "style"
    """Compare patches within their target style, or (the document) all styles in one pool."""
    base_channels: int | None = None
    """Width of the network. Unset: the document's 128, or 16 for the bundled pictures."""
    data_root: Path | None = None
    """Folder of latents: <style>/*.pt. Unset: latents of bundled pictures, photographs and histology."""
    held_out_fraction: float = 0.2
    """Share of the latents under data_root that is judged by, not trained on."""
    crops: int = 96
    """Training crops of each style of the bundled pictures."""
    held_out_crops: int = 16
    """Held-out crops of each style of the bundled pictures."""
    num_inference_steps: int = 20
    """Steps of the sampler."""
    start_time: float = 0.7
    """Time that styled pictures start at: 0 from noise, 1 from the source."""
    cfg_scale: float = 2.0
    """Guidance: how far the styled velocity is followed beyond the unstyled one; 1 is none."""
    temperature_lambda: float = 0.1
    """Noise of the sampler in its second half."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers()
        self._known_dtype(DTYPES)
        for name in ("patch_size", "swd_scales"):
            sizes = getattr(self, name)
            if any(size < 1 or size % 2 == 0 for size in (sizes if isinstance(sizes, tuple) else (sizes,))):
                self._out_of_range(name, "a patch has a middle", "give odd sizes, such as 3")
        if self.swd_scale_weights and len(self.swd_scale_weights) != len(self.swd_scales):
            self._refuse("swd_scale_weights", f"{len(self.swd_scales)} swd_scales", "give one weight for each")
        if self.checkpoint_every is not None and self.use_gradient_checkpointing is False:
            self._refuse("checkpoint_every", "checkpointing is turned off", "leave one of the two out")
        for name in ("compile_mode", "fullgraph", "cache_size_limit"):
            if not self.use_compile and getattr(self, name) != getattr(FlowStyleOptions, name):
                self._refuse(name, "nothing is compiled", "add --use_compile, or leave it out")

    def _check_numbers(self) -> None:
        self._at_least(
            1, "batch_size", "accumulation_steps", "ode_integration_steps", "checkpoint_every", "cache_size_limit",
            "num_epochs", "steps_per_epoch", "num_projections", "base_channels", "crops", "held_out_crops",
            "num_inference_steps",
        )  # fmt: skip
        for name in ("max_samples", "max_spatial_samples", "epsilon_warmup_epochs"):
            if getattr(self, name) < 0:
                self._out_of_range(
                    name, "it must not be negative", "give a whole number; 0 is all of them, or no warm-up"
                )
        self._positive("learning_rate", "max_grad_norm", do="give for example 1e-4 or 1.0")
        self._not_negative(
            "last_learning_rate", "weight_decay", "w_style", "w_content", "vel_reg_weight", "cfg_scale",
            "temperature_lambda", do="give for example 1.0",
        )  # fmt: skip
        for name in ("epsilon", "label_drop_prob", "start_time"):
            if not 0 <= getattr(self, name) < 1:
                self._out_of_range(name, "it must be at least 0 and less than 1", "give for example 0.1")
        if not 0 < self.held_out_fraction < 1:
            self._out_of_range("held_out_fraction", "it must lie between 0 and 1", "give for example 0.2")
        if self.base_channels is not None and self.base_channels % 4:
            self._out_of_range(
                "base_channels", "channels are normalised four and more at a time", "give a multiple of 4"
            )

    def size(self, name: str) -> Any:
        """The option ``name``, or where it is unset the document's value or that of the bundled pictures."""
        value = getattr(self, name)
        return value if value is not None else SIZES[name][self.data_root is None]

    def for_card_elsewhere(self) -> Self:
        # No plan hangs on cuDNN's trials, and the host has none.
        return dataclasses.replace(super().for_card_elsewhere(), use_cudnn_benchmark=False)

    @property
    def logical_rows(self) -> int:
        """Rows of one optimizer step."""
        return int(self.size("batch_size")) * self.accumulation_steps

    @property
    def pinned_checkpoint(self) -> int | None:
        """How many ODE steps run again together, 0 none; None where the budget may decide."""
        if self.use_gradient_checkpointing or self.checkpoint_every is not None:
            return min(self.checkpoint_every or 1, self.ode_integration_steps)
        return None if self.use_gradient_checkpointing is None else 0

    @property
    def patch_sizes(self) -> tuple[int, ...]:
        return self.swd_scales or (self.patch_size,)

    @property
    def size_weights(self) -> tuple[float, ...]:
        return self.swd_scale_weights or (1.0,) * len(self.patch_sizes)

    def epoch_steps(self, largest_style: int, styles: int) -> int:
        """Optimizer steps in an epoch; ``largest_style``: latents of the style with the most."""
        if self.steps_per_epoch is not None:
            return self.steps_per_epoch
        if self.data_root is None:
            return _BUNDLED_STEPS_PER_EPOCH
        return max(1, largest_style * styles**2 // self.logical_rows)


Options = FlowStyleOptions
