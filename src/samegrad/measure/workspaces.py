"""Library workspaces as events of a trace: what cuBLAS, cuDNN and torch's own kernels take besides tensors.

A trace sees tensors; what a library asks the same allocator for on its own is missing from it. cuBLAS has a workspace
for each thread and stream that multiplies matrices, which torch takes at the first product and keeps (from 2.15 on it
takes one for each product); forward and backward run in threads of their own. cuDNN takes one around each convolution
and recurrent layer, torch's reduction kernel one around a sum over many rows, such as a bias's gradient. What the
driver holds for the process (context, code of kernels) is outside the allocator and no event.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from samegrad.measure.convolution_workspaces import forward_bytes, input_gradient_bytes, weight_gradient_bytes
from samegrad.measure.events import Convolution, MemoryEvent, Operation, Recurrence, Trace
from samegrad.measure.library_calibration import BlasWorkspaces, LibraryCalibration
from samegrad.measure.recurrent_workspaces import recurrence_bytes
from samegrad.measure.reduction_workspaces import rows_sum_bytes
from samegrad.records import Category, Phase

# Overloads are left out; a product with a bias goes to cuBLASLt, the others to cuBLAS.
_PRODUCTS = frozenset({"aten.mm", "aten.bmm", "aten.baddbmm", "aten.addmv", "aten.mv", "aten.dot"})
_PRODUCTS_WITH_BIAS = frozenset({"aten.addmm", "aten._addmm_activation", "aten._scaled_mm"})
_CONVOLUTIONS = frozenset({"aten.convolution", "aten._convolution", "aten.cudnn_convolution"})
_RECURRENCE = "aten._cudnn_rnn"
_SUM = "aten.sum"
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workspace:
    """Memory that a library takes during ``operation``, after that operation's first ``after_takes`` storages.

    ``kept``: until the end; otherwise it is given back at once.
    """

    library: str
    operation: int
    after_takes: int
    size_bytes: int
    kept: bool = False


def find_workspaces(trace: Trace, calibration: LibraryCalibration) -> tuple[Workspace, ...]:
    """The workspaces of a CUDA trace, in order.

    Convolutions and recurrent layers whose shape the trace does not tell have none.
    """
    takes: dict[int, list[int]] = {}
    for event in trace.events:
        if event.change_bytes > 0:
            takes.setdefault(event.operation, []).append(event.change_bytes)
    found: list[Workspace] = []
    # Handles that have theirs: library, and whether it is the backward's thread.
    warm: set[tuple[str, bool]] = set()
    for index, operation in enumerate(trace.operations):
        taken = takes.get(index, [])
        for library, size_bytes in _asked_by_product(operation, calibration.blas):
            handle = library, operation.phase is Phase.BACKWARD
            if handle not in warm:
                kept = calibration.blas.kept
                found.append(
                    Workspace(
                        library=library, operation=index, after_takes=len(taken), size_bytes=size_bytes, kept=kept
                    )
                )
                if kept:
                    warm.add(handle)
        for library, after, size_bytes in _asked_by_kernel(operation, taken, calibration):
            if size_bytes:
                found.append(Workspace(library=library, operation=index, after_takes=after, size_bytes=size_bytes))
    return tuple(found)


def with_workspaces(trace: Trace, calibration: LibraryCalibration) -> Trace:
    """The trace with its workspaces as events of the category TEMPORARY; one not of CUDA has none."""
    if trace.device != "cuda":
        return trace
    waiting: dict[int, list[Workspace]] = {}
    for workspace in find_workspaces(trace, calibration):
        waiting.setdefault(workspace.operation, []).append(workspace)
    number = 1 + max((event.storage for event in trace.events), default=-1)
    events: list[MemoryEvent] = []

    def insert(operation: int, after_takes: int | None = None) -> None:
        """Those that come after so many takes of the operation, or all that are left of it."""
        nonlocal number
        left = waiting.get(operation, [])
        while left and (after_takes is None or left[0].after_takes <= after_takes):
            workspace = left.pop(0)
            events.append(MemoryEvent(number, workspace.size_bytes, operation, Category.TEMPORARY))
            if not workspace.kept:
                events.append(MemoryEvent(number, -workspace.size_bytes, operation, Category.TEMPORARY))
            number += 1

    current, taken = -1, 0
    for event in trace.events:
        if event.operation != current:
            for operation in range(current, event.operation):
                insert(operation)
            current, taken = event.operation, 0
        if event.change_bytes > 0:
            insert(current, taken)
            taken += 1
        else:
            # What goes after the operation goes after its workspaces.
            insert(current)
        events.append(event)
    for operation in range(current, len(trace.operations)):
        insert(operation)
    return dataclasses.replace(trace, events=tuple(events))


def _asked_by_product(operation: Operation, blas: BlasWorkspaces) -> list[tuple[str, int]]:
    """Libraries that a product of matrices asks for a workspace, and its bytes."""
    name = _packet(operation)
    asked = []
    # A kept cuBLASLt handle is a cuBLAS handle, and brings that one's workspace.
    if name in _PRODUCTS or (name in _PRODUCTS_WITH_BIAS and blas.kept):
        asked.append(("cuBLAS", blas.cublas_bytes))
    if name in _PRODUCTS_WITH_BIAS and not blas.shared:
        asked.append(("cuBLASLt", blas.cublaslt_bytes))
    return asked


def _asked_by_kernel(
    operation: Operation, taken: Sequence[int], calibration: LibraryCalibration
) -> list[tuple[str, int, int]]:
    """What is taken around the kernels of an operation: library, after how many of its storages, and bytes."""
    element_bytes = _ELEMENT_BYTES.get(operation.dtype)
    if element_bytes is None:
        return []
    shape = operation.shape
    if isinstance(shape, Convolution):
        return _asked_by_convolution(operation, shape, taken, element_bytes, calibration)
    if isinstance(shape, Recurrence):
        size_bytes = recurrence_bytes(shape, element_bytes)
        # Backward takes it for the gradients by inputs and states, and again for those by weights.
        places = [len(taken)] if _packet(operation) == _RECURRENCE else [min(3, len(taken)), len(taken)]
        return [("cuDNN", after, size_bytes) for after in places]
    if _packet(operation) == _SUM and operation.phase is Phase.BACKWARD and len(taken) == 1:
        # Backward sums over leading dimensions: a bias's gradient, broadcasting undone.
        rows = operation.moved_bytes // taken[0] - 1
        return [("torch", 1, rows_sum_bytes(rows, taken[0] // element_bytes, calibration))]
    return []


def _asked_by_convolution(
    operation: Operation, shape: Convolution, taken: Sequence[int], element_bytes: int, calibration: LibraryCalibration
) -> list[tuple[str, int, int]]:
    if _packet(operation) in _CONVOLUTIONS:
        return [("cuDNN", len(taken), forward_bytes(shape, element_bytes, calibration))]
    weight_bytes = shape.inputs * shape.outputs * shape.kernel_pixels // shape.groups * element_bytes
    asked = []
    for after, size_bytes in enumerate(taken, 1):
        if size_bytes == weight_bytes:
            asked.append(("cuDNN", after, weight_gradient_bytes(shape, element_bytes, calibration)))
        elif size_bytes == shape.rows * shape.inputs * shape.input_pixels * element_bytes:
            asked.append(("cuDNN", after, input_gradient_bytes(shape, element_bytes, calibration)))
    return asked


def _packet(operation: Operation) -> str:
    """The operation's name without its overload."""
    return operation.name.rsplit(".", 1)[0]
