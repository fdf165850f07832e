"""The settings and arithmetic of PyTorch's CUDA caching allocator: how requests are rounded, how large segments are.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h, torch 2.11 to 2.15, which agree in all of it.
No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re

from samegrad.errors import UsageError

SMALLEST_BLOCK_BYTES = 512
LARGEST_SMALL_REQUEST_BYTES = 2**20
SMALL_SEGMENT_BYTES = 2 * 2**20
SMALLEST_OWN_SEGMENT_BYTES = 10 * 2**20
SEGMENT_ROUNDING_BYTES = 2 * 2**20

# roundup_power2_divisions has an entry for each power of two from 1 MiB to 32 GiB, the last for all above.
_DIVISION_INTERVALS = 16
_SETTINGS_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class AllocatorRules:
    """What ``PYTORCH_ALLOC_CONF`` can change about where a request lands; the defaults are torch's.

    ``largest_split_bytes`` is ``max_split_size_mb``, ``largest_unsplit_rounding_bytes`` is
    ``max_non_split_rounding_mb``. ``power2_divisions`` has one entry for each power of two of the request from 1 MiB.
    """

    expandable_segments: bool = False
    large_segment_bytes: int = 20 * _MIB
    largest_split_bytes: int | None = None
    largest_unsplit_rounding_bytes: int = 20 * _MIB
    power2_divisions: tuple[int, ...] = (0,) * _DIVISION_INTERVALS
    garbage_collection_threshold: float = 0.0

    def rounded_bytes(self, requested_bytes: int) -> int:
        """The size of the block that serves a request of ``requested_bytes`` > 0."""
        if requested_bytes < SMALLEST_BLOCK_BYTES:
            return SMALLEST_BLOCK_BYTES
        divisions = self.divisions_of(requested_bytes)
        if divisions > 1 and requested_bytes > SMALLEST_BLOCK_BYTES * divisions:
            return _next_division(requested_bytes, divisions)
        return -(-requested_bytes // SMALLEST_BLOCK_BYTES) * SMALLEST_BLOCK_BYTES

    def divisions_of(self, requested_bytes: int) -> int:
        power = requested_bytes.bit_length() - 1
        return self.power2_divisions[min(max(power - 20, 0), _DIVISION_INTERVALS - 1)]

    def segment_bytes(self, block_bytes: int) -> int:
        """The memory asked of the driver when no cached block holds ``block_bytes``; also what the cap is told."""
        if block_bytes <= LARGEST_SMALL_REQUEST_BYTES:
            return SMALL_SEGMENT_BYTES
        if block_bytes < SMALLEST_OWN_SEGMENT_BYTES:
            return self.large_segment_bytes
        return -(-block_bytes // SEGMENT_ROUNDING_BYTES) * SEGMENT_ROUNDING_BYTES

    def smallest_remainder_bytes(self, block_bytes: int, *, small: bool) -> int | None:
        """The least that must be left of a block for ``block_bytes`` to be split off it; None where it never is."""
        if small or self.expandable_segments:
            return SMALLEST_BLOCK_BYTES
        if self.largest_split_bytes is not None and block_bytes >= self.largest_split_bytes:
            return None
        return LARGEST_SMALL_REQUEST_BYTES + 1

    def page_bytes(self, *, small: bool) -> int:
        """The unit in which an expandable segment is mapped."""
        return SMALL_SEGMENT_BYTES if small else self.large_segment_bytes


DEFAULT_RULES = AllocatorRules()


def cap_of_fraction(fraction: float, device_bytes: int) -> int:
    """The cap in bytes that ``set_per_process_memory_fraction(fraction)`` puts on a device of ``device_bytes``.

    A segment is refused when the bytes reserved and the segment's together are more than the cap.
    """
    return int(fraction * device_bytes)


def fraction_of_cap(cap_bytes: int, device_bytes: int) -> float:
    """The smallest fraction whose cap is at least ``cap_bytes``: the plain quotient can fall one byte short of it.

    Segments come in steps of 2 MiB, so one byte short is 2 MiB short.
    """
    fraction = min(1.0, cap_bytes / device_bytes)
    while fraction < 1.0 and cap_of_fraction(fraction, device_bytes) < cap_bytes:
        fraction = math.nextafter(fraction, 1.0)
    return fraction


def read_allocator_rules() -> AllocatorRules:
    """The rules of this process, from the environment as torch reads it."""
    for variable in _SETTINGS_VARIABLES:
        if text := os.environ.get(variable):
            return parse_allocator_rules(text)
    return AllocatorRules()


def parse_allocator_rules(text: str) -> AllocatorRules:
    """The rules that an allocator setting such as ``"expandable_segments:True"`` means. Raises UsageError.

    Settings that do not change where a request lands (threads, pinned memory) are read over.
    """
    changes: dict[str, object] = {}
    for key, value in re.findall(r"([a-z0-9_]+)\s*:\s*(\[[^\]]*\]|[^,\s]+)", text):
        match key:
            case "backend" if value != "native":
                raise UsageError(
                    asked=f"a prediction for the allocator backend {value!r}",
                    found="only the native caching allocator is modelled",
                    do="unset backend in PYTORCH_ALLOC_CONF, or measure on the device",
                )
            case "expandable_segments":
                changes["expandable_segments"] = value == "True"
            case "large_segment_size_mb":
                changes["large_segment_bytes"] = _mebibytes(key, value)
            case "max_split_size_mb":
                changes["largest_split_bytes"] = _mebibytes(key, value)
            case "max_non_split_rounding_mb":
                changes["largest_unsplit_rounding_bytes"] = _mebibytes(key, value)
            case "garbage_collection_threshold":
                changes["garbage_collection_threshold"] = float(value)
            case "roundup_power2_divisions":
                changes["power2_divisions"] = _parse_divisions(value)
            case _:
                continue
    return dataclasses.replace(DEFAULT_RULES, **changes)  # type: ignore[arg-type]  # by each field's own parser


def _next_division(requested_bytes: int, divisions: int) -> int:
    """The next of ``divisions`` equal steps between the powers of two around ``requested_bytes``."""
    power = 1 << (requested_bytes.bit_length() - 1)
    if power == requested_bytes:
        return requested_bytes
    step = power >> (divisions.bit_length() - 1)
    return power << 1 if step == 0 else -(-requested_bytes // step) * step


def _parse_divisions(value: str) -> tuple[int, ...]:
    if not value.startswith("["):
        return (int(value),) * _DIVISION_INTERVALS
    divisions = [0] * _DIVISION_INTERVALS
    reached = 0
    for start, count in re.findall(r"([0-9]+|>)\s*:\s*([0-9]+)", value):
        if start == ">":
            first, last = max(reached, 1), _DIVISION_INTERVALS
        else:
            # An entry means its own power of two; the first also means all below it.
            last = min(int(start).bit_length(), _DIVISION_INTERVALS)
            first = 0 if reached == 0 else last - 1
        divisions[first:last] = [int(count)] * max(0, last - first)
        reached = last
    return tuple(divisions)


def _mebibytes(key: str, value: str) -> int:
    if not value.isdigit():
        raise UsageError(
            asked=f"{key}:{value} in PYTORCH_ALLOC_CONF", found="not a whole number of MiB", do=f"write {key}:512"
        )
    return int(value) * _MIB
