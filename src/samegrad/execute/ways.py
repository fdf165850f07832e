"""The ways a step can run a few rows at a time: by rows through the whole model, or parts of the model in chunks.

What cannot be split by rows is tried part by part, each way on a few rows against the plain forward; what no way can
do is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.batchnorm import by_rows, has_batchnorm, shared_over_ranks
from samegrad.exact.examine import (
    chosen_rows,
    draws_or_none,
    examine,
    examine_model,
    find_state_rules,
    refuse_batch,
)
from samegrad.exact.examine_loss import examine_loss
from samegrad.exact.findings import Examination
from samegrad.exact.mapped import MappedExamination
from samegrad.exact.probes import PROBE_ROWS
from samegrad.exact.randomness import DrawSites
from samegrad.exact.recomputed import find_blocks
from samegrad.exact.segments import find_segments
from samegrad.exact.state import StateRule
from samegrad.exact.undisturbed import FailsOnFewRows, NotToBeTried, step_undisturbed
from samegrad.exact.unit_chain import find_units
from samegrad.execute.trial import MappingLever, examine_mapped, few_rows
from samegrad.levers.exact_batchnorm import ExactBatchNorm
from samegrad.levers.recompute import Recompute
from samegrad.levers.segments import Segments
from samegrad.measure.within_memory import WithinMemory
from samegrad.trees import RowLayout

_MAPPING = (Segments.name, Recompute.name, ExactBatchNorm.name)
# Boundaries of which one is kept where memory is shorter than time.
_KEEP_EVERY = 4
# Layers whose inputs are there for one chunk only, where memory is shorter still; of many layers, their root.
_TOGETHER = 5
# Of blocks that run again one by one, from which on runs of them keep much less.
_FEWEST_IN_RUNS = 4
# Of an examination: one row cannot mix with another.
_FEWEST_ROWS = 2


@dataclasses.dataclass(frozen=True)
class Ways:
    """What was found: the examination of a step split by rows, or why it cannot be and the other ways there are.

    ``mapped``: levers that put parts of the model into chunks, each tried against the plain forward. ``untried``: such
    as keep less than those for more time, which nothing stands in the way of so far. ``sites``: where
    the model draws. ``rules``: how state that it changes, running statistics apart, is reduced over chunks.
    ``refusals``: lever to why this step cannot take it, or need not. ``collectives``: chunks wait for other ranks.
    """

    by_rows: Examination | None
    refusal: CannotSplit | None = None
    mapped: tuple[MappingLever, ...] = ()
    untried: tuple[MappingLever, ...] = ()
    sites: DrawSites | None = None
    rules: tuple[StateRule, ...] = ()
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)
    collectives: bool = False

    def __post_init__(self) -> None:
        if self.refusal is not None:
            # Kept as long as the step: its frames hold the rows that were tried.
            self.refusal.forget_frames()

    @property
    def waits_inside(self) -> bool:
        """Whether the step waits for other ranks before its gradients are there."""
        return self.collectives or (self.by_rows is not None and self.by_rows.collectives)

    def told(self) -> str:
        """Why the step is split by rows or not, in words; empty where nothing is to be said."""
        if self.by_rows is not None:
            passes = "one pass" if self.by_rows.passes == 1 else "two passes"
            return f"loss: {self.by_rows.reason}, {passes}"
        return "" if self.refusal is None else f"not split through the whole model: {self.refusal.found}"

    def mapped_examination(self) -> MappedExamination:
        reason = "" if self.refusal is None else self.refusal.found
        # Where rows may be split, what draws without a key was refused.
        all_sites = self.by_rows is not None
        return MappedExamination(reason, self.sites, self.by_rows, sites_are_all=all_sites, rules=self.rules)


def find_ways(
    declared: DeclaredStep,
    aliases: ParameterAliases,
    batch: Any,
    layout: RowLayout,
    left_out: Iterable[int] = (),
) -> Ways:
    """The ways to run the step in chunks; segments that were declared are the only way then.

    ``left_out``: targets that some of the rows that are tried are to have.

    Raises FalseNormalise, and CannotSplit for what is not the model's: rows of the batch that require grad, parameters
    of a declared loss that cannot be held back, named segments that are none. OutOfMemory where not two rows fit.
    """
    if aliases.sharded:
        refuse_sharded_segments(declared.segments)
        return Ways(examine(declared, aliases, batch, layout, left_out))
    refuse_batch(declared, batch, layout)
    # On as many rows as there is memory for: eight, or fewer on a card that is nearly full.
    rows = min(PROBE_ROWS, layout.rows)
    while True:
        with WithinMemory(declared) as memory:
            return _ways_on(declared, aliases, batch, layout, left_out)
        if rows <= _FEWEST_ROWS:
            raise memory.refusal(
                asked=f"examine the step on {rows} rows before it is split",
                do="free memory on the device, or examine the step elsewhere and bring its plan (plan=)",
            )
        rows = max(_FEWEST_ROWS, rows // 2)
        batch, layout = trees.take_rows(batch, layout, chosen_rows(layout.rows, rows)[0]), _of_rows(layout, rows)


def _of_rows(layout: RowLayout, rows: int) -> RowLayout:
    return dataclasses.replace(layout, rows=rows)


def _ways_on(
    declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout, left_out: Iterable[int]
) -> Ways:
    """The ways that a few rows of ``batch`` show."""
    segments = declared.segments
    if shared := shared_over_ranks(declared.network):
        return _over_ranks(declared, aliases, batch, layout, shared[0])
    refusals: dict[str, str] = {}
    if segments is None:
        try:
            model = examine_model(declared, aliases, batch, layout, min(PROBE_ROWS, layout.rows), left_out)
            examination = examine_loss(declared, model)
        except NotToBeTried as refused:
            return Ways(None, refused)
        except CannotSplit as refused:
            if declared.normalise is not None:
                # Declared a sum over rows: what forbids that is not to be worked round.
                raise
            refusal = refused
        else:
            whole = "not needed: rows can be split through the whole model"
            return Ways(examination, sites=examination.sites, refusals=dict.fromkeys(_MAPPING, whole))
    else:
        refusal = CannotSplit(
            asked="split rows through the whole model", found="segments= names parts of it", do="leave segments= out"
        )
    sites = draws_or_none(declared, batch, layout)
    rules: tuple[StateRule, ...] | None = None
    mapped: list[MappingLever] = []

    def fits(lever: MappingLever) -> bool:
        nonlocal rules
        try:
            if rules is None and isinstance(lever, ExactBatchNorm):
                rules = find_state_rules(declared, batch, layout)
            examine_mapped(declared, aliases, batch, layout, lever, sites, rules or ())
        except CannotSplit as refused:
            if segments is not None:
                raise
            # Another way of the same lever may have been found.
            if not any(found.name == lever.name for found in mapped):
                refusals.setdefault(lever.name, refused.found)
            return False
        mapped.append(lever)
        refusals.pop(lever.name, None)
        return True

    untried: tuple[MappingLever, ...] = ()
    if segments is None and has_batchnorm(declared.network):
        untried = _try_batchnorm(declared, fits)
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
    return Ways(None, refusal, tuple(mapped), untried, sites, rules or (), refusals)


def _try_batchnorm(declared: DeclaredStep, fits: Callable[[MappingLever], bool]) -> tuple[MappingLever, ...]:
    """The full batch block by block, then chunks in lockstep; chunks that meet only where lockstep cannot record.

    Returns what keeps less, for whoever has too little memory for all that is between blocks or layers: several blocks
    that run again as one, and lockstep with fewer boundaries.
    """
    untried: list[MappingLever] = []
    blocks = find_blocks(declared.network)
    if blocks and fits(Recompute([*blocks])) and len(blocks) >= _FEWEST_IN_RUNS:
        # Of runs as long as there are many, what enters them and the inside of one are least together.
        length = math.isqrt(len(blocks) - 1) + 1
        untried.append(Recompute([blocks[at : at + length] for at in range(0, len(blocks), length)]))
    if fits(ExactBatchNorm(1)):
        layers = len(has_batchnorm(declared.network))
        if layers > _KEEP_EVERY:
            together = max(_TOGETHER, math.isqrt(layers))
            untried += [ExactBatchNorm(1, keep_every=_KEEP_EVERY), ExactBatchNorm(1, together=together)]
    else:
        fits(ExactBatchNorm(1, scheme_name="rendezvous"))
    return tuple(untried)


def _try_segments(
    declared: DeclaredStep,
    batch: Any,
    layout: RowLayout,
    named: Sequence[str] | None,
    fits: Callable[[MappingLever], bool],
    refusals: dict[str, str],
) -> None:
    few, few_layout = few_rows(declared, batch, layout)
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
    chain = find_units(declared, few_rows(declared, batch, layout)[0])
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
    return Ways(None, refusal, (ExactBatchNorm(1),), sites=model.sites, collectives=True)


def refuse_sharded_segments(segments: Sequence[str] | None) -> None:
    if segments is not None:
        raise CannotSplit(
            asked=f"segments={list(segments)}",
            found="parameters are sharded over ranks (fully_shard), whose hooks do not see parts run again in backward",
            do="leave segments= out, or use DistributedDataParallel",
        )
