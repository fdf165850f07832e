"""Library workspaces as events of a trace: what cuBLAS and cuDNN take through the same allocator as tensors.

A trace sees tensors; what a library asks the allocator for on its own is missing from it. cuBLAS has a workspace for
each thread and stream that multiplies matrices, which torch takes at the first product and keeps (from 2.15 on it
takes one for each product); forward and backward run in threads of their own. cuDNN takes one around each convolution.
What the driver holds for the process (context, code of kernels) is outside the allocator and no event.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from samegrad.measure import convolution_workspaces
from samegrad.measure.events import MemoryEvent, Operation, Trace
from samegrad.measure.library_calibration import LibraryCalibration
from samegrad.records import Category, Phase

# Overloads are left out; a product with a bias goes to cuBLASLt, the others to cuBLAS.
_PRODUCTS = frozenset({"aten.mm", "aten.bmm", "aten.baddbmm", "aten.addmv", "aten.mv", "aten.dot", "aten.linear"})
_PRODUCTS_WITH_BIAS = frozenset({"aten.addmm", "aten._addmm_activation", "aten._scaled_mm"})
_CONVOLUTIONS = frozenset({"aten.convolution", "aten.cudnn_convolution", "aten._convolution"})
_CONVOLUTION_BACKWARDS = frozenset({"aten.convolution_backward"})
_ELEMENT_BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workspace:
    """Memory that a library takes during ``operation``, after that operation's first ``after_takes`` storages.

    ``kept``: until the end; otherwise it is given back at once.
    """

    library: str
    operation: int
    after_takes: int
    size_bytes: int
    kept: bool


def find_workspaces(trace: Trace, calibration: LibraryCalibration) -> tuple[Workspace, ...]:
    """The workspaces of a CUDA trace, in order. Of a convolution whose shape the trace does not tell there is none."""
    found: list[Workspace] = []
    blas = calibration.blas
    warm: set[tuple[str, bool]] = set()
    takes = _takes_by_operation(trace)
    for index, operation in enumerate(trace.operations):
        name = operation.name.rsplit(".", 1)[0]
        taken = takes.get(index, [])
        if name in _PRODUCTS or name in _PRODUCTS_WITH_BIAS:
            in_backward = operation.phase is Phase.BACKWARD
            asked = [("cuBLAS", blas.cublas_bytes)] if blas.kept or name in _PRODUCTS else []
            if name in _PRODUCTS_WITH_BIAS and not blas.shared:
                asked.append(("cuBLASLt", blas.cublaslt_bytes))
            for library, size_bytes in asked:
                if blas.kept and (library, in_backward) in warm:
                    continue
                warm.add((library, in_backward))
                found.append(
                    Workspace(
                        library=library,
                        operation=index,
                        after_takes=len(taken),
                        size_bytes=size_bytes,
                        kept=blas.kept,
                    )
                )
        elif operation.convolution is not None and (name in _CONVOLUTIONS or name in _CONVOLUTION_BACKWARDS):
            sizes = _convolution_bytes(operation, taken, calibration, backward=name in _CONVOLUTION_BACKWARDS)
            found += [
                Workspace(library="cuDNN", operation=index, after_takes=after, size_bytes=size_bytes, kept=False)
                for after, size_bytes in sizes
                if size_bytes
            ]
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

    def insert(operation: int, after_takes: int | None) -> None:
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
                insert(operation, None)
            current, taken = event.operation, 0
        if event.change_bytes > 0:
            insert(current, taken)
            taken += 1
        else:
            # What goes after the operation goes after its workspaces.
            insert(current, None)
        events.append(event)
    for operation in range(current, len(trace.operations)):
        insert(operation, None)
    return dataclasses.replace(trace, events=tuple(events))


def _convolution_bytes(
    operation: Operation, taken: Sequence[int], calibration: LibraryCalibration, *, backward: bool
) -> list[tuple[int, int]]:
    """After how many of the operation's storages cuDNN takes how much."""
    shape, constants = operation.convolution, calibration.convolutions
    element_bytes = _ELEMENT_BYTES.get(operation.dtype)
    if shape is None or element_bytes is None:
        return []
    if not backward:
        return [(len(taken), convolution_workspaces.forward_bytes(shape, element_bytes, constants))]
    weight_bytes = shape.inputs * shape.outputs * shape.kernel_pixels // shape.groups * element_bytes
    sizes = []
    for position, size_bytes in enumerate(taken):
        if size_bytes == weight_bytes:
            sizes.append((position + 1, convolution_workspaces.weight_gradient_bytes(shape, element_bytes, constants)))
        elif size_bytes == shape.rows * shape.inputs * shape.input_pixels * element_bytes:
            sizes.append((position + 1, convolution_workspaces.input_gradient_bytes(shape, element_bytes, constants)))
    return sizes


def _takes_by_operation(trace: Trace) -> dict[int, list[int]]:
    takes: dict[int, list[int]] = {}
    for event in trace.events:
        if event.change_bytes > 0:
            takes.setdefault(event.operation, []).append(event.change_bytes)
    return takes
