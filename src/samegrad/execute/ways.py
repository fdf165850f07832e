"""The ways a step can run a few rows at a time: by rows through the whole model, or parts of the model in chunks.

What cannot be split by rows is tried part by part, each way on a few rows against the plain forward; what no way can
do is refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact import program
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.batchnorm import by_rows, has_batchnorm, shared_over_ranks
from samegrad.exact.examine import chosen_rows, draws_or_none, examine, examine_model, refuse_batch_gradients
from samegrad.exact.examine_loss import examine_loss
from samegrad.exact.findings import Examination
from samegrad.exact.mapped import MappedExamination
from samegrad.exact.probes import PROBE_ROWS, close
from samegrad.exact.randomness import DrawSites, StepKey
from samegrad.exact.recomputed import as_runs, find_blocks
from samegrad.exact.rounding import eps_in_use
from samegrad.exact.schemes import Scheme
from samegrad.exact.segments import find_segments
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import FailsOnFewRows, NotToBeTried, step_undisturbed
from samegrad.exact.unit_chain import find_units
from samegrad.levers.exact_batchnorm import ExactBatchNorm
from samegrad.levers.recompute import Recompute
from samegrad.levers.segments import Segments
from samegrad.trees import RowLayout

_MAPPING = (Segments.name, Recompute.name, ExactBatchNorm.name)
# Boundaries of which one is kept where memory is shorter than time.
_KEEP_EVERY = 4


class MappingLever(Protocol):
    """A lever that puts parts of a model into chunks."""

    @property
    def name(self) -> str: ...

    @property
    def forwards(self) -> float:
        """How often a row is run forward."""
        ...

    def scheme(self) -> Scheme: ...

    def knobs(self) -> dict[str, Any]: ...


def is_mapping(lever: object) -> TypeGuard[MappingLever]:
    return isinstance(lever, (Segments, Recompute, ExactBatchNorm))


@dataclasses.dataclass(frozen=True)
class Ways:
    """What was found: the examination of a step split by rows, or why it cannot be and the other ways there are.

    ``mapped``: levers that put parts of the model into chunks, each tried against the plain forward. ``sites``: where
    the model draws. ``refusals``: lever to why this step cannot take it, or need not. ``collectives``: chunks wait for
    other ranks.
    """

    by_rows: Examination | None
    refusal: CannotSplit | None = None
    mapped: tuple[MappingLever, ...] = ()
    sites: DrawSites | None = None
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)
    collectives: bool = False

    def mapped_examination(self) -> MappedExamination:
        reason = "" if self.refusal is None else self.refusal.found
        # Where rows may be split, what draws without a key was refused.
        return MappedExamination(reason, self.sites, self.by_rows, sites_are_all=self.by_rows is not None)


def find_ways(
    declared: DeclaredStep,
    aliases: ParameterAliases,
    batch: Any,
    layout: RowLayout,
) -> Ways:
    """The ways to run the step in chunks; segments that were declared are the only way then.

    Raises FalseNormalise, and CannotSplit for what is not the model's: rows of the batch that require grad, parameters
    of a declared loss that cannot be held back, named segments that are none.
    """
    segments = declared.segments
    if aliases.sharded:
        refuse_sharded_segments(segments)
        return Ways(examine(declared, aliases, batch, layout))
    refuse_batch_gradients(batch, layout)
    if shared := shared_over_ranks(declared.network):
        return _over_ranks(declared, aliases, batch, layout, shared[0])
    refusals: dict[str, str] = {}
    if segments is None:
        try:
            model = examine_model(declared, aliases, batch, layout, min(PROBE_ROWS, layout.rows))
            examination = examine_loss(declared, model)
        except NotToBeTried as refused:
            return Ways(None, refused)
        except CannotSplit as refused:
            if declared.normalise is not None:
                # Declared a sum over rows: what forbids that is not to be worked round.
                raise
            refusal = refused
        else:
            whole = "not needed: rows split through the whole model"
            return Ways(examination, sites=examination.sites, refusals=dict.fromkeys(_MAPPING, whole))
    else:
        refusal = CannotSplit(
            asked="split rows through the whole model", found="segments= names parts of it", do="leave segments= out"
        )
    sites = draws_or_none(declared, batch, layout)
    mapped: list[MappingLever] = []

    def fits(lever: MappingLever) -> bool:
        try:
            examine_mapped(declared, aliases, batch, layout, lever, sites)
        except CannotSplit as refused:
            if segments is not None:
                raise
            refusals.setdefault(lever.name, refused.found)
            return False
        mapped.append(lever)
        refusals.pop(lever.name, None)
        return True

    if segments is None and has_batchnorm(declared.network):
        _try_batchnorm(declared, fits)
    else:
        refusals[ExactBatchNorm.name] = "no BatchNorm in training mode"
    if not mapped:
        try:
            _try_segments(declared, batch, layout, segments, fits, refusals)
        except FailsOnFewRows as refused:
            if segments is not None:
                raise
            # Probes of the step would fail on as many.
            return Ways(None, refused)
    elif Segments.name not in refusals:
        refusals[Segments.name] = "tried only where BatchNorm has no exact way of its own"
    if segments is not None:
        refusals[Recompute.name] = "segments= names the parts that run again"
    elif not any(isinstance(lever, Recompute) for lever in mapped):
        _try_units(declared, batch, layout, fits, refusals)
    return Ways(None, refusal, tuple(mapped), sites, refusals)


def _try_batchnorm(declared: DeclaredStep, fits: Callable[[MappingLever], bool]) -> None:
    """The full batch block by block, then chunks in lockstep; chunks that meet only where lockstep cannot record."""
    if blocks := find_blocks(declared.network):
        fits(Recompute([*blocks]))
    if fits(ExactBatchNorm(1)):
        if len(has_batchnorm(declared.network)) > _KEEP_EVERY:
            fits(ExactBatchNorm(1, keep_every=_KEEP_EVERY))
    else:
        fits(ExactBatchNorm(1, scheme_name="rendezvous"))


def _try_segments(
    declared: DeclaredStep,
    batch: Any,
    layout: RowLayout,
    named: Sequence[str] | None,
    fits: Callable[[MappingLever], bool],
    refusals: dict[str, str],
) -> None:
    few, few_layout = _few(declared, batch, layout)
    # Hooks on a part may write into other parts.
    with step_undisturbed(declared):
        found = find_segments(declared, few, few_layout, named)
    if found:
        fits(Segments(1, {segment.path: segment.per_row for segment in found}))
    else:
        refusals[Segments.name] = "no part of the model with parameters treats rows alone"


def _try_units(
    declared: DeclaredStep,
    batch: Any,
    layout: RowLayout,
    fits: Callable[[MappingLever], bool],
    refusals: dict[str, str],
) -> None:
    """Blocks of any model on the whole batch; single layers keep little more than what enters them."""
    if Recompute.name in refusals:
        return
    chain = find_units(declared, _few(declared, batch, layout)[0])
    blocks: list[str | list[str]] = [list(unit.paths) for unit in chain.units if unit.has_parts]
    if blocks:
        fits(Recompute(blocks))
    else:
        refusals[Recompute.name] = chain.reason or chain.why_single_layers


def _over_ranks(
    declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout, layer: str
) -> Ways:
    """Lockstep over ranks and chunks. Nothing is tried that waits for another rank: statistics are left out."""
    refusal = CannotSplit(
        asked="split the rows of a step",
        found=f"{layer} (SyncBatchNorm in training mode) normalises with the statistics of all ranks' rows",
        do="give rows= or plan= on every rank; lockstep shares the statistics",
    )
    with by_rows(declared.network):
        model = examine_model(declared, aliases, batch, layout, min(PROBE_ROWS, layout.rows))
    if model.rules:
        raise CannotSplit(
            asked="run SyncBatchNorm exactly a few rows at a time",
            found=f"the forward also changes {model.rules[0].name}, and backward runs rows again",
            do="update that state outside the forward, or run the step whole on every rank",
        )
    return Ways(None, refusal, (ExactBatchNorm(1),), model.sites, collectives=True)


def refuse_sharded_segments(segments: Sequence[str] | None) -> None:
    if segments is not None:
        raise CannotSplit(
            asked=f"segments={list(segments)}",
            found="parameters are sharded over ranks (fully_shard), whose hooks do not see parts run again in backward",
            do="leave segments= out, or use DistributedDataParallel",
        )


def _few(declared: DeclaredStep, batch: Any, layout: RowLayout) -> tuple[Any, RowLayout]:
    rows = min(PROBE_ROWS, layout.rows)
    few = trees.move(trees.take_rows(batch, layout, chosen_rows(layout.rows, rows)[0]), declared.device)
    return few, dataclasses.replace(layout, rows=rows)


def examine_mapped(
    declared: DeclaredStep,
    aliases: ParameterAliases,
    batch: Any,
    layout: RowLayout,
    lever: MappingLever,
    sites: DrawSites | None,
) -> None:
    """That the lever's scheme computes the plain forward, on a few rows in uneven chunks. Raises CannotSplit."""
    few, few_layout = _few(declared, batch, layout)
    first = max(1, 3 * few_layout.rows // 8)
    sizes = [first, few_layout.rows - first] if few_layout.rows > 1 else [1]
    trial = _Trial(declared, aliases, few, few_layout, sizes, sites)
    plain = trial.run(None)
    if different := plain.differing(trial.run(lever.scheme())):
        if isinstance(lever, Recompute):
            raise _not_the_same_again(lever, different[0], lambda block: plain.differing(trial.run(block.scheme())))
        raise CannotSplit(
            asked=f"run parts of the model in chunks by {lever.name}",
            found=f"{different[0]} changes: something inside the parts sees other rows, or draws in another order",
            do="name smaller parts with segments=, or run the step whole (rows=<the batch's rows>)",
        )


def _not_the_same_again(
    lever: Recompute, different: str, differs: Callable[[Recompute], Sequence[str]]
) -> CannotSplit:
    """The refusal of blocks whose second run is another; names the first that is so by itself."""
    alone = next((Recompute([entry]) for entry in lever.blocks if differs(Recompute([entry]))), lever)
    named = ", ".join(name for run in as_runs(alone.blocks) for name in run)
    return CannotSplit(
        asked=f"run {named} again in backward",
        found=f"{different} changes: what runs again reads or writes something that is not its own, such as a cache",
        do="leave that part out of the blocks to recompute",
    )


def check_lever(
    declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout, lever: MappingLever, ways: Ways
) -> None:
    """That ``lever``, of a given plan, is one of the ``ways`` found or passes as they did. Raises CannotSplit."""
    if any(way.name == lever.name and _but_rows(way) == _but_rows(lever) for way in ways.mapped):
        return
    if isinstance(ways.refusal, NotToBeTried):
        raise ways.refusal
    if isinstance(lever, Segments):
        few, few_layout = _few(declared, batch, layout)
        found = {s.path: s.per_row for s in find_segments(declared, few, few_layout, list(lever.paths))}
        if found != lever.paths:
            raise CannotSplit(
                asked=f"segments {lever.paths}, as the plan has them",
                found=f"they are called on {found} rows for each of the batch",
                do="plan again for this model (leave out plan=)",
            )
    examine_mapped(declared, aliases, batch, layout, lever, ways.sites)


def _but_rows(lever: MappingLever) -> dict[str, Any]:
    return {knob: value for knob, value in lever.knobs().items() if knob != "rows"}


@dataclasses.dataclass(frozen=True)
class _Found:
    """Outputs by their place, and gradients by parameter."""

    outputs: list[tuple[str, Any]]
    gradients: dict[str, Tensor | None]

    def differing(self, other: _Found) -> list[str]:
        places, others = ([place for place, _ in side.outputs] for side in (self, other))
        if places != others:
            # A list, say, that grows with every call of a module.
            return sorted(set(places) ^ set(others)) or ["the order of the outputs"]
        found = [
            place
            for (place, a), (_, b) in zip(self.outputs, other.outputs)
            if isinstance(a, Tensor) and not (isinstance(b, Tensor) and a.shape == b.shape and close(a, b))
        ]
        # Some gradients are zero by structure (of a bias before BatchNorm): what stands there is the others' rounding.
        scale = max((float(g.abs().max()) for g in self.gradients.values() if g is not None and g.numel()), default=0.0)
        for name, mine in self.gradients.items():
            theirs = other.gradients[name]
            apart = (mine is None) != (theirs is None)
            if mine is not None and theirs is not None and mine.numel():
                apart = not float((mine - theirs).abs().max()) <= scale * eps_in_use(mine) ** 0.5
            if apart:
                found.append(f"the gradient of {name}")
        return found


@dataclasses.dataclass(frozen=True)
class _Trial:
    """The model on a few rows: its outputs, and the gradients of all parameters under fixed cotangents."""

    declared: DeclaredStep
    aliases: ParameterAliases
    few: Any
    layout: RowLayout
    sizes: Sequence[int]
    sites: DrawSites | None

    def run(self, scheme: Scheme | None) -> _Found:
        """By ``scheme``, or plainly, under one draw; nothing is left changed."""
        declared, network = self.declared, self.declared.network
        draws = StepDraws(self.sites, StepKey.fixed(0))
        ids = torch.arange(self.layout.rows, device=declared.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(step_undisturbed(declared))
            standing = stack.enter_context(self.aliases.swapped())
            stack.enter_context(torch.enable_grad())
            if scheme is not None:
                stack.enter_context(scheme(network, sizes=self.sizes, draws=draws))
            with draws.all_rows(ids):
                outputs = program.seen(declared.forward(network, self.few))
            live = [leaf for leaf in program.tensors_in(outputs) if leaf.requires_grad]
            cotangents = [torch.linspace(-1, 1, leaf.numel(), device=leaf.device).view(leaf.shape) for leaf in live]
            cotangents = [c.to(leaf.dtype) for c, leaf in zip(cotangents, live)]
            with torch.autocast(declared.device.type, enabled=False):
                gradients = _gradients(live, standing, cotangents)
        found = trees.flatten_with_paths(trees.map_tensors(outputs, Tensor.detach), "outputs")
        return _Found(found, dict(zip(self.aliases.names, gradients)))


def _gradients(
    live: Sequence[Tensor], wanted: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    if not live:
        return []
    try:
        return torch.autograd.grad(live, wanted, cotangents, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise CannotSplit(
            asked="run parts of the model in chunks",
            found="a torch.utils.checkpoint with use_reentrant=True, through which no gradients can be asked for",
            do="use_reentrant=False there, or take the checkpoint out: chunks save memory in its place",
        ) from error
