"""How an episode's step runs: what the options pin, what the document has, and what the memory there is decides.

The backbone is the step's model, and its rows are the images of the episode: it is what a plan puts into chunks, with
the BatchNorm statistics of the whole episode. The head and the three terms of the loss are the step's loss, once on
all embeddings.

AMP is a lever of the plan (``autocast``), taken because the options allow it: the verdict then compares with the plain
step under the same autocast and says how far float32 is.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.recipes._recipe.precision import forward_under, narrow_dtype

from .model import FewShotTransformer
from .objective import EpisodeLoss
from .options import FewShotOptions

AmpDtype = str | None


def amp_dtype(options: FewShotOptions, device: torch.device) -> AmpDtype:
    """The format of AMP on ``device``, or None: bfloat16 wherever there is any, float16 on cards without it."""
    if not options.amp_asked:
        return None
    if options.dtype != "auto":
        return options.dtype
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return "bfloat16"


class StreamedEpisodeLoss(EpisodeLoss):
    """The same loss, whose head takes ``query_rows`` queries at a time: each query is by itself, given the prototypes.

    Nothing inside the head is kept for more of them; it runs again in backward.
    """

    def __init__(self, loss: EpisodeLoss, query_rows: int) -> None:
        super().__init__(loss.head, loss.shape, weights=loss.weights)
        self.query_rows = query_rows

    def logits(self, support: Tensor, queries: Tensor) -> Tensor:
        """Logits (m, n) of queries (m, d), given the support (n, k, d)."""
        prototypes = self.head.prototypes(support)
        if len(queries) <= self.query_rows:
            whole: Tensor = self.head(prototypes, queries)
            return whole
        # The head is named among what is shared: its parameters get gradients from every chunk.
        logits: Tensor = sg.over(
            _logits_of_some, queries, shared=(prototypes, self.head), reduce="cat", rows=self.query_rows
        )
        return logits


def _logits_of_some(queries: Tensor, shared: tuple[Tensor, nn.Module]) -> Tensor:
    prototypes, head = shared
    logits: Tensor = head(prototypes, queries)
    return logits


class UnderAutocast(nn.Module):
    """``inner`` under autocast, as the plan's lever will run it: what a plan is measured with."""

    def __init__(self, inner: nn.Module, dtype: str) -> None:
        super().__init__()
        self.inner, self.dtype = inner, getattr(torch, dtype)

    def forward(self, *given: Tensor) -> Tensor:
        with torch.autocast(given[0].device.type, dtype=self.dtype):
            found: Tensor = self.inner(*given)
        return found


def chunk_sizes(images: int, steps: int) -> list[int]:
    """``images`` in ``steps`` chunks, none more than one image larger than another."""
    small, larger = divmod(images, steps)
    return [small + 1] * larger + [small] * (steps - larger)


def make_loss(options: FewShotOptions, model: FewShotTransformer) -> EpisodeLoss:
    """The three terms with the weights of ``options``, on the head's own parameters."""
    weights = (options.lambda_I, options.lambda_V, options.lambda_C)
    loss = EpisodeLoss(model.head, model.shape, weights=weights)
    return StreamedEpisodeLoss(loss, options.query_rows) if options.query_rows else loss


def make_step(
    options: FewShotOptions, model: FewShotTransformer, optimizer: torch.optim.Optimizer, episode: Tensor
) -> sg.Step:
    """The step, planned. ``episode``: images like those it will be given. Raises what refuses the plan."""
    device = next(model.parameters()).device
    loss, dtype = make_loss(options, model).to(device), amp_dtype(options, device)
    if options.plan_is_chosen:
        plan, footprint = _settled_plan(options, model, loss, optimizer, (episode, dtype))
    else:
        plan, footprint = _named_plan(options, model), None
    plan = _with_amp(plan, dtype, options.full_precision[0], model.backbone)
    allow = max(plan.exactness, sg.Exactness.SAME_SUM)
    # What somebody asked for is not left where memory runs out.
    is_asked = options.gradient_accumulation_steps or options.use_gradient_checkpointing
    step = sg.Step(
        model.backbone, loss, optimizer=optimizer, plan=plan, footprint=None if is_asked else footprint, allow=allow
    )
    step.footprint = footprint
    return step


