"""The real step at a few rows: what it holds at every moment and how long it takes, nothing of the user's changed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.exact import losses
from samegrad.exact.attributes import put_back
from samegrad.exact.handoff import hooks_silenced
from samegrad.exact.one_chunk import ChunkedStep
from samegrad.exact.phases import announce, arriving_chunks, listening
from samegrad.exact.shared_leaves import cut_loose
from samegrad.exact.split import sliced_chunks, under_draws
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import step_undisturbed
from samegrad.measure import census, counters
from samegrad.measure.counting import ByteCounter
from samegrad.records import Category, Phase, TimelinePoint
from samegrad.trees import RowLayout

# The shortest of a few runs: whatever else the machine does can only make one longer. Long ones are not repeated.
TIMED_RUNS = 3
_ENOUGH_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Probe:
    """One measured run in chunks of ``sizes`` rows. ``reserved_bytes`` only on CUDA.

    ``moments``: counted bytes after every operation, in stretches between announced phases.
    ``beyond_counted_bytes``: what the allocator's peak holds on top of the counted one (workspaces, rounding).
    ``numbers_read`` and ``truths_read``: lines of the forward that read one, and may go another way on other rows.
    """

    sizes: tuple[int, ...]
    peak_bytes: int
    by_phase: dict[Phase, int]
    by_category: dict[Category, int]
    timeline: tuple[TimelinePoint, ...]
    seconds: float
    moments: tuple[tuple[tuple[Phase, int], ...], ...]
    reserved_bytes: int | None = None
    beyond_counted_bytes: int = 0
    numbers_read: frozenset[str] = frozenset()
    truths_read: frozenset[str] = frozenset()

    @property
    def rows(self) -> int:
        return max(self.sizes)

    @property
    def batch_rows(self) -> int:
        return sum(self.sizes)

    @property
    def chunks(self) -> int:
        return len(self.sizes)


def probe_split(
    split: ChunkedStep,
    batch: Any,
    layout: RowLayout,
    sizes: Sequence[int],
    timed_runs: int = TIMED_RUNS,
    *,
    is_warm: bool = False,
) -> Probe:
    """The split step in chunks of ``sizes``, the first rows of ``batch``, up to but without the hand-over.

    ``timed_runs``: 0 where only bytes are asked for; its seconds are then not a number. ``is_warm``: a probe of this
    step on other rows came right before, so that a run to warm up is needed for its seconds alone.
    """
    few, few_layout = first_rows(batch, layout, sum(sizes))
    return _probed(
        split.declared, batch, lambda: split.totals(few, few_layout, sizes), sizes, timed_runs, is_warm=is_warm
    )


def probe_plain(
    declared: DeclaredStep,
    batch: Any,
    layout: RowLayout,
    *,
    batch_rows: int,
    draws: StepDraws | None = None,
    timed_runs: int = TIMED_RUNS,
    is_warm: bool = False,
) -> Probe:
    """The plain step on the first ``batch_rows`` rows; its gradients are taken and dropped.

    ``timed_runs`` and ``is_warm`` as in ``probe_split``.
    """
    with plain_run(declared, batch, layout, batch_rows, draws) as run:
        return _probed(declared, batch, run, [batch_rows], timed_runs, is_warm=is_warm)


def time_plain(
    declared: DeclaredStep, batch: Any, layout: RowLayout, *, batch_rows: int, draws: StepDraws | None = None
) -> float:
    """Seconds of the plain step on the first ``batch_rows`` rows: the shortest of a few runs."""
    with plain_run(declared, batch, layout, batch_rows, draws) as run, step_undisturbed(declared):
        run()
        return _shortest(run, declared.device, TIMED_RUNS)


def time_forward(
    declared: DeclaredStep, batch: Any, layout: RowLayout, *, batch_rows: int, draws: StepDraws | None = None
) -> float:
    """The same of the forward alone, which keeps nothing for a backward."""
    declared = under_draws(declared, draws)
    with _few_rows(batch, layout, batch_rows) as few, step_undisturbed(declared), torch.no_grad():

        def run() -> object:
            [chunk] = arriving_chunks(sliced_chunks(few, layout, [batch_rows], declared.device))
            return declared.forward(declared.network, chunk)

        run()
        return _shortest(run, declared.device, TIMED_RUNS)


def time_split(split: ChunkedStep, batch: Any, layout: RowLayout, sizes: Sequence[int]) -> float:
    """The same of the split step in chunks of ``sizes``, up to but without the hand-over."""
    few, few_layout = first_rows(batch, layout, sum(sizes))
    with step_undisturbed(split.declared):
        split.totals(few, few_layout, sizes)
        return _shortest(lambda: split.totals(few, few_layout, sizes), split.declared.device, TIMED_RUNS)


@contextlib.contextmanager
def plain_run(
    declared: DeclaredStep, batch: Any, layout: RowLayout, batch_rows: int, draws: StepDraws | None
) -> Iterator[Callable[[], Sequence[Tensor]]]:
    """The plain step up to its gradients; what its forward writes on the rows is undone at the end of the block."""
    declared = under_draws(declared, draws)
    with _few_rows(batch, layout, batch_rows) as few:

        def run() -> Sequence[Tensor]:
            [chunk] = arriving_chunks(sliced_chunks(few, layout, [batch_rows], declared.device))
            announce(Phase.FORWARD)
            outputs = declared.forward(declared.network, chunk)
            announce(Phase.LOSS)
            loss = checked_loss(declared.loss_fn(outputs, chunk))
            del outputs
            announce(Phase.BACKWARD)
            leaves = losses.leaves_under(loss)
            with hooks_silenced(leaves), torch.autocast(declared.device.type, enabled=False):
                return losses.gradients_apart_from(loss, leaves)

        yield run


@contextlib.contextmanager
def _few_rows(batch: Any, layout: RowLayout, rows: int) -> Iterator[Any]:
    """The first ``rows`` rows of ``batch``, cut loose from any graph; what is written on them is undone at the end."""
    few, _ = first_rows(cut_loose(batch), layout, rows)
    before = trees.map_tensors(few, Tensor.clone)
    try:
        yield few
    finally:
        for leaf, kept in zip(trees.leaves_of(few), trees.leaves_of(before)):
            if isinstance(leaf, Tensor):
                put_back(leaf, kept)


def first_rows(batch: Any, layout: RowLayout, rows: int) -> tuple[Any, RowLayout]:
    """The first ``rows`` rows of ``batch``, and how they lie."""
    return trees.first_rows(batch, layout, rows), dataclasses.replace(layout, rows=rows)


def _probed(
    declared: DeclaredStep,
    batch: Any,
    run: Callable[[], object],
    sizes: Sequence[int],
    timed_runs: int,
    *,
    is_warm: bool,
) -> Probe:
    device = declared.device
    with step_undisturbed(declared):
        # The first run creates library handles and workspaces that later ones share; the first on other rows, where it
        # is timed, looks for kernels.
        if timed_runs or not is_warm:
            run()
        seconds = _shortest(run, device, timed_runs)
        counter = ByteCounter(device, gradients_of=[declared.network], with_timeline=True)
        claim_residents(counter, declared, batch)
        with counter, listening(counter):
            run()
        peak, reserved = counter.peak_bytes, None
        if device.type == "cuda":
            counters.release_cached(device)
            counters.reset_peaks(device)
            run()
            reading = counters.read_allocator(device)
            if reading is not None:
                peak, reserved = reading.peak_allocated_bytes, reading.peak_reserved_bytes
    return Probe(
        sizes=tuple(sizes),
        peak_bytes=peak,
        beyond_counted_bytes=max(0, peak - counter.peak_bytes),
        moments=tuple(tuple(stretch) for stretch in counter.moments()),
        by_phase=counter.peak_by_phase,
        by_category=counter.peak_by_category,
        timeline=counter.timeline(),
        seconds=seconds,
        reserved_bytes=reserved,
        numbers_read=frozenset(counter.numbers_read),
        truths_read=frozenset(counter.truths_read),
    )


def _shortest(run: Callable[[], object], device: torch.device, runs: int) -> float:
    """Seconds of the shortest of ``runs``, or of fewer that took long enough together; not a number of none."""
    seconds: list[float] = []
    while len(seconds) < runs and sum(seconds) < _ENOUGH_SECONDS:
        seconds.append(timed(run, device).seconds)
    return min(seconds, default=math.nan)


class Timed(NamedTuple):
    """``seconds`` of one run, the device's work included, and how much of them passed until all of it was launched."""

    seconds: float
    launching_share: float


