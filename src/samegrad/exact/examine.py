"""Everything that must be known of a step before its rows are split, learnt from a few rows of its first batch.

Run once for each shape of batch and mode of the model. What it finds unsafe is refused by name; nothing of the
user's is left changed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import CannotSplit, FalseNormalise
from samegrad.exact import losses, program
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.audit import audit
from samegrad.exact.forward import StepForward
from samegrad.exact.losses import Form, LossForm
from samegrad.exact.passes import FirstPass, as_in_first_pass
from samegrad.exact.probes import PROBE_ROWS, RowProbes, check_reach, same_rows
from samegrad.exact.randomness import DrawSites
from samegrad.exact.shared_leaves import stood_in
from samegrad.exact.state import StateRule
from samegrad.exact.undisturbed import Generators, ModuleState, undisturbed
from samegrad.trees import RowLayout


@dataclasses.dataclass(frozen=True)
class Examination:
    """How a step may be split.

    ``form`` COUPLED means two passes. ``declared``: the form rests on normalise=. ``count_per_row``: the count of a
    COUNTED loss that a row brings, as seen on the probe rows. ``module_hooks``: the user's hooks that run per chunk.
    ``sites``: where the model draws, None where it does not. ``rules``: how the state that it changes is reduced.
    """

    form: Form
    reason: str
    declared: bool = False
    count_per_row: float = 1.0
    module_hooks: tuple[str, ...] = ()
    first_pass: FirstPass = FirstPass.WITHOUT_GRAPH
    sites: DrawSites | None = None
    rules: tuple[StateRule, ...] = ()

    @property
    def passes(self) -> int:
        return 2 if self.form is Form.COUPLED else 1


@dataclasses.dataclass(frozen=True)
class ModelFindings:
    """What was found of a model whose rows can be split: its outputs on the probe rows ``few``, and how it runs."""

    outputs: Any
    few: Any
    layout: RowLayout
    first_pass: FirstPass
    sites: DrawSites | None
    rules: tuple[StateRule, ...]


def examine(declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout) -> Examination:
    """How the step may be split. Raises CannotSplit or FalseNormalise, with the module or the residual named."""
    refuse_batch_gradients(batch, layout)
    return examine_loss(declared, aliases, examine_model(declared, aliases, batch, layout))


def examine_model(
    declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout
) -> ModelFindings:
    """That rows can be split through the whole model. Raises CannotSplit naming the module that forbids it."""
    batch, aliases = stood_in(batch, layout, aliases)
    rows = min(PROBE_ROWS, layout.rows)
    few, others = (
        trees.move(trees.take_rows(batch, layout, chosen), declared.device) for chosen in chosen_rows(layout.rows, rows)
    )
    few_layout = dataclasses.replace(layout, rows=rows)
    with undisturbed(declared.modules, declared.device) as (generators, state):
        probes = RowProbes(declared, few, few_layout, generators, state)
        found = probes.run(others, few_layout)
        forward = StepForward.of(declared, rows, probes.draws, found.rules)
        with aliases.swapped() as standing, torch.enable_grad():
            with_graph = forward.again(few, forward.ids(slice(0, rows)))
            check_reach(aliases, with_graph, standing)
            with as_in_first_pass(declared.device.type, FirstPass.WITHOUT_GRAPH):
                without_graph = forward.again(few, forward.ids(slice(0, rows)))
        first_pass = FirstPass.WITHOUT_GRAPH if same_rows(with_graph, without_graph) else FirstPass.WITH_GRAPH
    return ModelFindings(found.outputs, few, few_layout, first_pass, found.sites, found.rules)


def examine_loss(declared: DeclaredStep, aliases: ParameterAliases, model: ModelFindings) -> Examination:
    """One pass or two, by the loss of the probe rows. Raises CannotSplit or FalseNormalise."""
    hooks = _module_hooks(declared.network)
    few, layout = model.few, model.layout
    with undisturbed(declared.modules, declared.device) as (_, state):
        if declared.normalise is not None:
            _check_declared(declared, model.outputs, few, layout, state)
            _check_loss_reach(declared, aliases, model.outputs, few)
            return Examination(
                Form.ROW_SUM, "declared by normalise=", declared=True, module_hooks=hooks, sites=model.sites,
                rules=model.rules,
            )  # fmt: skip
        form, count = _recognised(declared, model.outputs, few, layout, state)
    return Examination(
        form.form, form.reason, count_per_row=count / layout.rows, module_hooks=hooks, first_pass=model.first_pass,
        sites=model.sites, rules=model.rules,
    )  # fmt: skip


def chosen_rows(batch_rows: int, rows: int) -> tuple[list[int], list[int]]:
    """``rows`` rows spread over the batch, and as many to replace them with: others where the batch has them."""
    stride = batch_rows // rows
    few = [i * stride for i in range(rows)]
    if stride > 1:
        return few, [i + 1 for i in few]
    return few, [few[(i + 1) % rows] for i in range(rows)]


def refuse_batch_gradients(batch: Any, layout: RowLayout) -> None:
    for path, leaf, axis in zip(layout.paths, trees.leaves_of(batch), layout.axes):
        if axis is not None and isinstance(leaf, Tensor) and leaf.requires_grad:
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"{path} carries rows and requires grad; only parameters and leaves that all rows share receive "
                "gradients from chunks",
                do="detach it, mark it as shared with None in batch_axes=, or run the step whole with "
                "rows=<the batch's rows>",
            )


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


def _module_hooks(network: nn.Module) -> tuple[str, ...]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return tuple(
        f"{name or 'the model'} ({type(part).__name__})"
        for name, part in network.named_modules()
        if any(getattr(part, kind) for kind in kinds)
    )


def find_draws(declared: DeclaredStep, batch: Any, layout: RowLayout) -> DrawSites | None:
    """Where the model draws, None where it does not or where its draws cannot be keyed, so that it cannot be split."""
    rows = min(PROBE_ROWS, layout.rows)
    few = trees.move(trees.take_rows(batch, layout, chosen_rows(layout.rows, rows)[0]), declared.device)
    with undisturbed(declared.modules, declared.device) as (generators, state):
        try:
            return RowProbes(declared, few, dataclasses.replace(layout, rows=rows), generators, state).draw_sites()
        except CannotSplit:
            return None
