"""A calibration from the times of whole steps, where no operation could be timed alone.

Few numbers against few steps: the fractions of the kinds that most of the time goes to, and what a kernel and an
operation take at least. Whatever a step's time hides (slow shapes, second reads) goes into them, so that they serve
models like those they were fitted to, and others less: ``timing_h200.py`` says how much less.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from samegrad.measure.cards import Card
from samegrad.measure.devices import Calibration
from samegrad.measure.events import Operation
from samegrad.measure.operation_classes import OperationClass
from samegrad.measure.timing import Roofline

# The fit may leave its start by about a factor of two before it costs as much as a fifth of a step's time.
STAY, MATCH = 0.5, 5.0
KINDS = (OperationClass.MATMUL, OperationClass.CONVOLUTION)
START = np.array([0.5, 0.4, 0.6, 0.4, 0.75, 0.4, 0.3, 4e-6])


class Timed(NamedTuple):
    """The operations of a step and its seconds; ``by_host``: a step of so small operations that the host decides."""

    operations: Sequence[Operation]
    seconds: float
    by_host: bool


def fit_calibration(steps: Sequence[Timed], card: Card, base: Calibration) -> Calibration:
    """``base`` with what ``steps`` on ``card`` say; TF32 allowed in all of them."""
    counted = [(collections.Counter(step.operations), step.seconds) for step in steps if not step.by_host]

    def misses(exponents: NDArray[np.float64]) -> NDArray[np.float64]:
        roofline = Roofline(card, _with(base, START * np.exp(exponents)), matmul_tf32=True, convolution_tf32=True)
        ratios = [_device_seconds(roofline, operations) / seconds for operations, seconds in counted]
        return np.concatenate([MATCH * np.log(ratios), STAY * exponents])

    found = least_squares(misses, np.zeros(len(START)), diff_step=1e-3)
    fitted = _with(base, np.array([_short(value) for value in START * np.exp(found.x)]))
    hosts = [_dispatch_seconds(step, fitted) for step in steps if step.by_host]
    return dataclasses.replace(fitted, dispatch_seconds=_short(float(np.mean(hosts)))) if hosts else fitted


def _with(base: Calibration, values: NDArray[np.float64]) -> Calibration:
    matmul, convolution, matmul_tf32, convolution_tf32, elementwise, normalisation, reduction, kernel = (
        float(value) for value in values
    )
    flops = {**base.flops_fractions}
    for dtype, reached in (("any", (matmul, convolution)), ("tf32", (matmul_tf32, convolution_tf32))):
        flops[dtype] = {**flops[dtype], **dict(zip(KINDS, reached))}
    bandwidth = {
        OperationClass.ELEMENTWISE: elementwise, OperationClass.COPY: elementwise,
        OperationClass.NORMALISATION: normalisation, OperationClass.REDUCTION: reduction,
    }  # fmt: skip
    return dataclasses.replace(
        base,
        flops_fractions=flops,
        bandwidth_fractions={**base.bandwidth_fractions, **bandwidth},
        kernel_seconds=kernel,
    )


def _device_seconds(roofline: Roofline, operations: Mapping[Operation, int]) -> float:
    return sum(times * roofline.device_seconds(operation)[0] for operation, times in operations.items())


def _dispatch_seconds(step: Timed, calibration: Calibration) -> float:
    """What is left of the host's time for each operation that computes, after launches and views."""
    computing = [operation for operation in step.operations if operation.kernels]
    rest = step.seconds - calibration.view_seconds * (len(step.operations) - len(computing))
    rest -= calibration.launch_seconds * sum(operation.kernels for operation in computing)
    return rest / len(computing)


def _short(value: float) -> float:
    return float(f"{value:.3g}")
