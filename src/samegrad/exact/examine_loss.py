"""One pass or two: what the loss of a few rows shows, and whether what was declared of it is true."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import CannotSplit, FalseNormalise
from samegrad.exact import collectives, losses
from samegrad.exact.aliases import NARROW, ParameterAliases
from samegrad.exact.audit import audit
from samegrad.exact.findings import Examination, ModelFindings
from samegrad.exact.losses import Form, LossForm
from samegrad.exact.sharded import refuse_in_loss
from samegrad.exact.softmax_loss import SoftmaxLoss, checked
from samegrad.exact.undisturbed import Generators, ModuleState, step_undisturbed
from samegrad.trees import RowLayout


def two_passes(examination: Examination, reason: str) -> Examination:
    return dataclasses.replace(examination, form=Form.COUPLED, reason=reason)


def examine_loss(declared: DeclaredStep, model: ModelFindings) -> Examination:
    """One pass or two, by the loss of the probe rows. Raises CannotSplit or FalseNormalise."""
    with step_undisturbed(declared) as (_, state):
        examination = _of_loss(declared, model, state)
        if model.aliases.sharded and examination.passes == 1:
            examination = _per_rank(declared, examination, model)
    return dataclasses.replace(
        examination, module_hooks=module_hooks(declared.network), first_pass=model.first_pass, sites=model.sites,
        rules=model.rules,
    )  # fmt: skip


def _of_loss(declared: DeclaredStep, model: ModelFindings, state: ModuleState) -> Examination:
    aliases, outputs, few, layout = model.aliases, model.outputs, model.few, model.layout
    if isinstance(declared.loss_fn, SoftmaxLoss):
        return _of_softmax(declared, aliases, outputs)
    try:
        with collectives.watched():
            if aliases.sharded:
                _refuse_sharded_in_loss(declared, aliases, outputs, few)
            if declared.normalise is not None:
                _check_declared(declared, outputs, few, layout, state)
                _check_loss_reach(declared, aliases, outputs, few)
                return Examination(Form.ROW_SUM, "declared by normalise=", declared=True)
            form, count = _recognised(declared, outputs, few, layout, state)
    except collectives.CollectiveSeen as seen:
        if declared.normalise is None:
            return Examination(Form.COUPLED, f"the loss calls a collective ({seen}), once a step", collectives=True)
        raise FalseNormalise(
            asked=f"normalise={_named(declared.normalise)}",
            found=f"the loss calls a collective ({seen}): in one pass it would run once a chunk, and ranks with other "
            "chunk counts would wait for each other",
            do="remove normalise= (two passes run the loss once a step), or reduce the count before the step, pass it "
            "in the batch as a tensor without axes, divide by it and declare normalise='sum'",
        ) from None
    return Examination(form.form, form.reason, count_per_row=count / layout.rows)


def _of_softmax(declared: DeclaredStep, aliases: ParameterAliases, outputs: Any) -> Examination:
    if aliases.sharded:
        raise CannotSplit(
            asked="reduce='softmax_mean' in a step whose parameters are sharded (fully_shard)",
            found="chunks that run for other ranks' sake have no place in the softmax",
            do="run the step whole, or share the rows out: over(..., reduce='softmax_mean', process_group=...)",
        )
    checked(outputs)
    return Examination(Form.COUPLED, "a softmax over all rows, declared by reduce=; rows are not kept")


def _refuse_sharded_in_loss(declared: DeclaredStep, aliases: ParameterAliases, outputs: Any, few: Any) -> None:
    _, rows = _with_grad(outputs)
    with torch.enable_grad():
        loss = checked_loss(declared.loss_fn(rows, few))
    refuse_in_loss(losses.leaves_under(loss), declared.network, aliases.sharded_names())


def _per_rank(declared: DeclaredStep, examination: Examination, model: ModelFindings) -> Examination:
    """One pass is left where each chunk's share is known before it runs: ranks reduce it as soon as it has run."""
    if examination.form is Form.COUNTED:
        return two_passes(
            examination,
            "it is divided by this rank's count of targets, and chunks are reduced over ranks before that is known; "
            "normalise=lambda batch: <that count> gives one pass",
        )
    _, rows = _with_grad(model.outputs)
    with torch.enable_grad():
        loss = declared.loss_fn(rows, model.few)
    if loss.dtype in NARROW:
        kind = str(loss.dtype).removeprefix("torch.")
        return two_passes(
            examination, f"it is a {kind} number, which a chunk's share of the rows would round; float32 gives one pass"
        )
    return examination


