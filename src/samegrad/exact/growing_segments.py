"""The CUDA allocator told, for a while, to make segments that grow page by page instead of segments of fixed sizes.

Segments of fixed sizes fill with gaps, worst while a graph is captured, when nothing can be given back: a pool of them
was seen to hold a fifth more than was ever in use. Segments of either kind stand beside each other.

Source: PyTorch documentation, "CUDA semantics", ``PYTORCH_ALLOC_CONF=expandable_segments:True``.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_GROWS = "expandable_segments"


@contextlib.contextmanager
def growing_segments() -> Iterator[None]:
    """A block in which new segments grow; afterwards the allocator does as it did before.

    Where ``why_not`` says something, nothing changes.
    """
    if why_not():
        yield
        return
    # What is not named is set to its default.
    others = re.sub(rf",?\s*{_GROWS}\s*:\s*\w+", "", _settings()).lstrip(",")
    also = f"{others}," if others else ""
    _change(f"{also}{_GROWS}:True")
    try:
        yield
    finally:
        _change(f"{also}{_GROWS}:False")


def segments_grow() -> bool:
    """Whether segments that are new do now."""
    return f"{_GROWS}:True" in _settings()


def why_not() -> str:
    """Why segments cannot be made to grow here, or need not; empty where they can."""
    if segments_grow():
        return "not needed: the allocator was told so already"
    if "cudaMallocAsync" in _settings():
        return "the allocator is cudaMallocAsync, which has no segments"
    if sys.platform != "linux" or not hasattr(torch._C, "_accelerator_setAllocatorSettings"):
        return "this platform or version of torch has no such segments"
    return ""


class _Told:
    """What the allocator was told here last, where torch does not say it."""

    settings: str | None = None


def _change(settings: str) -> None:
    # torch has no types here.
    cast(Any, torch._C)._accelerator_setAllocatorSettings(settings)
    _Told.settings = settings


def _settings() -> str:
    """What the allocator was told; older versions of torch do not say it, and are told by the environment first."""
    told = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if told is not None:
        return str(told())
    if _Told.settings is not None:
        return _Told.settings
    return next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), "")
