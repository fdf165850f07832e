"""What a story says, in words and numbers, before any format: page, markdown and terminal show the same facts.

1. Every number comes from a record; a record's own ``origin`` and ``counting`` label it.
2. Amounts that count different things are never compared.
"""

from __future__ import annotations

import dataclasses
import statistics

from samegrad.records import Budget, Category, Counting, Footprint, Origin, Plan, timed
from samegrad.report.statement import Statement, Tone
from samegrad.report.story import Story
from samegrad.report.words import capitalised, format_number, format_percent, format_rows
from samegrad.units import format_bytes, format_seconds

_SMALLEST_CAP = "smallest cap that runs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """One peak, named: ``what`` says what its bytes count, ``judged`` that the budget bounds this number.

    A peak that is not ``planned`` is that of the plain step, shown for comparison only.
    """

    name: str
    amount_bytes: int
    origin: Origin
    counting: Counting
    what: str
    basis: str = ""
    judged: bool = False
    planned: bool = True

    @property
    def counted(self) -> str:
        """What is counted, and by whom; never "GPU memory" for tensors that were only counted."""
        return f"{self.what} ({self.counting.value})" if self.counting is Counting.CUDA_ALLOCATOR else self.what


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knob:
    name: str
    value: str
    origin: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeverUse:
    """A lever of the plan with its knobs and the reason it was taken."""

    name: str
    knobs: tuple[Knob, ...]
    reason: str


def find_peaks(story: Story) -> list[Peak]:
    """Every known peak of the step, in the order: plain step, predicted, measured, seen in training."""
    peaks = _plain_peak(story)
    predicted, measured = story.predicted, story.measured
    if predicted is not None:
        peaks += _footprint_peaks(predicted)
    elif story.plan is not None and story.plan.predicted_peak_bytes is not None and story.limit is not None:
        peaks.append(
            Peak(
                name="Planned step",
                amount_bytes=story.plan.predicted_peak_bytes,
                origin=Origin.PREDICTED,
                counting=story.limit.counting,
                what="reserved" if story.limit.counting is Counting.CUDA_ALLOCATOR else story.limit.counting.value,
                judged=True,
            )
        )
    if measured is not None:
        peaks += _footprint_peaks(measured)
    return peaks + _training_peak(story)


def _allocated(counting: Counting) -> str:
    return "allocated" if counting is Counting.CUDA_ALLOCATOR else Counting.TENSOR_BYTES.value


def allocated(counting: Counting) -> str:
    """What ``peak_allocated_bytes`` counts, for use after the amount."""
    cuda = counting is Counting.CUDA_ALLOCATOR
    return f"allocated ({Counting.CUDA_ALLOCATOR.value})" if cuda else Counting.TENSOR_BYTES.value


def bounded(budget: Budget) -> str:
    """What ``budget`` bounds."""
    if budget.counting is Counting.CUDA_ALLOCATOR:
        return f"reserved ({Counting.CUDA_ALLOCATOR.value})"
    return Counting.TENSOR_BYTES.value


def _plain_peak(story: Story) -> list[Peak]:
    footprint = next((f for f in (story.predicted, story.measured) if f is not None and f.plain_laws), None)
    if footprint is None:
        return []
    if footprint.rows >= footprint.batch_rows and not (story.plan is not None and story.plan.levers):
        return []  # the step of the story is the plain step itself
    return [
        Peak(
            name=f"Plain step, all {footprint.batch_rows} rows at once",
            amount_bytes=footprint.predicted_peak_bytes(rows=footprint.batch_rows),
            origin=Origin.PREDICTED,
            counting=footprint.counting,
            what=_allocated(footprint.counting),
            basis="by laws fitted on probes",
            planned=False,
        )
    ]


def _footprint_peaks(footprint: Footprint) -> list[Peak]:
    amounts: list[tuple[str, int | None]] = [(_allocated(footprint.counting), footprint.peak_allocated_bytes)]
    if footprint.counting is Counting.CUDA_ALLOCATOR:
        amounts += [
            ("reserved", footprint.peak_reserved_bytes),
            ("cap for steady steps", footprint.steady_cap_bytes),
            (_SMALLEST_CAP, footprint.smallest_cap_bytes),
        ]
    known = [(what, amount) for what, amount in amounts if amount is not None]
    # What the budget bounds, best known last: allocated, reserved, the cap under which steps run steadily.
    judged = [what for what, _ in known if what != _SMALLEST_CAP][-1]
    return [
        Peak(
            name=f"Planned step, {format_rows(footprint.rows, of=footprint.batch_rows)} at a time",
            amount_bytes=amount,
            origin=footprint.origin,
            counting=footprint.counting,
            what=what,
            basis=footprint.basis,
            judged=what == judged,
        )
        for what, amount in known
    ]


def _training_peak(story: Story) -> list[Peak]:
    reserved = [r.peak_reserved_bytes for r in story.results if r.peak_reserved_bytes is not None]
    allocated = [r.peak_allocated_bytes for r in story.results if r.peak_allocated_bytes is not None]
    source = story.measured or story.limit
    # A step's result does not say what it counts: only an allocator reserves, else the run's own records tell.
    counting = Counting.CUDA_ALLOCATOR if reserved else source.counting if source is not None else None
    if counting is None or not (reserved or allocated):
        return []
    return [
        Peak(
            name=f"Highest of {_steps(story)} of training",
            amount_bytes=max(reserved or allocated),
            origin=Origin.MEASURED,
            counting=counting,
            what="reserved" if reserved else _allocated(counting),
            judged=True,
        )
    ]


def judge_fit(story: Story) -> Statement | None:
    """Whether the step stays within its budget; None without a budget or a peak."""
    budget = story.limit
    peaks = [peak for peak in find_peaks(story) if peak.judged]
    if budget is None or not peaks:
        return None
    # A measurement outweighs every prediction.
    peaks = [peak for peak in peaks if peak.origin is Origin.MEASURED] or peaks
    same = [peak for peak in peaks if peak.counting is budget.counting]
    if not same:  # rule 2
        sentence = f"the budget bounds bytes {bounded(budget)}, the known peak is {peaks[0].counted}"
        return Statement(tone=Tone.OPEN, answer="Not comparable", sentence=sentence)
    peak = max(same, key=lambda candidate: candidate.amount_bytes)
    limit, amount = format_bytes(budget.total_bytes), format_bytes(peak.amount_bytes)
    share = format_percent(peak.amount_bytes / budget.total_bytes)
    numbers = f"{amount} of {limit} ({share}), {peak.counted}, {peak.origin.value}"
    if peak.amount_bytes > budget.total_bytes:
        over = format_bytes(peak.amount_bytes - budget.total_bytes)
        return Statement(tone=Tone.BAD, answer="Over the budget", sentence=f"{numbers}; {over} too much")
    if peak.origin is Origin.PREDICTED:
        return Statement(tone=Tone.OPEN, answer="Predicted to fit", sentence=f"{numbers}, not measured")
    return Statement(tone=Tone.GOOD, answer="Within the budget", sentence=numbers)


def judge_prediction(story: Story) -> str:
    """How far the prediction was from the measurement, or an empty string where the two can't be compared."""
    predicted, measured = story.predicted, story.measured
    if predicted is None or measured is None or measured.origin is not Origin.MEASURED:
        return ""
    if predicted.counting is not measured.counting or predicted.rows != measured.rows:  # rule 2
        return ""
    if measured.peak_allocated_bytes == 0:
        return ""
    off = predicted.peak_allocated_bytes / measured.peak_allocated_bytes - 1
    forecast, truth = format_bytes(predicted.peak_allocated_bytes), format_bytes(measured.peak_allocated_bytes)
    how = "exact" if off == 0 else f"{format_percent(abs(off))} too {'high' if off > 0 else 'low'}"
    return f"Predicted {forecast}, measured {truth}, {allocated(measured.counting)}: the prediction was {how}."


