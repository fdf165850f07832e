"""Twins without data for everything a step works on, standing in its place for the time of a trace.

Modules stay the user's own, since losses and closures hold them; what stands in their slots for parameters and buffers
are twins. The optimizer steps on twins of its parameters, with twins of its state. Batches come again as twins, and
rows on disk as rows that are read from nowhere.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotTrace
from samegrad.exact.attributes import can_hold_state
from samegrad.exact.held import Held, held_in, of_a_library
from samegrad.measure import known_values

# What a module keeps for itself and a forward could change.
_SLOTS = (
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip

# Path and module.
NamedModules = list[tuple[str, nn.Module]]


def named_modules(declared: DeclaredStep) -> NamedModules:
    """All modules of the step, each by its first path; those of a loss below "loss_fn"."""
    found = list(declared.network.named_modules())
    if declared.loss_module is not None:
        found += declared.loss_module.named_modules(prefix="loss_fn")
    return found


def held_with_hooks(declared: DeclaredStep, modules: NamedModules) -> Held:
    """What the step's functions hold, the methods of its modules and the user's hooks included: they run too.

    A cache in a global or in an object of a module would keep twins.
    """
    functions: dict[str, Any] = {"loss_fn": declared.loss_fn, "forward": declared.forward}
    for kind in {type(part): None for _, part in modules}:
        functions |= _methods_of(kind)
    for path, part in modules:
        objects = {key: value for key, value in vars(part).items() if key not in _MODULES_OWN}
        functions |= {f"{path}.{key}" if path else key: value for key, value in objects.items() if _is_object(value)}
        for hooks in (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks):
            functions |= {f"a hook of {path or 'the model'} ({key})": hook for key, hook in hooks.items()}
        for name, parameter in part._parameters.items():
            if parameter is not None:
                hooks_of = (parameter._backward_hooks or {}).items()
                functions |= {f"a hook of {path}.{name} ({key})": hook for key, hook in hooks_of}
    return held_in(functions, [declared.model, *declared.modules])


# What nn.Module keeps for itself.
_MODULES_OWN = frozenset(vars(nn.Module()))


def _is_object(value: Any) -> bool:
    """Whether ``value`` is no state by itself, but may hold some."""
    return not (isinstance(value, nn.Module) or can_hold_state(value))


def _methods_of(kind: type) -> dict[str, Any]:
    """The functions that the user's own classes among the bases of ``kind`` define."""
    own = [base for base in kind.__mro__ if base is not object and not of_a_library(base)]
    return {
        f"{base.__name__}.{name}": method
        for base in own
        for name, method in vars(base).items()
        if isinstance(method, FunctionType)
    }


class Twins:
    """Twins of tensors, one for each, sharing memory where the tensors do. To be used inside of a fake tensor mode.

    Tensors on ``home`` (or without data) get twins on ``device``, the others stay where they are.
    """

    def __init__(self, home: torch.device, device: torch.device) -> None:
        self._home, self.device = home, device
        self._of: dict[int, tuple[Tensor, Tensor]] = {}
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._memory: dict[int, Tensor] = {}

    def of(self, tensor: Tensor, name: str) -> Tensor:
        """The twin of ``tensor``. Raises CannotTrace for ``name``, where it is of a kind that has none."""
        if id(tensor) not in self._of:
            # The tensor is kept too, so that its id stays its own.
            self._of[id(tensor)] = tensor, self._made(tensor, name)
            if tensor.is_leaf:
                self._gradients.append((tensor, tensor.grad))
        return self._of[id(tensor)][1]

    def known(self, tensor: Tensor) -> Tensor | None:
        return self._of[id(tensor)][1] if id(tensor) in self._of else None

    def forget_replaced(self) -> None:
        """Memory in whose place every twin that lay in it has been given other memory goes."""
        used = {twin.untyped_storage()._cdata for _, twin in self._of.values()}
        self._memory = {key: whole for key, whole in self._memory.items() if whole.untyped_storage()._cdata in used}

    def restore_gradients(self) -> None:
        """A parameter that is reached past its slot has received one without data."""
        for tensor, gradient in self._gradients:
            if tensor.grad is not gradient:
                tensor.grad = gradient

    def _made(self, tensor: Tensor, name: str) -> Tensor:
        _refuse_unusual(tensor, name)
        device = self.device if tensor.device.type in (self._home.type, "meta") else tensor.device
        twin = self._data(tensor, device)
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            vars(twin).update({key: value for key, value in vars(tensor).items() if key not in vars(twin)})
        elif tensor.requires_grad:
            twin.requires_grad_()
        known_values.remember(twin, tensor)
        for hook in (tensor._backward_hooks or {}).values():
            twin.register_hook(hook)  # type: ignore[no-untyped-call]  # torch has no types here
        return twin

    def _data(self, tensor: Tensor, device: torch.device) -> Tensor:
        storage = tensor.untyped_storage()
        whole = self._memory.get(storage._cdata)
        if whole is None:
            if storage.nbytes() == tensor.numel() * tensor.itemsize:
                whole = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            else:
                # A slice of a larger tensor keeps all of it.
                whole = torch.empty(storage.nbytes() // tensor.itemsize, dtype=tensor.dtype, device=device)
            self._memory[storage._cdata] = whole
        if whole.shape == tensor.shape and whole.stride() == tensor.stride() and whole.dtype is tensor.dtype:
            return whole.detach()
        return whole.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).detach()


