"""Keyed numbers as torch operations: opaque to compilers, which would fuse and so round them in another way.

Every operation takes where its words are used: ``key`` () int64 and ``ids`` (n,) int64 on the device of the draw,
``stream``, ``call``, and the draw's layout (before, n, inner), of which sample r owns [:, r, :]; element ``e`` of it is
position ``e`` of (before, inner) in row-major order. Registered when this module is imported, as torch asks.

    samegrad::keyed_words     int64 (before, n, inner), below 2**32
    samegrad::keyed_keep      bool, False with probability ``drop``
    samegrad::keyed_dropout   values kept and scaled or zeroed, and the mask; differentiable to any order
    samegrad::keyed_numbers   of a named distribution, from 53 random bits, computed in float64 and rounded to ``dtype``
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from samegrad.exact import elementary, philox
from samegrad.exact.elementary import Array

_library: Any = cast(Any, torch.library.Library)("samegrad", "DEF")
_WHERE = "Tensor key, Tensor ids, int stream, int call, SymInt before, SymInt inner"

# Elements whose float64 work stays in a core's cache.
_STRETCH = 16384


def _on_host(words: Any, before: int, inner: int) -> Tensor:
    """(n, before * inner) of numpy as a tensor (before, n, inner)."""
    if before == 1:
        return torch.from_numpy(words).view(1, len(words), inner)
    rows = torch.from_numpy(words).view(len(words), before, inner)
    return rows.transpose(0, 1).contiguous()


def _words_cpu(key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, plane: int) -> Tensor:
    words = philox.keyed_words(int(key), ids.numpy(), stream, call, plane, before * inner)
    return _on_host(words.astype("int64"), before, inner)


@functools.cache
def _triton() -> tuple[Any, Any]:
    """The modules of the kernels. Triton is there where CUDA is, and is slow to import."""
    from samegrad.exact import normal_triton, philox_triton

    return philox_triton, normal_triton


def _words_cuda(key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, plane: int) -> Tensor:
    words: Tensor = _triton()[0].keyed_words(key, ids, stream, call, plane, before, inner)
    return words


def _keep_cpu(key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, drop: float) -> Tensor:
    threshold = philox.keep_threshold(drop)
    return _on_host(philox.keyed_keep(int(key), ids.numpy(), stream, call, before * inner, threshold), before, inner)


def _keep_cuda(key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, drop: float) -> Tensor:
    keep: Tensor = _triton()[0].keyed_keep(key, ids, stream, call, before, inner, philox.keep_threshold(drop))
    return keep


def _dropout_cpu(
    values: Tensor, key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, drop: float
) -> tuple[Tensor, Tensor]:
    keep = _keep_cpu(key, ids, stream, call, before, inner, drop).view(values.shape)
    return scaled(values, keep, drop), keep


def _dropout_cuda(
    values: Tensor, key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, drop: float
) -> tuple[Tensor, Tensor]:
    if values.is_contiguous() and values.dtype in (torch.float32, torch.bfloat16, torch.float16):
        factors = philox.keep_threshold(drop), 1 / (1 - drop)
        dropped: tuple[Tensor, Tensor] = _triton()[0].keyed_dropout(
            values, key, ids, stream, call, before, inner, *factors
        )
        return dropped
    keep = _keep_cuda(key, ids, stream, call, before, inner, drop).view(values.shape)
    return scaled(values, keep, drop), keep


def scaled(values: Tensor, keep: Tensor, drop: float) -> Tensor:
    """``values * keep / (1 - drop)``, differentiable to any order."""
    if not values.is_cuda:
        kept = values * keep
        # Memory that is new costs the CPU more than the product does.
        return kept * (1 / (1 - drop)) if kept.requires_grad else kept.mul_(1 / (1 - drop))
    # Named for what torch uses it for: the same product in one kernel, differentiable twice.
    product: Tensor = torch.ops.aten.native_dropout_backward(values, keep, 1 / (1 - drop))
    return product


def _numbers_cpu(
    key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, distribution: str, scale: float,
    shift: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    planes = [
        philox.keyed_words(int(key), ids.numpy(), stream, call, plane, before * inner).ravel()
        for plane in range(_planes(distribution))
    ]
    numbers = np.empty(planes[0].size)
    for start in range(0, numbers.size, _STRETCH):
        part = slice(start, start + _STRETCH)
        words = [plane[part].astype(np.int64) for plane in planes]
        numbers[part] = _DISTRIBUTIONS[distribution](words, scale, shift)
    return _on_host(numbers.reshape(len(ids), before * inner), before, inner).to(dtype)


def _numbers_cuda(
    key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, distribution: str, scale: float,
    shift: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if distribution == "normal":
        kernels = _triton()[1]
        normal: Tensor
        if scale == 1 and shift == 0 and dtype in kernels.DTYPES:
            normal = kernels.keyed_normal(key, ids, stream, call, before, inner, dtype)
            return normal
        normal = kernels.keyed_normal(key, ids, stream, call, before, inner, torch.float64)
        return (normal * scale + shift).to(dtype)
    words = [_words_cuda(key, ids, stream, call, before, inner, plane) for plane in range(_planes(distribution))]
    numbers: Tensor = _DISTRIBUTIONS[distribution](words, scale, shift)
    return numbers.to(dtype)


def cuda_scratch_bytes(ids: Tensor, before: int, inner: int, distribution: str, scale: float, shift: float) -> int:
    """About what ``keyed_numbers`` holds at a time on CUDA beside its result: words, and float64 on the way to it."""
    if distribution == "normal" and scale == 1 and shift == 0:
        return 0
    # Words are int64; a term and the sum that it goes into stand beside them.
    held = 3 if distribution == "normal" else _planes(distribution) + 3
    return int(ids.shape[0]) * before * inner * held * 8


def _planes(distribution: str) -> int:
    return 4 if distribution in ("normal", "log_normal") else 2


# Words are int64 arrays below 2**32, numpy's or torch's, one for each plane. Results are float64.


def _uniform(words: Sequence[Array], scale: float, shift: float) -> Array:
    return _fraction(*words) * scale + shift


def _normal(words: Sequence[Array], scale: float, shift: float) -> Array:
    # Box and Muller 1958, one of the two numbers, so that an element needs no neighbour.
    square = elementary.log(_open_fraction(*words[:2])) * -2
    cosine = elementary.sine_and_cosine(_fraction(*words[2:]))[1]
    return elementary.library_of(square).sqrt(square) * cosine * scale + shift


def _log_normal(words: Sequence[Array], scale: float, shift: float) -> Array:
    return elementary.exp(_normal(words, scale, shift))


def _exponential(words: Sequence[Array], scale: float, shift: float) -> Array:
    return elementary.log(_open_fraction(*words)) * -scale + shift


def _cauchy(words: Sequence[Array], scale: float, shift: float) -> Array:
    sine, cosine = elementary.sine_and_cosine(_open_fraction(*words) * 0.5)
    return -cosine / sine * scale + shift


def _fraction(high: Array, low: Array) -> Array:
    """Multiples of 2**-53 in [0, 1)."""
    bits = (high << 21) | (low >> 11)
    return elementary.cast(bits, elementary.library_of(bits).float64) * 2.0**-53


def _open_fraction(high: Array, low: Array) -> Array:
    """Odd multiples of 2**-53 in (0, 1): neither log 0 nor log 1."""
    bits = (high << 20) | (low >> 12)
    return (elementary.cast(bits, elementary.library_of(bits).float64) + 0.5) * 2.0**-52


_DISTRIBUTIONS: dict[str, Callable[[Sequence[Array], float, float], Array]] = {
    "uniform": _uniform,
    "normal": _normal,
    "log_normal": _log_normal,
    "exponential": _exponential,
    "cauchy": _cauchy,
}


def _dropout_shapes(
    values: Tensor, key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, drop: float
) -> tuple[Tensor, Tensor]:
    keep = values.new_empty(values.shape, dtype=torch.bool)
    return scaled(values, keep, drop), keep


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.drop = inputs[-1]


def _dropout_backward(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (keep,) = ctx.saved_tensors
    return (scaled(cotangent, keep, ctx.drop), *[None] * 7)


# Each on the CPU and on CUDA.
KERNELS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "words": (_words_cpu, _words_cuda),
    "keep": (_keep_cpu, _keep_cuda),
    "numbers": (_numbers_cpu, _numbers_cuda),
}
DROPOUTS = _dropout_cpu, _dropout_cuda


def _register() -> None:
    _library.define(f"keyed_words({_WHERE}, int plane) -> Tensor")
    _library.define(f"keyed_keep({_WHERE}, float drop) -> Tensor")
    _library.define(f"keyed_dropout(Tensor values, {_WHERE}, float drop) -> (Tensor, Tensor)")
    _library.define(f"keyed_numbers({_WHERE}, str distribution, float scale, float shift, ScalarType dtype) -> Tensor")
    for name, (on_cpu, on_cuda) in {**KERNELS, "dropout": DROPOUTS}.items():
        _library.impl(f"keyed_{name}", on_cpu, "CPU")
        _library.impl(f"keyed_{name}", on_cuda, "CUDA")
    for name, made in (("words", torch.int64), ("keep", torch.bool), ("numbers", None)):
        torch.library.register_fake(
            f"samegrad::keyed_{name}",
            # Numbers are of the last argument's dtype.
            lambda key, ids, stream, call, before, inner, *rest, made=made: ids.new_empty(
                (before, ids.shape[0], inner), dtype=made or rest[-1]
            ),
            lib=_library,
        )
    torch.library.register_fake("samegrad::keyed_dropout", _dropout_shapes, lib=_library)
    torch.library.register_autograd(
        "samegrad::keyed_dropout", _dropout_backward, setup_context=_keep_for_backward, lib=_library
    )


_register()
