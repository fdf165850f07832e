"""Everything that must be known of a step before its rows are split, learnt from a few rows of its first batch.

Run once for each shape of batch and mode of the model. What it finds unsafe is refused by name; nothing of the
user's is left changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import CannotSplit, FalseNormalise
from samegrad.exact import collectives, losses, program
from samegrad.exact.aliases import NARROW, ParameterAliases
from samegrad.exact.audit import audit
from samegrad.exact.backward_probe import BackwardProbe
from samegrad.exact.forward import StepForward
from samegrad.exact.losses import Form, LossForm
from samegrad.exact.passes import FirstPass, as_in_first_pass
from samegrad.exact.probes import PROBE_ROWS, Findings, RowProbes, refuse_known_layers, same_rows
from samegrad.exact.randomness import DrawSites
from samegrad.exact.sharded import give_up, ranks_of, refuse_in_loss, refuse_unsafe, reshard
from samegrad.exact.shared_leaves import stood_in
from samegrad.exact.state import StateRule
from samegrad.exact.undisturbed import Generators, ModuleState, NotToBeTried, step_undisturbed
from samegrad.trees import RowLayout


@dataclasses.dataclass(frozen=True)
class Examination:
    """How a step may be split.

    ``form`` COUPLED means two passes. ``declared``: the form rests on normalise=. ``count_per_row``: the count of a
    COUNTED loss that a row brings, as seen on the probe rows. ``module_hooks``: the user's hooks that run per chunk.
    ``sites``: where the model draws, None where it does not. ``rules``: how the state that it changes is reduced.
    ``collectives``: the loss calls some, so ranks must run it equally often.
    """

    form: Form
    reason: str
    declared: bool = False
    count_per_row: float = 1.0
    module_hooks: tuple[str, ...] = ()
    first_pass: FirstPass = FirstPass.WITHOUT_GRAPH
    sites: DrawSites | None = None
    rules: tuple[StateRule, ...] = ()
    collectives: bool = False

    @property
    def passes(self) -> int:
        return 2 if self.form is Form.COUPLED else 1


@dataclasses.dataclass(frozen=True)
class ModelFindings:
    """What was found of a model whose rows can be split: its outputs on the probe rows ``few``, and how it runs.

    ``aliases``: with stand-ins for leaves of the batch that all rows share.
    """

    aliases: ParameterAliases
    outputs: Any
    few: Any
    layout: RowLayout
    first_pass: FirstPass
    sites: DrawSites | None
    rules: tuple[StateRule, ...]


def examine(declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout) -> Examination:
    """How the step may be split. Raises CannotSplit or FalseNormalise, with the module or the residual named.

    With sharded parameters every forward is a collective: all ranks must examine at the same time. They then examine
    as many rows, and what one rank refuses is refused on all.
    """
    rows = min(PROBE_ROWS, layout.rows)
    ranks = ranks_of(declared.modules)
    if ranks is None:
        refuse_batch_gradients(batch, layout)
        return examine_loss(declared, examine_model(declared, aliases, batch, layout, rows))

    def at_sight() -> tuple[None, int]:
        refuse_batch_gradients(batch, layout)
        refuse_known_layers(declared.network)
        refuse_unsafe(declared.modules, dict(zip(aliases.names, aliases.parameters)))
        return None, -rows

    def tried() -> tuple[Examination, int]:
        found = examine_loss(declared, examine_model(declared, aliases, batch, layout, -negative))
        return found, found.passes

    _, negative = ranks.together(at_sight)
    try:
        examination, passes = ranks.together(tried)
    except BaseException:
        give_up(declared.modules)
        raise
    finally:
        reshard(declared.modules)
    if passes > examination.passes:
        return _two_passes(examination, "another rank needs two passes")
    return examination


def _two_passes(examination: Examination, reason: str) -> Examination:
    return dataclasses.replace(examination, form=Form.COUPLED, reason=reason)


def examine_model(
    declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout, rows: int
) -> ModelFindings:
    """That rows can be split through the whole model, on ``rows`` of them. Raises CannotSplit naming the module."""
    batch, aliases = stood_in(batch, layout, aliases)
    few, others = (
        trees.move(trees.take_rows(batch, layout, chosen), declared.device) for chosen in chosen_rows(layout.rows, rows)
    )
    few_layout = dataclasses.replace(layout, rows=rows)
    with step_undisturbed(declared) as (generators, state):
        probes = RowProbes(declared, few, few_layout, generators, state)
        found = probes.run(others)
        if aliases.sharded:
            _refuse_beside_shards(found)
        forward = StepForward.of(declared, rows, probes.draws, found.rules)
        first_pass = _first_pass(aliases, forward, probes)
    return ModelFindings(aliases, found.outputs, few, few_layout, first_pass, found.sites, found.rules)


def _refuse_beside_shards(found: Findings) -> None:
    if found.sites is None and not found.rules:
        return
    what = "draws random numbers" if found.sites is not None else f"changes {found.rules[0].name}"
    raise CannotSplit(
        asked="split the rows of a step whose parameters are sharded",
        found=f"the forward {what}, which chunks of zero weight on some ranks would do as well",
        do="run the step whole (rows=<the batch's rows>), or use DistributedDataParallel",
    )


def _first_pass(aliases: ParameterAliases, forward: StepForward, probes: RowProbes) -> FirstPass:
    """How rows are to be computed first. Raises CannotSplit for what their graph and its backward show."""

    def some(batch: Any, rows: Sequence[int]) -> Any:
        return forward.again(batch, None if forward.row_ids is None else forward.row_ids[list(rows)])

    everything = range(forward.batch_rows)
    if aliases.sharded:
        with aliases.swapped(), torch.enable_grad():
            with_graph = some(probes.batch, everything)
            # A forward that no backward follows would stay in the order in which fully_shard gathers ahead.
            program.backward_of_nothing(program.tensors_in(with_graph))
    else:
        with_graph = BackwardProbe(probes, aliases, some).run()
    with aliases.swapped(), as_in_first_pass(forward.declared.device.type, FirstPass.WITHOUT_GRAPH):
        without_graph = some(probes.batch, everything)
    alike = same_rows(with_graph, without_graph) and not _has_recurrent_layers(forward.declared.network)
    return FirstPass.WITHOUT_GRAPH if alike else FirstPass.WITH_GRAPH


def examine_loss(declared: DeclaredStep, model: ModelFindings) -> Examination:
    """One pass or two, by the loss of the probe rows. Raises CannotSplit or FalseNormalise."""
    with step_undisturbed(declared) as (_, state):
        examination = _of_loss(declared, model, state)
        if model.aliases.sharded and examination.passes == 1:
            examination = _per_rank(declared, examination, model)
    return dataclasses.replace(
        examination, module_hooks=_module_hooks(declared.network), first_pass=model.first_pass, sites=model.sites,
        rules=model.rules,
    )  # fmt: skip


def _of_loss(declared: DeclaredStep, model: ModelFindings, state: ModuleState) -> Examination:
    aliases, outputs, few, layout = model.aliases, model.outputs, model.few, model.layout
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


def _refuse_sharded_in_loss(declared: DeclaredStep, aliases: ParameterAliases, outputs: Any, few: Any) -> None:
    _, rows = _with_grad(outputs)
    with torch.enable_grad():
        loss = checked_loss(declared.loss_fn(rows, few))
    refuse_in_loss(losses.leaves_under(loss), declared.network, aliases.sharded_names())


def _per_rank(declared: DeclaredStep, examination: Examination, model: ModelFindings) -> Examination:
    """One pass is left where each chunk's share is known before it runs: ranks reduce it as soon as it has run."""
    if examination.form is Form.COUNTED:
        return _two_passes(
            examination,
            "it is divided by this rank's count of targets, and chunks are reduced over ranks before that is known; "
            "normalise=lambda batch: <that count> gives one pass",
        )
    _, rows = _with_grad(model.outputs)
    with torch.enable_grad():
        loss = declared.loss_fn(rows, model.few)
    if loss.dtype in NARROW:
        kind = str(loss.dtype).removeprefix("torch.")
        return _two_passes(
            examination, f"it is a {kind} number, which a chunk's share of the rows would round; float32 gives one pass"
        )
    return examination


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


