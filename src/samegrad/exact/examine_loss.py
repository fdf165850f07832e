"""One pass or two: what the loss of a few rows shows, and whether what was declared of it is true."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import CannotSplit
from samegrad.exact import collectives, losses
from samegrad.exact.aliases import NARROW, ParameterAliases
from samegrad.exact.audit import audit
from samegrad.exact.declared_loss import examine_declared, false_for_collectives
from samegrad.exact.findings import Examination, ModelFindings
from samegrad.exact.loss_rows import taken_over_rows, with_grad
from samegrad.exact.losses import Form, LossForm
from samegrad.exact.out_of_memory import is_out_of_memory
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
                return examine_declared(declared, aliases, outputs, few, layout, state)
            form, count = _recognised(declared, outputs, few, layout, state)
    except collectives.CollectiveSeen as seen:
        if declared.normalise is None:
            return Examination(Form.COUPLED, f"the loss calls a collective ({seen}), once a step", collectives=True)
        raise false_for_collectives(declared, seen) from None
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
    _, rows = with_grad(outputs)
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
    _, rows = with_grad(model.outputs)
    with torch.enable_grad():
        loss = declared.loss_fn(rows, model.few)
    if loss.dtype in NARROW:
        kind = str(loss.dtype).removeprefix("torch.")
        return two_passes(
            examination, f"it is a {kind} number, which a chunk's share of the rows would round; float32 gives one pass"
        )
    return examination


def _recognised(
    declared: DeclaredStep, outputs: Any, few: Any, layout: RowLayout, state: ModuleState
) -> tuple[LossForm, float]:
    """The form the loss graph shows and the audit does not reject, and the count of a COUNTED loss on these rows."""
    leaves, rows = with_grad(outputs)
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
    try:
        residual = audit(declared, outputs, few, layout, form.form)
        found = taken_over_rows(declared, outputs, few, layout)
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        # It ran on all of these rows, and does not on one of them: it asks for other rows.
        if is_out_of_memory(error):
            raise
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return LossForm(Form.COUPLED, f"it fails on fewer than {layout.rows} rows ({words})"), 0.0
    # Parts without a gradient show nothing of their weight: a mask's hidden denominator could pass. A likelihood
    # brings its own count, so ignored targets may be silent there.
    if residual is None or (residual.silent_parts and form.form is not Form.COUNTED):
        return LossForm(Form.COUPLED, "these rows give no gradient to check a single pass with"), 0.0
    if not residual.passed:
        text = f"its graph looks like a {form.form.value}, but parts differ by {residual.gradient:.2g}"
        return LossForm(Form.COUPLED, text), 0.0
    if found is not None:
        # On rows that are alike it is one for all of them, and no comparison of values shows it.
        text = f"it uses in {found.used} what {found.made} takes over rows"
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
