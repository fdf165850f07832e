"""What a plan needs as it runs, the optimizer's turn included: the measurement that judges a rung of the ladder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad.declared import DeclaredStep
from samegrad.exact.growing_segments import segments_grow
from samegrad.exact.one_chunk import ChunkedStep
from samegrad.exact.phases import listening
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import step_undisturbed
from samegrad.measure import counters
from samegrad.measure.counting import ByteCounter
from samegrad.measure.probe import claim_residents, first_rows, plain_run, timed
from samegrad.measure.within_memory import WithinMemory
from samegrad.trees import RowLayout

# After which an allocator's segments lie as they will.
_SETTLING_STEPS = 3


@dataclasses.dataclass(frozen=True)
class OptimizerTurn:
    """What the optimizer takes that no probe shows: state that its first step makes, and what each of its steps takes
    and gives back while the gradients stand.

    ``travelling_bytes``: of each piece of state that comes from the host for a turn and leaves after it.
    """

    missing_state_bytes: int = 0
    temporary_bytes: int = 0
    travelling_bytes: tuple[int, ...] = ()

    @property
    def makes_room(self) -> bool:
        """Whether what the allocator keeps for later is given back before each turn and after it."""
        return bool(self.travelling_bytes) and not segments_grow()


@dataclasses.dataclass(frozen=True)
class Rung:
    """What a rung of the ladder was seen to need: reserved bytes on CUDA, counted bytes elsewhere.

    ``launching_share``: how much of ``seconds`` passed until Python had launched all work; None where none is launched.
    """

    peak_bytes: int
    seconds: float
    launching_share: float | None = None


def measure_rung(
    split: ChunkedStep, batch: Any, layout: RowLayout, sizes: Sequence[int], *, turn: OptimizerTurn
) -> Rung | None:
    """Peak and time of that run; nothing of the user's changes. What the optimizer will take is counted.

    None where memory ran out, or the allocator had to give some back and try again, under a cap.
    """
    few, few_layout = first_rows(batch, layout, sum(sizes))
    with WithinMemory(split.declared):
        return _rung(split.declared, batch, lambda: split.totals(few, few_layout, sizes), turn)
    return None


def measure_whole(
    declared: DeclaredStep, batch: Any, layout: RowLayout, draws: StepDraws, *, turn: OptimizerTurn
) -> Rung | None:
    """The same of the plain step on the whole batch."""
    with WithinMemory(declared), plain_run(declared, batch, layout, layout.rows, draws) as run:
        return _rung(declared, batch, run, turn)
    return None


def _rung(declared: DeclaredStep, batch: Any, run: Callable[[], object], turn: OptimizerTurn) -> Rung | None:
    device = declared.device
    with step_undisturbed(declared):
        if device.type != "cuda":
            counter = ByteCounter(device, gradients_of=[declared.network])
            claim_residents(counter, declared, batch)
            with counter, listening(counter):
                seconds = timed(run, device).seconds
            return Rung(counter.peak_bytes + turn.missing_state_bytes, seconds)
        counters.release_cached(device)
        state: list[Tensor] = []
        for index in range(_SETTLING_STEPS):
            # The first step makes the state while its gradients are alive; where it lands decides what fits later.
            state += _with_turn(declared, run, turn, new_bytes=0 if index else turn.missing_state_bytes)
        before = counters.read_allocator(device)
        counters.reset_peaks(device)
        timed_run = functools.partial(_with_turn, declared, run, turn) if turn.travelling_bytes else run
        shortest = min(timed(timed_run, device) for _ in range(2))
        _with_turn(declared, run, turn)
        after = counters.read_allocator(device)
        del state
    if before is None or after is None or after.retries > before.retries:
        return None
    return Rung(after.peak_reserved_bytes, shortest.seconds, shortest.launching_share)


def _with_turn(
    declared: DeclaredStep, run: Callable[[], object], turn: OptimizerTurn, *, new_bytes: int = 0
) -> list[Tensor]:
    """``run`` and, while its gradients stand, what the optimizer takes; of that the new state, which stays."""
    gradients = run()
    if turn.makes_room or new_bytes:
        # Before what is new as ``room_for_new_state`` does.
        torch.cuda.empty_cache()
    state = _standing_in(declared, new_bytes)
    travelling = [torch.empty(piece, dtype=torch.uint8, device=declared.device) for piece in turn.travelling_bytes]
    _standing_in(declared, turn.temporary_bytes)
    del gradients, travelling
    if turn.makes_room:
        torch.cuda.empty_cache()
    return state


def _standing_in(declared: DeclaredStep, amount_bytes: int) -> list[Tensor]:
    """Memory that the optimizer will take, in pieces like the parameters'."""
    pieces: list[Tensor] = []
    trainable = [p for module in declared.modules for p in module.parameters() if p.requires_grad]
    left = amount_bytes
    while trainable and left > 0:
        for parameter in trainable:
            if left > 0:
                pieces.append(torch.empty_like(parameter))
                left -= pieces[-1].nbytes
    return pieces
