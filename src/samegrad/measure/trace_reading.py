"""What a trace shows: peaks, their course, what lived at them. Pure functions of a ``Trace``; no torch here.

Bytes are as asked for, or each storage rounded up to ``round_to`` bytes: the CUDA allocator hands out multiples of
``CUDA_BLOCK_BYTES``. What is reserved for them is the allocator model's to say. ``step``: 0 for the first step, 1 for
the second, which has the optimizer's state.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

from samegrad.measure.events import MemoryEvent, Operation, Trace
from samegrad.records import Category, LiveTensors, Phase, TimelinePoint

CUDA_BLOCK_BYTES = 512
_LONGEST_TIMELINE = 240


@dataclasses.dataclass(frozen=True)
class Moment:
    """Live bytes by category after one event. ``event``: its index, ``operation``: -1 before the first one."""

    event: int
    operation: int
    live_bytes: int
    by_category: dict[Category, int]


@dataclasses.dataclass(frozen=True)
class LiveStorage:
    """A storage that lived at some moment, and what made it; None for what stood before the step."""

    size_bytes: int
    category: Category
    made_by: Operation | None

    @property
    def module(self) -> str:
        return "" if self.made_by is None else self.made_by.module


def find_peak(trace: Trace, *, step: int = 1, round_to: int = 1) -> Moment:
    """The first moment of the step at which most bytes lived."""
    return max(_moments(trace, step, round_to), key=lambda moment: moment.live_bytes)


def peak_bytes(trace: Trace, *, step: int = 1, round_to: int = 1) -> int:
    """Most bytes alive at a time in the step."""
    return find_peak(trace, step=step, round_to=round_to).live_bytes


def peak_by_phase(trace: Trace, *, step: int = 1, round_to: int = 1) -> dict[Phase, int]:
    """Most bytes alive at a time in each phase of the step."""
    peaks: dict[Phase, int] = {}
    for moment in _moments(trace, step, round_to):
        phase = _phase_of(trace, moment)
        peaks[phase] = max(moment.live_bytes, peaks.get(phase, 0))
    return peaks


def loss_peak_bytes(trace: Trace, *, step: int = 1, round_to: int = 1) -> int:
    """The most that the step's loss and its backward hold above what stood when the loss began.

    What the loss reads is not in it. Operations of the step's own code, between the forwards of modules and their
    backwards, are taken for the loss's.
    """
    own = [index for index, operation in enumerate(trace.operations) if operation.step == step]
    forwards = [k for k in own if trace.operations[k].phase is Phase.FORWARD and trace.operations[k].module]
    backwards = [k for k in own if trace.operations[k].phase is Phase.BACKWARD and trace.operations[k].module]
    first = forwards[-1] + 1 if forwards else own[0]
    end = backwards[0] if backwards else own[-1] + 1
    before, peak = 0, 0
    for moment in _moments(trace, step, round_to):
        if moment.operation < first:
            before = moment.live_bytes
        elif moment.operation < end:
            peak = max(peak, moment.live_bytes)
    return max(0, peak - before)


def live_at(trace: Trace, moment: Moment) -> list[LiveStorage]:
    """The storages that lived then, largest first."""
    living: dict[int, MemoryEvent] = {}
    for event in trace.events[: moment.event + 1]:
        if event.change_bytes > 0:
            living[event.storage] = event
        else:
            living.pop(event.storage)
    found = [
        LiveStorage(
            event.change_bytes,
            event.category,
            trace.operations[event.operation] if event.operation >= 0 else None,
        )
        for event in living.values()
    ]
    return sorted(found, key=lambda storage: -storage.size_bytes)


def by_module_at(trace: Trace, moment: Moment) -> dict[str, int]:
    """Bytes that lived then by the module that made them, largest first; what stood before the step is left out."""
    sums: Counter[str] = Counter()
    for storage in live_at(trace, moment):
        if storage.made_by is not None:
            sums[storage.module] += storage.size_bytes
    return dict(sums.most_common())


def tensors_at(trace: Trace, moment: Moment, *, most: int = 40) -> tuple[LiveTensors, ...]:
    """What lived then, what one operation of one module made taken together, largest first: the ``most`` largest."""
    sums: Counter[tuple[Category, str, str, Phase | None]] = Counter()
    counts: Counter[tuple[Category, str, str, Phase | None]] = Counter()
    for storage in live_at(trace, moment):
        made = storage.made_by
        key = (storage.category, storage.module, "" if made is None else made.name, made and made.phase)
        sums[key] += storage.size_bytes
        counts[key] += 1
    return tuple(
        LiveTensors(
            size_bytes=size, category=key[0], count=counts[key], module=key[1], operation=key[2], phase=key[3]
        )
        for key, size in sums.most_common(most)
    )


def timeline(trace: Trace, *, step: int = 1) -> tuple[TimelinePoint, ...]:
    """The course of the step, thinned to a readable number of points; each keeps the largest of its stretch.

    Moments lie at their operations, evenly spaced, so that a counted run of the same operations lies over them.
    """
    operations = [index for index, operation in enumerate(trace.operations) if operation.step == step]
    first, last = operations[0], operations[-1]
    stretch = -(-len(operations) // _LONGEST_TIMELINE)
    largest: dict[int, Moment] = {}
    latest: dict[int, Moment] = {}
    for moment in _moments(trace, step, 1):
        place = (max(moment.operation, first) - first) // stretch
        latest[place] = moment
        if place not in largest or moment.live_bytes > largest[place].live_bytes:
            largest[place] = moment
    points = []
    now = _standing_before(trace, step)
    for place, start in enumerate(range(first, last + 1, stretch)):
        # Phases begin with their first operation, also where that one changes no memory.
        shown = largest.get(place, dataclasses.replace(now, operation=start))
        now = latest.get(place, now)
        points.append(
            TimelinePoint(
                position_fraction=(start - first) / max(1, last - first),
                phase=_phase_of(trace, shown),
                live_bytes=shown.by_category,
                module=trace.operations[shown.operation].module if shown.operation >= 0 else "",
            )
        )
    return tuple(points)


def _standing_before(trace: Trace, step: int) -> Moment:
    """What stands when the step begins."""
    return [Moment(-1, -1, 0, {}), *_moments(trace, step - 1, 1)][-1]


def total_flops(trace: Trace, *, step: int = 1) -> int:
    """Floating-point operations of the products, convolutions and attention of the step."""
    return sum(operation.flops for operation in trace.operations if operation.step == step)


def _moments(trace: Trace, step: int, round_to: int) -> Iterator[Moment]:
    """The moments after each event of the step, which frees after its last operation belong to."""
    live = dict.fromkeys(Category, 0)
    total = 0
    for index, event in enumerate(trace.events):
        now = trace.operations[event.operation].step if event.operation >= 0 else 0
        if now > step:
            return
        blocks = -(-abs(event.change_bytes) // round_to)
        change = blocks * round_to if event.change_bytes > 0 else -blocks * round_to
        live[event.category] += change
        total += change
        if now == step:
            yield Moment(index, event.operation, total, dict(live))


def _phase_of(trace: Trace, moment: Moment) -> Phase:
    return trace.operations[moment.operation].phase if moment.operation >= 0 else Phase.FORWARD
