"""Recurrent layers as cuDNN runs them: one kernel for all layers and steps, with a reserve kept for backward.

Elsewhere torch unrolls them into hundreds of small operations. How large the reserve is, and what the library takes and
gives back, is in ``recurrent_workspaces``. Source: torch's ``aten/src/ATen/native/cudnn/RNN.cpp``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad.measure.events import Recurrence
from samegrad.measure.recurrent_workspaces import reserve_bytes


class Mode(enum.IntEnum):
    """cuDNN's numbers for the kinds of layers (``cudnnRNNMode_t``)."""

    RELU = 0
    TANH = 1
    LSTM = 2
    GRU = 3


_GATES = {Mode.RELU: 1, Mode.TANH: 1, Mode.LSTM: 4, Mode.GRU: 3}


def forward_shape(args: tuple[Any, ...]) -> Recurrence:
    """The shape of ``aten::_cudnn_rnn`` with ``args``."""
    rows, _, _, _, _, _, mode, hidden, _, layers, batch_first, dropout, _, bidirectional = args[:14]
    return _shape(rows, mode, hidden, layers, batch_first, dropout, bidirectional)


def backward_shape(args: tuple[Any, ...]) -> Recurrence:
    """The shape of ``aten::_cudnn_rnn_backward`` with ``args``."""
    mode, hidden, _, layers, batch_first, dropout, _, bidirectional = args[10:18]
    return _shape(args[0], mode, hidden, layers, batch_first, dropout, bidirectional)


def _shape(
    rows: Tensor, mode: int, hidden: int, layers: int, batch_first: bool, dropout: float, bidirectional: bool
) -> Recurrence:
    steps, batch = (rows.shape[1], rows.shape[0]) if batch_first else rows.shape[:2]
    return Recurrence(
        steps=steps,
        rows=batch,
        inputs=rows.shape[2],
        hidden=hidden,
        layers=layers,
        gates=_GATES[Mode(mode)],
        directions=1 + bidirectional,
        drops=bool(dropout),
        batch_first=batch_first,
    )


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
        weights = _FlatCast.apply(dtype, *weights)  # type: ignore[no-untyped-call]  # torch has no types here
        cell = None if cell is None else cell.to(dtype)
        hidden = hidden.to(dtype)
        rows = rows.to(dtype)
    size = hidden.shape[2] if cell is None else cell.shape[2]
    projected = hidden.shape[2] if hidden.shape[2] != size else 0
    per_layer = 2 + 2 * has_biases + bool(projected)
    made: tuple[Tensor, ...] = torch.ops.aten._cudnn_rnn(
        rows, weights, per_layer, None, hidden, cell, int(mode), size, projected, layers, batch_first, dropout, train,
        bidirectional, [], None,
    )  # fmt: skip
    return made[0], made[1], made[2]


class _FlatCast(torch.autograd.Function):
    """The weights in another dtype, in one piece of memory, as autocast lays them out for cuDNN."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [weight.dtype for weight in weights]
        return tuple(_slices(weights[0].new_empty(sum(weight.numel() for weight in weights), dtype=dtype), weights))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        made = [cotangent.to(dtype) for cotangent, dtype in zip(reversed(cotangents), reversed(ctx.dtypes))]
        return None, *reversed(made)


def _slices(flat: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """``flat`` cut into the shapes of ``weights``."""
    pieces = torch.split(flat, [weight.numel() for weight in weights])
    return [piece.view(weight.shape) for piece, weight in zip(pieces, weights)]


def lay_out_flat(layer: nn.RNNBase) -> None:
    """In the place of ``flatten_parameters``: the weights of ``layer`` in one piece of memory, as cuDNN wants them.

    torch does so for a layer's own weights once, and again where others take their place, as those of a chunk do: they
    then stand in memory twice.
    """
    weights = [weight for weight in layer._flat_weights if isinstance(weight, Tensor)]
    alike = {(weight.dtype, weight.device) for weight in weights}
    if len(weights) != len(layer._flat_weights) or len(alike) != 1 or weights[0].device.type != "cuda":
        return
    with torch.no_grad():
        flat = weights[0].new_empty(sum(weight.numel() for weight in weights))
        for weight, piece in zip(weights, _slices(flat, weights)):
            weight.data = piece


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
    shape = _shape(rows, mode, size, layers, batch_first, dropout, bidirectional)
    reserve = reserve_bytes(shape, rows.dtype.itemsize)
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
    gradients = _slices(rows.new_empty(sum(weight.numel() for weight in weights)), weights)
    return torch.empty_like(rows), torch.empty_like(hidden), None if cell is None else torch.empty_like(cell), gradients


# In the place of shapes that torch has not, or has without the reserve.
STAND_INS: dict[str, Callable[..., Any]] = {
    "_cudnn_rnn": _forward_results,
    "_cudnn_rnn_backward": _backward_results,
}
