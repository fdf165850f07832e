"""The units of a step from its trace: the blocks of the model and the code between them, with their bytes and seconds.

The forward of the last traced step falls into stretches by the module that runs; the backward into the same ones, last
first, since its operations carry the module whose forward they differentiate. Live bytes where stretches meet give what
each unit keeps, so that the table of the plain step adds up to the plain step's bytes at every position.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence

from samegrad.errors import BadInput
from samegrad.measure.events import Operation, Trace
from samegrad.measure.lifetimes import Lifetime, Lifetimes
from samegrad.records import Category, Phase
from samegrad.unit_tables import Unit, UnitTable

_FORWARD = (Phase.FORWARD, Phase.LOSS)

# The paths of the modules that are one unit; none for the code between units.
_Block = tuple[str, ...]
# The block that the operations of a module belong to, by the module's path.
_Owners = Mapping[str, _Block]


def units_of(
    trace: Trace,
    blocks: Sequence[str | Sequence[str]],
    operation_seconds: Sequence[float],
    *,
    row_independent: Collection[str] = (),
    launch_seconds: float = 0.0,
    round_to_bytes: int = 1,
) -> UnitTable:
    """The units of the plain step that ``trace`` followed, on all its rows, in forward order.

    ``blocks``: module paths that can run again in backward, a list of them for modules that do so as one; what runs
    outside them is a unit named "" for each stretch.
    ``operation_seconds``: for each operation of the trace. ``row_independent``: blocks that treat rows alone, where
    ``launch_seconds`` a kernel is what a chunk costs by itself. ``round_to_bytes``: every storage takes a multiple of
    it, on CUDA of 512. A block that runs in several stretches is not recomputable, since its calls cannot be chosen one
    by one.

    A trace does not say which output a skip connection reads, so ``crossing_bytes`` stay 0.

    Raises BadInput for a trace of a step that is split or runs parts again, and for seconds of another trace.
    """
    stretches = _stretches(trace, blocks, operation_seconds)
    lifetimes = Lifetimes.of(trace.events, round_to_bytes=round_to_bytes)
    calls = [stretch.block for stretch in stretches]
    units: list[Unit] = []
    for stretch in stretches:
        forward, backward = slice(stretch.start, stretch.stop), slice(stretch.arrival, stretch.end)
        recomputable = bool(stretch.block) and calls.count(stretch.block) == 1
        name = " to ".join(dict.fromkeys([*stretch.block[:1], *stretch.block[-1:]]))
        independent = recomputable and name in row_independent
        kernels = [operation.kernels for operation in (*2 * trace.operations[forward], *trace.operations[backward])]
        units.append(
            Unit(
                name=name,
                paths=stretch.block if len(stretch.block) > 1 else (),
                **_bytes_of(stretch, lifetimes, units[-1].output_bytes if units else 0),
                forward_seconds=sum(operation_seconds[forward]),
                backward_seconds=sum(operation_seconds[backward]),
                recomputable=recomputable,
                row_independent=independent,
                chunk_seconds=launch_seconds * sum(kernels) if independent else 0.0,
            )
        )
    resident_bytes = lifetimes.live_before(stretches[0].start)
    return UnitTable(rows=trace.batch_rows, resident_bytes=resident_bytes, units=tuple(units))


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """A unit's operations: ``start`` to ``stop`` in forward, ``arrival`` to ``end`` in backward, the ends excluded."""

    block: _Block
    start: int
    stop: int
    arrival: int = 0
    end: int = 0


def _stretches(
    trace: Trace, blocks: Sequence[str | Sequence[str]], operation_seconds: Sequence[float]
) -> list[_Stretch]:
    operations = trace.operations
    step = max((operation.step for operation in operations), default=0)
    forward = [k for k, o in enumerate(operations) if o.step == step and o.phase in _FORWARD]
    backward = [k for k, o in enumerate(operations) if o.step == step and o.phase is Phase.BACKWARD]
    wrong = None
    if len(operation_seconds) != len(operations):
        wrong = f"{len(operation_seconds)} times for {len(operations)} operations"
    elif len(trace.sizes) > 1:
        wrong = f"a step in {len(trace.sizes)} chunks"
    elif not forward or not backward:
        wrong = "a step without a forward or a backward"
    elif forward[-1] > backward[0]:
        wrong = f"{operations[forward[-1]].name} of {operations[forward[-1]].module or 'the step'} in backward"
    if wrong:
        raise BadInput(
            asked="the units of a traced step", found=wrong,
            do="trace the plain step: all rows at once, nothing run again",
        )  # fmt: skip
    owners = _owners({operation.module for operation in operations}, blocks)
    runs = _runs(operations, forward, owners)
    stops = [*(run[1][0] for run in runs[1:]), backward[0]]
    ahead = [_Stretch(block, inside[0], stop) for (block, inside), stop in zip(runs, stops)]
    return _with_backward(ahead, operations, backward, owners)


