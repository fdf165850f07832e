"""What was learnt of a step from a few rows of its first batch."""

from __future__ import annotations

import dataclasses
from typing import Any

from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.first_pass import FirstPass
from samegrad.exact.losses import Form
from samegrad.exact.randomness import DrawSites
from samegrad.exact.state import StateRule
from samegrad.trees import RowLayout


@dataclasses.dataclass(frozen=True)
class Examination:
    """How a step may be split.

    ``form`` COUPLED means two passes. ``declared``: the form rests on normalise=. ``count_per_row``: the count of a
    COUNTED loss that a row brings, as seen on the probe rows. ``module_hooks``: the user's hooks that run per chunk.
    ``sites``: where the model draws, None where it does not. ``rules``: how the state that it changes is reduced.
    ``collectives``: the loss calls some, so ranks must run it equally often. ``unseen``: targets that a declared loss
    leaves out and that none of the rows had on which it was tried.
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
    unseen: frozenset[int] = frozenset()

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
