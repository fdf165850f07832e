"""What a traced step does, written down: every operation, and every storage from its first appearance to its end.

To be entered above a fake tensor mode: operations are seen once, as they are dispatched, and what stands for their
kernels is not. It is told of phases and arriving chunks as a ``phases.Listener``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.nn.modules import module as module_hooks

from samegrad import trees
from samegrad.errors import CannotTrace
from samegrad.exact.looking_on import LookingOn
from samegrad.measure import kernel_shapes, known_values, operation_costs
from samegrad.measure.events import MemoryEvent, Operation
from samegrad.measure.repeated_blocks import Repetition, Written
from samegrad.measure.shadows import Twins
from samegrad.records import Category, Phase

_BORN_IN = {
    Phase.FORWARD: Category.ACTIVATIONS,
    Phase.LOSS: Category.ACTIVATIONS,
    Phase.BACKWARD: Category.TEMPORARY,
    Phase.HANDOFF: Category.TEMPORARY,
    Phase.OPTIMIZER: Category.TEMPORARY,
}
_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


class Dispatch(Protocol):
    """Whose choice of kernels is followed."""

    @property
    def device(self) -> torch.device: ...

    def call(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Failure:
    """Where something was raised last: the module's path or words for it, and the operation if it was in one.

    ``error``: the exception's ``id``. The exception itself would keep its frames, and tensors, alive: checkpoints end
    recomputation with one.
    """

    error: int
    place: str
    operation: str = ""


def _path_within(caller: str, owner: str, path: str) -> str:
    """The path to write down for the module ``path``, run by ``owner``, which itself is written down as ``caller``."""
    if path == owner:
        return caller
    if not owner:
        return path
    return caller + path[len(owner) :] if path.startswith(f"{owner}.") else f"{caller}.{path}"


class Recorder(LookingOn):
    """Operations and memory events of whatever runs inside.

    ``twins``: for tensors with data that the user's code brings from elsewhere, a closure say. ``paths``: a module's
    path by its ``id``.
    """

    def __init__(
        self, dispatch: Dispatch, twins: Twins, paths: Mapping[int, str], gradients_of: Iterable[nn.Module] = ()
    ) -> None:
        super().__init__()
        self._dispatch = dispatch
        self._device_type = dispatch.device.type
        self.twins = twins
        self._paths = paths
        self._gradients_of = list(gradients_of)
        self._modules = [""]
        self._own_paths = [""]
        self._module_of_node: dict[int, str] = {}
        self._known: dict[int, tuple[Any, int]] = {}
        self._unseen = False
        self._stood_before: list[tuple[int, int, int]] = []
        self.written = Written()
        self._repetition = Repetition(self.written)
        self.phase = Phase.FORWARD
        self.step = 0
        self.failure: Failure | None = None
        # Where the code looked at values that are known.
        self.values_read: set[str] = set()

    # As a listener.

    def announce(self, phase: Phase) -> None:
        self.claim_gradients()
        self.phase = phase

    def arrived(self, chunk: Any) -> None:
        """The tensors of ``chunk`` are inputs."""
        self.claim([leaf for leaf in trees.leaves_of(chunk) if isinstance(leaf, Tensor)], Category.INPUTS)

    def repeating(self) -> AbstractContextManager[None]:
        return self._repetition.block()

    def stands_in(self, times: int) -> bool:
        left = self._repetition.written_again(times)
        if left is None:
            return False
        for key, (storage, number) in self._known.items():
            self._known[key] = storage, left.get(number, number)
        return True

    @contextlib.contextmanager
    def running_again(self) -> Iterator[None]:
        depth = len(self._modules)
        try:
            yield
        finally:
            del self._modules[depth:], self._own_paths[depth:]

    # What storages are for.

    def claim(self, tensors: Iterable[Tensor], category: Category) -> None:
        """``tensors`` are for ``category``, whatever they were for before."""
        for tensor in tensors:
            if tensor.device.type == self._device_type:
                self._see(tensor.untyped_storage(), category, relabel=True)

    def number_of(self, tensor: Tensor) -> int | None:
        """The number of the storage of ``tensor``; None where it is not on the device, or has none."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[1]

    def claim_gradients(self) -> None:
        for part in self._gradients_of:
            self.claim([p.grad for p in part.parameters() if p.grad is not None], Category.GRADIENTS)

    def module(self) -> str:
        """Path of the module that runs now; in backward of the one whose forward is differentiated.

        One that runs for a module it is no part of (a network handed to a step, say) has its path behind that one's.
        """
        if len(self._modules) > 1:
            return self._modules[-1]
        node = torch._C._current_autograd_node()
        return "" if node is None else self._module_of_node.get(node._sequence_nr(), "")

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """A block in which nothing is written down."""
        before, self._unseen = self._unseen, True
        try:
            yield
        finally:
            self._unseen = before

    def stand_in(self, number: int) -> Tensor:
        """A tensor of bytes that is the storage of ``number`` from now on, which was taken and is nobody's yet."""
        with self.unseen():
            tensor = torch.empty(self.written.sizes_bytes[number], dtype=torch.uint8, device=self._dispatch.device)
        self._know(tensor.untyped_storage(), number)
        return tensor

    @property
    def operations(self) -> list[Operation]:
        return self.written.operations

    def events(self) -> tuple[MemoryEvent, ...]:
        """All events so far, each under what its storage was for in the end."""
        return tuple(
            MemoryEvent(storage, change, operation, self.written.categories[storage])
            for storage, change, operation in (*self._stood_before, *self.written.events)
        )

    @contextlib.contextmanager
    def following_modules(self) -> Iterator[None]:
        """A block in which calls of modules are seen."""

        def enters(part: nn.Module, _: Any) -> None:
            caller, owner = self._modules[-1], self._own_paths[-1]
            path = self._paths.get(id(part), owner)
            self._own_paths.append(path)
            self._modules.append(_path_within(caller, owner, path))

        def leaves(*_: Any) -> None:
            error = sys.exception()
            if isinstance(error, Exception) and (self.failure is None or self.failure.error != id(error)):
                self.failure = Failure(id(error), self._place())
            self._modules.pop()
            self._own_paths.pop()

        handles = [
            module_hooks.register_module_forward_pre_hook(enters),
            module_hooks.register_module_forward_hook(leaves, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            del self._modules[1:], self._own_paths[1:]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._unseen or func is torch.ops.prim.device.default:
            return self._dispatch.call(func, args, kwargs)
        module = self._noted_module()
        given = operation_costs.tensors_in((*args, *kwargs.values()))
        if func not in _LIFTS and not all(isinstance(tensor, FakeTensor) for tensor in given):
            args, kwargs = trees.map_tensors((args, kwargs), self._brought)
            given = operation_costs.tensors_in((*args, *kwargs.values()))
        try:
            result = self._dispatch.call(func, args, kwargs)
            known_values.follow(func, args, kwargs, result)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            result = self._read(func, args, kwargs, error)
        except Exception as error:
            self.failure = Failure(id(error), self._place(), str(func))
            raise
        self._note(func, module, args, kwargs, given, result)
        return result

    def _read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> Any:
        """The result of an operation that needs values. Raises ``error`` where they are not known."""
        try:
            value = known_values.evaluate(func, args, kwargs)
        except known_values.Unknown:
            self.failure = Failure(id(error), self._place(), str(func))
            raise error from None
        self.values_read.add(self._place())
        if not isinstance(value, Tensor):
            return value
        room = torch.ops.aten.empty.memory_format
        twin = self._dispatch.call(room, (list(value.shape),), {"dtype": value.dtype, "device": self._dispatch.device})
        known_values.remember(twin, value)
        return twin

    def _place(self) -> str:
        """What runs now, in words."""
        return self.module() or ("the model" if len(self._modules) > 1 else "the step's own code")

    def _noted_module(self) -> str:
        if len(self._modules) == 1:
            return self.module()
        # The node of an operation is made before it is dispatched, so the last number is its own.
        self._module_of_node.setdefault(torch._C._autograd._get_sequence_nr() - 1, self._modules[-1])
        return self._modules[-1]

    def _brought(self, tensor: Tensor) -> Tensor:
        """``tensor``, or its twin where it has data; on the device such a twin has stood before the step."""
        if isinstance(tensor, FakeTensor):
            return tensor
        known = self.twins.known(tensor)
        twin = self.twins.of(tensor, "a tensor that the step brings from elsewhere") if known is None else known
        storage = twin.untyped_storage()
        if known is None and twin.device.type == self._device_type and storage._cdata not in self._known:
            number = self.written.number(storage.nbytes(), Category.BUFFERS)
            self._known[storage._cdata] = weakref.ref(storage), number
            self._stood_before.append((number, storage.nbytes(), -1))
        return twin.detach()

    def _note(
        self, func: Any, module: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor], result: Any
    ) -> None:
        made = operation_costs.tensors_in(result if isinstance(result, (tuple, list)) else (result,))
        if not any(tensor.device.type == self._device_type for tensor in (*given, *made)):
            # What the host does for itself: scalars of an optimizer, rows before they travel.
            return
        for tensor in made:
            _refuse_sparse(tensor, func, self._place())
        index = len(self.operations)
        cost = operation_costs.cost_of(func, args, kwargs, result, given, made)
        self.operations.append(
            Operation(
                str(func),
                module,
                self.phase,
                self.step,
                cost.flops,
                cost.moved_bytes,
                cost.dtype,
                cost.kernels,
                kernel_shapes.shape_of(func, args),
                _bus_bytes(func, given),
            )
        )
        category = _BORN_IN[self.phase]
        # Numbers that Python brings are the host's, here as where bytes of a real step are counted.
        brought = _memory_of(made) if func in _LIFTS else None
        for tensor in made:
            storage = tensor.untyped_storage()
            if tensor.device.type != self._device_type or storage._cdata in self._known:
                continue
            if brought is None:
                brought = _memory_of(given)
            # A view of memory that nobody claimed, such as a table that stands elsewhere, takes none.
            if storage._cdata not in brought:
                self._see(storage, category)
        self._pass_through(cost.scratch, index)

    def _pass_through(self, changes_bytes: Iterable[int], index: int) -> None:
        """Memory that a kernel takes for itself and gives back."""
        taken: dict[int, list[int]] = {}
        for change in changes_bytes:
            if change > 0:
                number = self.written.number(change, Category.TEMPORARY)
                taken.setdefault(change, []).append(number)
            else:
                number = taken[-change].pop()
            self.written.events.append((number, change, index))

    def _see(self, storage: torch.UntypedStorage, category: Category, *, relabel: bool = False) -> None:
        key = storage._cdata
        if key in self._known:
            if relabel:
                self.written.categories[self._known[key][1]] = category
            return
        size = storage.nbytes()
        if size == 0:
            return
        number = self.written.number(size, category)
        self._know(storage, number)
        self.written.events.append((number, size, len(self.operations) - 1))

    def _know(self, storage: torch.UntypedStorage, number: int) -> None:
        key = storage._cdata
        self._known[key] = weakref.ref(storage, lambda _: self._free(key)), number

    def _free(self, key: int) -> None:
        _, number = self._known.pop(key)
        self.written.events.append((number, -self.written.sizes_bytes[number], len(self.operations) - 1))


def _bus_bytes(func: Any, given: list[Tensor]) -> int:
    """What a copy in place brings to the device, or, below 0, to the host. Rows that arrive come in other ways."""
    if func is not torch.ops.aten.copy_.default or len(given) < 2 or given[0].device.type == given[1].device.type:
        return 0
    size = given[0].numel() * given[0].itemsize
    return -size if given[0].device.type == "cpu" else size


def _memory_of(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _refuse_sparse(tensor: Tensor, func: Any, place: str) -> None:
    if tensor.layout is not torch.strided:
        raise CannotTrace(
            asked="follow the step without running it",
            found=f"{func} in {place} makes a {tensor.layout} tensor, whose size depends on values",
            do="measure the step by probes on its device, or use sparse=False",
        )
