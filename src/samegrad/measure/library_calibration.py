"""What CUDA libraries take for themselves on a card: sizes of workspaces, by compute capability and torch version.

cuBLAS's sizes are torch's own: aten/src/ATen/cuda/CublasHandlePool.cpp, for 2.11 and 2.14 read from their binaries; of
2.12 nothing was at hand, it counts as 2.13. cuDNN's are fitted to recorded histories: one H200, torch 2.11, cuDNN 9.19,
``cudnn.benchmark`` off; on other cards they are the same rules with that card's number of multiprocessors, and
uncalibrated. Of one H100 there are layers that were measured one by one as well.
"""

from __future__ import annotations

import dataclasses
import os
import re

from samegrad.errors import UsageError
from samegrad.measure.measured_convolutions import MeasuredConvolutions, measured_convolutions

_MIB = 2**20
_KIB = 2**10
# :4096:2:16:8, what cuBLAS asks for before Hopper.
_EARLIER_CUBLAS_BYTES = (2 * 4096 + 8 * 16) * _KIB
_LATER_CUBLAS_BYTES = 32 * _MIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlasWorkspaces:
    """``cublas_bytes`` and ``cublaslt_bytes`` of one handle, which is one thread's on one stream.

    ``kept``: taken at the first product and kept; otherwise taken and given back around each. ``shared``: cuBLASLt uses
    cuBLAS's.
    """

    cublas_bytes: int
    cublaslt_bytes: int
    kept: bool
    shared: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class LibraryCalibration:
    """All that the model of library workspaces takes from a card.

    ``multiprocessors`` and ``threads_per_multiprocessor``: over which sums are split. ``tile_channels``: inputs and
    outputs of one tile of a convolution's weight gradient. ``padded_bytes``: to which multiple the channels of one
    place are padded in copies. ``alignment_bytes``: what aligning the copies takes. ``context_bytes``: what a process
    takes of the device outside the allocator, by driver, context and the code of kernels, with cuBLAS and cuDNN in
    use; None where it was not measured. ``convolutions``: layers measured one by one, None where none were. ``source``
    names the measurement.
    """

    blas: BlasWorkspaces
    multiprocessors: int
    threads_per_multiprocessor: int = 2048
    tile_channels: int = 128
    padded_bytes: int = 16
    alignment_bytes: int = 256
    context_bytes: int | None = None
    convolutions: MeasuredConvolutions | None = None
    source: str = "uncalibrated"


# Of the largest card of each capability.
_MULTIPROCESSORS = {
    (7, 0): 80, (7, 5): 72, (8, 0): 108, (8, 6): 84, (8, 9): 142, (9, 0): 132, (10, 0): 148, (12, 0): 170,
}  # fmt: skip
_MULTIPROCESSORS_ELSEWHERE = 108
_THREADS_PER_MULTIPROCESSOR = {(7, 5): 1024, (8, 6): 1536, (8, 9): 1536, (12, 0): 1536}
_CALIBRATED = {(9, 0): "one H200, torch 2.11, cuDNN 9.19"}
# What the device had in use beside the allocator's segments after 100 kinds of operations, an idle driver included.
_CONTEXT_BYTES = {(9, 0): 812_449_792}


def calibrate_libraries(
    capability: tuple[int, int], torch_version: str, *, multiprocessors: int | None = None
) -> LibraryCalibration:
    """The constants for a card of ``capability`` under ``torch_version`` (as "2.11.0+cu130").

    ``multiprocessors``: the card's own number where it is known. Raises UsageError for another torch than 2.11 to 2.15.
    """
    return LibraryCalibration(
        blas=blas_workspaces(capability, torch_version),
        multiprocessors=multiprocessors or _MULTIPROCESSORS.get(capability, _MULTIPROCESSORS_ELSEWHERE),
        threads_per_multiprocessor=_THREADS_PER_MULTIPROCESSOR.get(capability, 2048),
        context_bytes=_CONTEXT_BYTES.get(capability),
        convolutions=measured_convolutions(capability),
        source=_CALIBRATED.get(capability, "uncalibrated"),
    )


def blas_workspaces(capability: tuple[int, int], torch_version: str) -> BlasWorkspaces:
    """What torch gives cuBLAS and cuBLASLt, from its version, the card and the environment variables it reads."""
    release = _release_of(torch_version)
    # Blackwell got Hopper's size after 2.11.
    larger = capability == (9, 0) if release == (2, 11) else 9 <= capability[0] <= 12
    cublas_bytes = _cublas_setting() or (_LATER_CUBLAS_BYTES if larger else _EARLIER_CUBLAS_BYTES)
    kept = release < (2, 15) or _is_set("TORCH_CUBLAS_WORKSPACE_CACHE") is True
    asked_to_share = _is_set("TORCH_CUBLASLT_UNIFIED_WORKSPACE")
    # 2.11 limits the size by default as if it were shared, but shares only when asked to.
    shared = kept and (asked_to_share is True if release == (2, 11) else asked_to_share is not False)
    cublaslt_bytes = _number("CUBLASLT_WORKSPACE_SIZE", 1024) * _KIB
    return BlasWorkspaces(
        cublas_bytes=cublas_bytes,
        cublaslt_bytes=min(cublas_bytes, cublaslt_bytes) if kept and asked_to_share is not False else cublaslt_bytes,
        kept=kept,
        shared=shared,
    )


def _cublas_setting() -> int | None:
    pools = re.findall(r":([0-9]+):([0-9]+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    return sum(int(size) * int(count) for size, count in pools) * _KIB or None


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else default


def _is_set(variable: str) -> bool | None:
    """As torch reads a switch: 1 or 0, None where it is neither."""
    return {"1": True, "0": False}.get(os.environ.get(variable, ""))


def _release_of(torch_version: str) -> tuple[int, int]:
    match = re.match(r"([0-9]+)\.([0-9]+)", torch_version)
    release = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (2, 11) <= release <= (2, 15):
        raise UsageError(
            asked=f"library workspaces under torch {torch_version}",
            found="known are torch 2.11 to 2.15",
            do="measure a step on the device, or use one of these versions",
        )
    return release
