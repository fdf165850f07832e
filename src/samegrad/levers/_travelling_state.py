"""The state tensors of an optimizer on their way to the host and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from samegrad import trees
from samegrad.exact.dataless import computing, is_torchs_own, memory_of
from samegrad.exact.growing_segments import segments_grow
from samegrad.exact.phases import announce
from samegrad.levers._state_pieces import Piece, in_pieces
from samegrad.records import Phase


class TravellingState:
    """The state tensors of an optimizer, of which some are away on the host.

    Entries of ``optimizer.state`` are replaced and never written where they are: what a checkpoint or the user took
    from it stays what it was. What a user loads or puts there meanwhile is left as it is.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        # On the host, and on their devices since they came back. Ids of their parts stay taken while they are here.
        self._away: list[Piece] = []
        self._back: list[Piece] = []
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
        pieces = [piece for kind in _by_kind(others) for piece in in_pieces(kind, _bytes_of)]
        sent += [_noted(piece, Piece.packed(piece), moved) for piece in pieces]
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


def _streams_of(devices: Set[torch.device]) -> list[torch.Stream]:
    """Those that work goes to now, of the devices that have any."""
    if not computing():
        return []
    return [torch.accelerator.current_stream(device) for device in devices if device.type != "cpu"]


def _bytes_of(leaf: Tensor) -> int:
    return leaf.nbytes


def _noted(before: Sequence[Tensor], after: Piece, moved: dict[int, Tensor]) -> Piece:
    """``after``, whose parts are noted in ``moved`` by the ids of what they are copies of."""
    moved |= {id(old): new for old, new in zip(before, after.parts)}
    return after


def _by_kind(leaves: Sequence[Tensor]) -> list[list[Tensor]]:
    """``leaves`` of one device and dtype together."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for leaf in leaves:
        groups.setdefault((leaf.device, leaf.dtype), []).append(leaf)
    return list(groups.values())


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
