"""The optimizer's state lives on the host between steps and comes back for the optimizer's step.

Saves: the state's bytes on the device while forward and backward run. Not in the optimizer's own step: there the state
is back, beside parameters and gradients, so that step's peak is what it was.
Costs: the state travels to the device and to the host once a step, and the step waits for it; pinned host memory. What
the allocator keeps of forward and backward has other sizes than the state, so it is given back before the state comes,
and the state's after it went; the next step takes its memory anew.
Why the gradient is the same: nothing is computed on the way; every step of the optimizer finds the bits it left.
Refuses: models on the CPU, where the state is on the host already, and steps without an optimizer.
Source: Ren et al. 2021, "ZeRO-Offload", arXiv:2101.06840, section 3, but with the update on the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import UsageError
from samegrad.exact.dataless import computing, has_data, is_torchs_own, memory_of
from samegrad.levers._lever import Execution, Slot
from samegrad.records import Exactness, Footprint


@dataclasses.dataclass(frozen=True)
class OptimizerState:
    """No knobs: all state tensors of more than one entry that are where their parameter is."""

    name: ClassVar[str] = "optimizer_state"
    slot: ClassVar[Slot] = Slot.STATE
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    @classmethod
    def unsuited(cls, declared: DeclaredStep) -> str | None:
        if declared.device.type == "cpu":
            return "the model is on the CPU, and so is the optimizer's state"
        return "no optimizer= was given" if declared.optimizer is None else None

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        yield execution

    @contextlib.contextmanager
    def standing(self, declared: DeclaredStep) -> Iterator[None]:
        """The state on the host but while the optimizer steps; back on the device afterwards."""
        if declared.optimizer is None:
            raise UsageError(
                asked=f"the lever {self.name}", found="no optimizer= was given to the step", do="Step(..., optimizer=…)"
            )
        travels = _TravellingState(declared.optimizer)
        with contextlib.ExitStack() as stack:
            stack.callback(travels.bring_back)
            travels.send_away()
            stack.callback(declared.optimizer.register_step_pre_hook(lambda *_: travels.bring_back()).remove)
            stack.callback(declared.optimizer.register_step_post_hook(lambda *_: travels.send_away()).remove)
            yield

    def knobs(self) -> dict[str, Any]:
        return {}


class _TravellingState:
    """The state tensors of an optimizer, of which some are away on the host.

    Entries of ``optimizer.state`` are replaced and never written where they are: what a checkpoint or the user took
    from it stays what it was. What a user loads or puts there meanwhile is left as it is.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        # Where each came from, by its id, which stays taken while the tensor is kept here.
        self._away: dict[int, tuple[Tensor, torch.device]] = {}

    def send_away(self) -> None:
        there = {id(leaf) for leaf in self._leaves()}
        self._away = {key: kept for key, kept in self._away.items() if key in there}
        shared = _in_shared_memory([*self._parameters(), *self._leaves()])
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        for parameter in self._parameters():
            self._replace(parameter, functools.partial(self._sent, parameter.device, shared, copies))
        for device in {parameter.device for parameter in self._parameters()}:
            if device.type != "cpu" and computing():
                # A checkpoint may read the copies at any time from now on.
                torch.accelerator.current_stream(device).synchronize()
        copies.clear()
        self._make_room()

    def bring_back(self) -> None:
        self._make_room()
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        for parameter in self._parameters():
            self._replace(parameter, functools.partial(self._returned, copies))
        self._away = {}

    def _make_room(self) -> None:
        """Gives back what the allocator keeps: within a cap nothing else finds room among pieces of other sizes."""
        if self._away and computing() and any(device.type == "cuda" for _, device in self._away.values()):
            torch.cuda.empty_cache()

    def _sent(
        self, home: torch.device, shared: set[int], copies: dict[int, tuple[Tensor, Tensor]], leaf: Tensor
    ) -> Tensor:
        if id(leaf) in copies:
            return copies[id(leaf)][1]
        if id(leaf) in self._away or not _can_travel(leaf, home) or memory_of(leaf) in shared:
            return leaf
        host = torch.empty_like(leaf, device="cpu", pin_memory=home.type == "cuda" and has_data(leaf))
        host.copy_(leaf, non_blocking=True)
        copies[id(leaf)] = (leaf, host)
        self._away[id(host)] = (host, home)
        return host

    def _returned(self, copies: dict[int, tuple[Tensor, Tensor]], leaf: Tensor) -> Tensor:
        if id(leaf) not in self._away:
            return leaf
        if id(leaf) not in copies:
            there = torch.empty_like(leaf, device=self._away[id(leaf)][1])
            copies[id(leaf)] = (leaf, there.copy_(leaf, non_blocking=True))
        return copies[id(leaf)][1]

    def _parameters(self) -> list[Tensor]:
        # Some optimizers keep other things among their state.
        return [key for key, state in self._optimizer.state.items() if isinstance(key, Tensor) and state]

    def _leaves(self) -> list[Tensor]:
        states = [self._optimizer.state[parameter] for parameter in self._parameters()]
        return [leaf for leaf in trees.leaves_of(states) if isinstance(leaf, Tensor)]

    def _replace(self, parameter: Tensor, moved: Callable[[Tensor], Tensor]) -> None:
        state = self._optimizer.state[parameter]
        for key, value in state.items():
            state[key] = trees.map_tensors(value, moved)


def _can_travel(leaf: Tensor, home: torch.device) -> bool:
    # Counters of one entry are left where the optimizer wants them, and so is what it keeps on the host by itself.
    return is_torchs_own(leaf) and leaf.layout is torch.strided and leaf.numel() > 1 and leaf.device == home


def _in_shared_memory(tensors: list[Tensor]) -> set[int]:
    """Storages, by ``memory_of``, in which several tensors lie or a part of one: copies would part them."""
    seen: dict[int, int] = {}
    shared: set[int] = set()
    for tensor in tensors:
        if is_torchs_own(tensor) and tensor.layout is torch.strided:
            memory = memory_of(tensor)
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            if seen.setdefault(memory, id(tensor)) != id(tensor) or not whole:
                shared.add(memory)
    return shared
