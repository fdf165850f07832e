"""Step times against clocks kept by hand: what bounds an operation, and how far the host runs ahead."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from types import MappingProxyType

import pytest

from samegrad.errors import UsageError
from samegrad.measure.cards import Card
from samegrad.measure.devices import PRIOR, Calibration, find_card
from samegrad.measure.events import Operation, Trace
from samegrad.measure.operation_classes import OperationClass, class_of
from samegrad.measure.timing import (
    Limit,
    Roofline,
    StepSeconds,
    predict_seconds,
    scale_by_reference,
    scale_to_measured,
)
from samegrad.records import Origin, Phase

# Round figures: a tera of operations and of bytes a second, half of each reached, microseconds on the host.
CARD = dataclasses.replace(
    find_card("H200"),
    bandwidth_bytes_per_second=1e12,
    flops_per_second=MappingProxyType({"float64": 0.5e12, "float32": 1e12, "tf32": 4e12, "bfloat16": 8e12}),
)
CALIBRATION = dataclasses.replace(
    PRIOR,
    origin=Origin.MEASURED,
    dispatch_seconds=3e-6,
    launch_seconds=2e-6,
    view_seconds=1e-6,
    kernel_seconds=4e-6,
    flops_fractions={"any": dict.fromkeys(OperationClass, 0.5)},
    bandwidth_fractions=dict.fromkeys(OperationClass, 0.5),
)
MATMUL, ADD, VIEW, READ = "aten.mm.default", "aten.add.Tensor", "aten.view.default", "aten._local_scalar_dense.default"


def operation(
    name: str = ADD, *, flops: int = 0, moved_bytes: int = 0, kernels: int = 1, dtype: str = "float32",
    module: str = "", phase: Phase = Phase.FORWARD, step: int = 0,
) -> Operation:  # fmt: skip
    return Operation(name, module, phase, step, flops, moved_bytes, dtype, kernels)


def predicted(
    operations: Sequence[Operation], *, card: Card = CARD, calibration: Calibration = CALIBRATION,
    matmul_tf32: bool = False, convolution_tf32: bool = True,
) -> StepSeconds:  # fmt: skip
    trace = Trace(tuple(operations), (), "cuda", 8, (8,))
    return predict_seconds(
        trace, card, calibration=calibration, matmul_tf32=matmul_tf32, convolution_tf32=convolution_tf32
    )


def by_hand(operations: Sequence[Operation], *, queued_launches: int | None = 1024) -> float:
    """The two clocks, kernel by kernel, for ``CARD`` and ``CALIBRATION`` with everything in float32."""
    host, ended = 0.0, [0.0]
    for one in operations:
        host += 3e-6 + 2e-6 * one.kernels if one.kernels else 1e-6
        if one.kernels:
            working = max(4e-6 * one.kernels, one.flops / 0.5e12, one.moved_bytes / 0.5e12)
            end = max(host, ended[-1]) + working
            for _ in range(one.kernels):
                ended.append(end)
                # The first entry is time zero: the launch of kernel n needs kernel n - 1024 to have ended.
                if queued_launches is not None and len(ended) - 1 > queued_launches:
                    host = max(host, ended[-1 - queued_launches])
        if one.name == READ:
            host = max(host, ended[-1])
    return max(host, ended[-1])


# The device is busy for 200 ms; a host that nothing holds would launch the rest in 60, and the device have no gaps.
BEYOND_THE_QUEUE = [operation(moved_bytes=10**11), *[operation(moved_bytes=1)] * 12_000]


def some_operations(seed: int, count: int = 3000) -> list[Operation]:
    """Stretches of large and of small operations, views, reads and operations of several kernels."""
    draw = random.Random(seed)
    found = []
    while len(found) < count:
        size = 10 ** draw.uniform(2, 9)
        for _ in range(draw.randrange(1, 400)):
            name = draw.choices([ADD, MATMUL, VIEW, READ], [8, 4, 4, 0.02])[0]
            kernels = 0 if name == VIEW else draw.choice([1, 1, 1, 3])
            flops = int(size * draw.random()) if name == MATMUL else 0
            moved_bytes = 0 if name == VIEW else int(size * draw.random())
            module, phase = draw.choice(["", "body.0", "body.1"]), draw.choice(list(Phase))
            where = {"module": module, "phase": phase}
            found.append(operation(name, flops=flops, moved_bytes=moved_bytes, kernels=kernels, **where))
    return [*found[:count], *BEYOND_THE_QUEUE]


def test_small_operations_take_the_hosts_time() -> None:
    seconds = predicted([operation(moved_bytes=1000)] * 500)
    # The last kernel starts when the host has launched it.
    assert seconds.seconds == pytest.approx(500 * 5e-6 + 4e-6)
    assert seconds.host_seconds == pytest.approx(500 * 5e-6)
    assert set(seconds.by_limit) == {Limit.LAUNCH}


def test_arithmetic_takes_its_part_of_the_peak() -> None:
    seconds = predicted([operation(MATMUL, flops=10**12, moved_bytes=10**6)] * 3)
    assert seconds.seconds == pytest.approx(3 * 1e12 / (0.5 * 1e12) + 5e-6)
    assert seconds.by_limit == pytest.approx({Limit.ARITHMETIC: 6.0})
    assert seconds.by_class == pytest.approx({OperationClass.MATMUL: 6.0})


def test_bytes_take_their_part_of_the_bandwidth() -> None:
    seconds = predicted([operation(moved_bytes=10**12)] * 3)
    assert seconds.seconds == pytest.approx(3 * 1e12 / (0.5 * 1e12) + 5e-6)
    assert seconds.by_limit == pytest.approx({Limit.BANDWIDTH: 6.0})


def test_the_lead_of_the_host_hides_later_launches() -> None:
    """A sum of maxima would charge the launches that the host made while the device was busy."""
    operations = [operation(moved_bytes=10**9), *[operation(moved_bytes=1000)] * 400]
    seconds = predicted(operations)
    device = 1e9 / 0.5e12 + 400 * 4e-6
    assert seconds.seconds == pytest.approx(device + 5e-6)
    sum_of_maxima = sum(max(5e-6, 4e-6, o.moved_bytes / 0.5e12) for o in operations)
    assert abs(sum_of_maxima - seconds.seconds) > 300e-6


def test_the_driver_holds_the_host_back_after_1024_launches() -> None:
    seconds = predicted(BEYOND_THE_QUEUE).seconds
    assert seconds == pytest.approx(200e-3 + (12_000 - 1024) * 5e-6, rel=1e-3)
    assert seconds > by_hand(BEYOND_THE_QUEUE, queued_launches=None) + 5e-3


def test_a_read_value_costs_the_lead() -> None:
    small = [operation(moved_bytes=1)] * 100
    large = operation(moved_bytes=10**9)
    assert predicted([large, *small]).seconds == pytest.approx(2e-3 + 100 * 4e-6 + 5e-6)
    waited = predicted([large, operation(READ, moved_bytes=8), *small])
    assert waited.seconds == pytest.approx(2e-3 + 5e-6 + 4e-6 + 100 * 5e-6 + 4e-6)


@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_keeps_the_clocks_kept_by_hand(seed: int) -> None:
    operations = some_operations(seed)
    seconds = predicted(operations)
    assert seconds.seconds == pytest.approx(by_hand(operations), rel=1e-9)
    assert max(seconds.host_seconds, seconds.device_seconds) <= seconds.seconds * (1 + 1e-9)
    assert seconds.seconds <= (seconds.host_seconds + seconds.device_seconds) * (1 + 1e-9)
    for parts in (seconds.by_phase, seconds.by_module):
        assert sum(parts.values()) == pytest.approx(seconds.seconds)
    for parts in (seconds.by_class, seconds.by_limit):
        assert sum(parts.values()) == pytest.approx(seconds.device_seconds)


@pytest.mark.parametrize("planted", ["one clock", "no queue", "kernels as one"])
def test_the_clocks_kept_by_hand_catch_a_planted_fault(planted: str) -> None:
    caught = 0
    for seed in range(12):
        operations = some_operations(seed)
        right = by_hand(operations)
        if planted == "one clock":
            wrong = sum(max(3e-6 + 2e-6 * o.kernels, 4e-6 * o.kernels, o.flops / 0.5e12, o.moved_bytes / 0.5e12)
                        for o in operations)  # fmt: skip
        elif planted == "no queue":
            wrong = by_hand(operations, queued_launches=None)
        else:
            wrong = by_hand([o._replace(kernels=min(o.kernels, 1)) for o in operations])
        caught += wrong != pytest.approx(right, rel=1e-9)
    assert caught > 0


def test_work_moves_the_time_of_its_own_module_and_phase() -> None:
    operations = [
        operation(MATMUL, flops=10**12, module="body.0"),
        operation(MATMUL, flops=2 * 10**12, module="body.1"),
        operation(MATMUL, flops=4 * 10**12, module="body.1", phase=Phase.BACKWARD),
        operation("aten._fused_adamw_.default", moved_bytes=10**12, phase=Phase.OPTIMIZER),
    ]
    seconds = predicted(operations)
    assert seconds.by_phase == pytest.approx({Phase.FORWARD: 6, Phase.BACKWARD: 8, Phase.OPTIMIZER: 2}, rel=1e-4)
    assert seconds.by_module == pytest.approx({"body.0": 2, "body.1": 12, "": 2}, rel=1e-4)


def test_the_last_step_counts_and_begins_anew() -> None:
    first = [operation(MATMUL, flops=10**12)] * 3
    second = [operation(MATMUL, flops=10**12, step=1)] * 5
    seconds = predicted(first + second)
    assert seconds.by_step == pytest.approx((6.0, 10.0), rel=1e-4)
    assert seconds.seconds == predicted(second).seconds


def test_tf32_is_used_where_it_is_allowed_and_nowhere_else() -> None:
    product = [operation(MATMUL, flops=10**13)]
    convolution = [operation("aten.convolution.default", flops=10**13)]
    launch = 5e-6
    assert predicted(product).seconds == pytest.approx(20 + launch)
    assert predicted(product, matmul_tf32=True).seconds == pytest.approx(5 + launch)
    # torch allows it in cuDNN's convolutions unless told otherwise, in products of matrices only when told.
    assert predicted(convolution).seconds == pytest.approx(5 + launch)
    assert predicted(convolution, convolution_tf32=False).seconds == pytest.approx(20 + launch)
    assert predicted(convolution, convolution_tf32=False, matmul_tf32=True).seconds == pytest.approx(20 + launch)
    for dtype, seconds in (("bfloat16", 2.5), ("float64", 40.0)):
        narrow = [operation(MATMUL, flops=10**13, dtype=dtype)]
        assert predicted(narrow, matmul_tf32=True).seconds == pytest.approx(seconds + launch)


def test_views_take_the_host_alone() -> None:
    seconds = predicted([operation(VIEW, kernels=0)] * 100)
    assert seconds.seconds == pytest.approx(100e-6) and seconds.device_seconds == 0


def test_the_same_trace_gives_the_same_seconds_and_they_survive_a_file() -> None:
    operations = some_operations(7)
    seconds = predicted(operations)
    assert seconds == predicted(operations)
    assert StepSeconds.from_json(seconds.to_json()) == seconds
    assert StepSeconds.from_json(scale_to_measured(seconds, 2.0, measured_on="a test").to_json()).seconds == 2.0


def test_whether_the_card_was_measured_is_said_in_words() -> None:
    trace = Trace((operation(),), (), "cuda", 1, (1,))
    measured = predict_seconds(trace, find_card("h200"), torch_version="2.11.0+cu130")
    assert measured.calibrated and "calibrated with torch 2.11.0" in measured.basis
    unknown = predict_seconds(trace, find_card("rtx 4070 laptop"))
    assert not unknown.calibrated and "uncalibrated" in unknown.basis
    assert unknown.origin is measured.origin is Origin.PREDICTED


def test_a_measurement_replaces_the_prediction_and_both_stay() -> None:
    before = predicted(some_operations(3))
    after = scale_to_measured(before, 3 * before.seconds, measured_on="NVIDIA H200, median of 5 steps")
    assert after.origin is Origin.MEASURED and before.origin is Origin.PREDICTED
    assert after.measured_seconds == after.seconds == 3 * before.seconds
    assert after.predicted_seconds == before.predicted_seconds
    assert sum(after.by_phase.values()) == pytest.approx(after.seconds)
    assert "NVIDIA H200" in after.basis and "0.33 of it" in after.basis


def test_another_plan_of_a_measured_step_is_corrected_and_stays_a_prediction() -> None:
    reference = scale_to_measured(predicted(some_operations(1)), 1.0, measured_on="a test")
    other = predicted(some_operations(2))
    corrected = scale_by_reference(other, reference)
    assert corrected.seconds == pytest.approx(other.seconds / reference.predicted_seconds)
    assert corrected.origin is Origin.PREDICTED and corrected.measured_seconds is None
    assert sum(corrected.by_module.values()) == pytest.approx(corrected.seconds)


def test_what_cannot_correct_is_refused() -> None:
    one = predicted(some_operations(1))
    with pytest.raises(UsageError, match="not measured"):
        scale_by_reference(one, one)
    elsewhere = scale_to_measured(dataclasses.replace(one, card="L4"), 1.0, measured_on="a test")
    with pytest.raises(UsageError, match="on L4"):
        scale_by_reference(one, elsewhere)
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="measured"):
            scale_to_measured(one, seconds, measured_on="a test")


def test_a_stretch_of_a_step_can_be_priced_by_itself() -> None:
    """As a planner does with the forward of one module."""
    stretch = some_operations(5)
    roofline = Roofline(CARD, CALIBRATION, matmul_tf32=False, convolution_tf32=True)
    moments = list(roofline.follow(stretch))
    assert [moment.operation for moment in moments] == stretch
    assert sum(moment.elapsed_seconds for moment in moments) == pytest.approx(predicted(stretch).seconds)
    for one, moment in zip(stretch, moments):
        assert (moment.device_seconds, moment.limit) == roofline.device_seconds(one)
        assert moment.host_seconds == roofline.host_seconds(one)


def test_a_trace_of_other_operations_than_cudas_is_said_to_be_one() -> None:
    trace = Trace((operation(),), (), "cpu", 1, (1,))
    assert "the operations of cpu, not of CUDA" in predict_seconds(trace, find_card("h200")).basis
    cuda = dataclasses.replace(trace, device="cuda")
    assert "cpu" not in predict_seconds(cuda, find_card("h200")).basis


def test_an_empty_trace_is_refused_with_what_could_not_be_traced() -> None:
    with pytest.raises(UsageError, match=r"body\.3: reads a value"):
        predict_seconds(Trace((), (), "cuda", 1, (1,), {"body.3": "reads a value"}), CARD)


def test_fractions_are_those_of_the_kind_and_the_dtype() -> None:
    calibration = dataclasses.replace(
        CALIBRATION,
        flops_fractions={"any": {OperationClass.MATMUL: 0.5}, "tf32": {OperationClass.MATMUL: 0.25}},
        bandwidth_fractions={**dict.fromkeys(OperationClass, 0.5), OperationClass.NORMALISATION: 0.1},
    )
    product = [operation(MATMUL, flops=10**13)]
    assert predicted(product, calibration=calibration).seconds == pytest.approx(20, rel=1e-4)
    assert predicted(product, calibration=calibration, matmul_tf32=True).seconds == pytest.approx(10, rel=1e-4)
    normalised = [operation("aten.native_layer_norm.default", moved_bytes=10**12)]
    assert class_of(normalised[0].name) is OperationClass.NORMALISATION
    assert predicted(normalised, calibration=calibration).seconds == pytest.approx(10, rel=1e-4)
