"""What running out of memory looks like: types and codes; text only inside types that carry no code.

Allocators raise types of their own. Libraries under torch raise plain RuntimeErrors whose text begins with their own
status name; a text is looked at only there, and only at its beginning, so that a user's sentence about memory is not
taken for an allocator's. Statuses that may mean something else (CUBLAS_STATUS_NOT_INITIALIZED after a device-side
assert, CUDNN_STATUS_NOT_SUPPORTED for strides) are not on the list, nor are failures of a collective: their group is
lost.
"""

from __future__ import annotations

import dataclasses
import re

import torch

from samegrad.errors import OverBudget

# cudaErrorMemoryAllocation; ROCm's hipErrorOutOfMemory has the same number.
_OUT_OF_MEMORY_CODE = 2


class OutOfMemory(OverBudget, torch.OutOfMemoryError):
    """Out of memory, and either there was no smaller plan or none may be taken. Nothing of a backward stays."""


@dataclasses.dataclass(frozen=True)
class Sign:
    """One way to run out: an error of ``kind``, with this ``code`` or with a text that begins with ``begins``.

    Neither means that the type says it all.
    """

    kind: type[BaseException]
    code: int | None = None
    begins: str | None = None

    def is_in(self, error: BaseException) -> bool:
        if self.code is None and self.begins is None:
            return isinstance(error, self.kind)
        if self.code is not None and isinstance(code := getattr(error, "error_code", None), int):
            return isinstance(error, self.kind) and code == self.code
        # Types derived from RuntimeError have a meaning of their own.
        return type(error) is self.kind and self.begins is not None and bool(re.match(self.begins, str(error)))


SIGNS = (
    Sign(torch.OutOfMemoryError),
    Sign(torch.AcceleratorError, code=_OUT_OF_MEMORY_CODE, begins="CUDA error: out of memory|HIP error: out of memory"),
    Sign(RuntimeError, begins="CUDA driver error: out of memory"),
    Sign(RuntimeError, begins="CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
    Sign(RuntimeError, begins="CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling"),
    Sign(RuntimeError, begins="cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
    Sign(RuntimeError, begins="cuFFT error: CUFFT_ALLOC_FAILED"),
    Sign(RuntimeError, begins="cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    Sign(RuntimeError, begins="cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_(DEVICE|HOST)_ALLOCATION_FAILED"),
    # The host's allocator: torch's, then Python's and numpy's.
    Sign(RuntimeError, begins=r"(\[enforce fail at [^\]]*\] [^.]*\. )?DefaultCPUAllocator: can't allocate memory"),
    Sign(RuntimeError, begins="MPS backend out of memory"),
    Sign(MemoryError),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is one of SIGNS. What an error was raised from is not looked at."""
    return any(sign.is_in(error) for sign in SIGNS)
