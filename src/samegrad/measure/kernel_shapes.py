"""The shapes of convolutions and recurrent layers, which decide what their library takes for itself.

Read from the arguments of the operation that was dispatched. Transposed convolutions have none: which of cuDNN's
kernels they run was not seen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from samegrad.measure import recurrent_kernels
from samegrad.measure.events import Convolution, Recurrence

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def shape_of(func: Any, args: tuple[Any, ...]) -> Convolution | Recurrence | None:
    """The shape that operation ``func`` works on, None for operations of another kind."""
    read = _READERS.get(func)
    return None if read is None else read(args)


def _forward_convolution(args: tuple[Any, ...]) -> Convolution | None:
    rows, weight, _, stride, padding, dilation, transposed, _, groups = args
    if transposed:
        return None
    made = [
        (size + 2 * pad - reach * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, reach in zip(
            rows.shape[2:], weight.shape[2:], _each(stride, rows), _each(padding, rows), _each(dilation, rows)
        )
    ]
    return _convolution(rows, weight, math.prod(made), stride, padding, groups)


def _backward_convolution(args: tuple[Any, ...]) -> Convolution | None:
    cotangent, rows, weight, _, stride, padding, _, transposed, _, groups, _ = args
    if transposed:
        return None
    return _convolution(rows, weight, math.prod(cotangent.shape[2:]), stride, padding, groups)


def _convolution(
    rows: Tensor, weight: Tensor, output_pixels: int, stride: Any, padding: Any, groups: int
) -> Convolution:
    kernel_pixels = math.prod(weight.shape[2:])
    return Convolution(
        rows=rows.shape[0],
        inputs=rows.shape[1],
        outputs=weight.shape[0],
        input_pixels=math.prod(rows.shape[2:]),
        output_pixels=output_pixels,
        kernel_pixels=kernel_pixels,
        groups=groups,
        pointwise=kernel_pixels == 1 and all(step == 1 for step in stride) and not any(padding),
        channels_last=_has_channels_last(rows) or _has_channels_last(weight),
    )


def _each(values: Any, rows: Tensor) -> list[int]:
    """One number for each axis of a picture; torch lets one stand for all."""
    return list(values) * (rows.dim() - 2) if len(values) == 1 else list(values)


def _has_channels_last(tensor: Tensor) -> bool:
    layout = _CHANNELS_LAST.get(tensor.dim())
    return layout is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout)


_READERS = {
    torch.ops.aten.convolution.default: _forward_convolution,
    torch.ops.aten.convolution_backward.default: _backward_convolution,
    torch.ops.aten._cudnn_rnn.default: recurrent_kernels.forward_shape,
    torch.ops.aten._cudnn_rnn_backward.default: recurrent_kernels.backward_shape,
}
