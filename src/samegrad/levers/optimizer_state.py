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
import itertools
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]  # documented, not in its __all__

from samegrad import trees
from samegrad.declared import Around, DeclaredStep
from samegrad.errors import UsageError
from samegrad.exact.dataless import computing, has_data, is_torchs_own, memory_of
from samegrad.exact.growing_segments import segments_grow
from samegrad.exact.phases import announce
from samegrad.levers._lever import Execution, Slot
from samegrad.records import Exactness, Footprint, Phase

Leaf = TypeVar("Leaf")

# The most that travels at once, larger tensors apart, and what each tensor of a piece begins at a multiple of.
_PIECE_BYTES = 64 << 20
_ALIGNED_BYTES = 64
# DLPack does not know all of torch's dtypes; others go by way of bytes.
_EXCHANGED = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


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
        travels = _TravellingState(declared.optimizer)
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
        return tuple(sum(piece) for piece in _in_pieces(leaf_bytes, int))


@dataclasses.dataclass(frozen=True)
class _Piece:
    """State tensors that travel together: parts of one ``memory``, which belong on the device ``home``.

    ``starts``: where in the memory each of ``parts`` begins, in entries.
    """

    home: torch.device
    memory: Tensor
    starts: tuple[int, ...]
    parts: tuple[Tensor, ...]

    @classmethod
    def packed(cls, leaves: Sequence[Tensor]) -> _Piece:
        """Copies of ``leaves``, which are of one dtype and device, on the host."""
        aligned = max(1, _ALIGNED_BYTES // leaves[0].element_size())
        starts = [0, *itertools.accumulate(-(-leaf.numel() // aligned) * aligned for leaf in leaves)]
        memory = _host_memory(leaves[0], starts.pop())
        # As dense as they are, whatever the order of their axes.
        strides = [torch.empty_like(leaf, device="meta").stride() for leaf in leaves]
        parts = _parts_of(memory, starts, [leaf.shape for leaf in leaves], strides)
        for part, leaf in zip(parts, leaves):
            part.copy_(leaf, non_blocking=True)
        return cls(leaves[0].device, memory, tuple(starts), tuple(parts))

    def sent(self) -> _Piece:
        """A copy on the host, in memory that nobody has."""
        return self._in(_host_memory(self.memory, self.memory.numel()).copy_(self.memory, non_blocking=True))

    def returned(self) -> _Piece:
        """A copy on its device."""
        return self._in(torch.empty_like(self.memory, device=self.home).copy_(self.memory, non_blocking=True))

    def _in(self, memory: Tensor) -> _Piece:
        """The same parts of ``memory``, which holds what this one's does."""
        shapes, strides = [part.shape for part in self.parts], [part.stride() for part in self.parts]
        return _Piece(self.home, memory, self.starts, tuple(_parts_of(memory, self.starts, shapes, strides)))

    def freed(self) -> list[Tensor]:
        """Copies of its parts on its device, each in memory of its own."""
        # Waited for: pinned memory knows only of copies from its beginning, and is soon somebody else's.
        return [torch.empty_like(part, device=self.home).copy_(part) for part in self.parts]

    def is_whole(self, ids: Set[int]) -> bool:
        """Whether all its parts are of ``ids``, and lie where they did: ``part.data = ...`` lays one elsewhere."""
        size = self.memory.element_size()
        places = [self.memory.data_ptr() + start * size for start in self.starts] if computing() else None
        return all(id(part) in ids and part.dtype == self.memory.dtype for part in self.parts) and (
            places is None or places == [part.data_ptr() for part in self.parts]
        )

    def has_any_of(self, ids: Set[int]) -> bool:
        return any(id(part) in ids for part in self.parts)


def _streams_of(devices: Set[torch.device]) -> list[torch.Stream]:
    """Those that work goes to now, of the devices that have any."""
    if not computing():
        return []
    return [torch.accelerator.current_stream(device) for device in devices if device.type != "cpu"]


def _host_memory(like: Tensor, entries: int) -> Tensor:
    pinned = like.device.type == "cuda" and has_data(like)
    return torch.empty(entries, dtype=like.dtype, device="cpu", pin_memory=pinned)


def _parts_of(
    memory: Tensor, starts: Sequence[int], shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]]
) -> list[Tensor]:
    """The tensors that lie in ``memory``, each from one of ``starts`` on and of a storage of its own.

    A checkpoint writes storages whole, and what is loaded from it shares them as they were shared.
    """
    if not computing():
        return [memory.as_strided(*where) for where in zip(shapes, strides, starts)]
    # As capsules: between tensors themselves it takes twice as long, and there are hundreds in every step.
    if memory.dtype in _EXCHANGED:
        return [from_dlpack(to_dlpack(memory.as_strided(*where))) for where in zip(shapes, strides, starts)]
    size, by_bytes = memory.element_size(), memory.view(torch.uint8)
    views = [by_bytes[start * size : (start + shape.numel()) * size] for start, shape in zip(starts, shapes)]
    alone = [from_dlpack(to_dlpack(view)).view(memory.dtype) for view in views]
    return [one.as_strided(shape, stride) for one, shape, stride in zip(alone, shapes, strides)]


class _TravellingState:
    """The state tensors of an optimizer, of which some are away on the host.

    They travel in pieces of many: hundreds of small copies take longer to launch than to run. Entries of
    ``optimizer.state`` are replaced and never written where they are: what a checkpoint or the user took from it stays
    what it was. What a user loads or puts there meanwhile is left as it is.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        # On the host, and on their devices since they came back. Ids of their parts stay taken while they are here.
        self._away: list[_Piece] = []
        self._back: list[_Piece] = []
        self._in_turn = False
        # Those of the optimizer's last turn.
        self._streams: list[torch.Stream] = []
        # What says that copies which are under way have arrived.
        self._leaving: list[torch.Event] = []

    def begin_turn(self, _: Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Before the optimizer's step: brings back what is away."""
        # Only a closure calls backward before the turn ends, and an exception leaves a turn without an end.
        self._in_turn = any(callable(given) for given in (*arguments[1:], *options.values()))
        self.bring_back()

    def end_turn(self, *_: Any) -> None:
        self._in_turn = False
        self._streams = _streams_of({parameter.device for parameter in self._parameters()})

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """The block of a backward, in which the state is on the host; all of it has arrived when the block ends.

        ``optimizer.state_dict()`` waits for it inside; ``optimizer.state`` itself cannot, so a loss that reads it there
        finds copies that are under way. Not where an optimizer calls backward in its own step: it goes on with its
        state afterwards.
        """
        if not self._in_turn:
            announce(Phase.OPTIMIZER)
            self.send_away()
        try:
            yield
        finally:
            # They went first, so this hardly waits.
            self.arrive()

    def arrive(self) -> None:
        """Waits for copies that are under way."""
        while self._leaving:
            self._leaving[-1].synchronize()
            self._leaving.pop()

    def send_away(self) -> None:
        """Sets off the copies; ``arrive`` waits for them."""
        for stream in (elsewhere := [one for one in self._streams if one not in _streams_of({one.device})]):
            torch.accelerator.current_stream(stream.device).wait_stream(stream)
        homes = {id(leaf): (leaf, p.device) for p in self._parameters() for leaf in self._leaves_of(p)}
        leaves = {key: leaf for key, (leaf, _) in homes.items()}
        mine = {id(part) for piece in (*self._away, *self._back) for part in piece.parts}
        shared = _in_shared_memory([*self._parameters(), *(leaf for key, leaf in leaves.items() if key not in mine)])
        self._away = [piece for piece in self._away if piece.has_any_of(leaves.keys())]
        gone = {id(part) for piece in self._away for part in piece.parts}
        moved: dict[int, Tensor] = {}
        whole = [
            piece
            for piece in self._back
            if memory_of(piece.memory) not in shared and piece.is_whole(leaves.keys())
        ]
        sent = [_noted(piece.parts, piece.sent(), moved) for piece in whole]
        others = [
            leaf
            for key, (leaf, home) in homes.items()
            if key not in gone and key not in moved and _can_travel(leaf, home) and memory_of(leaf) not in shared
        ]
        pieces = [piece for kind in _by_kind(others) for piece in _in_pieces(kind, _bytes_of)]
        sent += [_noted(piece, _Piece.packed(piece), moved) for piece in pieces]
        self._leaving += [stream.record_event() for stream in _streams_of({piece.home for piece in sent})]
        if elsewhere:
            # The memory that it leaves is given back to the stream that it came in, which runs ahead of the copies.
            self.arrive()
        self._replace(moved)
        self._away, self._back = [*self._away, *sent], []
        # What is held here would not be given back.
        is_new = bool(pieces)
        for held in (homes, leaves, others, whole, pieces):
            held.clear()
        self._make_room(is_new=is_new)

    def bring_back(self) -> None:
        self._make_room()
        here, moved = {id(leaf) for leaf in self._leaves()}, dict[int, Tensor]()
        back = [_noted(one.parts, one.returned(), moved) for one in self._away if one.is_whole(here)]
        for piece in self._away:
            if not piece.is_whole(here) and piece.has_any_of(here):
                moved |= {id(part): freed for part, freed in zip(piece.parts, piece.freed())}
        self._replace(moved)
        self._away, self._back = [], [*self._back, *back]

    def stay(self) -> None:
        """Brings back what is away, for good: each tensor in memory of its own."""
        self._make_room()
        while pieces := self._away or self._back:
            moved = {id(part): freed for part, freed in zip(pieces[-1].parts, pieces[-1].freed())}
            self._replace(moved)
            pieces.pop()

    def _make_room(self, *, is_new: bool = False) -> None:
        """Gives back what the allocator keeps: within a cap a piece finds no room among segments of other sizes.

        Those that grow have it: what is free in them is free together, but for what state that ``is_new``, made in
        many tensors while gradients were alive, left between them.
        """
        needed = is_new or not segments_grow()
        if needed and self._away and computing() and any(p.home.type == "cuda" for p in self._away):
            torch.cuda.empty_cache()

    def _parameters(self) -> list[Tensor]:
        # Some optimizers keep other things among their state.
        return [key for key, state in self._optimizer.state.items() if isinstance(key, Tensor) and state]

    def _leaves_of(self, parameter: Tensor) -> list[Tensor]:
        values = self._optimizer.state[parameter].values()
        # Hundreds of entries in every step, and few of them are lists of tensors.
        return [
            leaf
            for value in values
            for leaf in ((value,) if isinstance(value, Tensor) else trees.leaves_of(value))
            if isinstance(leaf, Tensor)
        ]

    def _leaves(self) -> list[Tensor]:
        return [leaf for parameter in self._parameters() for leaf in self._leaves_of(parameter)]

    def _replace(self, moved: dict[int, Tensor]) -> None:
        for parameter in self._parameters():
            state = self._optimizer.state[parameter]
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = moved.get(id(value), value)
                else:
                    state[key] = trees.map_tensors(value, lambda leaf: moved.get(id(leaf), leaf))


def _bytes_of(leaf: Tensor) -> int:
    return leaf.nbytes


def _noted(before: Sequence[Tensor], after: _Piece, moved: dict[int, Tensor]) -> _Piece:
    """``after``, whose parts are noted in ``moved`` by the ids of what they are copies of."""
    moved |= {id(old): new for old, new in zip(before, after.parts)}
    return after


def _by_kind(leaves: Sequence[Tensor]) -> list[list[Tensor]]:
    """``leaves`` of one device and dtype together."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for leaf in leaves:
        groups.setdefault((leaf.device, leaf.dtype), []).append(leaf)
    return list(groups.values())


def _in_pieces(leaves: Sequence[Leaf], bytes_of: Callable[[Leaf], int]) -> Iterator[list[Leaf]]:
    """As many together as a piece holds, in order."""
    piece, held_bytes = list[Leaf](), 0
    for leaf in leaves:
        if piece and held_bytes + bytes_of(leaf) > _PIECE_BYTES:
            yield piece
            piece, held_bytes = [], 0
        piece.append(leaf)
        held_bytes += bytes_of(leaf)
    if piece:
        yield piece


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
