"""How long a traced step takes on a card: a roofline for each operation, and two clocks.

On the device an operation takes the longest of three: what its kernels take at least, its arithmetic at the part of
the peak that its kind reaches, its bytes likewise. The host queues operations ahead and the device follows, each on
its own clock: a kernel starts when the host has launched it and the device has finished the one before. So a step of
large operations takes the device's time, a step of small ones the host's, and one that changes between the two pays
for each stretch what that stretch is bound by. A sum of maxima would not see the lead that the host gained.

What a forward sends to the host leaves beside the computation and comes back beside it (``copies_beside``).
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from samegrad.errors import UsageError
from samegrad.json_record import Record
from samegrad.measure.cards import Card
from samegrad.measure.copies_beside import CopiesBeside
from samegrad.measure.devices import Calibration, calibration_in_words, find_calibration
from samegrad.measure.events import Operation, Trace
from samegrad.measure.operation_classes import OperationClass, class_of, host_waits_for
from samegrad.records import Origin, Phase

_Key = TypeVar("_Key")
# The driver's queue: a launch beyond it waits until the device has taken one. It was found to hold about a thousand
# (NVIDIA developer forum 68937).
_QUEUED_LAUNCHES = 1024


# Of a link's rate, what copies of pinned memory reach where it was not measured: 50 GB/s of 63 on PCIe 5.0 x16, by
# which torch plans its own offloading (torch._functorch._activation_offloading).
_LINK_FRACTION = 0.8


class Limit(enum.Enum):
    """What an operation's time on the device is bound by."""

    LAUNCH = "launch"
    BUS = "bus"
    ARITHMETIC = "arithmetic"
    BANDWIDTH = "bandwidth"


