"""Everything that must be known of a step before its rows are split, learnt from a few rows of its first batch.

Run once for each shape of batch and mode of the model. What it finds unsafe is refused by name; nothing of the
user's is left changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact import program
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.backward_probe import BackwardProbe
from samegrad.exact.batchnorm import by_rows
from samegrad.exact.examine_loss import examine_loss, two_passes
from samegrad.exact.findings import Examination, ModelFindings
from samegrad.exact.first_pass import FirstPass, as_in_first_pass
from samegrad.exact.float64 import float64_declared, widened
from samegrad.exact.forward import StepForward
from samegrad.exact.left_out import IGNORED, rows_with
from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.exact.probes import PROBE_ROWS, Findings, RowProbes
from samegrad.exact.randomness import DrawSites
from samegrad.exact.row_comparisons import same_rows
from samegrad.exact.row_refusals import refuse_known_layers
from samegrad.exact.sharded import give_up, ranks_of, refuse_unsafe, reshard
from samegrad.exact.shared_leaves import stood_in
from samegrad.exact.state import StateRule
from samegrad.exact.undisturbed import NotToBeTried, step_undisturbed
from samegrad.trees import RowLayout


def examine(
    declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout, left_out: Iterable[int] = ()
) -> Examination:
    """How the step may be split. Raises CannotSplit or FalseNormalise, with the module or the residual named.

    ``left_out``: targets that some of the rows that are tried are to have.

    With sharded parameters every forward is a collective: all ranks must examine at the same time. They then examine
    as many rows, and what one rank refuses is refused on all.
    """
    rows = min(PROBE_ROWS, layout.rows)
    ranks = ranks_of(declared.modules)
    if ranks is None:
        refuse_batch(declared, batch, layout)
        return examine_loss(declared, examine_model(declared, aliases, batch, layout, rows, left_out))

    def at_sight() -> tuple[None, int]:
        refuse_batch(declared, batch, layout)
        refuse_known_layers(declared.network)
        refuse_unsafe(declared.modules, dict(zip(aliases.names, aliases.parameters)))
        return None, -rows

    def tried() -> tuple[Examination, int]:
        found = examine_loss(declared, examine_model(declared, aliases, batch, layout, -negative, left_out))
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
        return two_passes(examination, "another rank needs two passes")
    return examination


def examine_model(
    declared: DeclaredStep,
    aliases: ParameterAliases,
    batch: Any,
    layout: RowLayout,
    rows: int,
    left_out: Iterable[int] = (),
) -> ModelFindings:
    """That rows can be split through the whole model, on ``rows`` of them. Raises CannotSplit naming the module."""
    batch, aliases = stood_in(batch, layout, aliases)
    few_rows, other_rows = chosen_rows(layout.rows, rows)
    few_rows = rows_with(batch, layout, few_rows, {IGNORED, *left_out})
    few, others = (
        trees.move(trees.take_rows(batch, layout, chosen), declared.device) for chosen in (few_rows, other_rows)
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


def chosen_rows(batch_rows: int, rows: int) -> tuple[list[int], list[int]]:
    """``rows`` rows spread over the batch, and as many to replace them with: others where the batch has them."""
    stride = batch_rows // rows
    few = [i * stride for i in range(rows)]
    if stride > 1:
        return few, [i + 1 for i in few]
    return few, [few[(i + 1) % rows] for i in range(rows)]


def refuse_batch(declared: DeclaredStep, batch: Any, layout: RowLayout) -> None:
    """Raises CannotSplit for leaves whose rows no chunk can have: such as require grad, and lists of things."""
    for path, leaf, axis in zip(layout.paths, trees.leaves_of(batch), layout.axes):
        if axis is not None and isinstance(leaf, Tensor) and leaf.requires_grad:
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"{path} carries rows and requires grad; only parameters and leaves that all rows share receive "
                "gradients from chunks",
                do="detach it, mark it as shared with None in batch_axes=, or run the step whole with "
                "rows=<the batch's rows>",
            )


    if declared.batch_axes is None or isinstance(declared.batch_axes, int):
        _refuse_lists(batch, layout)


def _refuse_lists(batch: Any, layout: RowLayout) -> None:
    """Every chunk would see the whole list, and ``zip`` would take the first entries of it for its rows."""
    entries: dict[str, int] = {}
    for path, leaf in zip(layout.paths, trees.leaves_of(batch)):
        parent, _, key = path.rpartition("[")
        if key.rstrip("]").isdigit() and not isinstance(leaf, Tensor) and not trees.is_row_source(leaf):
            entries[parent] = entries.get(parent, 0) + 1
    for parent, count in entries.items():
        if count == layout.rows and layout.rows > 1:
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"{parent} has {count} entries that are no tensors, one for each row",
                do="give them as a tensor (numbers for names), or say that all rows share them with None for it in "
                "batch_axes=, or run the step whole with rows=<the batch's rows>",
            )


def _has_recurrent_layers(network: nn.Module) -> bool:
    """Their kernels without a graph give the same bits for some numbers of rows and not for others (one row, say)."""
    return any(isinstance(part, nn.RNNBase) for part in network.modules())


def find_state_rules(declared: DeclaredStep, batch: Any, layout: RowLayout) -> tuple[StateRule, ...]:
    """How state that the model changes is reduced over chunks that share BatchNorm's statistics; those are left out.

    Looked for again on a copy in float64 where none is found: what rows count for may hang on a choice, of the nearest
    code say, that rounding decides. Raises CannotSplit naming what has no rule, and for draws that cannot be keyed.
    """
    rows = min(PROBE_ROWS, layout.rows)
    few, others = (
        trees.move(trees.take_rows(batch, layout, chosen), declared.device) for chosen in chosen_rows(layout.rows, rows)
    )
    few_layout = dataclasses.replace(layout, rows=rows)
    try:
        return _state_rules(declared, few, others, few_layout)
    except CannotSplit as refusal:
        if all(p.dtype == torch.float64 for p in declared.network.parameters()):
            raise
        try:
            wide = float64_declared(declared, declared.device)
            return _state_rules(wide, widened(few), widened(others), few_layout)
        except (RuntimeError, TypeError, CannotSplit) as error:
            if is_out_of_memory(error):
                raise
            # Of two dtypes in one operation, mostly; or of a module that cannot be copied.
            raise refusal from None


def _state_rules(declared: DeclaredStep, few: Any, others: Any, layout: RowLayout) -> tuple[StateRule, ...]:
    with by_rows(declared.network), step_undisturbed(declared) as (generators, state):
        return RowProbes(declared, few, layout, generators, state).state_rules(others)


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