def _named_plan(options: FewShotOptions, model: FewShotTransformer) -> sg.Plan:
    """The chunks that somebody asks for, or the document's, or the blocks that run again."""
    images = options.episode_images
    asked = bool(options.gradient_accumulation_steps)
    if options.use_gradient_checkpointing:
        return sg.Plan(
            levers={"recompute": {"blocks": block_names(model.backbone)}},
            exactness=sg.Exactness.SAME_BITS,
            batch_rows=images,
            knob_origins={"recompute.blocks": sg.KnobOrigin.PINNED},
        )
    if options.steps == 1:
        return sg.Plan(levers={}, exactness=sg.Exactness.SAME_BITS, batch_rows=images)
    return sg.Plan(
        levers={"exact_batchnorm": {"rows": chunk_sizes(images, options.steps)}},
        exactness=sg.Exactness.SAME_SUM,
        batch_rows=images,
        knob_origins={"exact_batchnorm.rows": sg.KnobOrigin.PINNED if asked else sg.KnobOrigin.DEFAULT},
        reasons={"exact_batchnorm": told_of_steps(options)},
    )


def told_of_steps(options: FewShotOptions) -> str:
    """Where the number of chunks comes from, in words."""
    if options.gradient_accumulation_steps:
        return f"{options.steps} chunks inside the episode, as --gradient_accumulation_steps asks"
    return f"{options.steps} chunks inside the episode, as the document has them for {options.backbone}"


def _settled_plan(
    options: FewShotOptions,
    model: FewShotTransformer,
    loss: EpisodeLoss,
    optimizer: torch.optim.Optimizer,
    given: tuple[Tensor, AmpDtype],
) -> tuple[sg.Plan, sg.Footprint]:
    """The fastest plan within the budget, or in what is free now, measured as AMP will run it.

    Pinned chunks are the plan's to work round.
    """
    episode, dtype = given
    steps = options.gradient_accumulation_steps
    if dtype is None:
        measured = sg.Step(model.backbone, loss, optimizer=optimizer)
    else:
        measured = step_under_autocast(model, loss, optimizer, dtype)
    with measured as step:
        try:
            plan, footprint = sg.settle_plan(
                step, episode, budget=options.budget, rows=chunk_sizes(len(episode), steps) if steps else None
            )
        except sg.BudgetTooSmall as refusal:
            if not steps:
                raise
            raise sg.BudgetTooSmall(
                asked=f"--gradient_accumulation_steps {steps} within {options.budget}",
                found=refusal.found,
                do="ask for more steps, leave the option out and let the plan choose, or raise the budget",
                option="gradient_accumulation_steps",
            ) from None
    # What was measured holds the loss in a module of its own; what runs does not.
    if options.use_gradient_checkpointing:
        plan = dataclasses.replace(_named_plan(options, model), budget=plan.budget)
    return sg.Step(model.backbone, loss).declared.signed(plan, episode), footprint


def step_under_autocast(
    model: FewShotTransformer, loss: EpisodeLoss, optimizer: torch.optim.Optimizer, dtype: str
) -> sg.Step:
    """The step under an autocast of its own: how AMP is measured and followed before there is a plan."""
    forward = forward_under(narrow_dtype(dtype))
    return sg.Step(model.backbone, UnderAutocast(loss, dtype), forward=forward, optimizer=optimizer)


def _with_amp(plan: sg.Plan, dtype: AmpDtype, full_precision: list[str], backbone: nn.Module) -> sg.Plan:
    """``plan`` under autocast in ``dtype``, the parts of ``full_precision`` left alone."""
    if dtype is None:
        return plan
    knobs = {"dtype": dtype, "full_precision": layers_in(backbone, full_precision)}
    return dataclasses.replace(
        plan,
        levers={**plan.levers, "autocast": knobs},
        exactness=sg.Exactness.ROUNDED,
        knob_origins={**plan.knob_origins, "autocast.dtype": sg.KnobOrigin.DEFAULT},
        reasons={**plan.reasons, "autocast": "AMP is on unless --no_use_amp or --dtype float32 turns it off"},
    )


def layers_in(backbone: nn.Module, parts: list[str]) -> list[str]:
    """The convolutions in ``parts``: they are all that autocast narrows there, and chunks run each as one call.

    Raises UsageError for a part that the backbone does not have.
    """
    known = dict(backbone.named_modules())
    found: list[str] = []
    for part in parts:
        if part not in known:
            raise sg.UsageError(
                asked=f"--precision backbone.{part}=float32",
                found="the backbone has no such part",
                do="use one of " + ", ".join(f"backbone.{name}" for name, _ in backbone.named_children()),
                option="precision",
            )
        inside = [(f"{part}.{name}".rstrip("."), layer) for name, layer in known[part].named_modules()]
        found += [name for name, layer in inside if isinstance(layer, nn.Conv2d)]
    return list(dict.fromkeys(found))


def block_names(backbone: nn.Module) -> list[str]:
    """What runs again as one: residual blocks, or the blocks of a convolutional backbone."""
    names = [name for name, _ in backbone.named_children() if name.startswith("layer")]
    parts = dict(backbone.named_children())
    if any(isinstance(layer, nn.Conv2d) for name in names for layer in parts[name].children()):
        return names
    return [f"{name}.{number}" for name in names for number, _ in parts[name].named_children()]
