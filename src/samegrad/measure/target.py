"""A card that a step is planned for, whether or not it is at hand: what a traced step reserves and takes on it."""

from __future__ import annotations

import dataclasses
import functools

import torch

from samegrad.exact.tf32 import Tf32Products
from samegrad.measure import counters
from samegrad.measure.allocator_rules import AllocatorRules, read_allocator_rules
from samegrad.measure.caps import Against, Reserved, predict_reserved, steady_against
from samegrad.measure.cards import Card
from samegrad.measure.devices import Calibration, calibration_in_words, find_calibration, find_card
from samegrad.measure.events import Operation, Trace
from samegrad.measure.library_calibration import LibraryCalibration, calibrate_libraries
from samegrad.measure.replay import Request, repeat_steps, replay
from samegrad.measure.timing import Roofline
from samegrad.measure.workspaces import with_workspaces
from samegrad.records import Budget, Counting
from samegrad.units import format_bytes, parse_bytes

# Of a card whose driver was not measured.
_CONTEXT_BYTES = 2**29
_FREE_MARGIN = 0.05


@dataclasses.dataclass(frozen=True)
class Target:
    """``card`` under a version of torch, with the allocator's rules of this process's environment.

    ``tf32``: which float32 products are rounded to TF32, by default as in this process when the target was made.
    """

    card: Card
    torch_version: str = torch.__version__
    tf32: Tf32Products = dataclasses.field(default_factory=Tf32Products.now)

    @classmethod
    def named(cls, name: str) -> Target:
        """The card called ``name``, as this process would use it. Raises UsageError for none, or several."""
        return cls(find_card(name))

    @classmethod
    def at_hand(cls, device: torch.device) -> Target:
        """The card that is ``device`` of this machine. Raises UsageError where the catalogue lacks it."""
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
        return cls(find_card(torch.cuda.get_device_name(device), memory_bytes=memory_bytes))

    @functools.cached_property
    def calibration(self) -> Calibration:
        return find_calibration(self.card, torch_version=self.torch_version)

    @functools.cached_property
    def libraries(self) -> LibraryCalibration:
        return calibrate_libraries(
            self.card.compute_capability,
            self.torch_version,
            multiprocessors=self.card.streaming_multiprocessors,
        )

    @functools.cached_property
    def rules(self) -> AllocatorRules:
        return read_allocator_rules()

    @functools.cached_property
    def roofline(self) -> Roofline:
        tf32 = self.tf32
        return Roofline(self.card, self.calibration, matmul_tf32=tf32.matrices, convolution_tf32=tf32.convolutions)

    def in_words(self) -> str:
        """The card, and on what its numbers rest."""
        libraries = self.libraries.source
        return (
            f"{self.card.name}; times {calibration_in_words(self.calibration, torch_version=self.torch_version)}; "
            f"library workspaces {'uncalibrated' if libraries == 'uncalibrated' else f'calibrated on {libraries}'}"
        )

    @property
    def context_bytes(self) -> int:
        """What the driver and the libraries' code take beside the allocator, in no budget; see ``context_basis``."""
        return self.libraries.context_bytes or _CONTEXT_BYTES

    @property
    def context_basis(self) -> str:
        return "assumed" if self.libraries.context_bytes is None else f"measured on {self.libraries.source}"

    def budget(self, asked: str | int | None, *, host: str | int | None = None) -> Budget:
        """The budget that ``asked`` means on the card: bytes, "6GiB", "80%", or None for what an empty card leaves."""
        if asked is None:
            amount = int((self.card.memory_bytes - self.context_bytes) * (1 - _FREE_MARGIN))
            driver = f"{format_bytes(self.context_bytes)} for the driver"
            source = f"an empty {self.card.name} ({self.card.memory_basis}) less {driver}"
        else:
            amount, source = counters.asked_bytes(asked, lambda: (self.card.memory_bytes, self.card.memory_basis))
        host_bytes = parse_bytes(host, option="host_budget") if isinstance(host, str) else host
        return Budget(
            total_bytes=amount, device=self.card.name, counting=Counting.CUDA_ALLOCATOR, source=source,
            host_bytes=host_bytes,
        )  # fmt: skip

    def reserve(self, trace: Trace, *, expandable_segments: bool = False) -> Reserved:
        """What the allocator reserves for the traced step with its library workspaces, run over and over.

        ``expandable_segments``: in segments that grow, whatever the environment says.
        """
        return predict_reserved(self._requests(trace), self._rules(expandable_segments))

    def keeps(self, trace: Trace, cap_bytes: int, *, expandable_segments: bool = False) -> bool:
        """Whether the traced step, run over and over, gives no cached memory back under a cap after its second turn."""
        rules = self._rules(expandable_segments)
        return replay(self._requests(trace), rules, cap_bytes=cap_bytes, stop_at_unsteady=True).steady

    def against(self, trace: Trace, most_bytes: int, *, expandable_segments: bool = False) -> Against:
        """Whether the traced step, run over and over, stays steady under ``most_bytes``, and about what it needs."""
        return steady_against(self._requests(trace), self._rules(expandable_segments), most_bytes)

    def with_workspaces(self, trace: Trace) -> Trace:
        """The trace with what its libraries take on the card, for what is told of its moments."""
        return with_workspaces(trace, self.libraries)

    def _requests(self, trace: Trace) -> tuple[Request, ...]:
        return repeat_steps(self.with_workspaces(trace))

    def _rules(self, expandable_segments: bool) -> AllocatorRules:
        return dataclasses.replace(self.rules, expandable_segments=True) if expandable_segments else self.rules

    def seconds_of(self, trace: Trace) -> tuple[float, ...]:
        """Seconds of each operation of the trace, as it moves the end of what has been computed."""
        steps: dict[int, list[Operation]] = {}
        for operation in trace.operations:
            steps.setdefault(operation.step, []).append(operation)
        return tuple(moment.elapsed_seconds for step in sorted(steps) for moment in self.roofline.follow(steps[step]))