def _has_recurrent_layers(network: nn.Module) -> bool:
    """Their kernels without a graph give the same bits for some numbers of rows and not for others (one row, say)."""
    return any(isinstance(part, nn.RNNBase) for part in network.modules())


def _module_hooks(network: nn.Module) -> tuple[str, ...]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return tuple(
        f"{name or 'the model'} ({type(part).__name__})"
        for name, part in network.named_modules()
        # fully_shard's own are no hooks of the user's.
        if any(not _of_torch(hook) for kind in kinds for hook in getattr(part, kind).values())
    )


def _of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def find_draws(declared: DeclaredStep, batch: Any, layout: RowLayout) -> DrawSites | None:
    """Where the model draws, None where it does not or where its draws cannot be keyed, so that it cannot be split."""
    try:
        return draws_or_none(declared, batch, layout)
    except NotToBeTried:
        return None


def draws_or_none(declared: DeclaredStep, batch: Any, layout: RowLayout) -> DrawSites | None:
    """The same. Raises NotToBeTried for a model that no forward may be tried of."""
    rows = min(PROBE_ROWS, layout.rows)
    few = trees.move(trees.take_rows(batch, layout, chosen_rows(layout.rows, rows)[0]), declared.device)
    with step_undisturbed(declared) as (generators, state):
        try:
            return RowProbes(declared, few, dataclasses.replace(layout, rows=rows), generators, state).draw_sites()
        except NotToBeTried:
            raise
        except CannotSplit:
            return None
