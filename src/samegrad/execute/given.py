"""A plan that was given, not measured: was it made for this step, is it allowed, and does it compute the same?

What its levers change is tried on a few rows before it is believed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from samegrad.declared import FROZEN, DeclaredStep
from samegrad.errors import IN_THE_DECLARATION, CannotSplit, UsageError, WrongPlan
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.find_head import find_head
from samegrad.exact.segments import find_segments
from samegrad.exact.undisturbed import NotToBeTried
from samegrad.execute.trial import MappingLever, examine_mapped, few_rows, is_mapping
from samegrad.execute.ways import Ways
from samegrad.levers import levers_of, weakest_exactness
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.levers.segments import Segments
from samegrad.records import Exactness, Plan
from samegrad.trees import RowLayout


def refuse_not_there(**options: Any) -> None:
    """Raises UsageError for an option that is given and that nothing takes yet."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(
                asked=f"{name}={value!r}",
                found=f"samegrad cannot take {name}= yet, and ignoring it would run another step than declared",
                do=f"leave {name} out",
            )


def check_allowed(plan: Plan, allow: Exactness) -> None:
    """Raises UsageError for a plan that is less exact than ``allow``."""
    weakest = weakest_exactness(plan)
    if weakest > allow:
        raise UsageError(
            asked=f"a plan that is {weakest.name}: {weakest.explained()}",
            found=f"the step allows {allow.name} at most",
            do=f"plan again without what is less exact; {IN_THE_DECLARATION}: "
            f"allow=Exactness.{weakest.name} if that is meant",
        )


def check_batch(plan: Plan, signature: str, layout: RowLayout) -> None:
    """Raises WrongPlan for a batch, of this ``signature``, that ``plan`` was not made for."""
    if layout.rows > plan.batch_rows:
        raise WrongPlan(
            asked=f"apply a plan made for {plan.batch_rows} rows",
            found=f"this batch has {layout.rows} rows",
            do="plan again with the largest batch: step.prepare(worst_batch)",
        )
    planned = plan.signature.partition(" | ")[0]
    if planned and planned != signature:
        raise WrongPlan(
            asked="apply a plan made for another batch",
            found=_first_difference("", _leaves(planned), _leaves(signature))
            or f"planned for {planned}; this batch is {signature}",
            do="plan again for this batch (leave out plan=)",
        )


def check_model(plan: Plan, declared: DeclaredStep) -> None:
    """Raises WrongPlan for a model that ``plan`` was not made for."""
    planned = plan.signature.partition(" | ")[2]
    model = declared.model_signature() if planned else ""
    if planned != model:
        raise WrongPlan(
            asked="apply a plan made for another model",
            # Plans from before parameters were written down say no more than that they are others.
            found=(plan.parameters and _first_difference("parameter ", plan.parameters, declared.parameter_shapes()))
            or f"planned for {planned}, this is {model}: parameters' names, shapes, dtypes, or which of "
            "them train, are others",
            do="plan again for this model (leave out plan=)",
        )


def _leaves(signature: str) -> dict[str, str]:
    """The leaves of a batch's signature: their dtype and shape by path."""
    return dict(re.findall(r"(\S.*?):(\w+(?:\[[^]]*\])?(?:\+grad)?)(?: |$)", signature))


def _first_difference(what: str, planned: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first of ``planned`` that is another ``now``, as it was and as it is, and how many more are; "" for none."""
    differing = [name for name in {**planned, **now} if planned.get(name) != now.get(name)]
    if not differing:
        return ""
    # One that has another shape says more than one that has another name.
    name = next((name for name in differing if name in planned and name in now), differing[0])
    then = _told(planned[name], now.get(name, "")) if name in planned else "not there"
    is_now = _told(now[name], planned.get(name, "")) if name in now else "not there"
    others = f"; {len(differing) - 1} more differ" if len(differing) > 1 else ""
    return f"{what}{name} was {then} when the plan was made, and is {is_now} now{others}"


def _told(shape: str, other: str) -> str:
    """``shape``, and that it trained or was frozen where that is what makes it ``other``."""
    if shape.endswith(FROZEN):
        return f"{shape.removesuffix(FROZEN)}, frozen"
    return f"{shape}, training" if other.endswith(FROZEN) else shape


def check_levers(
    plan: Plan, declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout, ways: Ways
) -> None:
    """Raises CannotSplit where a lever of ``plan`` would not compute the plain step, or would save nothing."""
    for lever in levers_of(plan):
        if is_mapping(lever):
            if not _was_found(lever, ways):
                _check_mapping(lever, declared, aliases, batch, layout, ways)
        elif isinstance(lever, ChunkLoss):
            _refuse_untried(ways)
            find_head(dataclasses.replace(declared, head=lever.head), batch, layout)


def _check_mapping(
    lever: MappingLever, declared: DeclaredStep, aliases: ParameterAliases, batch: Any, layout: RowLayout, ways: Ways
) -> None:
    """That ``lever`` passes as the ``ways`` that were found did. Raises CannotSplit."""
    _refuse_untried(ways)
    if isinstance(lever, Segments):
        few, few_layout = few_rows(declared, batch, layout)
        found = {s.path: s.per_row for s in find_segments(declared, few, few_layout, list(lever.paths))}
        if found != lever.paths:
            raise CannotSplit(
                asked=f"segments {lever.paths}, as the plan has them",
                found=f"they are called on {found} rows for each of the batch",
                do="plan again for this model (leave out plan=)",
            )
    examine_mapped(declared, aliases, batch, layout, lever, ways.sites, ways.rules)


def _refuse_untried(ways: Ways) -> None:
    if isinstance(ways.refusal, NotToBeTried):
        raise ways.refusal


def _was_found(lever: MappingLever, ways: Ways) -> bool:
    return any(way.name == lever.name and _but_rows(way) == _but_rows(lever) for way in ways.mapped)


def _but_rows(lever: MappingLever) -> dict[str, Any]:
    return {knob: value for knob, value in lever.knobs().items() if knob != "rows"}
