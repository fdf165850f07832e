"""What is an out-of-memory error and what is not: types, codes, and texts of plain RuntimeErrors only."""

from __future__ import annotations

import pickle
import weakref
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError
from torch._inductor.exc import InductorError, LoweringException

import samegrad as sg
from samegrad.exact.out_of_memory import SIGNS, OutOfMemory, is_out_of_memory
from samegrad.measure.within_memory import let_go


def accelerator(text: str, code: int | None = None) -> torch.AcceleratorError:
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code
    return error


def lowering(error: Exception) -> LoweringException:
    return LoweringException(error, "aten.mm.default", [], {})


# As torch words them: c10/cuda, ATen/cuda/Exceptions.h, ATen/cudnn/Exceptions.h, c10/core/impl/alloc_cpu.cpp.
LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB"),
    torch.OutOfMemoryError("anything"),
    OutOfMemory(asked="a", found="b", do="c"),
    accelerator("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", 2),
    accelerator("whatever it says", 2),
    accelerator("CUDA error: out of memory"),
    accelerator("HIP error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("Triton Error [HIP]:  Code: 2, Messsage: out of memory"),
    MemoryError(),
    BackendCompilerFailed("inductor", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), None),
    BackendCompilerFailed("inductor", RuntimeError("Triton Error [CUDA]: out of memory"), None),
    InductorError(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
    InductorError(lowering(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), None),
    lowering(RuntimeError("Triton Error [CUDA]: out of memory")),
    InternalTorchDynamoError("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),
]


class Theirs(RuntimeError):
    pass


OTHERS = [
    RuntimeError("CUDA out of memory"),
    RuntimeError("my loader is out of memory"),
    RuntimeError("while handling: cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( ... )`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear with a non-contiguous input."),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    Theirs("MPS backend out of memory"),
    Theirs("CUDA error: out of memory"),
    torch.distributed.DistBackendError("NCCL error: unhandled cuda error, out of memory"),
    accelerator("CUDA error: an illegal memory access was encountered", 700),
    accelerator("CUDA error: out of memory, says a text with another code", 700),
    accelerator("CUDA error: device-side assert triggered"),
    ValueError("out of memory"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("Triton Error [HIP]:  Code: 700, Messsage: illegal memory access, out of memory"),
    RuntimeError("OutOfMemoryError: CUDA out of memory"),
    BackendCompilerFailed("inductor", RuntimeError("no compiler is out of memory"), None),
    BackendCompilerFailed("mine", ValueError("OutOfMemoryError: of a kind"), None),
    lowering(ValueError("out of memory")),
    InternalTorchDynamoError("KeyError: OutOfMemoryError: what"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", LACKS, ids=lambda error: f"{type(error).__name__}: {str(error)[:40]}")
def test_a_lack_of_memory_is_told(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: f"{type(error).__name__}: {str(error)[:40]}")
def test_another_error_is_left_alone(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_every_sign_is_needed() -> None:
    for sign in SIGNS:
        others = [other for other in SIGNS if other is not sign]
        texts = [*LACKS, RuntimeError("DefaultCPUAllocator: can't allocate memory")]
        assert any(sign.is_in(error) and not any(other.is_in(error) for other in others) for error in texts), sign


def test_the_hosts_allocator_as_it_is() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_what_a_compilers_backend_lacks_is_told_and_let_go_of() -> None:
    class Large:
        pass

    seen: list[weakref.ref[Large]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        large = Large()
        seen.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    except RuntimeError as error:
        assert type(error) is not torch.OutOfMemoryError and is_out_of_memory(error)
        let_go(error)
    assert seen[0]() is None


def test_what_it_was_raised_from_is_not_looked_at() -> None:
    try:
        try:
            raise torch.OutOfMemoryError("theirs to handle")
        except torch.OutOfMemoryError as cause:
            raise ValueError("a batch that is too large") from cause
    except ValueError as error:
        assert not is_out_of_memory(error)


def test_the_error_is_torchs_and_ours_and_survives_a_process() -> None:
    error = OutOfMemory(asked="a step", found="no memory", do="take less")
    assert isinstance(error, torch.OutOfMemoryError) and isinstance(error, sg.SamegradError)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is OutOfMemory and str(again) == str(error) and again.exit_code == 5
