"""torch's layers that draw inside, keyed: dropouts, randomised ReLU, attention and recurrent layers.

``KEYED`` maps torch's function to ours, which takes ``Draws`` and then what torch's own takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samegrad.exact.draw_sites import refused
from samegrad.exact.draws import Draws

# Klambauer et al. 2017, "Self-Normalizing Neural Networks": the negative saturation value of SELU.
_SELU_SATURATION = 1.7580993408473766


def _checked(drop: float) -> float:
    if not 0 <= drop <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {drop}")
    return drop


def dropout(draws: Draws, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or _checked(p) == 0 or input.numel() == 0:
        return input
    if p == 1:
        # Nothing is left to chance, but the call counts: a probability that is a schedule must not shift the others.
        draws.next("dropout", input.shape, input.device)
        zero = torch.zeros((), dtype=input.dtype, device=input.device)
        return input.mul_(zero) if inplace else input * zero
    draw = draws.next("dropout", input.shape, input.device)
    if inplace:
        return input.mul_(draw.keep(p).to(input.dtype) * (1 / (1 - p)))
    return draw.dropout(input, p)[0]


def _dropout_(draws: Draws, input: Tensor, p: float, train: bool) -> Tensor:
    return dropout(draws, input, p, train, inplace=True)


def native_dropout(draws: Draws, input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or _checked(p) == 0:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    draw = draws.next("native_dropout", input.shape, input.device)
    if p == 1:
        return torch.zeros_like(input), torch.zeros_like(input, dtype=torch.bool)
    return draw.dropout(input, p)


Noise = Callable[[Tensor, float, Tensor], tuple[Tensor, Tensor | None]]


def _scaled_noise(keep: Tensor, drop: float, input: Tensor) -> tuple[Tensor, None]:
    return keep.to(input.dtype) * (1 / (1 - drop)), None


def _alpha_noise(keep: Tensor, drop: float, input: Tensor) -> tuple[Tensor, Tensor]:
    """The factor and the term that keep mean and variance of SELU's outputs."""
    scale = 1 / math.sqrt((_SELU_SATURATION**2 * drop + 1) * (1 - drop))
    kept = keep.to(input.dtype)
    return kept * scale, (kept - 1) * (_SELU_SATURATION * scale) + _SELU_SATURATION * scale * drop


def _features(input: Tensor) -> tuple[int, ...]:
    return (*input.shape[:2], *(1,) * (input.dim() - 2))


def _noisy(name: str, noise: Noise, shape_of: Callable[[Tensor], tuple[int, ...]], inplace: bool) -> Callable[..., Any]:
    """A dropout that multiplies by a factor and adds a term, one of each for every entry of ``shape_of(input)``."""

    def run(draws: Draws, input: Tensor, p: float, train: bool) -> Tensor:
        if not train or _checked(p) == 0 or input.numel() == 0:
            return input
        draw = draws.next(name, shape_of(input), input.device)
        if p == 1:
            zero = torch.zeros((), dtype=input.dtype, device=input.device)
            return input.mul_(zero) if inplace else input * zero
        factor, term = noise(draw.keep(p), p, input)
        result = input.mul_(factor) if inplace else input * factor
        return result if term is None else result.add_(term) if inplace else result + term

    return run


def _whole_shape(input: Tensor) -> tuple[int, ...]:
    return tuple(input.shape)


def _rrelu(inplace: bool) -> Callable[..., Tensor]:
    def run(
        draws: Draws, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False,
        generator: None = None,
    ) -> Tensor:  # fmt: skip
        if not training:
            return F.leaky_relu(input, (lower + upper) / 2, inplace)
        draw = draws.next("rrelu", input.shape, input.device)
        slope = draw.numbers("uniform", input.dtype, upper - lower, lower)
        factor = torch.where(input > 0, torch.ones_like(slope), slope)
        return input.mul_(factor) if inplace else input * factor

    return run


def attention(
    draws: Draws,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention with its weights written out, so that they are dropped by our draws: memory for (..., L, S) weights."""
    if dropout_p == 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    if is_causal:
        if attn_mask is not None:
            raise RuntimeError("attention takes attn_mask or is_causal=True, not both")
        attn_mask = query.new_ones((query.shape[-2], key.shape[-2]), dtype=torch.bool).tril()
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
    # Zeros, not NaN, for a query that may look nowhere, as in torch's own.
    weights: Tensor = torch.ops.aten._safe_softmax(scores, -1)
    return dropout(draws, weights, dropout_p) @ value


def _recurrent(layer: Callable[..., Any]) -> Callable[..., Any]:
    """``layer`` (torch.lstm, torch.gru, ...) one layer at a time, with keyed dropout in between."""

    def run(draws: Draws, input: Tensor, *rest: Any) -> Any:
        if isinstance(rest[0], Tensor) and isinstance(rest[2], (tuple, list)):
            packed_layers, packed_drop, training = rest[4], rest[5], rest[6]
            if training and packed_drop and packed_layers > 1:
                raise refused(
                    layer.__name__, "draws between its layers on a packed sequence", "pad it, or set its dropout to 0"
                )
            return layer(input, *rest)
        hidden, weights, biases, layers, drop, training, bidirectional, batch_first = rest
        if not training or not drop or layers == 1:
            return layer(input, *rest)
        states = hidden if isinstance(hidden, (tuple, list)) else [hidden]
        directions = 2 if bidirectional else 1
        ends: list[Sequence[Tensor]] = []
        each = len(weights) // layers
        for index in range(layers):
            if index:
                input = dropout(draws, input, drop)
            part = slice(index * directions, (index + 1) * directions)
            mine = [state[part] for state in states]
            start = mine if isinstance(hidden, (tuple, list)) else mine[0]
            input, *last = layer(
                input, start, weights[index * each : (index + 1) * each], biases, 1, 0.0, training, bidirectional,
                batch_first,
            )  # fmt: skip
            ends.append(last)
        return (input, *(torch.cat(parts) for parts in zip(*ends)))

    return run


KEYED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.dropout: dropout,
    torch.dropout: dropout,
    torch.dropout_: _dropout_,
    torch.native_dropout: native_dropout,
    torch.feature_dropout: _noisy("feature_dropout", _scaled_noise, _features, False),
    torch.feature_dropout_: _noisy("feature_dropout", _scaled_noise, _features, True),
    torch.alpha_dropout: _noisy("alpha_dropout", _alpha_noise, _whole_shape, False),
    torch.alpha_dropout_: _noisy("alpha_dropout", _alpha_noise, _whole_shape, True),
    torch.feature_alpha_dropout: _noisy("feature_alpha_dropout", _alpha_noise, _features, False),
    torch.feature_alpha_dropout_: _noisy("feature_alpha_dropout", _alpha_noise, _features, True),
    torch.rrelu: _rrelu(False),
    torch.rrelu_: _rrelu(True),
    F.scaled_dot_product_attention: attention,
    torch.lstm: _recurrent(torch.lstm),
    torch.gru: _recurrent(torch.gru),
    torch.rnn_tanh: _recurrent(torch.rnn_tanh),
    torch.rnn_relu: _recurrent(torch.rnn_relu),
}
