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
from samegrad.measure.events import BEFORE_THE_STEPS, Convolution, MemoryEvent, Operation, Recurrence, Trace
from samegrad.measure.library_calibration import BlasWorkspaces, LibraryCalibration
from samegrad.measure.measured_convolutions import Pass
from samegrad.measure.recurrent_workspaces import Passing, backward_passing, forward_passing
from samegrad.measure.reduction_workspaces import rows_sum_bytes
from samegrad.records import Category, Phase

# Overloads are left out; a product with a bias goes to cuBLASLt, the others to cuBLAS.
_PRODUCTS = frozenset({"aten.mm", "aten.bmm", "aten.baddbmm", "aten.addmv", "aten.mv", "aten.dot"})
_PRODUCTS_WITH_BIAS = frozenset({"aten.addmm", "aten._addmm_activation", "aten._scaled_mm"})
_CONVOLUTIONS = frozenset({"aten.convolution", "aten._convolution", "aten.cudnn_convolution"})
_RECURRENCE = "aten._cudnn_rnn"
_SUM = "aten.sum"
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Where no layer like it was measured.
_CONVOLUTION_RULES = {
    Pass.FORWARD: forward_bytes, Pass.INPUT_GRADIENT: input_gradient_bytes, Pass.WEIGHT_GRADIENT: weight_gradient_bytes,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workspace:
    """Memory that a library takes during ``operation``, after that operation's first ``after_takes`` storages.

    ``until_takes``: after how many of them it is given back, at once where that is as many; None where it is kept.
    """

    library: str
    operation: int
    after_takes: int
    until_takes: int | None
    size_bytes: int


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
                        library=library,
                        operation=index,
                        after_takes=len(taken),
                        until_takes=None if kept else len(taken),
                        size_bytes=size_bytes,
                    )
                )
                if kept:
                    warm.add(handle)
        found += [
            Workspace(
                library=library,
                operation=index,
                after_takes=passing.after_takes,
                until_takes=passing.until_takes,
                size_bytes=passing.size_bytes,
            )
            for library, passing in _asked_by_kernel(operation, taken, calibration)
            if passing.size_bytes
        ]
    return tuple(found)


def with_workspaces(trace: Trace, calibration: LibraryCalibration) -> Trace:
    """The trace with its workspaces as events of the category WORKSPACES; one not of CUDA has none.

    What cuBLAS keeps is there before the first step: a step has it taken anew when it begins to run.
    """
    if trace.device != "cuda":
        return trace
    waiting: dict[int, list[Workspace]] = {}
    residents = sum(event.operation == BEFORE_THE_STEPS for event in trace.events)
    for workspace in find_workspaces(trace, calibration):
        if workspace.library == "cuBLAS" and workspace.until_takes is None:
            workspace = dataclasses.replace(workspace, operation=BEFORE_THE_STEPS, after_takes=residents)
        waiting.setdefault(workspace.operation, []).append(workspace)
    woven = _Woven(waiting, 1 + max((event.storage for event in trace.events), default=-1))
    current = BEFORE_THE_STEPS
    for event in trace.events:
        if event.operation != current:
            woven.finish(current, event.operation)
            current = event.operation
        woven.add(event)
    woven.finish(current, len(trace.operations))
    return dataclasses.replace(trace, events=tuple(woven.events))