def comparable_budget(budget: Budget | None, footprint: Footprint) -> int | None:
    """The bytes of ``budget`` where they count what ``footprint`` counts."""
    return budget.total_bytes if budget is not None and budget.counting is footprint.counting else None


def describe_budget(budget: Budget) -> str:
    """``"16.0 MiB on cpu, counted tensor bytes; from --budget 16MiB"``, and the host's share where there is one."""
    host = f"; on the host {format_bytes(budget.host_bytes)}" if budget.host_bytes is not None else ""
    amount = format_bytes(budget.total_bytes)
    return f"{amount} on {budget.device}, {bounded(budget)}; from {budget.source}{host}"


def levers_used(plan: Plan) -> list[LeverUse]:
    return [
        LeverUse(
            name=lever,
            knobs=tuple(
                Knob(
                    name=knob,
                    value=str(value),
                    origin=origin.value if (origin := plan.knob_origins.get(f"{lever}.{knob}")) else "not recorded",
                )
                for knob, value in knobs.items()
            ),
            reason=plan.reasons.get(lever, ""),
        )
        for lever, knobs in plan.levers.items()
    ]


def levers_left_out(plan: Plan, *footprints: Footprint | None) -> dict[str, str]:
    """The levers that the plan does not use, each with the plan's reason or with why this step refuses it."""
    refusals: dict[str, str] = {}
    for footprint in footprints:
        refusals |= footprint.refusals if footprint is not None else {}
    return {name: reason for name, reason in (refusals | plan.reasons).items() if name not in plan.levers}