def _with_backward(
    ahead: list[_Stretch], operations: Sequence[Operation], backward: Sequence[int], owners: _Owners
) -> list[_Stretch]:
    """The stretches with their backward. What lies between two blocks belongs to the code between them, if any."""
    own: dict[_Block, list[list[int]]] = {}
    for block, inside in _runs(operations, [k for k in backward if owners[operations[k].module]], owners):
        own.setdefault(block, []).append(inside)
    found: list[_Stretch] = []
    cursor = backward[0]
    for number, stretch in reversed(list(enumerate(ahead))):
        runs = own.get(stretch.block, [])
        is_lowest = all(other.block != stretch.block for other in ahead[:number])
        mine = [k for run in (runs if is_lowest else runs[:1]) for k in run]
        own[stretch.block] = runs[1:]
        arrival = cursor
        if found:
            arrival = max(cursor, mine[0]) if mine else cursor
            found[-1] = dataclasses.replace(found[-1], end=arrival)
        found.append(dataclasses.replace(stretch, arrival=arrival, end=backward[-1] + 1))
        cursor = max(arrival, mine[-1] + 1) if mine else arrival
    return found[::-1]


def _runs(
    operations: Sequence[Operation], indices: Sequence[int], owners: _Owners
) -> list[tuple[_Block, list[int]]]:
    """Consecutive operations of one block."""
    grouped = itertools.groupby(indices, key=lambda k: owners[operations[k].module])
    return [(block, list(inside)) for block, inside in grouped]


def _owners(modules: Collection[str], blocks: Sequence[str | Sequence[str]]) -> dict[str, _Block]:
    """For each of ``modules`` the innermost block that its operations run in, an empty one for none."""
    block_at = {path: block for block in map(_as_paths, blocks) for path in block}
    found: dict[str, _Block] = {}
    for module in modules:
        above = module
        while above and above not in block_at:
            above = above.rpartition(".")[0]
        found[module] = block_at.get(above, ())
    return found


def _as_paths(block: str | Sequence[str]) -> _Block:
    return (block,) if isinstance(block, str) else tuple(block)


def _bytes_of(stretch: _Stretch, lifetimes: Lifetimes, entering_bytes: int) -> dict[str, int]:
    """A unit's entries in bytes. ``entering_bytes``: what it reads, of which its output may be a view."""
    before, after = lifetimes.live_before(stretch.start), lifetimes.live_before(stretch.stop)
    arrival = lifetimes.live_before(stretch.arrival)
    own = lifetimes.born_in(stretch.start, stretch.stop)
    at_arrival = [s for s in lifetimes.born_in(stretch.stop, stretch.arrival) if s.died >= stretch.arrival]
    output = _output_of(own, at_arrival, stretch)
    output_bytes = _sum(output) or entering_bytes
    saved = [s for s in own if s.died >= stretch.arrival and s.category is Category.ACTIVATIONS and s not in output]
    gradients = [s for s in lifetimes.born_in(stretch.arrival, stretch.end) if s.category is Category.GRADIENTS]
    return {
        "kept_bytes": after - before,
        "output_bytes": output_bytes,
        "forward_extra_bytes": lifetimes.peak_in(stretch.start, stretch.stop) - before,
        "backward_extra_bytes": lifetimes.peak_in(stretch.arrival, stretch.end) - arrival,
        # What units keep adds up to what stands after each of them.
        "arrival_extra_bytes": arrival - after,
        "incoming_bytes": _sum(at_arrival),
        "gradient_bytes": _sum(gradients),
        "offloadable_bytes": max(0, min(_sum(saved), after - before - output_bytes)),
        "moved_bytes": _sum(saved),
    }


def _output_of(own: Sequence[Lifetime], at_arrival: Sequence[Lifetime], stretch: _Stretch) -> list[Lifetime]:
    """What a stretch made for later ones: what they alone hold, which is gone when its gradient arrives; and where the
    stretch needs its output itself, the last thing it made that is as large as that gradient."""
    standing = [s for s in own if s.died >= stretch.stop]
    output = [s for s in standing if s.died < stretch.arrival]
    gradients = [s.size_bytes for s in at_arrival if s.category is not Category.GRADIENTS]
    # No gradient stands when that of the loss is made.
    alike = [s for s in standing if not gradients or s.size_bytes == max(gradients)]
    return output if set(alike) & set(output) else [*output, *alike[-1:]]


def _sum(storages: Sequence[Lifetime]) -> int:
    return sum(storage.size_bytes for storage in storages)