def _refuse_unusual(tensor: Tensor, name: str) -> None:
    kind = type(tensor)
    found = ""
    if tensor.layout is not torch.strided:
        found = f"{name} is a {tensor.layout} tensor"
    elif not (kind is Tensor or kind is nn.Parameter or kind is nn.Buffer):
        found = f"{name} is a {kind.__name__}"
    if found:
        raise _not_followed(found)


def refuse_hooks_in_backward(modules: NamedModules) -> None:
    """Raises CannotTrace naming a parameter whose hook is called when its gradient is there; twins have none."""
    for path, part in modules:
        for name, parameter in part._parameters.items():
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                place = f"{path}.{name}" if path else name
                raise _not_followed(
                    f"{place} has a post-accumulate-grad hook, which may step an optimizer in the middle of backward"
                )


def _not_followed(found: str) -> CannotTrace:
    return CannotTrace(
        asked="follow the step without running it", found=found, do="measure the step by probes on its device"
    )


@contextlib.contextmanager
def standing_in(modules: NamedModules, twins: Twins) -> Iterator[None]:
    """Twins in the slots of all ``modules`` (path and module); the slots as before on every way out."""
    kept = [(part, part.training, {slot: vars(part)[slot].copy() for slot in _SLOTS}) for _, part in modules]
    try:
        for path, part in modules:
            for slots in (part._parameters, part._buffers):
                for key, tensor in slots.items():
                    if tensor is None:
                        continue
                    twin = twins.of(tensor, f"{path}.{key}" if path else key)
                    if tensor.grad is not None and twin.grad is None:
                        twin.grad = twins.of(tensor.grad, f"the gradient of {path}.{key}")
                    slots[key] = twin  # type: ignore[assignment]  # a twin of a parameter is one
            if isinstance(part, nn.RNNBase):
                # It lists its weights a second time, and lays them out anew in a step that finds others there.
                part._init_flat_weights()
        yield
    finally:
        for part, training, slots_before in kept:
            part.training = training
            for slot, before in slots_before.items():
                now = vars(part)[slot]
                now.clear()
                now.update(before)
        twins.restore_gradients()


def shadow_optimizer(optimizer: torch.optim.Optimizer, twins: Twins, numbers: Numbers) -> torch.optim.Optimizer:
    """A copy of ``optimizer`` for the twins of its parameters, with twins of the state that exists."""
    shadow = copied_optimizer(optimizer)
    shadow.param_groups = [_shadow_group(group, twins) for group in optimizer.param_groups]
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, Tensor):
            shadow.state[twins.of(parameter, "an optimizer's parameter")] = _shadow_state(state, twins, numbers)
    return shadow


def copied_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A shallow copy without state and without hooks (the user's are not called), whose groups are the original's."""
    copied = copy.copy(optimizer)
    # Copying leaves out what a user's optimizer keeps of its own, and must leave out a step that a scheduler wrapped.
    own = {key: value for key, value in vars(optimizer).items() if key not in vars(copied) and key != "step"}
    vars(copied).update(own)
    copied.state = collections.defaultdict(dict)
    return copied


def _shadow_group(group: dict[str, Any], twins: Twins) -> dict[str, Any]:
    parameters = [twins.of(parameter, "an optimizer's parameter") for parameter in group["params"]]
    shadow = {**group, "params": parameters}
    plain = not group.get("fused") and not group.get("differentiable")
    if "foreach" in group and group["foreach"] is None and plain:
        # torch chooses it for plain tensors on CUDA; twins are of a type of their own.
        shadow["foreach"] = twins.device.type == "cuda"
    return shadow


def _shadow_state(state: dict[str, Any], twins: Twins, numbers: Numbers) -> dict[str, Any]:
    """State without its data; numbers that a step reads, such as its count, stay numbers."""

    def shadow(key: str, value: Any) -> Any:
        if id(value) in numbers:
            return torch.tensor(numbers[id(value)], dtype=value.dtype, device="cpu")
        return twins.of(value, f"the optimizer's {key}") if isinstance(value, Tensor) else copy.deepcopy(value)

    return {key: shadow(key, value) for key, value in state.items()}


# Values of a state's scalars on the host by their ``id``.
Numbers = dict[int, float]


def read_numbers(optimizer: torch.optim.Optimizer | None) -> Numbers:
    """The scalars on the host in an optimizer's state, which its step reads. To be called outside of a fake mode."""
    states = [] if optimizer is None else optimizer.state.values()
    values = [value for state in states for value in trees.leaves_of(state) if isinstance(value, Tensor)]
    return {id(value): value.item() for value in values if value.dim() == 0 and value.device.type == "cpu"}


@dataclasses.dataclass(frozen=True)
class _RowsWithoutData:
    """A row source that reads nothing."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        rows = (stop - start, *self.shape[1:])
        return torch.empty(rows, dtype=self.dtype, device="cpu") if out is None else out


def shadow_batch(batch: Any, twins: Twins) -> Any:
    """``batch`` with twins of its tensors and of its row sources."""

    def shadow(leaf: Any, path: str) -> Any:
        if isinstance(leaf, Tensor):
            return twins.of(leaf, path)
        return _RowsWithoutData(tuple(leaf.shape), leaf.dtype) if trees.is_row_source(leaf) else leaf

    leaves = [shadow(leaf, path) for path, leaf in trees.flatten_with_paths(batch, "batch")]
    return trees.unflatten(leaves, trees.flatten(batch)[1])