def examined(story: Story) -> dict[str, str]:
    """What the examination of the step found, in words, by topic."""
    found: dict[str, str] = {}
    for footprint in (story.predicted, story.measured):
        found |= footprint.facts if footprint is not None else {}
    return found


def describe_plan(plan: Plan) -> str:
    """One sentence: how exact the plan is, and what it was predicted to need."""
    parts = [f"{capitalised(plan.exactness.explained())} ({plan.exactness.name})"]
    if plan.predicted_peak_bytes is not None:
        parts.append(f"predicted peak {format_bytes(plan.predicted_peak_bytes)}")
    if plan.predicted_seconds is not None:
        parts.append(f"predicted step {format_seconds(plan.predicted_seconds)}")
    return "; ".join(parts) + "."


def key_figures(story: Story) -> list[tuple[str, str, str]]:
    """The few numbers a reader looks for first: a name, the value, and what it is (of)."""
    figures: list[tuple[str, str, str]] = []
    budget = story.limit
    if budget is not None:
        figures.append(("Budget", format_bytes(budget.total_bytes), bounded(budget)))
    judged = [peak for peak in find_peaks(story) if peak.judged]
    best = [peak for peak in judged if peak.origin is Origin.MEASURED] or judged
    if best:
        peak = max(best, key=lambda candidate: candidate.amount_bytes)
        figures.append((f"Peak, {peak.origin.value}", format_bytes(peak.amount_bytes), peak.counted))
    footprint = story.measured or story.predicted
    if footprint is not None:
        figures.append(("Rows at a time", str(footprint.rows), f"of {footprint.batch_rows} in a batch"))
    if story.results:
        if seconds := timed(story.results):
            of = f"median of {_number_of_steps(len(seconds))}"
            figures.append(("Time of a step", format_seconds(statistics.median(seconds)), of))
        last = story.results[-1]
        figures.append(("Last loss", format_number(last.loss, digits=4), f"at step {last.index}"))
    elif footprint is not None and footprint.seconds is not None:
        figures.append(("Time of a step", format_seconds(footprint.seconds), footprint.origin.value))
    return figures


def describe_training(story: Story) -> str:
    """One sentence on the steps taken: how many, their median time and the last loss."""
    if not story.results:
        return ""
    last = story.results[-1]
    # Of a run whose only steps were counted meanwhile no time is known.
    seconds = timed(story.results)
    each = " each (median)" if len(story.results) > 1 else ""
    took = f", {format_seconds(statistics.median(seconds))}{each}" if seconds else ""
    return f"{_steps(story)}{took}; loss {format_number(last.loss, digits=4)} at step {last.index}."


def _steps(story: Story) -> str:
    return _number_of_steps(len(story.results))


def _number_of_steps(count: int) -> str:
    return f"{count} step" + ("s" if count != 1 else "")


def category_name(category: Category) -> str:
    return category.value.replace("_", " ")
