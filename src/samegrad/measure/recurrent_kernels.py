"""Recurrent layers as cuDNN runs them: one kernel for all layers and steps, with a reserve kept for backward.

Elsewhere torch unrolls them into hundreds of small operations. cuDNN says how large its reserve is only to those who
have a device, so it is an estimate here: for every layer, direction, step and row what the chain rule needs of it, the
gates, the cell and the hidden state, in the dtype of the layer. Source: Appleyard, Kocisky, Blunsom 2016, "Optimizing
Performance of Recurrent Neural Networks on GPUs", arXiv:1604.01946; torch's ``aten/src/ATen/native/cudnn/RNN.cpp``.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Mode(enum.IntEnum):
    """cuDNN's numbers for the kinds of layers (``cudnnRNNMode_t``)."""

    RELU = 0
    TANH = 1
    LSTM = 2
    GRU = 3


# States kept of each cell, in hidden sizes: LSTM four gates, cell and output; GRU three gates, the recurrent part of
# the new one and the output; plain cells the sum and the output.
_KEPT_STATES = {Mode.RELU: 2, Mode.TANH: 2, Mode.LSTM: 6, Mode.GRU: 5}


def reserve_bytes(
    mode: Mode, *, steps: int, rows: int, hidden: int, layers: int, directions: int, itemsize: int, dropout: float
) -> int:
    """The estimated reserve of a layer stack in training, in bytes."""
    cells = steps * rows * layers * directions
    # Between layers, a byte an element says what was dropped.
    masks = steps * rows * (layers - 1) * directions * hidden if dropout else 0
    return cells * hidden * _KEPT_STATES[mode] * itemsize + masks


def _lstm(rows: Tensor, states: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    output, hidden, cell = _cudnn(Mode.LSTM, rows, states[0], states[1], *options)
    return output, hidden, cell


def _without_cell(mode: Mode) -> Callable[..., tuple[Tensor, Tensor]]:
    def layer(rows: Tensor, state: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        return _cudnn(mode, rows, state, None, *options)[:2]

    return layer


def _cudnn(
    mode: Mode,
    rows: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_autocast_enabled("cuda") and rows.dtype is torch.float32:
        dtype = torch.get_autocast_dtype("cuda")
        rows, hidden = rows.to(dtype), hidden.to(dtype)
        cell = None if cell is None else cell.to(dtype)
        weights = [weight.to(dtype) for weight in weights]
    size = hidden.shape[2] if cell is None else cell.shape[2]
    projected = hidden.shape[2] if hidden.shape[2] != size else 0
    per_layer = 2 + 2 * has_biases + bool(projected)
    made: tuple[Tensor, ...] = torch.ops.aten._cudnn_rnn(
        rows, weights, per_layer, None, hidden, cell, int(mode), size, projected, layers, batch_first, dropout, train,
        bidirectional, [], None,
    )  # fmt: skip
    return made[0], made[1], made[2]


COMPOSITES: dict[str, Callable[..., Any]] = {
    "lstm.input": _lstm,
    "gru.input": _without_cell(Mode.GRU),
    "rnn_tanh.input": _without_cell(Mode.TANH),
    "rnn_relu.input": _without_cell(Mode.RELU),
}


def _forward_results(
    rows: Tensor, weights: Sequence[Tensor], weight_stride: int, weight_buffer: Tensor | None, hidden: Tensor,
    cell: Tensor | None, mode: int, size: int, projected: int, layers: int, batch_first: bool, dropout: float,
    train: bool, bidirectional: bool, batch_sizes: Sequence[int], dropout_state: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    steps, batch = (rows.shape[1], rows.shape[0]) if batch_first else rows.shape[:2]
    directions = 1 + bidirectional
    # cuDNN writes steps first; a batch that is to come first is a view of that.
    output = rows.new_empty((steps, batch, (projected or size) * directions))
    reserve = reserve_bytes(
        Mode(mode), steps=steps, rows=batch, hidden=size, layers=layers, directions=directions,
        itemsize=rows.dtype.itemsize, dropout=dropout,
    )  # fmt: skip
    return (
        output.transpose(0, 1) if batch_first else output,
        torch.empty_like(hidden),
        rows.new_empty(0) if cell is None else torch.empty_like(cell),
        rows.new_empty(reserve if train else 0, dtype=torch.uint8),
        rows.new_empty(0),
    )


def _backward_results(
    rows: Tensor, weights: Sequence[Tensor], weight_stride: int, weight_buffer: Tensor, hidden: Tensor,
    cell: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    buffer = rows.new_empty(sum(weight.numel() for weight in weights))
    gradients, start = [], 0
    for weight in weights:
        gradients.append(buffer[start : start + math.prod(weight.shape)].view(weight.shape))
        start += weight.numel()
    return torch.empty_like(rows), torch.empty_like(hidden), None if cell is None else torch.empty_like(cell), gradients


# In the place of shapes that torch has not, or has without the reserve.
STAND_INS: dict[str, Callable[..., Any]] = {
    "_cudnn_rnn": _forward_results,
    "_cudnn_rnn_backward": _backward_results,
}
