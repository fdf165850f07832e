"""Style transfer of latents by a ten-step flow whose loss sorts all patches of the logical batch (document 001).

The logical batch is ``batch_size`` x ``accumulation_steps`` rows. Its sliced Wasserstein distance sorts the patches of
all of them, so it is computed once, on all rows; chunks of rows and ODE steps that run again are the plan's affair.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe import LongTable, Program, Recipe, needed_for_pictures
from samegrad.recipes._recipe.clipping import clip_before_step
from samegrad.recipes._recipe.precision import autocast, narrow_dtype, weight_dtype

from . import data
from .calling import Calling, CompiledCalling
from .judging import Judgement, judge_styled
from .losses import Energy
from .model import Styled, StyleFlow, make_flow
from .options import FlowStyleOptions
from .plans import planned_step
from .results import write_results
from .sampling import Sampler
from .splits import Splits, open_splits
from .table import rows_of_table

_log = logging.getLogger("samegrad")

# Beside the options' seed and the epoch, so that no two uses share draws.
_TRAINING, _VALIDATION, _STYLING = 0, 1, 2


@dataclasses.dataclass(kw_only=True)
class FlowStyleProgram(Program):
    """AdamW on whole logical batches drawn from ``splits``; the weights with the lowest held-out energy are kept."""

    model: StyleFlow
    options: FlowStyleOptions
    splits: Splits
    energy: Energy
    calling: Calling
    _parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def batches(self, epoch: int) -> Iterator[data.StyleBatch]:
        options = self.options
        rate = data.cosine_rate(
            options.size("learning_rate"), options.last_learning_rate, epoch, options.size("num_epochs")
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        earliest = data.earliest_time(options.epsilon, epoch, options.epsilon_warmup_epochs)
        training = self.splits.training
        # In force while the loop works on what is yielded, and as it was when the epoch ends, however it ends.
        with torch.backends.cudnn.flags(benchmark=options.use_cudnn_benchmark or torch.backends.cudnn.benchmark):
            for step in range(options.epoch_steps(training.largest_style, len(training.names))):
                seed = (options.random_seed, _TRAINING, epoch, step)
                yield data.draw_batch(training, drawing_of(options), earliest=earliest, seed=seed)

    def validate(self) -> float:
        """The training energy on held-out latents, under the same draws every time; its terms are named as losses."""
        batch = self._held_out_batch
        styled = [self._flow(rows) for rows in _in_chunks(batch, self.options.size("batch_size"))]
        distance, similarity = self.energy.parts(torch.cat(styled), batch)
        self._parts = {"swd_loss": float(distance), "ssm_loss": float(similarity)}
        return self.energy.style_weight * float(distance) + self.energy.content_weight * float(similarity)

    def validation_parts(self) -> Mapping[str, float]:
        return self._parts

    def evaluate(self) -> dict[str, float]:
        found = self.judge()
        return {
            "held_out_swd": found.swd, "held_out_ssm": found.ssm,
            "held_out_swd_identity": found.identity_swd, "held_out_ssm_identity": found.identity_ssm,
            "held_out_swd_shuffled": found.shuffled_swd, "held_out_ssm_shuffled": found.shuffled_ssm,
            "held_out_latents": len(self.splits.held_out),
            **self.calling.counts(),
        }  # fmt: skip

    def judge(self) -> Judgement:
        """Held-out latents styled by the sampler, between the two anchors."""
        return judge_styled(self.restyled, self.splits.held_out, self.splits.training, self.options.patch_sizes)

    def restyled(self, source: Tensor, source_ids: Tensor, style_ids: Tensor) -> Tensor:
        """Latents (B, 4, H, W) styled by the sampler as inference does it, on the host."""
        device, generator = self.step.declared.device, data.generator_of(self.options.random_seed, _STYLING)
        parts = []
        for first in range(0, len(source), self.options.size("batch_size")):
            rows = slice(first, first + self.options.size("batch_size"))
            with autocast(narrow_dtype(self.options.dtype), device):
                styled = sampler_of(self.options).style(
                    self.model.network, source[rows].to(device), style_ids[rows].to(device), generator
                )
            parts.append(styled.to("cpu", source.dtype))
        return torch.cat(parts)

    def write(self, folder: Path) -> list[Path]:
        with needed_for_pictures():
            return write_results(
                self.model,
                folder,
                restyle=self.restyled,
                splits=self.splits,
                base_channels=self.options.size("base_channels"),
                sampler=sampler_of(self.options),
            )

    def describe(self) -> list[str]:
        options, splits = self.options, self.splits
        rows, size = options.logical_rows, options.size("batch_size")
        patches = data.patches_in(rows, splits.training.latents)
        compared = min(options.max_samples or patches, patches)
        parameters = sum(p.numel() for p in self.model.parameters())
        return [
            f"latents: {splits.described}; styles {', '.join(splits.training.names)}; "
            f"{len(splits.training)} to train on, {len(splits.held_out)} held out",
            f"model: LGTUNet of width {options.size('base_channels')}, {parameters:,} parameters, "
            f"{options.ode_integration_steps} Euler steps{_checkpointed(options)}; {options.dtype}",
            f"logical batch: {rows} rows ({size} x {options.accumulation_steps}), one loss and one gradient",
            f"patches: {patches:,} in a logical batch, {compared:,} compared ({compared / patches:.1%} coverage), "
            f"{options.num_projections} directions, "
            f"{'within their style' if self.energy.by_style else 'all in one pool'}",
            f"optimizer: AdamW, learning rate {options.size('learning_rate'):g} to {options.last_learning_rate:g}, "
            f"gradient norm clipped to {options.max_grad_norm:g} once a logical step",
        ]

    def told_of_pins(self) -> list[str]:
        """Which ODE steps run again by the options alone: they are part of the step, and every number is with them."""
        options, steps = self.options, self.options.ode_integration_steps
        every, told = options.pinned_checkpoint, []
        if every is not None:
            by = "--use_gradient_checkpointing" if every else "--no_use_gradient_checkpointing"
            if options.checkpoint_every is not None:
                by = f"--checkpoint_every {options.checkpoint_every}"
            runs = "one by one" if every == 1 else f"in runs of {every}"
            again = f"runs its {steps} ODE steps again in backward, {runs}: all numbers here are with that"
            told.append(f"Pinned by {by}: the plain step {again if every else 'runs no ODE step again in backward'}.")
        patches = data.patches_in(options.logical_rows, self.splits.training.latents)
        if 0 < options.max_samples < patches:
            told.append(
                f"Gradient noise: the style loss compares {options.max_samples:,} of {patches:,} patches "
                "(--max_samples); how far that strays from all of them: samegrad plan flow_style --table."
            )
        return told

    @functools.cached_property
    def _held_out_batch(self) -> data.StyleBatch:
        drawing = dataclasses.replace(
            drawing_of(self.options), rows=len(self.splits.held_out), label_drop_probability=0.0
        )
        seed = (self.options.random_seed, _VALIDATION)
        return data.draw_batch(self.splits.held_out, drawing, earliest=self.options.epsilon, seed=seed)

    @torch.no_grad()
    def _flow(self, rows: data.StyleBatch) -> Tensor:
        """Styled latents of some rows of a batch on the host, by the flow as it is trained."""
        device = self.step.declared.device
        styled: Styled = self.calling(self.model, rows.to(device))
        return styled.latents.to("cpu", rows.source.dtype)


def _checkpointed(options: FlowStyleOptions) -> str:
    every = options.pinned_checkpoint
    return f", run again in backward {every} at a time (pinned)" if every else ""


def _in_chunks(batch: data.StyleBatch, rows: int) -> Iterator[data.StyleBatch]:
    for first in range(0, len(batch.source), rows):
        part = {name: getattr(batch, name)[first : first + rows] for name in data.ROW_FIELDS}
        yield batch._replace(**part)


def build(options: FlowStyleOptions) -> FlowStyleProgram:
    """The program that ``options`` describe; latents are read, nothing is trained. Raises what is wrong with them."""
    splits, device = open_splits(options), sg.find_device(options.device)
    if options.use_cudnn_benchmark and device.type != "cuda":
        _log.warning("samegrad: --use_cudnn_benchmark has no effect here (%s): cuDNN runs on CUDA devices", device)
    model = make_flow(
        len(splits.training.names),
        base_channels=options.size("base_channels"),
        ode_steps=options.ode_integration_steps,
        seed=options.random_seed,
        dtype=weight_dtype(options.dtype),
    ).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.size("learning_rate"), weight_decay=options.weight_decay,
        # Which takes no temporaries; the others take a parameter size.
        fused=next(model.parameters()).device.type == "cuda",
    )  # fmt: skip
    clip_before_step(optimizer, options.max_grad_norm)
    energy = energy_of(options)
    batch = data.draw_batch(
        splits.training, drawing_of(options), earliest=0.0, seed=(options.random_seed, _TRAINING, 0, 0)
    )
    calling = calling_of(options, model)
    declare = functools.partial(
        sg.Step, model, energy, optimizer=optimizer, forward=calling, batch_axes=data.ROW_AXES
    )
    return FlowStyleProgram(
        step=planned_step(options, model, declare, batch),
        model=model,
        optimizer=optimizer,
        best=sg.BestWeights(model, patience=None),
        epochs=options.size("num_epochs"),
        empty_cache=options.empty_cache,
        options=options,
        splits=splits,
        energy=energy,
        calling=calling,
    )


def energy_of(options: FlowStyleOptions) -> Energy:
    """The loss that ``options`` describe."""
    return Energy(
        style_weight=options.size("w_style"),
        content_weight=options.w_content,
        velocity_weight=options.vel_reg_weight if options.use_velocity_reg else 0.0,
        patch_sizes=options.patch_sizes,
        size_weights=options.size_weights,
        style_weights=options.style_weights,
        by_style=options.patch_pool == "style",
    )


def drawing_of(options: FlowStyleOptions) -> data.Drawing:
    """How logical batches are drawn under ``options``."""
    return data.Drawing(
        rows=options.logical_rows,
        label_drop_probability=options.label_drop_prob,
        patch_sizes=options.patch_sizes,
        projections=options.num_projections,
        max_samples=options.max_samples or None,
        max_positions=options.max_spatial_samples or None,
    )


def calling_of(options: FlowStyleOptions, model: StyleFlow) -> Calling:
    """How the flow is called under ``options``."""
    if not options.use_compile:
        return Calling(options.dtype)
    return CompiledCalling(
        options.dtype, model.network, mode=options.compile_mode, fullgraph=options.fullgraph,
        recompile_limit=options.cache_size_limit,
    )  # fmt: skip


def sampler_of(options: FlowStyleOptions) -> Sampler:
    """How held-out latents are styled under ``options``, and by default those of inference."""
    return Sampler(
        steps=options.num_inference_steps,
        start_time=options.start_time,
        guidance=options.cfg_scale,
        temperature=options.temperature_lambda,
    )


def table(options: FlowStyleOptions) -> LongTable:
    """The document's tables with our figures beside its own."""
    return rows_of_table(options, energy_of(options))


RECIPE = Recipe(
    name="flow_style",
    summary=__doc__.splitlines()[0],
    document="001",
    options=FlowStyleOptions,
    build=build,
    table=table,
    pins={"use_gradient_checkpointing": "recompute.blocks", "checkpoint_every": "recompute.blocks"},
    troubleshooting=(
        "Out of memory: fewer accumulation_steps do not lower the peak of a document's loop, and here they only make "
        "the logical batch smaller. Give --budget: fewer rows at a time and ODE steps that run again keep the batch.",
        "Still out of memory: a smaller batch_size is another logical batch, and another loss: its patches are fewer. "
        "--use_gradient_checkpointing runs every ODE step again and leaves the gradient as it is.",
        "Training is unstable: a lower --max_grad_norm clips harder (once a logical step), --use_velocity_reg pulls "
        "velocities down, --epsilon_warmup_epochs 20 lets rows start at noise for longer.",
        "Training is slow: --use_compile pays on a GPU whose time goes into launches; fewer --ode_integration_steps "
        "are faster in proportion and another model; more accumulation_steps make updates rarer, not steps faster.",
    ),
)
