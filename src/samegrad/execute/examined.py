"""What is known of a step's batches, found once for each kind: the ways to run them in chunks, and their draws."""

from __future__ import annotations

from typing import Any

from samegrad.declared import DeclaredStep
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.examine import find_draws
from samegrad.exact.left_out import held_by_rows
from samegrad.exact.randomness import DrawSites
from samegrad.exact.sharded import ranks_of
from samegrad.exact.step_draws import StepDraws
from samegrad.execute.given import check_batch, check_levers, check_model
from samegrad.execute.ways import Ways, find_ways
from samegrad.records import Plan
from samegrad.trees import RowLayout

# The signature of the batch, and what of the model trains and in which mode: another one makes another step of it.
Kind = tuple[str, str]


class Examined:
    """Examinations of ``declared``, which are made anew when its parameters are others.

    ``aliases``: of what trainable parameters there were at the last look. ``ways``: by kind, those that were found.
    """

    def __init__(self, declared: DeclaredStep, aliases: ParameterAliases) -> None:
        self.aliases = aliases
        self.ways: dict[Kind, Ways] = {}
        self._declared = declared
        self._draws: dict[Kind, DrawSites | None] = {}
        self._accepted: set[Kind] = set()
        self._model_accepted = False

    def kind_of(self, batch: Any, layout: RowLayout) -> Kind:
        return layout.signature(batch), self._declared.mode()

    def refresh(self) -> None:
        """Looks at what is trainable now, and forgets what was found of other parameters."""
        fresh = self.aliases.refreshed()
        if fresh is not self.aliases:
            self.aliases = fresh
            self.ways.clear()
            self._accepted.clear()

    def ways_for(self, kind: Kind, batch: Any, layout: RowLayout) -> Ways:
        """The ways to run batches of ``kind``, as this one is, examined on its first rows where none are known."""
        self.refresh()
        ranks = ranks_of(self._declared.modules) if self.aliases.sharded else None
        unseen: frozenset[int] = frozenset()
        # Once, and again where rows hold targets that the loss turned out to leave out.
        for _ in range(2):
            known = self.ways.get(kind)
            unseen = unseen if known is None or known.by_rows is None else known.by_rows.unseen
            unknown = known is None or bool(held_by_rows(batch, layout, unseen))
            # With sharded parameters ranks examine together: when one must, all do.
            if unknown if ranks is None else ranks.largest(unknown) != [0]:
                self.ways[kind] = find_ways(self._declared, self.aliases, batch, layout, unseen)
        return self.ways[kind]

    def draws_for(self, kind: Kind, batch: Any, layout: RowLayout) -> StepDraws:
        """The draws of the next step: the same for every plan."""
        if kind not in self._draws:
            known = self.ways.get(kind)
            if known is not None:
                self._draws[kind] = known.sites
            else:
                # Sharded steps that draw are not split; what a whole one draws is the plain step's own.
                self._draws[kind] = None if self.aliases.sharded else find_draws(self._declared, batch, layout)
        return StepDraws(self._draws[kind])

    def accept_plan(self, plan: Plan, batch: Any, layout: RowLayout) -> None:
        """Whether a plan that was given is one for this model and batches like this one. Raises WrongPlan."""
        check_batch(plan, layout.signature(batch), layout)
        # The model once: freezing more later only lowers what the plan needs.
        if not self._model_accepted:
            check_model(plan, self._declared)
            self._model_accepted = True

    def accept_levers(self, plan: Plan, kind: Kind, batch: Any, layout: RowLayout, ways: Ways) -> None:
        """Tries the levers of a plan that was not measured here, once a kind. Raises CannotSplit."""
        if kind not in self._accepted:
            check_levers(plan, self._declared, self.aliases, batch, layout, ways)
            self._accepted.add(kind)
