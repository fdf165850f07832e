"""Keyed numbers as torch operations: opaque to compilers, which would fuse and so round them in another way.

Every operation takes where its words are used: ``key`` () int64 and ``ids`` (n,) int64 on the device of the draw,
``stream``, ``call``, and the draw's layout (before, n, inner), of which sample r owns [:, r, :]; element ``e`` of it is
position ``e`` of (before, inner) in row-major order. Registered when this module is imported, as torch asks.

    samegrad::keyed_words     int64 (before, n, inner), below 2**32
    samegrad::keyed_keep      bool, False with probability ``drop``
    samegrad::keyed_dropout   values kept and scaled or zeroed, and the mask; differentiable to any order
    samegrad::keyed_numbers   float64 of a named distribution, from 53 random bits
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from samegrad.exact import elementary, philox

_library: Any = cast(Any, torch.library.Library)("samegrad", "DEF")
_WHERE = "Tensor key, Tensor ids, int stream, int call, SymInt before, SymInt inner"

# Elements whose float64 work stays in a core's cache.
_STRETCH = 32768


def _on_host(words: Any, before: int, inner: int) -> Tensor:
    """(n, before * inner) of numpy as a tensor (before, n, inner)."""
    rows = torch.from_numpy(words).view(len(words), before, inner)
    return rows.transpose(0, 1).contiguous()


def _words_cpu(key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, plane: int) -> Tensor:
    words = philox.keyed_words(int(key), ids.numpy(), stream, call, plane, before * inner)
    return _on_host(words.astype("int64"), before, inner)


def _words_cuda(key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, plane: int) -> Tensor:
    from samegrad.exact import philox_triton

    return philox_triton.keyed_words(key, ids, stream, call, plane, before, inner)


def _keep_cpu(key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, drop: float) -> Tensor:
    threshold = philox.keep_threshold(drop)
    return _on_host(philox.keyed_keep(int(key), ids.numpy(), stream, call, before * inner, threshold), before, inner)


def _keep_cuda(key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, drop: float) -> Tensor:
    return _words_cuda(key, ids, stream, call, before, inner, 0) >= philox.keep_threshold(drop)


def _dropout_cpu(
    values: Tensor, key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, drop: float
) -> tuple[Tensor, Tensor]:
    keep = _keep_cpu(key, ids, stream, call, before, inner, drop).view(values.shape)
    return _scaled(values, keep, drop), keep


def _dropout_cuda(
    values: Tensor, key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, drop: float
) -> tuple[Tensor, Tensor]:
    if values.is_contiguous() and values.dtype in (torch.float32, torch.bfloat16, torch.float16):
        from samegrad.exact import philox_triton

        threshold = philox.keep_threshold(drop)
        return philox_triton.keyed_dropout(values, key, ids, stream, call, before, threshold, 1 / (1 - drop))
    keep = _keep_cuda(key, ids, stream, call, before, inner, drop).view(values.shape)
    return _scaled(values, keep, drop), keep


def _scaled(values: Tensor, keep: Tensor, drop: float) -> Tensor:
    # Named for what torch uses it for: values * keep * scale in one kernel, differentiable twice.
    scaled: Tensor = torch.ops.aten.native_dropout_backward(values, keep, 1 / (1 - drop))
    return scaled


def _numbers(
    key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, distribution: str, scale: float,
    shift: float,
) -> Tensor:  # fmt: skip
    planes = 4 if distribution in ("normal", "log_normal") else 2
    words = [_words(key, ids, stream, call, before, inner, plane) for plane in range(planes)]
    stretch = _STRETCH if ids.is_cpu else max(words[0].numel(), 1)
    stretches = zip(*(torch.split(plane.flatten(), stretch) for plane in words))
    numbers = [_DISTRIBUTIONS[distribution](part, scale, shift) for part in stretches]
    return torch.cat(numbers).view(before, len(ids), inner)


def _words(key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, plane: int) -> Tensor:
    compute = _words_cpu if ids.is_cpu else _words_cuda
    return compute(key, ids, stream, call, before, inner, plane)


def _uniform(words: tuple[Tensor, ...], scale: float, shift: float) -> Tensor:
    return _fraction(*words[:2]).mul_(scale).add_(shift)


def _normal(words: tuple[Tensor, ...], scale: float, shift: float) -> Tensor:
    # Box and Muller 1958, one of the two numbers, so that an element needs no neighbour.
    radius = elementary.log(_open_fraction(*words[:2])).mul_(-2).sqrt_()
    return elementary.sine_and_cosine(_fraction(*words[2:]))[1].mul_(radius).mul_(scale).add_(shift)


def _log_normal(words: tuple[Tensor, ...], scale: float, shift: float) -> Tensor:
    return elementary.exp(_normal(words, scale, shift))


def _exponential(words: tuple[Tensor, ...], scale: float, shift: float) -> Tensor:
    return elementary.log(_open_fraction(*words)).mul_(-scale).add_(shift)


def _cauchy(words: tuple[Tensor, ...], scale: float, shift: float) -> Tensor:
    sine, cosine = elementary.sine_and_cosine(_open_fraction(*words).mul_(0.5))
    return (-cosine / sine).mul_(scale).add_(shift)


def _fraction(high: Tensor, low: Tensor) -> Tensor:
    """Multiples of 2**-53 in [0, 1)."""
    return ((high << 21) | (low >> 11)).to(torch.float64).mul_(2.0**-53)


def _open_fraction(high: Tensor, low: Tensor) -> Tensor:
    """Odd multiples of 2**-53 in (0, 1): neither log 0 nor log 1."""
    return ((high << 20) | (low >> 12)).to(torch.float64).add_(0.5).mul_(2.0**-52)


_DISTRIBUTIONS = {
    "uniform": _uniform,
    "normal": _normal,
    "log_normal": _log_normal,
    "exponential": _exponential,
    "cauchy": _cauchy,
}


def _laid_out(ids: Tensor, before: int, inner: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((before, ids.shape[0], inner), dtype=dtype)


def _dropout_shapes(
    values: Tensor, key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, drop: float
) -> tuple[Tensor, Tensor]:
    keep = values.new_empty(values.shape, dtype=torch.bool)
    return _scaled(values, keep, drop), keep


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.drop = inputs[-1]


def _dropout_backward(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (keep,) = ctx.saved_tensors
    return (_scaled(cotangent, keep, ctx.drop), *[None] * 7)


def _register() -> None:
    _library.define(f"keyed_words({_WHERE}, int plane) -> Tensor")
    _library.define(f"keyed_keep({_WHERE}, float drop) -> Tensor")
    _library.define(f"keyed_dropout(Tensor values, {_WHERE}, float drop) -> (Tensor, Tensor)")
    _library.define(f"keyed_numbers({_WHERE}, str distribution, float scale, float shift) -> Tensor")
    for name, on_cpu, on_cuda in (
        ("keyed_words", _words_cpu, _words_cuda),
        ("keyed_keep", _keep_cpu, _keep_cuda),
        ("keyed_dropout", _dropout_cpu, _dropout_cuda),
        ("keyed_numbers", _numbers, _numbers),
    ):
        _library.impl(name, on_cpu, "CPU")
        _library.impl(name, on_cuda, "CUDA")
    for name, dtype in (("words", torch.int64), ("keep", torch.bool), ("numbers", torch.float64)):
        torch.library.register_fake(
            f"samegrad::keyed_{name}",
            lambda key, ids, stream, call, before, inner, *_, dtype=dtype: _laid_out(ids, before, inner, dtype),
            lib=_library,
        )
    torch.library.register_fake("samegrad::keyed_dropout", _dropout_shapes, lib=_library)
    torch.library.register_autograd(
        "samegrad::keyed_dropout", _dropout_backward, setup_context=_keep_for_backward, lib=_library
    )


_register()
