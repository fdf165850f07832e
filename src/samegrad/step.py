"""``Step``, the front door: one line of an ordinary loop changes.

    step = sg.Step(model, loss_fn, budget="6GiB", optimizer=optimizer)
    for batch in loader:
        loss = step.backward(batch)
        optimizer.step(); optimizer.zero_grad()
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from samegrad.data.prefetch import Prefetcher
from samegrad.declared import DeclaredStep, Forward, Loss, Normalise, declare
from samegrad.errors import CannotSplit, UsageError
from samegrad.exact.find_head import named_head
from samegrad.exact.loop import agreed_cut
from samegrad.exact.one_chunk import ChunkedStep
from samegrad.exact.sharded import ranks_of
from samegrad.exact.softmax_loss import reduced_loss
from samegrad.exact.split import plain_backward
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.stepping_hooks import refuse_stepping_hooks
from samegrad.exact.whole import WholeStep, reduces_in_backward
from samegrad.execute.apply import Standing, applied, check_scaled, chunked_step
from samegrad.execute.examined import Examined, Kind
from samegrad.execute.given import check_allowed, refuse_not_there
from samegrad.execute.kept_plans import Kept, KeptPlans
from samegrad.execute.kept_programs import KeptPrograms
from samegrad.execute.pinned import checked_rows, pinned_plan
from samegrad.execute.recover import Attempt, Attempts, attempts_for
from samegrad.execute.row_counts import RowCounts
from samegrad.execute.ways import Ways
from samegrad.levers import Execution
from samegrad.measure import counters
from samegrad.measure.child_signals import children_heard_later
from samegrad.measure.other_lengths import other_lengths_told
from samegrad.module_walk import parameters_of
from samegrad.plan.explain import explain_given, explain_plan
from samegrad.plan.options import Options
from samegrad.records import Budget, Exactness, Footprint, Plan, Recovery, Verdict
from samegrad.report.front import describe_levers
from samegrad.report.verdicts import judge
from samegrad.settle import aliases_for, check_kinds, check_one_of, plan_here, smaller_plans
from samegrad.trees import RowLayout, extents_of
from samegrad.units import format_bytes

_log = logging.getLogger("samegrad")


class Step:
    """A training step that runs inside a budget and leaves the gradients of the plain step.

    ``loss_fn(outputs, batch)`` is the ordinary full-batch loss. At most one of ``budget`` (bytes, "6GiB", "80%"),
    ``rows`` (an int, or a list that adds up to the batch) and ``plan``; none means what is free now. ``forward``
    defaults to ``model(batch[0])`` for tuples and lists, matching keywords for mappings, ``model(batch)`` for a
    tensor. ``normalise`` declares the loss a sum over rows over a count (single pass; audited). ``batch_axes`` says
    where rows are. ``reduce="softmax_mean"``: the model returns ``(scores, values)``, scores (rows, B) and values
    (rows, B, ...), and ``loss_fn((lse, means), batch)`` takes the scores' log-sum-exp over the rows (B,) and the values
    averaged with their softmax (B, ...); rows are then streamed through the softmax and never kept.
    ``footprint``: what ``settle_plan`` chose ``plan`` from. A plan is a pin; with its footprint it is none, and where
    memory runs out the next smaller one is taken, in the same precision.
    ``enforce`` caps the CUDA allocator at the budget until ``close``. ``allow`` is the weakest
    exactness a plan may have.

    ``segments`` names submodules that treat rows alone, for a model that couples rows elsewhere; without it they are
    found. ``head`` names the nn.Linear whose logits only the loss takes, where it is not the last one: a plan may then
    run that loss in chunks, and with ``rows`` it does. ``plain_forward``: what ``forward`` must equal where it computes
    the same by other means, such as rows shared out over devices; verification compares with it. ``expected_steps``:
    how many steps the plan is for, which decides whether compiling pays, and how long it is looked for: after a
    twentieth of what all steps take no further candidate is compiled. ``groups`` is refused until the lever behind it
    exists. ``host_budget``: what plans may pin on the host, by default what is free there.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        *,
        budget: str | int | None = None,
        rows: int | Sequence[int] | None = None,
        plan: Plan | None = None,
        footprint: Footprint | None = None,
        host_budget: str | int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        forward: Forward | None = None,
        normalise: Normalise | None = None,
        reduce: Literal["softmax_mean"] | None = None,
        groups: Any = None,
        segments: Sequence[str] | None = None,
        batch_axes: Any = None,
        head: str | None = None,
        plain_forward: Forward | None = None,
        expected_steps: int | None = None,
        device: torch.device | str | None = None,
        enforce: bool = False,
        allow: Exactness = Exactness.SAME_SUM,
    ) -> None:
        check_one_of(budget=budget, rows=rows, plan=plan)
        check_kinds(plan=plan, footprint=footprint, allow=allow, expected_steps=expected_steps)
        refuse_not_there(groups=groups)
        loss_fn = reduced_loss(loss_fn, reduce=reduce, normalise=normalise)
        self.declared: DeclaredStep = declare(
            model, loss_fn, optimizer=optimizer, forward=forward, normalise=normalise, batch_axes=batch_axes,
            segments=segments, head=head, plain_forward=plain_forward, device=device,
        )  # fmt: skip
        if head is not None:
            named_head(self.declared.network, head)
        self.budget: Budget | None = None if plan is None else plan.budget
        self.plan: Plan | None = plan
        self.footprint: Footprint | None = footprint
        self.verdict: Verdict | None = None
        self.expected_steps = expected_steps
        self.allow = allow
        self.asked_budget, self.asked_host_budget = budget, host_budget
        self._rows = checked_rows(rows)
        self._enforce, self._capped = enforce, False
        self._prefetcher = Prefetcher(self.declared.device)
        self._examined = Examined(self.declared, aliases_for(self.declared))
        self._waits_for_ranks = self._examined.aliases.sharded or reduces_in_backward(self.declared)
        self._given, self._leaves_given = plan, footprint is not None
        self._plans = KeptPlans()
        self._row_counts = RowCounts(self.declared)
        self._standing = Standing(self.declared)
        self._programs = KeptPrograms()
        self._closed = False
        # Of the last backward: attempts that ran out of memory before the one that counted.
        self.recoveries: tuple[Recovery, ...] = ()

    def backward(self, batch: Any, *, scaler: Any = None) -> Tensor:
        """The step's loss, () detached and unscaled; ``.grad`` grows by the plain step's gradients.

        A tensor of the batch that all rows share may require grad (prototypes, say): it gets its total, and passes it
        on through the graph it came from, once.

        ``scaler``: a GradScaler; it scales the loss only, unscale, step and update stay yours. If anything raises
        before the gradients are handed over, ``.grad`` is as it was. Where memory runs out, the attempt is undone and
        the next plan that needs less runs the same batch (``recoveries`` says what happened, and so does a warning);
        with a plan that was pinned, or none left, OutOfMemory is raised.
        """
        self._check_open()
        if scaler is not None:
            refuse_stepping_hooks(
                parameters_of(self.declared.modules), asked="step.backward(batch, scaler=...)",
                do="take the hooks off and step the optimizer after scaler.unscale_, or train without a scaler",
            )  # fmt: skip
        if not torch.is_grad_enabled():
            # Two passes would otherwise leave no gradient and say nothing.
            raise UsageError(
                asked="step.backward(batch)",
                found="gradients are switched off (torch.no_grad or inference_mode)",
                do="call it outside that block",
            )
        with other_lengths_told(self.declared, batch):
            layout, execution = self._agreed_execution(batch)
        assert self.plan is not None
        kind = self._examined.kind_of(batch, layout)
        attempts = self._attempts(kind, batch, self.plan)
        for attempt in attempts:
            with attempt:
                self.recoveries = tuple(attempts.recoveries)
                if self.recoveries:
                    execution = self._fall_to(attempt.plan, kind, batch, layout)
                return self._run(execution, kind, batch, layout, scaler, attempt)
        raise AssertionError("attempts end by an error")

    def prepare(self, worst_batch: Any) -> Plan:
        """The plan for batches up to ``worst_batch``'s rows, made now instead of at the first backward."""
        self._check_open()
        with other_lengths_told(self.declared, worst_batch):
            self._execution(worst_batch, self.declared.layout(worst_batch))
        assert self.plan is not None
        return self.plan

    def explain(self) -> str:
        """Why the step runs as it does, how exact that is and was found to be, in words.

        Before the first batch there is nothing to explain.
        """
        if self.plan is None:
            return "No plan yet: it is made at the first backward, or by prepare(batch)."
        verdict = [] if self.verdict is None else [judge(self.verdict).text]
        found = [*self._row_counts.notes, *self._programs.notes(), *verdict]
        if self.footprint is not None:
            return "\n".join([explain_plan(self.plan, self.footprint), *found])
        return explain_given(self.plan, [*(ways.told() for ways in self._examined.ways.values()), *found])

    def put_back(self) -> None:
        """Puts back what levers put in place between steps, until the next backward brings it again."""
        self._standing.close()

    def close(self) -> None:
        """Gives back what the step holds beyond the model: pinned buffers, the reader thread, the allocator's cap.

        What levers put in place between steps (strides of weights, optimizer state on the host) is put back.
        """
        self.put_back()
        self._programs.close()
        self._prefetcher.close()
        if self._capped:
            counters.uncap_allocator(self.declared.device)
            self._capped = False
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        asked = f"rows={self._rows}" if self._rows is not None else f"budget={self.asked_budget!r}"
        under = "no plan yet" if self.plan is None else describe_levers(self.plan.levers)
        return f"Step({type(self.declared.model).__name__}, {asked if self._given is None else 'plan=...'}: {under})"

    @property
    def rows(self) -> int | tuple[int, ...] | None:
        """Rows at a time as they were pinned by ``rows=``, or None."""
        return self._rows

    def sizes_for(self, batch: Any) -> tuple[int, ...]:
        """The rows of each chunk of ``batch`` under the plan; one entry when it runs whole."""
        layout = self.declared.layout(batch)
        return self._execution(batch, layout).sizes or (layout.rows,)

    def split_for(self, batch: Any, layout: RowLayout) -> ChunkedStep:
        """What runs batches like this one in chunks under the plan, examined on its first rows. Raises CannotSplit.

        Where the plan runs whole: what would run it in chunks.
        """
        execution = self._execution(batch, layout)
        if execution.runs_whole:
            execution = dataclasses.replace(execution, sizes=(1,) * layout.rows)
        return self._in_chunks(execution, self._examined.kind_of(batch, layout), batch, layout, kept=False)

    def whole_for(self, batch: Any, layout: RowLayout) -> WholeStep | None:
        """What runs batches like this one whole under the plan; None where that is the plain call."""
        assert self.plan is not None
        kind = self._examined.kind_of(batch, layout)
        attempt = next(iter(self._attempts(kind, batch, self.plan)))
        return _whole(attempt, self.declared, self._examined.draws_for(kind, batch, layout))

    def draws_for(self, batch: Any, layout: RowLayout) -> StepDraws:
        """The draws of the next step: the same for every plan."""
        return self._examined.draws_for(self._examined.kind_of(batch, layout), batch, layout)

    def _run(
        self, execution: Execution, kind: Kind, batch: Any, layout: RowLayout, scaler: Any, attempt: Attempt
    ) -> Tensor:
        check_scaled(execution, scaler)
        # Examined first: what levers put on the model is not the user's.
        chunked = None if execution.runs_whole else self._in_chunks(execution, kind, batch, layout, kept=True)
        draws = self._examined.draws_for(kind, batch, layout) if chunked is None else None
        assert self.plan is not None
        with self._standing.bring(self.plan), applied(self.plan, self.declared, layout.rows) as running:
            if chunked is not None and execution.sizes is not None:
                chunked = dataclasses.replace(chunked, declared=running.declared, agreement=attempt.agreement)
                return chunked.backward(batch, layout, execution.sizes, scaler)
            whole = _whole(attempt, running.declared, draws)
            if whole is None:
                return plain_backward(running.declared, batch, layout, scaler, draws)
            return whole.backward(batch, layout, scaler)

    def _attempts(self, kind: Kind, batch: Any, plan: Plan) -> Attempts:
        by_plan = self._given is not None and not self._leaves_given
        pinned = "rows=" if self._rows is not None else "plan=" if by_plan else ""
        further = () if pinned or self.footprint is None else smaller_plans(self.footprint, plan, self.allow)
        return attempts_for(
            self.declared, batch, plan, iter(further), self._examined.ways.get(kind),
            pinned=pinned, sharded=self._waits_for_ranks,
        )  # fmt: skip

    def _fall_to(self, plan: Plan, kind: Kind, batch: Any, layout: RowLayout) -> Execution:
        """The execution of a smaller plan, which stays in the place of the one that ran out of memory."""
        assert self.footprint is not None
        if self._given is not None:
            self.plan = self._given = plan
        else:
            self._plans.keep(kind, Kept(plan, self.footprint, extents_of(batch, layout)))
        return self._execution(batch, layout)

    def _in_chunks(self, execution: Execution, kind: Kind, batch: Any, layout: RowLayout, *, kept: bool) -> ChunkedStep:
        """``kept``: by what was compiled and captured for the batches before."""
        ways = self._examined.ways_for(kind, batch, layout)
        assert self.plan is not None
        if self._given is not None or self._rows is not None:
            self._examined.accept_levers(self.plan, kind, batch, layout, ways)
        self._row_counts.check(self.plan, execution, ways, kind, batch, layout)
        programs = self._programs.of(self.plan, execution) if kept else None
        return chunked_step(execution, self._examined.aliases, ways, self._chunks, programs)

    def _chunks(
        self, batch: Any, layout: RowLayout, sizes: Sequence[int], device: torch.device
    ) -> Iterable[Any]:
        return self._prefetcher.stream(batch, layout, sizes)

    def _agreed_execution(self, batch: Any) -> tuple[RowLayout, Execution]:
        """How this batch runs; with sharded parameters in as many chunks as on the other ranks."""
        ranks = ranks_of(self.declared.modules)
        if ranks is None:
            layout = self.declared.layout(batch)
            return layout, self._execution(batch, layout)

        def cut() -> tuple[RowLayout, tuple[int, ...] | None]:
            layout = self.declared.layout(batch)
            return layout, self._execution(batch, layout).sizes

        layout, sizes = agreed_cut(ranks, cut)
        return layout, dataclasses.replace(self._execution(batch, layout), sizes=sizes, kept_chunks=0)

    @children_heard_later()
    def _execution(self, batch: Any, layout: RowLayout) -> Execution:
        """How the plan runs this batch. Plans first where that is still to be done."""
        self.declared.refuse_without_data(batch)
        if self._rows is not None:
            # Ranks that hold parts of the parameters examine together, once they have agreed on their chunks.
            self.plan = pinned_plan(
                self._rows, self.declared, layout,
                lambda: None if self._examined.aliases.sharded else self._ways_for(batch, layout),
            )  # fmt: skip
        elif self._given is not None:
            self._examined.accept_plan(self._given, batch, layout)
        else:
            # A layer that is frozen or switched to eval mode makes another step of it.
            kind, extents = self._examined.kind_of(batch, layout), extents_of(batch, layout)
            known = self._plans.of(kind, extents, layout.rows, lambda plan: self._accepts(plan, batch, layout))
            if known is None:
                self._standing.close()
                self._programs.close()
                known = self._plans.keep(kind, Kept(*self._planned(batch, layout), extents))
            self.plan, self.footprint = known.plan, known.footprint
        assert self.plan is not None
        check_allowed(self.plan, self.allow)
        with applied(self.plan, self.declared, layout.rows) as execution:
            return execution

    def _ways_for(self, batch: Any, layout: RowLayout) -> Ways:
        """The ways to run batches like this one."""
        return self._examined.ways_for(self._examined.kind_of(batch, layout), batch, layout)

    def _accepts(self, plan: Plan, batch: Any, layout: RowLayout) -> bool:
        """Whether ``plan``, made for a batch that is longer somewhere, can run this one too."""
        with contextlib.suppress(CannotSplit), applied(plan, self.declared, layout.rows) as execution:
            if not execution.runs_whole:
                kind = self._examined.kind_of(batch, layout)
                ways = self._examined.ways_for(kind, batch, layout)
                self._examined.accept_levers(plan, kind, batch, layout, ways)
                chunked_step(execution, self._examined.aliases, ways, self._chunks)
            return True
        return False

    def _planned(self, batch: Any, layout: RowLayout) -> tuple[Plan, Footprint]:
        device = self.declared.device
        self.budget = counters.read_budget(self.asked_budget, device, host=self.asked_host_budget)
        if self.asked_budget is None:
            # A warning, so that it is seen without any logging set up: nobody declared this number.
            _log.warning("samegrad: budget %s, %s", format_bytes(self.budget.total_bytes), self.budget.source)
        self._examined.refresh()
        aliases = self._examined.aliases
        options = Options(
            allow=self.allow, expected_steps=self.expected_steps, one_shape=not self._plans.varied
        )
        plan, footprint, measurement = plan_here(self.declared, aliases, batch, self.budget, options)
        # What the probes left, in cycles and in the allocator's cache, lies as suited them, not the step.
        counters.release_cached(device)
        if self._enforce and not self._capped:
            # Not before: the examination takes rows of its own.
            self._capped = counters.cap_allocator(device, self.budget.total_bytes) is not None
        self._examined.ways[self._examined.kind_of(batch, layout)] = measurement.ways
        return plan, footprint

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(asked="a step", found="it was closed", do="make a new Step")


def _whole(attempt: Attempt, declared: DeclaredStep, draws: StepDraws | None) -> WholeStep | None:
    if not attempt.undoable:
        return None
    return WholeStep(declared, attempt.parameters, draws, attempt.examination, attempt.agreement)
