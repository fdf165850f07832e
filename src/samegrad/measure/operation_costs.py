"""What one operation costs: arithmetic, bytes moved, kernels launched, memory it takes for itself."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, flop_registry

from samegrad.measure import kernel_scratch


class Cost(NamedTuple):
    """As ``events.Operation`` has it.

    ``scratch``: what is taken and given back inside the operation, as ``kernel_scratch`` has it.
    """

    flops: int
    moved_bytes: int
    dtype: str
    kernels: int
    scratch: tuple[int, ...] = ()


# Tensors of one launch of torch's multi-tensor kernels by how many lists they walk, and blocks of so many elements
# (``aten/src/ATen/native/cuda/MultiTensorApply.cuh``).
_TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}
_TENSORS_A_LONG_LAUNCH = 30
_BLOCKS_A_LAUNCH, _ELEMENTS_A_BLOCK = 320, 65536

_MAKE_ROOM = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh")


def cost_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, given: list[Tensor], made: list[Tensor]
) -> Cost:
    """The cost of ``func``, which was ``given`` tensors and ``made`` others."""
    dtype = _dtype_of(given, made)
    if _only_looks(func) or (made and _makes_nothing_new(func, given, made)):
        return Cost(0, 0, dtype, 0)
    return Cost(
        _flops(func, args, kwargs, result),
        _moved_bytes(given, made),
        dtype,
        _launches(args) if func._schema.name.startswith(("aten::_foreach_", "aten::_fused_")) else 1,
        kernel_scratch.scratch_changes(func, args) if any(tensor.device.type == "cuda" for tensor in given) else (),
    )


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0
    if func._overloadpacket is torch.ops.aten.convolution_backward:
        return _flops_of_backward_convolution(args)
    return int(formula(*args, **kwargs, out_val=result))


def _flops_of_backward_convolution(args: tuple[Any, ...]) -> int:
    """As many as the convolution itself took, for each of input and weight whose gradient is asked for.

    torch's formula lets every channel meet every other whatever the groups are: of a depthwise convolution it is wrong
    by the number of its channels, which kernels of a row's own make a number of rows times channels.
    """
    gradient, given, weight, transposed, asked = args[0], args[1], args[2], args[7], args[10]
    once = conv_flop_count(list(given.shape), list(weight.shape), list(gradient.shape), transposed=transposed)
    return int(once * sum(map(bool, asked[:2])))


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments or results, and in lists there."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [entry for entry in value if isinstance(entry, Tensor)]
    return found


@functools.cache
def _only_looks(func: Any) -> bool:
    """Whether ``func`` returns views, or room that nothing is written into."""
    schema = func._schema
    if schema.name.removeprefix("aten::") in _MAKE_ROOM:
        return True
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _makes_nothing_new(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Views that the schema does not tell, such as ``_unsafe_view``."""
    if func._schema.is_mutable:
        return False
    brought = {tensor.untyped_storage()._cdata for tensor in given}
    return all(tensor.untyped_storage()._cdata in brought for tensor in made)


def _moved_bytes(given: list[Tensor], made: list[Tensor]) -> int:
    sizes = {id(tensor): tensor.numel() * tensor.itemsize for tensor in (*given, *made)}
    return int(sum(sizes.values()))


def _dtype_of(given: list[Tensor], made: list[Tensor]) -> str:
    for tensor in (*given, *made):
        if tensor.is_floating_point() or tensor.is_complex():
            return str(tensor.dtype).removeprefix("torch.")
    return str((*given, *made)[0].dtype).removeprefix("torch.") if given or made else ""


def _launches(args: tuple[Any, ...]) -> int:
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
    if not lists:
        return 1
    blocks = sum(-(-tensor.numel() // _ELEMENTS_A_BLOCK) for tensor in lists[0])
    by_tensors = -(-len(lists[0]) // _TENSORS_A_LAUNCH.get(len(lists), _TENSORS_A_LONG_LAUNCH))
    return int(max(1, by_tensors, -(-blocks // _BLOCKS_A_LAUNCH)))
