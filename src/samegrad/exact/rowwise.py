"""``rowwise``: a module or function of rows, run a few rows at a time; the code around it stays full-batch.

    encode = sg.rowwise(encoder, rows=64)
    loss = contrastive(encode(images), encode_text(texts))      # any code: sorts, N x N, prototypes
    loss.backward()                                             # hooks, scaler and DistributedDataParallel as usual

Values and gradients of any order are those of ``encoder(images)``; what is kept for backward is the rows' outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit, UsageError
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.backward_probe import BackwardProbe
from samegrad.exact.group_probe import check_alone
from samegrad.exact.held import arrays_held_in
from samegrad.exact.probes import PROBE_ROWS, RowProbes
from samegrad.exact.randomness import DrawSites
from samegrad.exact.row_count_code import refuse_counting_rows
from samegrad.exact.row_map import RowCall
from samegrad.exact.row_refusals import check_reach, refuse_held
from samegrad.exact.sharded import refuse_sharded
from samegrad.exact.state import StateRule
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import undisturbed
from samegrad.trees import RowLayout


def rowwise(
    fn: Callable[..., Any],
    *,
    rows: int,
    axes: int | Any = None,
    groups: Sequence[int] | None = None,
    shared: Sequence[nn.Module] = (),
) -> Rowwise:
    """``fn`` run ``rows`` rows at a time, as a module that can be called, wrapped in DDP and differentiated.

    ``fn``: a module, or a function with the modules it uses in ``shared``. ``axes``: where rows are in its arguments
    and outputs, when that is not their first axis: one axis for all of them, or a nesting of axes and None for the
    arguments ``(args, kwargs)``. ``groups``: lengths of consecutive rows that must stay in one chunk. At the first
    call of each kind ``fn`` is examined on a few rows; what mixes rows or keeps state raises CannotSplit.
    """
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise UsageError(asked=f"rows={rows!r}", found="not a positive whole number", do="give rows at a time, say 64")
    if not callable(fn):
        raise UsageError(
            asked="rowwise(fn, rows=...)", found=f"fn is a {type(fn).__name__}, which cannot be called",
            do="give a module, or a function of tensors whose first axis is the rows",
        )  # fmt: skip
    return Rowwise(fn, rows, axes, groups, shared)


class Rowwise(nn.Module):
    """What ``rowwise`` returns. ``module`` is the wrapped module; its parameters and state_dict are its own."""

    def __init__(
        self,
        fn: Callable[..., Any],
        rows: int,
        axes: Any,
        groups: Sequence[int] | None,
        shared: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        own = [fn] if isinstance(fn, nn.Module) else []
        self.module = fn if isinstance(fn, nn.Module) and not shared else nn.ModuleList([*own, *shared])
        # A plain attribute of a module would register it twice.
        self._fn = (fn,)
        self._rows, self._axes, self._groups = rows, axes, None if groups is None else tuple(groups)
        self._aliases = ParameterAliases({"": self.module})
        self._examined: dict[tuple[str, str, bool], DrawSites | None] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch = (args, kwargs)
        layout = trees.find_rows(batch, self._axes)
        sizes = self._sizes(layout.rows)
        self._aliases = self._aliases.refreshed()
        draws = StepDraws(self._sites(batch, layout, len(sizes) > 1))
        ids = None
        if draws.sites is not None:
            draws.take()
            device = next(leaf.device for leaf in trees.leaves_of(batch) if isinstance(leaf, Tensor))
            ids = torch.arange(layout.rows, device=device)
        if len(sizes) < 2:
            with draws.all_rows(ids):
                return self._fn[0](*args, **kwargs)
        call = RowCall(self._fn[0], self._aliases, [self.module], self._out_axis(), draws.rows)
        return call.in_chunks(batch, layout, sizes, ids)

    def _out_axis(self) -> int:
        return self._axes if isinstance(self._axes, int) else 0

    def _sizes(self, batch_rows: int) -> tuple[int, ...]:
        if self._groups is None:
            return tuple(trees.even_sizes(batch_rows, self._rows))
        return tuple(grouped_sizes(self._groups, rows=self._rows, batch_rows=batch_rows))

    def _sites(self, batch: Any, layout: RowLayout, split: bool) -> DrawSites | None:
        """Where ``fn`` draws. At the first call of a kind it is examined; raises CannotSplit when it is to be split."""
        mode = "".join("t" if part.training else "e" for part in self.module.modules())
        key = (layout.signature(batch), mode, split)
        if key not in self._examined:
            try:
                self._examined[key] = self._examine(batch, layout, split)
            except CannotSplit:
                if split:
                    raise
                # The plain call, with the draws of its own.
                self._examined[key] = None
        return self._examined[key]

    def _examine(self, batch: Any, layout: RowLayout, split: bool) -> DrawSites | None:
        refuse_sharded(
            [self.module],
            asked="run a function of rows in chunks that are recomputed in backward",
            do="use Step(model, loss_fn, rows=...), whose chunks go through fully_shard's hooks",
        )
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        probed = DeclaredStep(model=self.module, loss_fn=_no_loss, forward=self._rows_first, device=device)
        held = arrays_held_in(self._fn[0], [self.module])
        with undisturbed([self.module], device, held) as (generators, state):
            if self._groups is None:
                few, others, few_layout = _probe_rows(batch, layout)
                probes = RowProbes(probed, few, few_layout, generators, state)
                if not split:
                    # Only its draws must be those of a split call.
                    return probes.draw_sites()
                found = probes.run(others)
                _refuse_state(found.rules)
                BackwardProbe(probes, self._aliases, probes.forward).run()
                self._refuse_counting(batch, layout, few_layout.rows)
                return found.sites
            if split:
                # Rows of one group may see each other, so whole groups are what is tried.
                few = trees.take_rows(batch, layout, list(range(self._groups[0])))
                check_alone(probed, batch, layout, self._groups, generators, state)
                with self._aliases.swapped() as standing, torch.enable_grad():
                    check_reach(self._aliases, self._rows_first(self.module, few), standing)
                refuse_held(state)
                self._refuse_counting(batch, layout, self._groups[0])
        return None

    def _refuse_counting(self, batch: Any, layout: RowLayout, tried: int) -> None:
        detached = trees.map_tensors(batch, Tensor.detach)
        refuse_counting_rows(
            self._fn[0], [self.module], lambda chunk: self._rows_first(self.module, chunk), detached, layout,
            [tried, *self._sizes(layout.rows), layout.rows],
        )  # fmt: skip

    def _rows_first(self, _: nn.Module, batch: Any) -> Any:
        args, kwargs = batch
        axis = self._out_axis()
        return trees.map_tensors(self._fn[0](*args, **kwargs), lambda leaf: leaf.movedim(axis, 0) if axis else leaf)


def _refuse_state(rules: Sequence[StateRule]) -> None:
    if rules:
        raise CannotSplit(
            asked="rows a few at a time",
            found=f"the forward changes {', '.join(rule.name for rule in rules[:3])}, and backward runs rows again",
            do="give the model to Step, which writes state once a step, or update that state outside the function",
        )


def _no_loss(outputs: Any, batch: Any) -> Tensor:
    raise AssertionError("rows are examined without a loss")


def _probe_rows(batch: Any, layout: RowLayout) -> tuple[Any, Any, RowLayout]:
    rows = min(PROBE_ROWS, layout.rows)
    detached = trees.map_tensors(batch, Tensor.detach)
    few = trees.take_rows(detached, layout, list(range(rows)))
    others = trees.take_rows(detached, layout, [(i + rows) % layout.rows for i in range(rows)])
    return few, others, dataclasses.replace(layout, rows=rows)


def grouped_sizes(groups: Sequence[int], *, rows: int, batch_rows: int) -> list[int]:
    """Chunks of whole groups, as many as ``rows`` hold. Raises UsageError for groups that cannot be kept whole."""
    if sum(groups) != batch_rows or min(groups, default=0) < 1:
        raise UsageError(
            asked=f"groups of {list(groups)[:8]} rows",
            found=f"they add up to {sum(groups)}, the batch has {batch_rows} rows",
            do="give the positive length of each consecutive group",
        )
    if max(groups) > rows:
        raise UsageError(
            asked=f"{rows} rows at a time with groups kept whole",
            found=f"a group has {max(groups)} rows",
            do=f"give rows={max(groups)} or more",
        )
    sizes = [0]
    for length in groups:
        if sizes[-1] + length > rows:
            sizes.append(0)
        sizes[-1] += length
    return sizes

