"""A model as a chain of units that can run again in backward, found by structure and by one forward that is watched.

    chain = find_units(declared, few)
    [unit.name for unit in chain.units]      ["stem", "layers.0", "layers.1", "norm", "head"]
    chain.runs()                             stretches of units in which each works on what the one before returns

Units are the outermost repeated blocks (members of a Sequential or ModuleList, siblings of one class) and what is
called beside them. Each is called once in a forward, on tensors, and leaves its inputs as they are. A module that
changes its input in place is one unit with the one that made that input. What is no unit is left out with its reason;
it runs as ever, and what it returns is kept.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.exact.undisturbed import step_undisturbed

_PLAIN = (int, float, complex, str, bytes, type(None), enum.Enum, torch.Size, torch.dtype, torch.device, slice)
_LISTS = (nn.ModuleList, nn.ModuleDict)
# What transformers models hand to their blocks in training too, where nobody generates.
_CACHES = ("DynamicCache", "EncoderDecoderCache")
_NAMED_IN_REASON = 3
# So many siblings of one class are blocks; two may be an encoder and a decoder, with blocks of their own.
_A_ROW = 3


@dataclasses.dataclass(frozen=True)
class Unit:
    """Submodules ``paths``, called one after another, that run again together.

    ``follows``: it works on what the unit before returned and on nothing else that would have to be kept. ``inner``:
    finer units of a unit that is a Sequential, or holds one and nothing else. ``has_parts``: it is more than a single
    layer, most of which keep little beside what enters them.
    """

    paths: tuple[str, ...]
    follows: bool
    has_parts: bool
    inner: tuple[Unit, ...] = ()

    @property
    def name(self) -> str:
        return " to ".join(dict.fromkeys([self.paths[0], self.paths[-1]]))


@dataclasses.dataclass(frozen=True)
class UnitChain:
    """Units in the order of their calls, and why other modules are none, by path."""

    units: tuple[Unit, ...]
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def runs(self) -> list[list[Unit]]:
        """The units in stretches as long as can be, in which every unit follows on the one before."""
        found: list[list[Unit]] = []
        for unit in self.units:
            if unit.follows and found:
                found[-1].append(unit)
            else:
                found.append([unit])
        return found

    @property
    def reason(self) -> str:
        """Why there are no units, in words; empty where there are."""
        if self.units:
            return ""
        if not self.left_out:
            return "no submodule of the model is called, so there is no part to run again"
        return f"no part of the model can run again: {self._named_in_left_out}"

    @property
    def why_single_layers(self) -> str:
        """Why there is no block among the units, in words."""
        reason = "no blocks, only single layers, which keep little inside"
        return f"{reason}: {self._named_in_left_out}" if self.left_out else reason

    @property
    def _named_in_left_out(self) -> str:
        named = [f"{path} {why}" for path, why in list(self.left_out.items())[:_NAMED_IN_REASON]]
        more = len(self.left_out) - len(named)
        return "; ".join(named) + (f"; and {more} more" if more else "")


def find_units(declared: DeclaredStep, few: Any) -> UnitChain:
    """The chain of units of the declared model. ``few``: a few rows of a batch, on the device. Changes nothing."""
    network = declared.network
    with step_undisturbed(declared), torch.enable_grad(), _watched(network) as calls:
        declared.forward(network, few)
        standing = [*network.parameters(), *network.buffers(), *_tensors(few)]
        return _Chain(network, calls, {id(tensor) for tensor in standing}).found()


# A tensor and its version at some moment. Held, so that no other one gets its id.
_Seen = list[tuple[Tensor, int]]


@dataclasses.dataclass
class _Call:
    """One call of a submodule, as it was entered and as it was left.

    ``strange``: kinds of objects among what it was handed or returned. ``written``: ids of inputs changed in place.
    ``calls_others``: it ran other submodules, its own or such as were handed to it.
    """

    order: int
    inputs: _Seen
    strange: list[str]
    outputs: _Seen = dataclasses.field(default_factory=list)
    written: set[int] = dataclasses.field(default_factory=set)
    calls_others: bool = False

    def leave(self, output: Any) -> None:
        leaves = trees.leaves_of(output)
        self.outputs = [(leaf, leaf._version) for leaf in leaves if isinstance(leaf, Tensor)]
        self.strange += _strange(leaves)
        self.written = {id(tensor) for tensor, version in self.inputs if tensor._version != version}

    def entered_by(self, before: _Call) -> bool:
        """Whether something that ``before`` returned enters this call as it left that one."""
        returned = {id(tensor): version for tensor, version in before.outputs}
        return any(returned.get(id(tensor)) == version for tensor, version in self.inputs)

    def writes_only_into(self, before: _Call) -> bool:
        """Whether all that this call changes in place is what ``before`` returned."""
        return self.entered_by(before) and self.written <= {id(tensor) for tensor, _ in before.outputs}


@contextlib.contextmanager
def _watched(network: nn.Module) -> Iterator[dict[str, list[_Call]]]:
    """The calls of all submodules while the block runs, by path."""
    calls: dict[str, list[_Call]] = collections.defaultdict(list)
    running: list[_Call] = []
    order = itertools.count()

    def entering(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            leaves = trees.leaves_of((args, kwargs))
            inputs = [(leaf, leaf._version) for leaf in leaves if isinstance(leaf, Tensor)]
            call = _Call(next(order), inputs, _strange(leaves))
            calls[path].append(call)
            for outer in running:
                outer.calls_others = True
            running.append(call)

        return hook

    def leaving(_: nn.Module, __: Any, output: Any) -> None:
        running.pop().leave(output)

    handles = []
    try:
        for path, part in network.named_modules():
            if path:
                handles.append(part.register_forward_pre_hook(entering(path), with_kwargs=True))
                # First of all: what the module's own forward returns, before hooks that replace it.
                handles.append(part.register_forward_hook(leaving, prepend=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in trees.leaves_of(tree) if isinstance(leaf, Tensor)]


def _strange(leaves: Sequence[Any]) -> list[str]:
    """The kinds of objects that may hold what is not seen: caches, say."""
    plain = (Tensor, nn.Module, *_PLAIN)
    return [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, plain) and not callable(leaf)]


def _without(kind: str) -> str:
    """How to do without an object of ``kind``, where that is known."""
    return "; a transformers model makes none under config.use_cache = False" if kind in _CACHES else ""


class _Chain:
    """The units of ``network`` by its ``calls``. ``standing``: ids of tensors that are there all through the step."""

    def __init__(self, network: nn.Module, calls: dict[str, list[_Call]], standing: set[int]) -> None:
        self._network, self._calls, self._standing = network, calls, standing
        self._left_out: dict[str, str] = {}

    def found(self) -> UnitChain:
        paths = [path for path in self._candidates("", in_list=False) if self._is_unit(path)]
        return UnitChain(self._linked(paths), self._left_out)

    # By structure.

    def _children(self, path: str) -> list[str]:
        """Submodules of ``path`` that are called, through lists, which are not: a Sequential may be looped over too."""
        found: list[str] = []
        for key, child in self._network.get_submodule(path).named_children():
            name = f"{path}.{key}" if path else key
            if name in self._calls:
                found.append(name)
            elif isinstance(child, (nn.Sequential, *_LISTS)):
                found += self._children(name)
        return found

    def _candidates(self, path: str, *, in_list: bool) -> Iterator[str]:
        children = self._children(path)
        kinds = collections.Counter(type(self._module(child)) for child in children)
        for child in children:
            part = self._module(child)
            above = self._module(child.rpartition(".")[0])
            repeated = in_list or isinstance(above, _LISTS) or kinds[type(part)] >= _A_ROW
            if isinstance(part, nn.Sequential) and self._is_list(child):
                yield from self._candidates(child, in_list=True)
            elif not repeated and self._holds_list(child):
                yield from self._candidates(child, in_list=False)
            else:
                yield child

    def _is_list(self, path: str) -> bool:
        """Whether blocks stand in a row below ``path``: parts with parts of their own, or layers of one kind."""
        members = self._children(path)
        if sum(bool(self._children(member)) for member in members) > 1:
            return True
        return any(
            type(self._module(a)) is type(self._module(b))
            and any(True for _ in self._module(a).parameters())
            and self._calls[b][0].entered_by(self._calls[a][0])
            for a, b in itertools.pairwise(members)
        )

    def _holds_list(self, path: str) -> bool:
        inner = [f"{path}.{name}" if name else path for name, _ in self._module(path).named_modules()]
        return any(
            isinstance(self._module(name), (nn.Sequential, *_LISTS)) and self._is_list(name) for name in inner
        )

    def _module(self, path: str) -> nn.Module:
        return self._network.get_submodule(path)

    # By what was seen.

    def _is_unit(self, path: str) -> bool:
        why = self._why_not(path)
        if why:
            self._left_out[path] = why
        return not why

    def _why_not(self, path: str) -> str:
        calls = self._calls[path]
        [call, *others] = calls
        if others:
            return f"is called {len(calls)} times in a forward"
        if isinstance(self._module(path), torch.jit.ScriptModule):
            return "is a ScriptModule, whose forward cannot be replaced"
        if call.strange:
            return f"is handed or returns a {call.strange[0]}, which it may write{_without(call.strange[0])}"
        if not call.inputs:
            return "is handed no tensor"
        if not any(tensor.requires_grad for tensor, _ in call.outputs):
            return "returns nothing that is differentiated"
        return ""

    def _linked(self, paths: Sequence[str]) -> tuple[Unit, ...]:
        """Units of ``paths`` in the order of their calls; what writes into its input is joined to what made it."""
        units: list[Unit] = []
        before: _Call | None = None
        calls = sorted(((path, self._calls[path][0]) for path in paths), key=lambda known: known[1].order)
        # What several units are handed is kept anyway.
        handed = collections.Counter(key for _, call in calls for key in {id(tensor) for tensor, _ in call.inputs})
        kept = self._standing | {key for key, count in handed.items() if count > 1}
        for path, call in calls:
            if call.written:
                if before is None or not call.writes_only_into(before):
                    self._left_out[path] = "changes in place what it is handed, and no unit right before it made that"
                    continue
                units[-1] = Unit((*units[-1].paths, path), units[-1].follows, has_parts=True)
            else:
                follows = before is not None and _follows(call, before, kept)
                units.append(Unit((path,), follows, call.calls_others, self._inner(path)))
            before = call
        return tuple(units)

    def _inner(self, path: str) -> tuple[Unit, ...]:
        children = self._children(path)
        if not isinstance(self._module(path), nn.Sequential):
            # A block may be no more than a name for a Sequential.
            return self._inner(children[0]) if len(children) == 1 else ()
        units = self._linked([child for child in children if not self._why_not(child)])
        return units if len(units) > 1 else ()


def _follows(call: _Call, before: _Call, kept: set[int]) -> bool:
    """Whether ``call`` works on what ``before`` returned, and beside it on what is ``kept``, by id."""
    returned = {id(tensor) for tensor, _ in before.outputs}
    return call.entered_by(before) and {id(tensor) for tensor, _ in call.inputs} - returned <= kept