def timed(run: Callable[[], object], device: torch.device) -> Timed:
    counters.synchronize(device)
    start = time.perf_counter()
    run()
    launched = time.perf_counter()
    counters.synchronize(device)
    seconds = time.perf_counter() - start
    return Timed(seconds, (launched - start) / seconds)


def claim_residents(counter: ByteCounter, declared: DeclaredStep, batch: Any) -> None:
    """Counts what lives between steps, and the batch where it is on the step's device as a whole."""
    for module in declared.modules:
        parameters = list(module.parameters())
        counter.claim(parameters, Category.PARAMETERS)
        counter.claim(module.buffers(), Category.BUFFERS)
        counter.claim([p.grad for p in parameters if p.grad is not None], Category.GRADIENTS)
    counter.claim(census.state_tensors(declared.optimizer), Category.OPTIMIZER_STATE)
    leaves = trees.leaves_of(batch)
    counter.claim([leaf for leaf in leaves if isinstance(leaf, Tensor)], Category.INPUTS)
    counter.stand(sum(_resident_bytes(leaf, declared.device) for leaf in leaves), Category.INPUTS)


def standing_batch_bytes(batch: Any, device: torch.device) -> int:
    """Bytes of the batch that are on ``device`` as a whole; on the CPU also what a row source holds in memory."""
    leaves = trees.leaves_of(batch)
    return trees.storage_bytes([t for t in leaves if isinstance(t, Tensor) and t.device == device]) + sum(
        _resident_bytes(leaf, device) for leaf in leaves
    )


def _resident_bytes(leaf: Any, device: torch.device) -> int:
    if device.type != "cpu" or not trees.is_row_source(leaf):
        return 0
    # Sources that say nothing of it read from disk.
    return int(getattr(leaf, "resident_bytes", 0))
