"""What in a model forbids splitting its rows, found by experiment on a few rows and named by module.

draws    draws are keyed by row where they can be; any other would be another draw than the whole batch's
state    what the forward changes must have a rule by which chunks' states become the batch's (``state.py``)
repeat   the same rows run twice must give the same bits
replace  other rows are replaced: kept rows must stay the same, bit for bit where all shapes do
subset   a few rows alone must give what they give among others (up to rounding)
reach    every leaf the outputs depend on must be a parameter in its slot, else its gradient would be lost

What backward does is looked at in ``backward_probe.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit
from samegrad.exact import collectives, program
from samegrad.exact.draw_probe import check_sites, find_sites
from samegrad.exact.draw_sites import DrawSites
from samegrad.exact.draws import StepKey
from samegrad.exact.few_rows import on_few_rows
from samegrad.exact.module_names import entered, looked_at
from samegrad.exact.replaced_rows import ShapesSeen, replacements
from samegrad.exact.row_comparisons import alike, leaf_pairs, rounded_alike, row_pairs, same_bits, same_rows
from samegrad.exact.row_refusals import WAYS_OUT, check_untouched, check_weights, refuse_held, refuse_known_layers
from samegrad.exact.sharded import is_sharded, local
from samegrad.exact.state import StateRule
from samegrad.exact.state_probe import StateProbe
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import FailsOnFewRows, Generators, ModuleState, NotToBeTried
from samegrad.exact.varied_rows import with_other_numbers, with_smaller_numbers
from samegrad.trees import RowLayout

PROBE_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the experiments found of a model that can be split: its outputs on the probe rows, draws, and state."""

    outputs: Any
    sites: DrawSites | None = None
    rules: tuple[StateRule, ...] = ()


