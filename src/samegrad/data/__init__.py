"""Rows on the host or on disk, and their way to the device a chunk at a time."""

from __future__ import annotations

from samegrad.data.prefetch import Prefetcher, stream_chunks
from samegrad.data.readers import check_rows, open_rows
from samegrad.data.rows import Rows

__all__ = ["Prefetcher", "Rows", "check_rows", "open_rows", "stream_chunks"]
