"""The optimizer's state lives on the host while forward and backward run, and comes back for the optimizer's step.

Saves: the state's bytes on the device while forward and backward run. Not in the optimizer's own step: there the state
is back, beside parameters and gradients, so that step's peak is what it was. Until the next backward begins it stays.
Costs: the state travels to the host and to the device once a step; pinned host memory. It leaves while the host sets
off the forward, and the device waits for it both ways. What the allocator keeps of forward and backward has other sizes
than the state, so in segments that do not grow it is given back before the state comes, and the state's after it went;
the next step takes its memory anew.
Why the gradient is the same: nothing is computed on the way; every step of the optimizer finds the bits it left.
Refuses: models on the CPU, where the state is on the host already, and steps without an optimizer.
Source: Ren et al. 2021, "ZeRO-Offload", arXiv:2101.06840, section 3, but with the update on the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor

from samegrad.declared import Around, DeclaredStep
from samegrad.errors import UsageError
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._state_pieces import in_pieces
from samegrad.levers._travelling_state import TravellingState
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
    def standing(self, declared: DeclaredStep) -> Iterator[Around]:
        """The state on the host from the beginning of a backward to the optimizer's step; for good where it belongs
        afterwards.
        """
        if declared.optimizer is None:
            raise UsageError(
                asked=f"the lever {self.name}", found="no optimizer= was given to the step", do="Step(..., optimizer=…)"
            )
        travels = TravellingState(declared.optimizer)
        with contextlib.ExitStack() as stack:
            stack.callback(travels.stay)
            stack.callback(declared.optimizer.register_step_pre_hook(travels.begin_turn).remove)
            stack.callback(declared.optimizer.register_step_post_hook(travels.end_turn).remove)
            # A signal's handler may save a checkpoint in the middle of a backward.
            stack.callback(declared.optimizer.register_state_dict_pre_hook(lambda _: travels.arrive()).remove)
            yield travels.away

    def knobs(self) -> dict[str, Any]:
        return {}

    @staticmethod
    def pieces_of(state_bytes: int, parameters: Sequence[Tensor]) -> tuple[int, ...]:
        """The bytes of each piece in which state travels, of which each parameter has its share in tensors like it."""
        share = state_bytes / sum(p.nbytes for p in parameters) if parameters else 0.0
        if not share:
            return ()
        tensors = max(1, round(share))
        leaf_bytes = [int(p.nbytes * share / tensors) for p in parameters if p.numel() > 1 for _ in range(tensors)]
        return tuple(sum(piece) for piece in in_pieces(leaf_bytes, int))
