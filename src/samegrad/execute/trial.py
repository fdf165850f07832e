"""A lever that puts parts of a model into chunks, tried on a few rows before it is believed.

The model runs on them as it is and by the lever's scheme, under one draw and fixed cotangents: outputs and the
gradients of all parameters must be the same up to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact import program
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.batchnorm import uses_batch_statistics
from samegrad.exact.examine import chosen_rows
from samegrad.exact.float64 import float64_declared, widened
from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.exact.probes import PROBE_ROWS
from samegrad.exact.randomness import DrawSites, StepKey
from samegrad.exact.recomputed import as_runs
from samegrad.exact.rounding import eps_in_use
from samegrad.exact.row_comparisons import close
from samegrad.exact.schemes import Scheme
from samegrad.exact.state import StateRule
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import step_undisturbed
from samegrad.levers.exact_batchnorm import ExactBatchNorm
from samegrad.levers.recompute import Recompute
from samegrad.levers.segments import Segments
from samegrad.measure.within_memory import WithinMemory
from samegrad.trees import RowLayout

# How much farther from float64 the chunks' gradients may be than the plain ones, where both are rounded.
_FARTHER = 2.0


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


def few_rows(declared: DeclaredStep, batch: Any, layout: RowLayout) -> tuple[Any, RowLayout]:
    """A few rows spread over ``batch``, on the device, and their layout."""
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
    rules: Sequence[StateRule] = (),
) -> None:
    """That the lever's scheme computes the plain forward, on a few rows in uneven chunks. Raises CannotSplit."""
    few, few_layout = few_rows(declared, batch, layout)
    first = max(1, 3 * few_layout.rows // 8)
    sizes = [first, few_layout.rows - first] if few_layout.rows > 1 else [1]
    trial = _Trial(declared, aliases, few, few_layout, sizes, sites, rules)
    plain = trial.run(None)
    if plain.counted_again and isinstance(lever, ExactBatchNorm):
        raise CannotSplit(
            asked=f"run parts of the model in chunks by {lever.name}",
            found=f"{plain.counted_again[0]} runs again in backward, inside a torch.utils.checkpoint of the model, and "
            "the plain step updates its running statistics twice",
            do="take the checkpoint out of the model: chunks save memory in its place, and update them once",
        )
    chunked = trial.run(lever.scheme())
    if different := plain.differing(chunked):
        if _is_rounding(trial, lever, plain, chunked):
            return
        if isinstance(lever, Recompute):
            raise _not_the_same_again(lever, different[0], lambda block: plain.differing(trial.run(block.scheme())))
        raise CannotSplit(
            asked=f"run parts of the model in chunks by {lever.name}",
            found=f"{different[0]} changes: something inside the parts sees other rows, or draws in another order",
            do="name smaller parts with segments=, or run the step whole (rows=<the batch's rows>)",
        )


def _is_rounding(trial: _Trial, lever: MappingLever, plain: _Found, chunked: _Found) -> bool:
    """Whether copies in float64 are the same both ways, and the chunks' gradients about as near to theirs as the plain.

    A forward may enter autocast by itself, and deep in a model half the digits of a narrow format are none; or the
    model picks by comparing numbers, and a rounding decides. In float64 neither happens: autocast leaves it alone.
    """
    if not trial.rounds():
        return False
    try:
        with WithinMemory(trial.declared) as memory:
            exact, in_chunks = trial.in_float64(trial.declared.device).both_ways(lever)
        if memory.found:
            # A few rows, and as much memory as they want.
            exact, in_chunks = trial.in_float64(torch.device("cpu")).both_ways(lever)
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        # Of two dtypes in one operation, mostly; or of a module that cannot be copied.
        return False
    if exact.differing(in_chunks):
        return False
    return trial.chooses(plain) or chunked.distance(exact) <= _FARTHER * plain.distance(exact)


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


@dataclasses.dataclass(frozen=True)
class _Found:
    """Outputs by their place, and gradients by parameter; the BatchNorm layers that counted a batch in backward."""

    outputs: list[tuple[str, Any]]
    gradients: dict[str, Tensor | None]
    counted_again: tuple[str, ...] = ()

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

    def distance(self, exact: _Found) -> float:
        """The norm of the difference from all gradients of ``exact``, not a number where one of the two has none."""
        apart = 0.0
        # Those of the model: the loss, whose parameters have a place here as well, is not run.
        for name, other in exact.gradients.items():
            mine = self.gradients[name]
            if (mine is None) != (other is None):
                return float("nan")
            if mine is not None and other is not None:
                apart += float((mine.to(other.device, other.dtype) - other).square().sum())
        return math.sqrt(apart)


@dataclasses.dataclass(frozen=True)
class _Trial:
    """The model on a few rows: its outputs, and the gradients of all parameters under fixed cotangents."""

    declared: DeclaredStep
    aliases: ParameterAliases
    few: Any
    layout: RowLayout
    sizes: Sequence[int]
    sites: DrawSites | None
    rules: Sequence[StateRule]

    def chooses(self, found: _Found) -> bool:
        """Whether the model picks by comparing numbers, codes that are nearest, say.

        Seen by whole numbers that come out or are state: there a rounding may decide.
        """
        whole = any(isinstance(leaf, Tensor) and not leaf.is_floating_point() for _, leaf in found.outputs)
        return whole or bool(self.rules)

    def rounds(self) -> bool:
        """Whether the model is in a format that float64 could tell more of."""
        return any(p.dtype != torch.float64 for p in self.declared.network.parameters())

    def in_float64(self, device: torch.device) -> _Trial:
        """The same trial of copies in float64 on ``device``."""
        declared = float64_declared(self.declared, device)
        few = trees.move(widened(self.few), device)
        return dataclasses.replace(self, declared=declared, aliases=ParameterAliases({"": declared.network}), few=few)

    def both_ways(self, lever: MappingLever) -> tuple[_Found, _Found]:
        """Plainly, and by the scheme of ``lever``."""
        return self.run(None), self.run(lever.scheme())

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
                stack.enter_context(scheme(network, sizes=self.sizes, draws=draws, rules=self.rules))
            with draws.all_rows(ids):
                outputs = program.seen(declared.forward(network, self.few))
            counts = _batch_counts(network)
            live = [leaf for leaf in program.tensors_in(outputs) if leaf.requires_grad]
            cotangents = [torch.linspace(-1, 1, leaf.numel(), device=leaf.device).view(leaf.shape) for leaf in live]
            cotangents = [c.to(leaf.dtype) for c, leaf in zip(cotangents, live)]
            with torch.autocast(declared.device.type, enabled=False):
                gradients = _gradients(live, standing, cotangents)
            again = tuple(name for name, count in _batch_counts(network).items() if count != counts[name])
        found = trees.flatten_with_paths(trees.map_tensors(outputs, Tensor.detach), "outputs")
        return _Found(found, dict(zip(self.aliases.names, gradients)), again)


def _batch_counts(network: nn.Module) -> dict[str, int]:
    """How many batches each BatchNorm layer has counted."""
    return {
        name: int(part.num_batches_tracked)
        for name, part in network.named_modules()
        if uses_batch_statistics(part) and part.num_batches_tracked is not None
    }


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
