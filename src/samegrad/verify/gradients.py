"""The planned step against the plain step, and the verdict.

Gradients, loss and state are compared on both sides from the same weights; nothing of the user's changes. Which
plain step it is compared with is a ladder (``reference.py``), what is compared are the tiers of the contract
(``tiers.py``), and where the answer is no, what is at fault is looked for (``fault.py``).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from samegrad import trees
from samegrad.declared import DeclaredStep, check_step
from samegrad.errors import CannotSplit, UsageError
from samegrad.exact.one_chunk import ChunkedStep
from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.exact.sharded import refuse_sharded
from samegrad.exact.step_draws import StepDraws
from samegrad.execute.apply import applied
from samegrad.levers import weakest_exactness
from samegrad.measure.child_signals import children_heard_later
from samegrad.measure.counted_targets import refuse_without_targets
from samegrad.measure.probe_sets import MORE_ROOM, fewest_rows
from samegrad.measure.within_memory import WithinMemory
from samegrad.records import Check, Exactness, Plan, Same, Verdict
from samegrad.trees import RowLayout
from samegrad.verify import tolerance
from samegrad.verify.fault import name_fault
from samegrad.verify.fewer import parts_of
from samegrad.verify.reference import Reference, Where, checked_rows, cpu_is_possible, on_device
from samegrad.verify.sides import Planned
from samegrad.verify.tiers import KEPT_BITS, PLAIN_TWICE, Compared, compare, compare_with_cpu, promises_bits


class Verifiable(Protocol):
    """A step with a plan: a ``Step``, for one."""

    verdict: Verdict | None

    @property
    def declared(self) -> DeclaredStep: ...

    @property
    def plan(self) -> Plan | None: ...

    def sizes_for(self, batch: Any) -> tuple[int, ...]: ...

    def split_for(self, batch: Any, layout: RowLayout) -> ChunkedStep: ...

    def draws_for(self, batch: Any, layout: RowLayout) -> StepDraws: ...

    def put_back(self) -> None: ...


@children_heard_later()
def verify_step(
    step: Verifiable, batch: Any, *, rows: int | None = None, reference: Where | None = None
) -> Verdict:
    """Whether the planned step has the plain step's gradients, loss and state; also left in ``step.verdict``.

    ``rows``: compare on the first ``rows`` rows of ``batch``; None means all, or as many as fit. ``reference``: the
    plain step on the "device" or on the "cpu" (in float64); None means the device where the batch fits, else the CPU
    where that takes seconds. ``verdict.reference`` says which it was. Raises UsageError when ``rows`` is more than
    the batch has, or when the CPU is asked for and cannot be the reference; OutOfMemory where not one row fits.
    """
    check_step(step, asked="verify_step(step, batch)")
    refuse_sharded(
        step.declared.modules,
        asked="verify a step against the plain step",
        do="verify the same model before fully_shard is applied to it, on one process or under "
        "DistributedDataParallel; gradients of sharded parameters exist only after they are reduced",
    )
    if reference not in (None, "device", "cpu"):
        raise UsageError(
            asked=f"reference={reference!r}", found="neither 'device' nor 'cpu'", do="leave it out, or give one of them"
        )
    asked = checked_rows(step.declared.layout(batch), rows)
    sizes = step.sizes_for(batch)
    with WithinMemory(step.declared) as memory:
        return _verified(step, batch, sizes, asked, reference)
    raise memory.refusal(asked="verify the step against the plain step", do=MORE_ROOM)


def _verified(
    step: Verifiable, batch: Any, sizes: tuple[int, ...], asked: int | None, reference: Where | None
) -> Verdict:
    started, layout = time.perf_counter(), step.declared.layout(batch)
    # The reference is the step as the user made it.
    step.put_back()
    planned = _planned(step, batch, layout, sizes)
    chosen = on_device(planned, batch, layout, asked)
    few, compared = _compared(planned, batch, sizes, chosen.rows)
    if few.planned.layout.rows < chosen.rows:
        chosen = chosen.on_fewer(few.planned.layout.rows)
    whole = _shown(planned, sizes, layout.rows if asked is None else asked)
    cpu_checks, chosen = _on_cpu(whole, batch, (chosen, compared.draws), reference)
    verdict = _verdict(planned, compared, cpu_checks, (chosen, layout.rows))
    if verdict.answer is Same.DIFFERS:
        # Two steps of which neither has a loss differ, whatever the plan.
        refuse_without_targets(step.declared, batch, asked="verify the step against the plain step")
    if verdict.answer is Same.DIFFERS:
        with WithinMemory(step.declared) as memory:
            verdict = dataclasses.replace(verdict, fault=_fault(few, compared, _Rows(whole, batch), cpu_checks))
        if memory.found:
            verdict = dataclasses.replace(verdict, fault=f"what is at fault was not found: {memory.found}")
    verdict = dataclasses.replace(verdict, seconds=time.perf_counter() - started)
    step.verdict = verdict
    return verdict


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The planned step on some rows, and those rows or a batch that begins with them."""

    planned: Planned
    rows: Any


def _compared(planned: Planned, batch: Any, sizes: tuple[int, ...], rows: int) -> tuple[_Rows, Compared]:
    """The first ``rows`` rows compared on the device; half as many where memory runs out, and so on."""
    while True:
        with WithinMemory(planned.declared) as memory:
            few = _Rows(_shown(planned, sizes, rows), trees.slice_rows(batch, planned.layout, 0, rows))
            return few, compare(few.planned, few.rows)
        if rows <= fewest_rows(planned.layout):
            raise memory.refusal(asked=f"verify the step on {rows} of its rows", do=MORE_ROOM)
        rows //= 2