class _Woven:
    """The events of a trace with workspaces among them; ``number``: of the first workspace's storage."""

    def __init__(self, waiting: dict[int, list[Workspace]], number: int) -> None:
        self.events: list[MemoryEvent] = []
        self._waiting = waiting
        self._number = number
        self._held: list[tuple[Workspace, int]] = []
        self._taken = 0

    def add(self, event: MemoryEvent) -> None:
        if event.change_bytes > 0:
            self._pass(event.operation, self._taken)
            self._taken += 1
        else:
            # What goes after the operation goes after its workspaces.
            self._pass_all(event.operation)
        self.events.append(event)

    def finish(self, operation: int, following: int) -> None:
        """What is left of ``operation``, and all of those without events before ``following``."""
        for index in range(operation, following):
            self._pass_all(index)
            self._taken = 0

    def _pass_all(self, operation: int) -> None:
        places = {place for w in self._waiting.get(operation, ()) for place in (w.after_takes, w.until_takes or 0)}
        places |= {workspace.until_takes or 0 for workspace, _ in self._held}
        for place in sorted(places):
            self._pass(operation, place)

    def _pass(self, operation: int, place: int) -> None:
        """The workspaces at this place: what comes and goes at once, then what goes, then what stays a while."""
        left = self._waiting.get(operation, [])
        here = [workspace for workspace in left if workspace.after_takes <= place]
        self._waiting[operation] = [workspace for workspace in left if workspace.after_takes > place]
        at_once = [w for w in here if w.until_takes is not None and w.until_takes <= place]
        for workspace in at_once:
            self._give_back(workspace, self._take(workspace))
        for workspace, number in reversed(self._held):
            if (workspace.until_takes or 0) <= place:
                self._give_back(workspace, number)
        self._held = [(w, number) for w, number in self._held if (w.until_takes or 0) > place]
        for workspace in here:
            if workspace not in at_once:
                number = self._take(workspace)
                if workspace.until_takes is not None:
                    self._held.append((workspace, number))

    def _take(self, workspace: Workspace) -> int:
        self.events.append(MemoryEvent(self._number, workspace.size_bytes, workspace.operation, Category.WORKSPACES))
        self._number += 1
        return self._number - 1

    def _give_back(self, workspace: Workspace, number: int) -> None:
        self.events.append(MemoryEvent(number, -workspace.size_bytes, workspace.operation, Category.WORKSPACES))


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
) -> list[tuple[str, Passing]]:
    """What is taken around the kernels of an operation, and by which library."""
    element_bytes = _ELEMENT_BYTES.get(operation.dtype)
    if element_bytes is None:
        return []
    shape = operation.shape
    if isinstance(shape, Convolution):
        return _asked_by_convolution(operation, shape, taken, element_bytes, calibration)
    if isinstance(shape, Recurrence):
        passing = forward_passing if _packet(operation) == _RECURRENCE else backward_passing
        return [("cuDNN", found) for found in passing(shape, element_bytes, taken)]
    if _packet(operation) == _SUM and operation.phase is Phase.BACKWARD and len(taken) == 1:
        # Backward sums over leading dimensions: a bias's gradient, broadcasting undone.
        rows = operation.moved_bytes // taken[0] - 1
        return [("torch", Passing(1, 1, rows_sum_bytes(rows, taken[0] // element_bytes, calibration)))]
    return []


def _asked_by_convolution(
    operation: Operation, shape: Convolution, taken: Sequence[int], element_bytes: int, calibration: LibraryCalibration
) -> list[tuple[str, Passing]]:
    if _packet(operation) in _CONVOLUTIONS:
        found = convolution_bytes(Pass.FORWARD, shape, element_bytes, calibration)
        return [("cuDNN", Passing(len(taken), len(taken), found))]
    weight_bytes = shape.inputs * shape.outputs * shape.kernel_pixels // shape.groups * element_bytes
    asked = []
    for after, size_bytes in enumerate(taken, 1):
        if size_bytes == weight_bytes:
            which = Pass.WEIGHT_GRADIENT
        elif size_bytes == shape.rows * shape.inputs * shape.input_pixels * element_bytes:
            which = Pass.INPUT_GRADIENT
        else:
            continue
        asked.append(("cuDNN", Passing(after, after, convolution_bytes(which, shape, element_bytes, calibration))))
    return asked


def convolution_bytes(which: Pass, shape: Convolution, element_bytes: int, calibration: LibraryCalibration) -> int:
    """What cuDNN takes for one pass of a convolution: as it was measured, or by rule."""
    measured = calibration.convolutions
    found = None if measured is None else measured.bytes_of(which, shape, element_bytes)
    return _CONVOLUTION_RULES[which](shape, element_bytes, calibration) if found is None else found


def _packet(operation: Operation) -> str:
    """The operation's name without its overload."""
    return operation.name.rsplit(".", 1)[0]
