"""Whether code could find out how many rows there are, read from the code itself.

Most models and losses are layers of torch called one after another: nothing in them reads a length, a shape or a
value, loops over rows or decides anything, so that nobody need look whether they do so the same way for any number of
rows. Whatever is not known to be so counts as code that could.
"""

from __future__ import annotations

import dis
from collections.abc import Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep, default_forward
from samegrad.exact.held import codes_within
from samegrad.exact.replaced_forward import has_own_forward

# What says how large a tensor is, hands its values to Python, or takes as many rows as there may be.
_READS = frozenset(
    "shape size sizes numel nelement stride nbytes storage untyped_storage storage_offset data_ptr is_contiguous "
    "tolist item numpy equal allclose is_nonzero is_same_size __len__ __iter__ __array__ __dict__ __getitem__ map_ "
    "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk hsplit vsplit dsplit narrow topk roll unfold "
    "select index_select take kthvalue as_strided _shape_as_tensor".split()
)
_BUILTINS = frozenset("super abs dict".split())
# Operations that loop, take rows apart or are not known here.
_LOOPS = frozenset(
    "CALL_FUNCTION_EX LIST_EXTEND SET_UPDATE IMPORT_NAME GET_AITER YIELD_VALUE GET_LEN BUILD_SLICE BINARY_SLICE "
    "STORE_SLICE".split()
)
_MODULES = (torch.__name__, "math")
_NUMBERS = (int, float, str, bool, type(None), torch.dtype, torch.device)
_Instructions = Sequence[dis.Instruction]


def is_row_blind(declared: DeclaredStep, batch: Any) -> bool:
    """Whether neither the model nor the loss of ``declared`` could find out how many rows ``batch`` has."""
    functions = [f for f in (declared.loss_fn, declared.forward) if f is not declared.loss_module]
    return is_blind(functions, declared.modules, batch)


def is_blind(functions: Sequence[Any], modules: Sequence[nn.Module], batch: Any) -> bool:
    """Whether neither ``functions`` nor the code of ``modules`` could find out how many rows ``batch`` has."""
    if not _plain_containers(batch):
        # Its own class may count its rows.
        return False
    search = _Search()
    parts = [part for module in modules for part in module.modules()]
    apart = [function for function in functions if not any(function is module for module in modules)]
    return all(map(search.blind, apart)) and all(map(search.blind_module, parts))


def _plain_containers(batch: Any) -> bool:
    if isinstance(batch, (tuple, list)):
        return type(batch) in (tuple, list) and all(map(_plain_containers, batch))
    if isinstance(batch, dict):
        return type(batch) is dict and all(map(_plain_containers, batch.values()))
    return type(batch) in (Tensor, *_NUMBERS) or trees.is_row_source(batch)


class _Search:
    """Through functions and modules, each once."""

    def __init__(self) -> None:
        self._seen: set[object] = set()

    def blind(self, value: Any, owner: nn.Module | None = None) -> bool:
        """Whether what ``value`` is used for cannot count rows. ``owner``: the module whose method it is."""
        if value is default_forward or isinstance(value, (*_NUMBERS, Tensor)):
            return True
        if isinstance(value, nn.Module):
            # Those of the step are looked at by themselves; others are not known to it.
            return value is owner
        if isinstance(value, ModuleType):
            return value.__name__.partition(".")[0] in _MODULES
        if not isinstance(value, FunctionType):
            known = isinstance(value, (BuiltinFunctionType, type)) or callable(value)
            return known and _of_torch(value) and getattr(value, "__name__", "") not in _READS
        return _of_torch(value) or self._blind_function(value, owner)

    def blind_module(self, part: nn.Module) -> bool:
        """Whether the code of ``part`` cannot, its submodules aside."""
        if has_own_forward(part) or _has_hooks(part):
            return False
        return _of_torch(type(part)) or self._blind_methods("forward", part)

    def _blind_methods(self, name: str, part: nn.Module) -> bool:
        """All that the classes of ``part`` have under this name."""
        found = [vars(base)[name] for base in type(part).__mro__ if name in vars(base) and not _of_torch(base)]
        return all(isinstance(method, FunctionType) and self._blind_function(method, part) for method in found)

    def _blind_function(self, function: FunctionType, owner: nn.Module | None) -> bool:
        key = function.__code__, None if owner is None else id(owner)
        if key in self._seen:
            return True
        self._seen.add(key)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
        for name, cell in cells.items():
            try:
                if name != "__class__" and not self.blind(cell.cell_contents):
                    return False
            except ValueError:  # not assigned yet
                return False
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if not all(map(self.blind, defaults)):
            return False
        return all(self._blind_code(code, function, owner) for code in codes_within(function.__code__))

    def _blind_code(self, code: CodeType, function: FunctionType, owner: nn.Module | None) -> bool:
        instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "TO_BOOL")]
        for at, instruction in enumerate(instructions):
            name, of = instruction.opname, instruction.argval
            if name in _LOOPS or name.startswith(("MATCH", "SEND", "UNPACK_EX")):
                return False
            decides = "JUMP" in name and "IF" in name and "NONE" not in name
            if (decides or name == "GET_ITER") and not _of_self(instructions, at, owner):
                return False
            if name in ("LOAD_GLOBAL", "LOAD_NAME"):
                held = function.__globals__.get(of, self)
                if not (of in _BUILTINS if held is self else self.blind(held)):
                    return False
            elif name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR") and not self._blind_attribute(of, owner):
                return False
        return True

    def _blind_attribute(self, name: str, owner: nn.Module | None) -> bool:
        """Whether reading ``name``, of the owner or of anything else, cannot."""
        if name in _READS:
            return False
        if owner is None:
            return True
        held = vars(owner).get(name, ())
        if held != () and not isinstance(held, (nn.Module, *_NUMBERS, Tensor, list, tuple)) and not self.blind(held):
            return False
        return self._blind_methods(name, owner)


def _of_self(instructions: _Instructions, at: int, owner: nn.Module | None) -> bool:
    """Whether what is decided or looped over at ``at`` is a part of the module or a number that it has."""
    if owner is None or at < 2:
        return False
    source, attribute = instructions[at - 2 : at]
    if attribute.opname != "LOAD_ATTR" or not source.opname.startswith("LOAD_FAST") or source.argval != "self":
        return False
    return attribute.argval in owner._modules or isinstance(vars(owner).get(attribute.argval, owner), _NUMBERS)


def _has_hooks(part: nn.Module) -> bool:
    return any((part._forward_pre_hooks, part._forward_hooks))


def _of_torch(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] == torch.__name__