def _fault(few: _Rows, compared: Compared, whole: _Rows, cpu_checks: Sequence[Check]) -> str:
    """What is at fault, looked for where it was seen: on the device's rows, else on those the CPU was asked for."""
    if not all(check.passed for check in compared.checks):
        return name_fault(few.planned, few.rows, compared.checks, lambda rest, rows: compare(rest, rows).checks)
    layout = whole.planned.layout
    return name_fault(
        whole.planned, trees.slice_rows(whole.rows, layout, 0, layout.rows), cpu_checks, compare_with_cpu
    )


def _planned(step: Verifiable, batch: Any, layout: RowLayout, sizes: tuple[int, ...]) -> Planned:
    plan = step.plan or Plan(levers={}, exactness=Exactness.SAME_BITS, batch_rows=layout.rows)
    with applied(plan, step.declared, layout.rows) as execution:
        whole = execution.runs_whole and len(sizes) < 2
    if not whole:
        split = step.split_for(batch, layout)
        return Planned(step.declared, split, plan, layout.rows, layout, sizes, split.examination.sites)
    sites = step.draws_for(batch, layout).sites if plan.levers else None
    planned = Planned(step.declared, None, plan, layout.rows, layout, sizes, sites)
    if not plan.levers or promises_bits(planned):
        return planned
    return dataclasses.replace(planned, by_rows=_by_rows(step, batch, layout))


def _by_rows(step: Verifiable, batch: Any, layout: RowLayout) -> ChunkedStep | None:
    """What would split a step that runs whole: the size of rounding shows in small parts. None where nothing can."""
    try:
        return step.split_for(batch, layout)
    except CannotSplit:
        return None


def _shown(planned: Planned, sizes: tuple[int, ...], rows: int) -> Planned:
    """The planned step on the first ``rows`` rows of its batch."""
    layout = dataclasses.replace(planned.layout, rows=rows)
    parts = parts_of(sizes, rows, planned.plan_rows) if planned.split is not None else (rows,)
    return dataclasses.replace(planned, layout=layout, parts=parts)


def _on_cpu(
    planned: Planned, batch: Any, on_device: tuple[Reference, bool], where: Where | None
) -> tuple[list[Check], Reference]:
    """The checks against the CPU, where it was asked for or is the next rung, and the reference with it.

    ``on_device``: what was compared on the device, and whether the step draws random numbers.
    """
    rows, declared = planned.layout.rows, planned.declared
    chosen, draws = on_device
    next_rung = chosen.rows < rows and planned.split is not None and not _is_host(declared.device)
    if where == "device" or (where is None and not next_rung):
        return [], chosen
    refusal = ""
    if draws and not _is_host(declared.device):
        refusal = "the step draws random numbers, and the CPU's generator draws others"
    elif not cpu_is_possible(declared.as_plain, batch, planned.layout, rows):
        refusal = f"{rows} rows in float64 do not fit the host, take too long there, or cannot run there"
    else:
        with WithinMemory(declared) as memory:
            try:
                checks = compare_with_cpu(planned, trees.slice_rows(batch, planned.layout, 0, rows))
                return checks, chosen.with_cpu(rows)
            except (RuntimeError, TypeError) as error:
                if is_out_of_memory(error):
                    raise
                refusal = f"the step cannot run in float64 on the CPU: {error}"
        refusal = refusal or f"the planned step in float64 does not fit the device ({memory.found})"
    if where == "cpu":
        raise UsageError(asked="verify against the plain step on the CPU", found=refusal, do="leave out reference=")
    return [], chosen


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"


def _verdict(
    planned: Planned, compared: Compared, cpu_checks: Sequence[Check], where: tuple[Reference, int]
) -> Verdict:
    """The verdict of all checks; ``where``: the reference, and the rows of the whole batch."""
    reference, batch_rows = where
    checks = [*cpu_checks, *compared.checks]
    passed = all(check.passed for check in checks)
    # In the same bits, or in a plan that is the plain call, there is nothing that a low precision could hide.
    itself = compared.exactly or planned.is_plain_call
    proven = itself or tolerance.proves_logic(compared.precision) or reference.cpu_rows > 0
    answer = Same.DIFFERS if not passed else Same.SAME if proven else Same.UNPROVEN
    # The first that failed, or the first: the sharpest.
    entries = [check for check in checks if check.name.startswith(("gradient entries", PLAIN_TWICE, KEPT_BITS))]
    entries = [check for check in entries if not check.passed] or entries
    main = entries[0] if entries else next((check for check in checks if not check.passed), checks[0])
    return Verdict(
        answer=answer,
        reference=reference.words,
        rows_checked=reference.rows_checked,
        batch_rows=batch_rows,
        dtype=planned.precision.name,
        compared_dtype=compared.precision.name,
        narrowed_by=compared.narrowed_by,
        max_relative_error=main.error,
        worst_parameter=main.worst,
        parameters_checked=compared.parameters,
        buffers_checked=compared.buffers,
        checks=tuple(checks),
        asked=weakest_exactness(planned.plan),
        found=_found(planned, compared) if answer is Same.SAME else None,
        departure=compared.departure,
    )


def _found(planned: Planned, compared: Compared) -> Exactness:
    """How exact a step is that passed: what rounds otherwise is never the declared step, whatever its reference."""
    if planned.rounding.dtype is not None:
        return Exactness.ROUNDED
    return Exactness.SAME_BITS if compared.exactly or promises_bits(planned) else Exactness.SAME_SUM
