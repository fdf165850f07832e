"""The words of ``philox`` on CUDA: one Triton kernel that writes them, one that drops with them.

Imported where a CUDA tensor draws for the first time. Nothing here takes a number that changes from step to step:
key and sample ids are read from device memory, so a captured graph draws anew when they are overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_jit: Callable[..., Callable[..., Any]] = triton.jit

_TILE_COUNTERS = 256

# Numbers that differ between calls, layers and chunks; a kernel for each value would be compiled otherwise.
PLAIN = ["place", "call", "rows", "elements", "inner", "threshold", "scale"]
# A chunk's ids may start anywhere.
ANYWHERE = ["key_at", "ids_at"]


@_jit
def _philox(block, sample, key, call, place):
    """The four words of every lane. Lanes: block uint32, sample int64; the rest are scalars."""
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = block
    c1 = (sample & 0xFFFFFFFF).to(tl.uint32)
    c2 = tl.zeros_like(block) + call.to(tl.uint32)
    c3 = (((sample >> 32) & 0xFFFF) * 65536 + place).to(tl.uint32)
    first = tl.full(block.shape, 0xD2511F53, tl.uint32)
    second = tl.full(block.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        low0, high0 = c0 * first, tl.umulhi(c0, first)
        low1, high1 = c2 * second, tl.umulhi(c2, second)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@_jit
def tile_of_words(
    key_at, ids_at, place, call, rows, elements, inner, FLAT: tl.constexpr, TILE: tl.constexpr
):
    """Words (4 * TILE,) uint32 of this program, the offset of each in the draw, and whether there is such a place.

    The draw is (before, rows, inner), contiguous. place: plane + 256 * stream.

    FLAT: a row's elements lie together and fill whole counters, so that neighbouring words are neighbours in memory.
    """
    start = tl.program_id(0)
    counters = (elements + 3) // 4
    lanes = start * TILE + tl.arange(0, TILE)
    row = lanes // counters
    block = lanes % counters
    there = row < rows
    sample = tl.load(ids_at + row, mask=there, other=0)
    w0, w1, w2, w3 = _philox(block.to(tl.uint32), sample, tl.load(key_at), call, place.to(tl.int64))
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (4 * TILE,))
    number = tl.arange(0, 4 * TILE)
    if FLAT:
        offset = start.to(tl.int64) * (4 * TILE) + number
        # By fours, which the compiler can see: it then reads and writes four at once.
        valid = start * TILE + number // 4 < rows * counters
    else:
        lane = start * TILE + number // 4
        element = (lane % counters) * 4 + number % 4
        row = (lane // counters).to(tl.int64)
        valid = (element < elements) & (row < rows)
        offset = (element // inner).to(tl.int64) * rows * inner + row * inner + element % inner
    return words, offset, valid


@_jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=ANYWHERE)
def _words_kernel(
    out_at, key_at, ids_at, place, call, rows, elements, inner, FLAT: tl.constexpr, TILE: tl.constexpr
):
    words, offset, valid = tile_of_words(key_at, ids_at, place, call, rows, elements, inner, FLAT, TILE)
    tl.store(out_at + offset, words.to(tl.int64), mask=valid)


@_jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=ANYWHERE)
def _keep_kernel(
    keep_at, key_at, ids_at, place, call, rows, elements, inner, threshold, FLAT: tl.constexpr, TILE: tl.constexpr
):
    words, offset, valid = tile_of_words(key_at, ids_at, place, call, rows, elements, inner, FLAT, TILE)
    tl.store(keep_at + offset, words >= threshold.to(tl.uint32), mask=valid)


@_jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=ANYWHERE)
def _dropout_kernel(
    in_at, out_at, keep_at, key_at, ids_at, place, call, rows, elements, inner, threshold, scale,
    FLAT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    words, offset, valid = tile_of_words(key_at, ids_at, place, call, rows, elements, inner, FLAT, TILE)
    keep = words >= threshold.to(tl.uint32)
    values = tl.load(in_at + offset, mask=valid, other=0.0)
    # A product with zero and not a choice: what is not finite stays so, as it does under torch's own dropout.
    dropped = values.to(tl.float32) * keep.to(tl.float32) * scale
    tl.store(out_at + offset, dropped.to(values.dtype), mask=valid)
    tl.store(keep_at + offset, keep, mask=valid)


def keyed_words(key: Tensor, ids: Tensor, stream: int, call: int, plane: int, before: int, inner: int) -> Tensor:
    """Words as int64 (before, n, inner) on the device of ``ids`` (n,) int64; key: () int64 there."""
    words = torch.empty((before, ids.shape[0], inner), dtype=torch.int64, device=ids.device)
    launch(_words_kernel, (words,), key, ids, (plane + 256 * stream, call), (before, inner), ())
    return words


def keyed_keep(key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, threshold: int) -> Tensor:
    """Where words reach ``threshold``, bool (before, n, inner)."""
    keep = torch.empty((before, ids.shape[0], inner), dtype=torch.bool, device=ids.device)
    launch(_keep_kernel, (keep,), key, ids, (256 * stream, call), (before, inner), (threshold,))
    return keep


def keyed_dropout(
    values: Tensor, key: Tensor, ids: Tensor, stream: int, call: int, before: int, inner: int, threshold: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``values`` kept and scaled or zeroed, and the mask, bool.

    values: contiguous, read as (before, n, inner); float32 or narrower, since a kernel takes ``scale`` as float32.
    """
    out = torch.empty_like(values)
    keep = torch.empty_like(values, dtype=torch.bool)
    launch(
        _dropout_kernel, (values, out, keep), key, ids, (256 * stream, call), (before, inner), (threshold, scale)
    )  # fmt: skip
    return out, keep


def launch(
    kernel: Any,
    pointers: tuple[Tensor, ...],
    key: Tensor,
    ids: Tensor,
    place_and_call: tuple[int, int],
    layout: tuple[int, int],
    extra: tuple[int | float, ...],
    **options: Any,
) -> None:
    """Runs ``kernel`` on every word of the draw, on the device of ``ids`` and torch's stream of it."""
    before, inner = layout
    rows, elements = ids.shape[0], before * inner
    lanes = rows * ((elements + 3) // 4)
    if not lanes:
        return
    if lanes > 2**31 - 2 * _TILE_COUNTERS:
        raise ValueError(f"a draw of {rows} x {elements} numbers is more than one kernel counts")
    arguments = (
        *pointers, key, ids.contiguous(), *place_and_call, rows, elements, inner, *extra,
        before == 1 and elements % 4 == 0, _TILE_COUNTERS,
    )  # fmt: skip
    grid = (-(-lanes // _TILE_COUNTERS),)
    if ids.device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
    else:
        with torch.cuda.device(ids.device):
            kernel[grid](*arguments, **options)