class RowProbes:
    """The experiments, on ``batch`` of ``layout.rows`` <= PROBE_ROWS rows on the model's device."""

    def __init__(
        self, declared: DeclaredStep, batch: Any, layout: RowLayout, generators: Generators, state: ModuleState
    ) -> None:
        self.declared = declared
        self.batch, self.layout = batch, layout
        self.generators, self.state = generators, state
        self._rows = layout.rows
        self._draws = StepDraws()
        self.kept = list(range(1, self._rows, 2)) or [0]

    def run(self, others: Any) -> Findings:
        """What is found. ``others``: as many other rows, to replace with. Raises CannotSplit."""
        refuse_known_layers(self.declared.network)
        with torch.no_grad():
            sites = self._find_draws()
            outputs = self.forward(self.batch)
            refuse_held(self.state)
            rules = self._rules(others)
            for path, leaf in trees.flatten_with_paths(outputs, "outputs"):
                if isinstance(leaf, Tensor):
                    program.check_row_output(path, leaf, self._rows)
            self._check_repeat(outputs)
            if self._rows > 1:
                self._check_replace(outputs, others)
                self._check_subset(outputs)
        return Findings(outputs, sites, rules)

    @torch.no_grad()
    def state_rules(self, others: Any) -> tuple[StateRule, ...]:
        """How the state that a forward changes is reduced over chunks, and nothing else. Raises CannotSplit."""
        self._find_draws()
        self.forward(self.batch)
        return self._rules(others)

    def _find_draws(self) -> DrawSites | None:
        """Where the model draws; from now on it draws by them."""
        sites = self.draw_sites()
        if sites is not None:
            check_sites(sites, self.declared.network, self._plain_forward, self.restored)
        self._draws = StepDraws(sites, StepKey.fixed(0))
        return sites

    def _rules(self, others: Any) -> tuple[StateRule, ...]:
        """Of the forward that just ran; the state is put back. They must be those of rows with other masks as well."""
        probe = StateProbe(
            self.declared.network, self._rows, self._forward_rows, lambda: self.forward(others), self.state
        )
        rules = tuple(probe.rules())
        self.restored()
        if rules and self._rows > 1:
            changed = with_other_numbers(self.batch, self.layout, range(2, self._rows, 3))
            batch, self.batch = self.batch, with_smaller_numbers(changed, self.layout, masks=False)
            try:
                with contextlib.suppress(FailsOnFewRows), on_few_rows(self._rows, ()):
                    # What the model was not made for tells nothing.
                    self.forward(self.batch)
                    probe.check(rules)
            finally:
                self.batch = batch
                self.restored()
        return rules

    @property
    def draws(self) -> StepDraws:
        """The draws under which the outputs were made."""
        return self._draws

    def draw_sites(self) -> DrawSites | None:
        """Where the model draws, None where it draws nothing. Raises CannotSplit naming what cannot be keyed by row."""
        versions = [(p, leaf, leaf._version) for p, leaf in _tensors(self.batch)]
        weights = [(n, p, local(p).clone()) for n, p in self.declared.network.named_parameters()]

        def first() -> None:
            self._forward_alone()
            check_weights(weights)
            weights.clear()
            check_untouched(versions)

        fewer = max(1, self._rows - max(1, 3 * self._rows // 8))

        def second() -> None:
            few = trees.take_rows(self.batch, self.layout, list(range(fewer)))
            with entered(self.declared.network) as running, on_few_rows(fewer, running):
                self.declared.forward(self.declared.network, few)

        with torch.no_grad():
            return find_sites(
                self.declared.network, (first, second), (self._rows, fewer), self.generators, self.restored
            )

    def _forward_alone(self) -> None:
        """A forward that needs no other rank; ``fully_shard`` may gather its parameters."""
        network = self.declared.network
        sharded = any(is_sharded(p) for p in network.parameters())
        running: list[str] = []
        try:
            with (
                entered(network) as running,
                on_few_rows(self._rows, running),
                collectives.watched(*[collectives.GATHER_INTO_TENSOR] * sharded),
            ):
                self._plain_forward()
        except collectives.CollectiveSeen as seen:
            raise NotToBeTried(
                asked="split the rows of a step",
                found=f"{running[-1] if running else 'the forward'} calls a collective ({seen}): it would see a "
                "chunk's rows, and ranks with other chunk counts would wait for each other",
                do=f"{WAYS_OUT}, or move the collective into loss_fn, which sees all rows of this rank once a step",
            ) from None

    def _plain_forward(self) -> None:
        self.declared.forward(self.declared.network, self.batch)

    def forward(self, batch: Any, rows: Sequence[int] | None = None) -> Any:
        """The outputs of ``batch``: the probe rows ``rows``, or all of them."""
        ids = torch.tensor(list(range(self._rows) if rows is None else rows), device=self.declared.device)
        with self._draws.rows(ids):
            return program.seen(self.declared.forward(self.declared.network, batch))

    def _forward_rows(self, rows: Sequence[int]) -> None:
        few = self.batch if len(rows) == self._rows else trees.take_rows(self.batch, self.layout, list(rows))
        self.forward(few, rows)

    def _check_repeat(self, outputs: Any) -> None:
        again = self.forward(self.batch)
        self.restored()
        if same_rows(outputs, again):
            return
        place = self._first_difference(self.batch, range(self._rows))
        raise CannotSplit(
            asked="split the rows of a step",
            found=f"{place} gives other outputs when the same rows run again: it keeps state where that is not seen, "
            "or a kernel adds in an order that varies",
            do=f"{WAYS_OUT}, keep state in buffers and attributes of the module, or choose kernels that repeat "
            "(torch.use_deterministic_algorithms(True, warn_only=True) names those that do not)",
        )

    def _check_replace(self, outputs: Any, others: Any) -> None:
        for kept, replaced in replacements(self.batch, others, self.layout, self.kept):
            again = self.forward(replaced)
            self.restored()
            pairs = [(x[kept], y[kept]) for _, x, y in row_pairs(outputs, again)]
            if all(same_bits(x, y) for x, y in pairs):
                continue
            if all(rounded_alike(x, y) for x, y in pairs) and self._shapes(self.batch) != self._shapes(replaced):
                continue
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"{self._first_difference(replaced, kept)} mixes rows: other rows were replaced and rows {kept} "
                "changed",
                do=f"{WAYS_OUT}, or take the mixing out of the model and into loss_fn, which sees all rows",
            )

    def _check_subset(self, outputs: Any) -> None:
        few = trees.take_rows(self.batch, self.layout, self.kept)
        with entered(self.declared.network) as running, on_few_rows(len(self.kept), running):
            alone = self.forward(few, self.kept)
        self.restored()
        for path, among, apart in leaf_pairs(outputs, alone):
            if not isinstance(among, Tensor):
                # Such as len(x): the loss would be given the length of a chunk.
                if isinstance(among, program.Unseen) or among == apart:
                    continue
            else:
                chosen = among[torch.tensor(self.kept, device=among.device)]
                if chosen.shape == apart.shape and alike(chosen, apart):
                    continue
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"{path} of a row depends on how many rows run with it, or on its position",
                do=f"{WAYS_OUT}, or make the model's rows independent of the batch's length",
            )

    def restored(self) -> None:
        self.state.restore()
        self.generators.restore()

    def _shapes(self, batch: Any) -> list[tuple[int, ...]]:
        seen = ShapesSeen()
        with seen:
            self.forward(batch)
        self.restored()
        shapes: list[tuple[int, ...]] = seen.shapes
        return shapes

    def _first_difference(self, other: Any, rows: Sequence[int]) -> str:
        """The first module, in the order of returns, whose outputs of ``rows`` are not those among ``other`` rows."""
        first: list[list[tuple[str, Tensor]]] = []
        for batch in (self.batch, other):
            seen: list[tuple[str, Tensor]] = []
            with looked_at(self.declared.network, _collector(seen)):
                self.forward(batch)
            self.restored()
            first.append(seen)
        for (name, a), (_, b) in zip(first[0], first[1]):
            by_rows = a.dim() > 0 and a.shape == b.shape and a.shape[0] == self._rows
            if by_rows and not same_bits(a[list(rows)], b[list(rows)]):
                return name
        return "code outside its modules"


def _collector(seen: list[tuple[str, Tensor]]) -> Callable[[str, Tensor | None], None]:
    def look(name: str, output: Tensor | None) -> None:
        if output is not None:
            seen.append((name, output))

    return look


def _tensors(batch: Any) -> list[tuple[str, Tensor]]:
    return [(p, leaf) for p, leaf in trees.flatten_with_paths(batch, "batch") if isinstance(leaf, Tensor)]