def _check_declared(
    declared: DeclaredStep, outputs: Any, few: Any, layout: RowLayout, state: ModuleState
) -> None:
    generators = Generators(declared.device)
    residual = audit(declared, outputs, few, layout, None)
    if generators.advanced():
        raise FalseNormalise(
            asked=f"normalise={_named(declared.normalise)}",
            found="the loss draws random numbers, so the loss of a chunk is another draw than the batch's",
            do="remove normalise=: with two passes the loss is computed once, on all rows",
        )
    if changed := state.changed():
        raise FalseNormalise(
            asked=f"normalise={_named(declared.normalise)}",
            found=f"the loss changes {', '.join(changed[:3])}, which would happen once a chunk and not once a step",
            do="remove normalise=: with two passes the loss is computed once, on all rows",
        )
    if residual is not None and not residual.passed:
        raise FalseNormalise(
            asked=f"normalise={_named(declared.normalise)}",
            found=f"on {layout.rows} rows the loss is not that sum over rows: its gradient differs by "
            f"{residual.gradient:.2g} of the largest entry and its value by {residual.loss:.2g}, rounding explains "
            f"{residual.allowed:.1g}",
            do="remove normalise= (two passes are exact for every loss), or give the count the loss divides by",
        )


def _check_loss_reach(declared: DeclaredStep, aliases: ParameterAliases, outputs: Any, few: Any) -> None:
    """Raises CannotSplit when the loss uses a parameter without an alias: a chunk would write to its ``.grad``."""
    leaves, rows = _with_grad(outputs)
    with aliases.swapped() as standing, torch.enable_grad():
        loss = checked_loss(declared.loss_fn(rows, few))
    known = {id(leaf) for leaf in (*leaves, *standing)}
    for leaf in losses.leaves_under(loss):
        if id(leaf) not in known:
            raise CannotSplit(
                asked=f"normalise={_named(declared.normalise)}, one pass over the chunks",
                found=f"the loss uses a tensor of shape {tuple(leaf.shape)} that requires grad and is in no module "
                "that samegrad was given",
                do="make the loss an nn.Module that holds it as a parameter, or remove normalise=",
            )


def _with_grad(outputs: Any) -> tuple[list[Tensor], Any]:
    """The outputs as leaves of a new graph, and nested as before."""
    leaves, spec = trees.flatten(outputs)
    leaves = [
        leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], trees.unflatten(leaves, spec)


def _named(normalise: Any) -> str:
    return getattr(normalise, "__qualname__", repr(normalise))


def _recognised(
    declared: DeclaredStep, outputs: Any, few: Any, layout: RowLayout, state: ModuleState
) -> tuple[LossForm, float]:
    """The form the loss graph shows and the audit does not reject, and the count of a COUNTED loss on these rows."""
    leaves, rows = _with_grad(outputs)
    generators = Generators(declared.device)
    with torch.enable_grad():
        loss = checked_loss(declared.loss_fn(rows, few))
    form = losses.recognise(loss, leaves, layout.rows)
    if form.form is Form.COUPLED:
        return form, 0.0
    if generators.advanced():
        return LossForm(Form.COUPLED, "the loss draws random numbers"), 0.0
    if changed := state.changed():
        return LossForm(Form.COUPLED, f"the loss changes {', '.join(changed[:3])}"), 0.0
    residual = audit(declared, outputs, few, layout, form.form)
    # Parts without a gradient show nothing of their weight: a mask's hidden denominator could pass. A likelihood
    # brings its own count, so ignored targets may be silent there.
    if residual is None or (residual.silent_parts and form.form is not Form.COUNTED):
        return LossForm(Form.COUPLED, "these rows give no gradient to check a single pass with"), 0.0
    if not residual.passed:
        text = f"its graph looks like a {form.form.value}, but parts differ by {residual.gradient:.2g}"
        return LossForm(Form.COUPLED, text), 0.0
    count = losses.count_of(loss).item() if form.form is Form.COUNTED else 0.0
    return form, count


def module_hooks(network: nn.Module) -> tuple[str, ...]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return tuple(
        f"{name or 'the model'} ({type(part).__name__})"
        for name, part in network.named_modules()
        # fully_shard's own are no hooks of the user's.
        if any(not _of_torch(hook) for kind in kinds for hook in getattr(part, kind).values())
    )


def _of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
