"""The training step of ``options``: how the model is called, and what somebody pinned of the plan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, nn

import samegrad as sg
from samegrad.recipes._recipe.clipping import clip_before_step
from samegrad.recipes._recipe.precision import weight_dtype

from .data import Batch
from .model import Objective, Outputs, VQSpectrogram
from .options import VQSpectrogramOptions

# Of BatchNorm layers in lockstep, how many lie between inputs that are kept, where little is to be kept.
_FEW_KEPT = 4


def make_model(options: VQSpectrogramOptions, machines: int) -> VQSpectrogram:
    """The model in training mode, on the host; its weights depend on the seed alone."""
    return VQSpectrogram(
        machines,
        latent_dim=options.latent_dim,
        channels=options.channels,
        num_codes=options.num_codes,
        norm=options.norm,
        transform_head_per_patch=options.transform_head_per_patch,
        generator=Generator().manual_seed(options.random_seed),
        dtype=weight_dtype(options.dtype),
    )


def make_objective(options: VQSpectrogramOptions) -> Objective:
    return Objective(
        options.lambda_recon, options.lambda_vq, options.lambda_machine_id, options.lambda_transform
    )


def make_optimizer(options: VQSpectrogramOptions, model: nn.Module) -> torch.optim.AdamW:
    """AdamW that clips the norm of the gradients of a whole logical batch, once, before its step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    clip_before_step(optimizer, options.grad_clip)
    return optimizer


def narrow_dtype(options: VQSpectrogramOptions, device: torch.device) -> torch.dtype | None:
    """In what to compute under autocast: bfloat16, or float16 where the device has no bfloat16; None for no autocast.
    """
    if not options.narrow:
        return None
    if options.dtype == "float16":
        return torch.float16
    if options.dtype == "bfloat16" or device.type != "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def make_step(
    options: VQSpectrogramOptions,
    model: VQSpectrogram,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    plan: sg.Plan | None = None,
) -> sg.Step:
    """The step of logical batches like ``batch``, by ``plan`` where one is given.

    Raises BudgetTooSmall, naming the pin that does not fit.
    """
    device = next(model.parameters()).device
    declare = functools.partial(
        sg.Step, model, objective, optimizer=optimizer, forward=_forward(narrow_dtype(options, device))
    )
    if plan is not None:
        return declare(plan=plan)
    if options.budget is not None:
        return _budgeted(options, declare, batch)
    if pinned_rows(options) is None and not options.checkpoints:
        return declare()
    return declare(plan=pinned_plan(options, model, len(batch["machine"])))


def pinned_rows(options: VQSpectrogramOptions) -> int | None:
    """Clips at a time that somebody asked for, None where that is the plan's affair."""
    return options.batch_clips if options.gradient_accumulation_steps > 1 else None


def pinned_plan(options: VQSpectrogramOptions, model: nn.Module, batch_rows: int) -> sg.Plan:
    """The plan that the options name where no budget is given: clips at a time, blocks run again, or the plain step."""
    rows = pinned_rows(options)
    levers: dict[str, dict[str, Any]] = {}
    if rows is not None and options.norm == "batch":
        # In lockstep everything runs again already; checkpointing then means to keep fewer of its cuts.
        levers["exact_batchnorm"] = {"rows": rows, "keep_every": _FEW_KEPT if options.checkpoints else 1}
    elif rows is not None:
        levers["split_rows"] = {"rows": rows}
    if options.checkpoints and "exact_batchnorm" not in levers:
        levers["recompute"] = {"blocks": blocks_of(model)}
    exact = sg.Exactness.SAME_SUM if rows is not None else sg.Exactness.SAME_BITS
    return sg.Plan(
        levers=levers,
        exactness=exact,
        batch_rows=batch_rows,
        knob_origins={f"{name}.{next(iter(knobs))}": sg.KnobOrigin.PINNED for name, knobs in levers.items()},
    )


def blocks_of(model: nn.Module) -> list[str]:
    """The encoder's and the decoder's blocks, by name; single convolutions keep little more than their input."""
    return [
        f"{part}.{name}"
        for part in ("encoder", "decoder")
        for name, block in model.get_submodule(part).named_children()
        if any(True for _ in block.children())
    ]


def _budgeted(options: VQSpectrogramOptions, declare: Callable[..., sg.Step], batch: Batch) -> sg.Step:
    rows = pinned_rows(options)
    step = declare(budget=options.budget)
    if rows is None and not options.checkpoints:
        return step
    with step:
        try:
            plan, footprint = sg.settle_plan(step, batch, budget=options.budget, rows=rows)
        except (sg.BudgetTooSmall, sg.CannotSplit) as refusal:
            raise _renamed(options, refusal) from None
        if options.checkpoints and not {"recompute", "exact_batchnorm"} & set(plan.levers):
            # All would fit as it is; with less kept it fits all the more.
            more = {"recompute": {"blocks": blocks_of(step.declared.network)}}
            plan = sg.Plan(
                levers=plan.levers | more, exactness=plan.exactness, batch_rows=plan.batch_rows, budget=plan.budget,
                signature=plan.signature, parameters=plan.parameters,
                knob_origins=plan.knob_origins | {"recompute.blocks": sg.KnobOrigin.PINNED},
            )  # fmt: skip
    pinned = declare(plan=plan)
    pinned.footprint = footprint
    return pinned


def _renamed(options: VQSpectrogramOptions, refusal: sg.SamegradError) -> sg.BudgetTooSmall:
    pinned = options.gradient_accumulation_steps > 1
    name = "gradient_accumulation_steps" if pinned else "use_gradient_checkpointing"
    value = f" {options.gradient_accumulation_steps}" if pinned else ""
    do = "take a smaller --batch_size and more steps, leave the option out, or raise the budget"
    return sg.BudgetTooSmall(
        asked=f"--{name}{value} within {options.budget}", found=refusal.found, do=do, option=name
    )


def _forward(dtype: torch.dtype | None) -> Any:
    """How the model is called: None for its own way, or under autocast."""
    if dtype is None:
        return None

    def under_autocast(model: nn.Module, batch: Batch) -> Outputs:
        patches = batch["patches"]
        with torch.autocast(patches.device.type, dtype=dtype):
            outputs: Outputs = model(patches)
        return outputs

    return under_autocast
