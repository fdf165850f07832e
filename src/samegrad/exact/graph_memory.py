"""Memory of captured graphs in segments that grow, so that a pool holds hardly more than what is in use.

While a graph is captured nothing can be given back to the driver, and segments of fixed sizes fill with gaps: a pool
of them was seen to hold a fifth more than was ever in use. A segment that grows page by page has no gaps of that kind.

Source: PyTorch documentation, "CUDA semantics", ``PYTORCH_ALLOC_CONF=expandable_segments:True``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, cast

import torch

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_GROWS = "expandable_segments"


@contextlib.contextmanager
def growing_segments() -> Iterator[None]:
    """A block in which the CUDA allocator makes segments that grow; afterwards it does as it did before.

    Where the allocator is another one, or the platform has no such segments, nothing changes.
    """
    # torch has no types here.
    library = cast(Any, torch._C)
    change = getattr(library, "_accelerator_setAllocatorSettings", None)
    before = _settings(library)
    if change is None or "cudaMallocAsync" in before or _GROWS in before:
        yield
        return
    # What is not named is set to its default.
    others = f"{before}," if before else ""
    change(f"{others}{_GROWS}:True")
    try:
        yield
    finally:
        change(f"{others}{_GROWS}:False")


def _settings(library: Any) -> str:
    """What the allocator was told; older versions of torch do not say it, and are told by the environment."""
    told = getattr(library, "_accelerator_getAllocatorSettings", None)
    if told is not None:
        return str(told())
    return next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), "")
