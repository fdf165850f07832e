"""What state a model's forward changes, found on a few rows, and how chunks' states become the batch's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from samegrad.errors import CannotSplit
from samegrad.exact import containers
from samegrad.exact.attributes import same_tensor
from samegrad.exact.audit import splits_of
from samegrad.exact.containers import CONTAINERS
from samegrad.exact.state import Reducer, StateRule, Values, learn_rules
from samegrad.exact.undisturbed import ModuleState

Places = Sequence[tuple[str, str]]


class StateProbe:
    """``forward(rows)`` runs the network on these of ``rows`` probe rows; ``others()`` on as many other rows."""

    def __init__(
        self,
        network: nn.Module,
        rows: int,
        forward: Callable[[Sequence[int]], object],
        others: Callable[[], object],
        state: ModuleState,
    ) -> None:
        self._network, self._rows = network, rows
        self._forward, self._others, self._state = forward, others, state

    def rules(self) -> list[StateRule]:
        """How what a forward of all rows has just changed is reduced over chunks; the state is put back.

        Raises CannotSplit naming what has no rule.
        """
        changed = self._state.written_places()
        if not changed:
            return []
        if self._built_once(changed):
            self._state.restore()
            return []
        whole = self._values(changed)
        self._state.restore()
        before = self._values(changed)
        rules = learn_rules(changed, whole, self._parted(changed, self._state), before)
        fresh = [rule for rule in rules if rule.reducer is Reducer.SUM and not _any(before[rule.name])]
        if fresh:
            warmed = self._warmed(fresh)
            rules = [warmed.get(rule.name, rule) for rule in rules]
        return rules

    def check(self, rules: Sequence[StateRule]) -> None:
        """That these are the rules of what a forward of other rows has just changed; the state is put back.

        Raises CannotSplit naming what has another one.
        """
        names = [(rule.path, rule.key) for rule in rules]
        whole = self._values(names)
        self._state.restore()
        if any(isinstance(v, Tensor) and v.is_floating_point() and bool(v.isnan().any()) for v in whole.values()):
            # Rows without an entry in their mask have no number.
            return
        again = learn_rules(names, whole, self._parted(names, self._state), self._values(names))
        for rule, other in zip(rules, again, strict=True):
            if rule.reducer is not other.reducer:
                raise CannotSplit(
                    asked="split the rows of a step",
                    found=f"the forward changes {rule.name}, which is chunks' {rule.reducer.value} on some rows and "
                    f"their {other.reducer.value} on rows with other masks",
                    do="run the step whole (a larger budget, or rows=<the batch's rows>), or update that state outside "
                    "the forward",
                )

    def _warmed(self, fresh: Sequence[StateRule]) -> dict[str, StateRule]:
        """Rules of sums that were zero, which shows nothing of their decay: looked at after a first update."""
        names = [(rule.path, rule.key) for rule in fresh]
        everything = range(self._rows)
        self._forward(everything)
        warm, start = ModuleState([self._network]), self._values(names)
        self._forward(everything)
        later = self._values(names)
        warm.restore()
        rules = learn_rules(names, later, self._parted(names, warm), start)
        self._state.restore()
        return {rule.name: rule for rule in rules}

    def _parted(self, names: Places, state: ModuleState) -> list[list[tuple[float, Values]]]:
        """For several ways to part the rows: each part's share, and the state after a forward of it."""
        ways = []
        for sizes in splits_of(self._rows):
            parts, start = [], 0
            for size in sizes:
                self._forward(range(start, start + size))
                parts.append((size / self._rows, self._values(names)))
                state.restore()
                start += size
            ways.append(parts)
        return ways

    def _values(self, names: Places) -> Values:
        values: Values = {}
        for path, key in names:
            part = self._network.get_submodule(path)
            mine = part._buffers if key in part._buffers else vars(part)
            if key in mine:
                value = mine[key]
                copied = containers.twin if isinstance(value, CONTAINERS) else copy.copy
                kept = value.detach().clone() if isinstance(value, Tensor) else copied(value)
                values[f"{path}.{key}" if path else key] = kept
        return values

    def _built_once(self, changed: Places) -> bool:
        """Whether all that the forward changed is a table that it builds at first and that no row enters."""
        if self._state.switched():
            return False
        here = self._values(changed)
        built = ModuleState([self._network])
        self._others()
        if built.written_places():
            built.restore()
            return False
        self._state.restore()
        self._others()
        there = self._values(changed)
        same = all(name in there and _equal(value, there[name]) for name, value in here.items())
        built.restore()
        return same


def _any(value: Any) -> bool:
    return bool(value.any()) if isinstance(value, Tensor) else bool(value)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_tensor(a, b)
    if isinstance(a, (list, tuple, dict)):
        return type(a) is type(b) and len(a) == len(b)
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