class Moment(NamedTuple):
    """One operation on both clocks. ``elapsed_seconds``: by how much it moved the end of what has been computed."""

    operation: Operation
    host_seconds: float
    device_seconds: float
    elapsed_seconds: float
    limit: Limit


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The time of operations on one card: of each alone, and of a stretch of them in order.

    ``matmul_tf32`` and ``convolution_tf32``: whether float32 may run in TF32, in cuDNN's convolutions and elsewhere.
    """

    card: Card
    calibration: Calibration
    _: dataclasses.KW_ONLY
    matmul_tf32: bool
    convolution_tf32: bool

    def follow(self, operations: Iterable[Operation]) -> Iterator[Moment]:
        """Each operation on both clocks, which begin at zero, as after a loss was read."""
        host = device = reached = 0.0
        queued: collections.deque[float] = collections.deque()
        beside = CopiesBeside()
        for operation in operations:
            launching = self.host_seconds(operation)
            working, limit = self.device_seconds(operation)
            host += launching
            device = beside.reach(operation.phase, device)
            if beside.takes(operation):
                device = beside.begin(operation, device, host, working)
            elif operation.kernels:
                device = max(device, host) + working
                queued.extend([device] * operation.kernels)
                while len(queued) > _QUEUED_LAUNCHES:
                    host = max(host, queued.popleft())
            if host_waits_for(operation.name):
                host = max(host, device)
            before, reached = reached, max(host, device)
            yield Moment(operation, launching, working, reached - before, limit)

    def host_seconds(self, operation: Operation) -> float:
        """Seconds the host takes to launch it."""
        known = self.calibration
        if not operation.kernels:
            return known.view_seconds
        return known.dispatch_seconds + known.launch_seconds * operation.kernels

    def device_seconds(self, operation: Operation) -> tuple[float, Limit]:
        """Seconds the device works on it, and what bounds them."""
        if not operation.kernels:
            return 0.0, Limit.LAUNCH
        card, known, kind = self.card, self.calibration, class_of(operation.name)
        if operation.bus_bytes:
            link = known.pinned_bytes_per_second or _LINK_FRACTION * card.host_bandwidth_bytes_per_second
            return max((known.kernel_seconds, Limit.LAUNCH), (abs(operation.bus_bytes) / link, Limit.BUS))
        tf32 = self.convolution_tf32 if kind is OperationClass.CONVOLUTION else self.matmul_tf32
        dtype = card.arithmetic_of(operation.dtype, tf32=tf32)
        rate = card.flops_per_second[dtype] * known.flops_fraction(kind, dtype)
        bandwidth = card.bandwidth_bytes_per_second * known.bandwidth_fraction(kind)
        return max(
            (operation.kernels * known.kernel_seconds, Limit.LAUNCH),
            (operation.flops / rate, Limit.ARITHMETIC),
            (operation.moved_bytes / bandwidth, Limit.BANDWIDTH),
            key=lambda bound: bound[0],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSeconds(Record):
    """How long a step takes on ``card``: ``seconds`` as measured where it was, else as predicted; both are kept.

    The step is the last of the trace, which has the optimizer's state; ``by_step`` has all of them. ``by_phase`` and
    ``by_module`` (path of the innermost module) divide ``seconds``; ``by_class`` and ``by_limit`` divide
    ``device_seconds``, the time the device works. ``host_seconds``: what launching takes. Where host and device are
    about equal, neither is idle for long.
    """

    card: str
    origin: Origin
    basis: str
    calibrated: bool
    predicted_seconds: float
    host_seconds: float
    device_seconds: float
    by_step: tuple[float, ...]
    by_phase: dict[Phase, float]
    by_module: dict[str, float]
    by_class: dict[OperationClass, float]
    by_limit: dict[Limit, float]
    measured_seconds: float | None = None

    @property
    def seconds(self) -> float:
        return self.predicted_seconds if self.measured_seconds is None else self.measured_seconds


def predict_seconds(
    trace: Trace,
    card: Card,
    *,
    calibration: Calibration | None = None,
    matmul_tf32: bool = False,
    convolution_tf32: bool = True,
    torch_version: str = "",
) -> StepSeconds:
    """The seconds of the step in ``trace`` on ``card``.

    ``calibration``: that of the card and ``torch_version``, or the prior, where None. ``matmul_tf32`` and
    ``convolution_tf32``: ``torch.backends.cuda.matmul.allow_tf32`` (a ``float32_matmul_precision`` below "highest")
    and ``torch.backends.cudnn.allow_tf32``, of the run that is meant; the defaults are torch's. Raises UsageError when
    the trace has no operations.
    """
    if not trace.operations:
        raise UsageError(
            asked=f"predict the seconds of a step on {card.name}",
            found="a trace without operations" + "".join(f"; {where}: {note}" for where, note in trace.notes.items()),
            do="trace a step that computes something",
        )
    known = calibration or find_calibration(card, torch_version=torch_version)
    steps: dict[int, list[Operation]] = collections.defaultdict(list)
    for operation in trace.operations:
        steps[operation.step].append(operation)
    roofline = Roofline(card, known, matmul_tf32=matmul_tf32, convolution_tf32=convolution_tf32)
    courses = [list(roofline.follow(steps[step])) for step in sorted(steps)]
    last = courses[-1]
    return StepSeconds(
        card=card.name,
        origin=Origin.PREDICTED,
        basis=f"roofline on {card.name}, {calibration_in_words(known, torch_version=torch_version)}"
        + ("" if trace.device == "cuda" else f"; the trace followed the operations of {trace.device}, not of CUDA"),
        calibrated=known.origin is Origin.MEASURED,
        predicted_seconds=_total(last),
        host_seconds=sum(moment.host_seconds for moment in last),
        device_seconds=sum(moment.device_seconds for moment in last),
        by_step=tuple(_total(course) for course in courses),
        by_phase=_added((moment.operation.phase, moment.elapsed_seconds) for moment in last),
        by_module=_added((moment.operation.module, moment.elapsed_seconds) for moment in last),
        by_class=_added((class_of(moment.operation.name), moment.device_seconds) for moment in last),
        by_limit=_added((moment.limit, moment.device_seconds) for moment in last),
    )


def scale_to_measured(predicted: StepSeconds, measured_seconds: float, *, measured_on: str) -> StepSeconds:
    """``predicted`` with the seconds that the device took, parts in proportion; the prediction stays beside them.

    ``measured_on``: the device and how, in words. Raises UsageError unless the measurement is positive.
    """
    if not measured_seconds > 0:
        raise UsageError(
            asked="replace a predicted step time by a measured one",
            found=f"{measured_seconds} s from {measured_on}",
            do="give the seconds of a whole step, waited for on the device",
        )
    ratio = measured_seconds / predicted.predicted_seconds
    basis = f"measured on {measured_on}; {predicted.basis} predicted {1 / ratio:.2f} of it"
    scaled = _scaled(predicted, ratio, predicted_seconds=predicted.predicted_seconds, basis=basis)
    return dataclasses.replace(scaled, origin=Origin.MEASURED, measured_seconds=measured_seconds)


def scale_by_reference(predicted: StepSeconds, reference: StepSeconds) -> StepSeconds:
    """``predicted`` of another plan, corrected by what ``reference``, of the same step and card, was found to be off.

    It stays a prediction. Raises UsageError when ``reference`` was not measured, or on another card.
    """
    if reference.measured_seconds is None or reference.card != predicted.card:
        raise UsageError(
            asked=f"correct a prediction for {predicted.card} by another step",
            found=f"that step was {'not measured' if reference.measured_seconds is None else f'on {reference.card}'}",
            do="measure one plan of the step on the same card first",
        )
    ratio = reference.measured_seconds / reference.predicted_seconds
    basis = f"{predicted.basis}, times {ratio:.2f} as another plan of this step was measured"
    return _scaled(predicted, ratio, predicted_seconds=predicted.predicted_seconds * ratio, basis=basis)


def _scaled(seconds: StepSeconds, ratio: float, *, predicted_seconds: float, basis: str) -> StepSeconds:
    return dataclasses.replace(
        seconds,
        basis=basis,
        predicted_seconds=predicted_seconds,
        host_seconds=seconds.host_seconds * ratio,
        device_seconds=seconds.device_seconds * ratio,
        by_step=tuple(part * ratio for part in seconds.by_step),
        by_phase=_times(seconds.by_phase, ratio),
        by_module=_times(seconds.by_module, ratio),
        by_class=_times(seconds.by_class, ratio),
        by_limit=_times(seconds.by_limit, ratio),
    )


def _times(parts: Mapping[_Key, float], ratio: float) -> dict[_Key, float]:
    return {key: part * ratio for key, part in parts.items()}


def _added(parts: Iterable[tuple[_Key, float]]) -> dict[_Key, float]:
    sums: dict[_Key, float] = collections.defaultdict(float)
    for key, part in parts:
        sums[key] += part
    return dict(sums)


def _total(course: Iterable[Moment]) -> float:
    return sum(moment.elapsed_seconds for moment in course)
