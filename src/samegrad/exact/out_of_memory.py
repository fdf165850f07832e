"""What running out of memory looks like: types and codes; text only inside types that carry no code.

Allocators raise types of their own. Libraries under torch raise plain RuntimeErrors whose text begins with their own
status name; a text is looked at only there, and only at its beginning, so that a user's sentence about memory is not
taken for an allocator's. Statuses that may mean something else (CUBLAS_STATUS_NOT_INITIALIZED after a device-side
assert, CUDNN_STATUS_NOT_SUPPORTED for strides) are not on the list, nor are failures of a collective: their group is
lost.

torch's compiler wraps what it meets while it compiles, or writes its type and text into an error of its own; what is
wrapped or written there is looked at in its place.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator

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
    # The driver gave no room for a kernel; Triton's launchers have words of their own.
    Sign(RuntimeError, begins=r"Triton Error \[CUDA\]: out of memory|Triton Error \[HIP\]: +Code: 2, Mess+age: "),
    # The host's allocator: torch's, then Python's and numpy's.
    Sign(RuntimeError, begins=r"(\[enforce fail at [^\]]*\] [^.]*\. )?DefaultCPUAllocator: can't allocate memory"),
    Sign(RuntimeError, begins="MPS backend out of memory"),
    Sign(MemoryError),
)


# What a compiler's error that has no cause begins with, by the name that it calls the type.
_WRITTEN_KINDS: dict[str, type[BaseException]] = {
    kind.__name__: kind for kind in (torch.OutOfMemoryError, torch.AcceleratorError, RuntimeError, MemoryError)
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is one of SIGNS. What an error was raised from is not looked at, but for a compiler's."""
    return any(sign.is_in(one) for one in _and_compiled(error) for sign in SIGNS)


def _and_compiled(error: BaseException) -> Iterator[BaseException]:
    """``error``, and what torch's compiler met where the error is the compiler's."""
    # Whoever raises a compiler's error has imported the compiler; asking for it here would cost every start-up.
    dynamo, inductor = sys.modules.get("torch._dynamo.exc"), sys.modules.get("torch._inductor.exc")
    yield error
    while dynamo is not None and isinstance(error, dynamo.BackendCompilerFailed):
        error = error.inner_exception
        yield error
    written = [dynamo.InternalTorchDynamoError] if dynamo is not None else []
    written += [inductor.LoweringException] if inductor is not None else []
    if isinstance(error, tuple(written)):
        name, _, text = str(error).partition(": ")
        if name in _WRITTEN_KINDS:
            yield _WRITTEN_KINDS[name](text)
