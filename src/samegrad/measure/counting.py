"""Live tensor bytes of whatever runs inside, by category and phase, on any device.

Every operation's results are seen; a storage counts once, from its first appearance until it is freed. Memory that a
kernel takes and gives back inside one operation is not seen, nor is anything that is not a tensor. Views of memory
that stood before and was not claimed (rows mapped from a file) do not count.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.exact.looking_on import LookingOn
from samegrad.measure.failures import line_now
from samegrad.measure.operation_costs import tensors_in
from samegrad.records import Category, Phase, TimelinePoint

_BORN_IN = {
    Phase.FORWARD: Category.ACTIVATIONS,
    Phase.LOSS: Category.ACTIVATIONS,
    Phase.BACKWARD: Category.TEMPORARY,
    Phase.HANDOFF: Category.TEMPORARY,
    Phase.OPTIMIZER: Category.TEMPORARY,
}
_LONGEST_TIMELINE = 240
# Short runs are judged by few steps; of long ones a sixteenth shows what grows.
_OFTEN_COUNTED_STEPS, _COUNTED_EVERY_STEPS = 32, 16
# What .item(), float() and ``if`` ask of a tensor.
_READS_A_NUMBER = torch.ops.aten._local_scalar_dense.default


class _Declares(Protocol):
    @property
    def declared(self) -> DeclaredStep: ...


def count_bytes(step: _Declares, *, with_timeline: bool = False) -> ByteCounter:
    """A counter for ``train(step, batches, counter=...)``: live tensor bytes on the step's device.

    ``with_timeline``: also keep the course of what is counted, for ``timeline()``; meant for a step or two.
    """
    return ByteCounter(step.declared.device, gradients_of=step.declared.modules, with_timeline=with_timeline)


def sample_bytes(step: _Declares) -> ByteCounter:
    """The same for a run: it counts every other one of the first steps and then few, and the others keep their time."""
    return _SampledByteCounter(step.declared.device, gradients_of=step.declared.modules)


class ByteCounter(LookingOn):
    """Counts live bytes of tensors on ``device`` while it is entered. It is a ``phases.Listener``.

    ``gradients_of``: modules whose parameters' ``.grad`` are gradients. ``with_timeline`` keeps the course of the
    step, one point an operation, which long runs should not.
    """

    def __init__(
        self, device: torch.device, *, gradients_of: Iterable[nn.Module] = (), with_timeline: bool = False
    ) -> None:
        super().__init__()
        self._device_type = device.type
        self._gradients_of = list(gradients_of)
        # Lines of the user's forward that read a number of the batch or a truth, with a timeline.
        self.numbers_read: set[str] = set()
        self.truths_read: set[str] = set()
        self._known: dict[int, tuple[Any, int, Category]] = {}
        self._moments: list[tuple[Phase, dict[Category, int]]] | None = [] if with_timeline else None
        self._stretches: list[list[tuple[Phase, int]]] | None = [] if with_timeline else None
        self._repeating = 0
        self._standing: dict[Category, int] = {}
        self.phase = Phase.FORWARD
        self.live: dict[Category, int] = dict.fromkeys(Category, 0)
        self.live_bytes = 0
        self.reset_peaks()

    def counts(self, index: int) -> bool:
        """Whether step ``index`` is to be counted."""
        return True

    def reset_peaks(self) -> None:
        self.peak_bytes = self.live_bytes
        self.peak_by_category = dict(self.live)
        self.peak_by_phase: dict[Phase, int] = {}
        self._note_peak()

    def announce(self, phase: Phase) -> None:
        self._claim_gradients()
        self.phase = phase
        if self._stretches is not None:
            self._stretches.append([])
        self._note_peak()

    def arrived(self, chunk: Any) -> None:
        """Counts the tensors of ``chunk`` as inputs."""
        self.claim([leaf for leaf in trees.leaves_of(chunk) if isinstance(leaf, Tensor)], Category.INPUTS)

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """No moments are kept inside, so that runs of any number of chunks have the same ones; peaks are."""
        self._repeating += 1
        try:
            yield
        finally:
            self._repeating -= 1

    def running_again(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def stands_in(self, times: int) -> bool:
        """Never: what is counted runs."""
        return False

    def claim(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Counts ``tensors`` under ``category``, whatever they counted as before."""
        for tensor in tensors:
            self._see(tensor, category, relabel=True)
        self._note_peak()

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Counts ``tensors`` no more: their step is over, and whoever still holds them does so for other reasons."""
        for tensor in tensors:
            for storage in _storages(tensor):
                if storage._cdata in self._known:
                    self._free(storage._cdata)

    def stand(self, amount_bytes: int, category: Category) -> None:
        """Counts ``amount_bytes`` that no tensor shows, in place of what stood there before."""
        change = amount_bytes - self._standing.get(category, 0)
        self._standing[category] = amount_bytes
        self.live[category] += change
        self.live_bytes += change
        self._note_peak()

    def moments(self) -> list[list[tuple[Phase, int]]]:
        """Live bytes after every operation, a list for each stretch between two announcements."""
        return self._stretches or []

    def timeline(self) -> tuple[TimelinePoint, ...]:
        """The course of the step, thinned to a readable number of points; each keeps the largest of its stretch."""
        moments = self._moments or []
        stretch = max(1, -(-len(moments) // _LONGEST_TIMELINE))
        points = []
        for start in range(0, len(moments), stretch):
            phase, live = max(moments[start : start + stretch], key=lambda moment: sum(moment[1].values()))
            position = start / max(1, len(moments) - 1)
            points.append(TimelinePoint(position_fraction=position, phase=phase, live_bytes=live))
        return tuple(points)

    def _claim_gradients(self) -> None:
        for module in self._gradients_of:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    self._see(parameter.grad, Category.GRADIENTS, relabel=True)

    def _see(self, tensor: Tensor, category: Category, *, relabel: bool = False) -> None:
        if tensor.device.type != self._device_type:
            return
        for storage in _storages(tensor):
            self._see_storage(storage, category, relabel=relabel)

    def _see_storage(self, storage: torch.UntypedStorage, category: Category, *, relabel: bool) -> None:
        key = storage._cdata
        if key in self._known:
            if relabel:
                reference, size, before = self._known[key]
                self.live[before] -= size
                self.live[category] += size
                self._known[key] = (reference, size, category)
            return
        size = storage.nbytes()
        if size == 0:
            return
        self._known[key] = (weakref.ref(storage, lambda _: self._free(key)), size, category)
        self.live[category] += size
        self.live_bytes += size

    def _free(self, key: int) -> None:
        _, size, category = self._known.pop(key)
        self.live[category] -= size
        self.live_bytes -= size

    def _note_reading(self, tensor: Tensor) -> None:
        # Whole numbers are lengths and counts, more often than not.
        if tensor.is_floating_point():
            self.numbers_read.add(line_now())
        elif tensor.dtype is torch.bool:
            self.truths_read.add(line_now())

    def _note_peak(self) -> None:
        if self.live_bytes > self.peak_by_phase.get(self.phase, -1):
            self.peak_by_phase[self.phase] = self.live_bytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.peak_by_category = dict(self.live)
        if self._stretches and not self._repeating:
            self._stretches[-1].append((self.phase, self.live_bytes))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _READS_A_NUMBER and self._moments is not None and self.phase is Phase.FORWARD:
            self._note_reading(args[0])
        result = func(*args, **(kwargs or {}))
        category = _BORN_IN[self.phase]
        for tensor in tensors_in(result if isinstance(result, (list, tuple)) else (result,)):
            storages = _storages(tensor)
            # Most results are views, or written where they stood.
            if all(storage._cdata in self._known for storage in storages) or _bring(args, storages):
                continue
            self._see(tensor, category)
        self._note_peak()
        if self._moments is not None:
            # One for each operation, also for those ahead of the first announcement, so that a step that was followed
            # has the same ones.
            self._moments.append((self.phase, dict(self.live)))
        return result


class _SampledByteCounter(ByteCounter):
    def counts(self, index: int) -> bool:
        return index % (2 if index < _OFTEN_COUNTED_STEPS else _COUNTED_EVERY_STEPS) == 0


def _bring(args: tuple[Any, ...], storages: Sequence[torch.UntypedStorage]) -> bool:
    """Whether an argument brought some of ``storages``, which nobody claimed: a mapped file that is looked at, say."""
    brought = {storage._cdata for tensor in tensors_in(args) for storage in _storages(tensor)}
    return any(storage._cdata in brought for storage in storages)


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The memory under ``tensor``; a sparse gradient has that of its indices and of its values."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices().untyped_storage(), tensor._values().untyped_storage()]
    return [tensor.untyped_storage()]
