"""A plan that was given, not measured: what its levers change is tried on a few rows before it is believed."""

from __future__ import annotations

import dataclasses
from typing import Any

from samegrad.declared import DeclaredStep
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.find_head import find_head
from samegrad.exact.undisturbed import NotToBeTried
from samegrad.execute.ways import Ways, check_lever, is_mapping
from samegrad.levers import levers_of
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.records import Plan
from samegrad.trees import RowLayout


def check_levers(
    plan: Plan, declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout, ways: Ways
) -> None:
    """Raises CannotSplit where a lever of ``plan`` would not compute the plain step, or would save nothing."""
    for lever in levers_of(plan):
        if is_mapping(lever):
            check_lever(declared, aliases, batch, layout, lever, ways)
        elif isinstance(lever, ChunkLoss):
            if isinstance(ways.refusal, NotToBeTried):
                raise ways.refusal
            find_head(dataclasses.replace(declared, head=lever.head), batch, layout)
