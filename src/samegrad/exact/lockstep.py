"""BatchNorm exactly while only a few rows have activations: all chunks go from one BatchNorm to the next together.

    with lockstep(network, sizes=[64, 64, 40]):
        loss_fn(network(x), batch).backward()          # gradients and running statistics of the plain step

The network is cut at its BatchNorm layers (``stages.py``). Between two of them each chunk runs alone, keeping nothing;
only what crosses a cut is there for all rows, and the network's output, so that any loss may follow. Backward runs
each stage again, chunk by chunk. With ``keep_every=g`` only every g-th cut is kept and the ones between are made again
together: 2 forwards and a backward for g = 1, at most 3 forwards and a backward for others.

With ``together=g`` the cuts between g stages are there for no more than a chunk, not even while the next is made: each
stage of a group runs from what enters the group. That is g + 1 forwards and (g + 1) / 2 backwards, for the memory of
statistics alone; the gradient is the same sum, taken stage by stage with the statistics as variables of their own.

1. Running statistics are updated once, after the whole forward, and so is other state (``rules``) that chunks'
   contributions add up to: each chunk starts from what it was before. Nothing is changed when something raises before.
2. Statistics are rows' gradients too: see ``stage_run.py``. Derivatives of any order for keep_every=1, one for others.
3. Layers in eval mode, and whatever contains no BatchNorm, run as rows within their stage.
4. A model that calls torch.utils.checkpoint itself is recorded through it. The plain step updates statistics under it
   twice, in forward and when it recomputes (pytorch#96136); here they are updated once. Gradients are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from samegrad import trees
from samegrad.errors import CannotSplit, Untraceable, UsageError
from samegrad.exact import batchnorm
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.chunk_map import Autocast
from samegrad.exact.crossings import Crossing
from samegrad.exact.recorded import Recorded, filled, nodes_in
from samegrad.exact.replaced_forward import forward_replaced, has_own_forward
from samegrad.exact.stage_run import ROW_NUMBERS, Call, ChunkContext, Slot, StageRun, StageState
from samegrad.exact.stages import Stage, Stages, is_rows
from samegrad.exact.state import StateRule, StateTransaction
from samegrad.exact.tracings import Tracings
from samegrad.exact.watch import Watch


@contextlib.contextmanager
def lockstep(
    network: nn.Module,
    *,
    sizes: Sequence[int],
    keep_every: int = 1,
    together: int = 1,
    chunk_context: ChunkContext | None = None,
    tracings: Tracings | None = None,
    rules: Sequence[StateRule] = (),
) -> Iterator[None]:
    """Calls of ``network`` run in chunks of ``sizes`` rows with the statistics of all of them.

    Tensor arguments with as many rows as ``sizes`` adds up to are cut, others are shared. ``chunk_context``: see
    ``stage_run.py``. ``tracings``: kept by the caller, so that a network is not cut anew at every step. ``rules``: how
    state that the network changes, running statistics apart, is reduced over chunks. Raises Untraceable where the
    network cannot be recorded, CannotSplit where its rows cannot be cut.
    """
    check_sizes(sizes)
    for name, number in (("keep_every", keep_every), ("together", together)):
        if number < 1:
            raise UsageError(asked=f"{name}={number}", found="not a positive number", do="give 1 or more")
    if has_own_forward(network):
        raise Untraceable(
            asked="record what the model computes",
            found="its forward was replaced on this instance, so its class does not say what it computes",
            do="undo that, or let its chunks meet at each BatchNorm (rendezvous)",
        )
    plain = network.forward
    known = Tracings() if tracings is None else tracings
    batchnorm.coupled_layers(network)
    # Other ranks may have more chunks, and wait for the collectives of this scheme.
    alone = not batchnorm.shared_over_ranks(network)

    # Whoever looks which arguments the network takes sees its own.
    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(sizes) == 1 and alone:
            return plain(*args, **kwargs)
        check_rows((args, kwargs), sizes)
        staged = known.stages_of(network, args, kwargs, rows=sum(sizes), together=together)
        call, values = _begun(network, staged, (args, kwargs), sizes, rules)
        if chunk_context is not None:
            call = dataclasses.replace(call, chunk_context=chunk_context)
        results = _run(call, values, keep_every)
        for state in call.states.values():
            state.transaction.check()
        for state in call.states.values():
            state.transaction.commit()
        for stage in call.staged.stages:
            if stage.barrier is not None:
                batchnorm.commit(call.layer(stage.barrier), call.statistics[stage.barrier])
        return results

    with forward_replaced(network, forward):
        yield


def check_sizes(sizes: Sequence[int]) -> None:
    if not sizes or min(sizes) < 1:
        raise UsageError(asked=f"chunks of {list(sizes)} rows", found="not positive", do="give the rows of each chunk")


def check_rows(arguments: Any, sizes: Sequence[int]) -> None:
    """Raises UsageError unless some tensor of ``arguments`` has as many rows as the chunks."""
    if not any(is_rows(leaf, sum(sizes)) for leaf in trees.leaves_of(arguments)):
        shapes = [tuple(leaf.shape) for leaf in trees.leaves_of(arguments) if isinstance(leaf, Tensor)]
        raise UsageError(
            asked=f"run chunks of {list(sizes)} rows",
            found=f"no argument of the model has {sum(sizes)} rows on its first axis, shapes are {shapes}",
            do="give sizes that add up to the batch's rows",
        )


def watch_beside_batchnorm(network: nn.Module, device: torch.device, rules: Sequence[StateRule] = ()) -> Watch:
    """A watch over all of ``network`` but the running statistics and state of ``rules``, which a forward does change.

    What runs again in backward is given that state as it was; nobody else's writing into it can be seen there.
    """
    own = {id(b) for part in network.modules() if batchnorm.uses_batch_statistics(part) for b in part.buffers()}
    own |= {id(network.get_submodule(rule.path)._buffers.get(rule.key)) for rule in rules}
    watch = Watch.of([network], device)
    return dataclasses.replace(watch, buffers=tuple(kept for kept in watch.buffers if id(kept[1]) not in own))


def _begun(
    network: nn.Module, staged: Stages, arguments: Any, sizes: Sequence[int], rules: Sequence[StateRule]
) -> tuple[Call, dict[Slot, Tensor]]:
    """The call and what stands at its beginning: parameters, arguments, row numbers."""
    rows = sum(sizes)
    tensors = [leaf for leaf in trees.leaves_of(arguments) if isinstance(leaf, Tensor)]
    device = next(t for t in tensors if is_rows(t, rows)).device
    aliases = ParameterAliases({"": network})
    call = Call(
        recorded=Recorded.of(network, staged.constants),
        staged=staged,
        aliases=aliases,
        sizes=tuple(sizes),
        autocast=Autocast.now([t.device.type for t in (*tensors, *aliases.parameters)]),
        watch=watch_beside_batchnorm(network, device, rules),
        chunk_context=None,
        states=_states(network, staged, rules),
    )
    values: dict[Slot, Tensor] = {ROW_NUMBERS: torch.arange(rows, device=device)}
    values |= {Slot("parameter", i): p for i, p in enumerate(aliases.parameters)}
    for number, (node, tensor) in enumerate(zip(staged.inputs, tensors)):
        if node in staged.carried:
            crossing = call.crossings[node] = Crossing(f"argument {number}")
            crossing.packed(tensor, rows)
            values[Slot("rows", node)] = tensor
        else:
            values[Slot("shared", node)] = tensor
    return call, values


def _states(network: nn.Module, staged: Stages, rules: Sequence[StateRule]) -> dict[str, StageState]:
    """What keeps state apart, by the module that holds it."""
    by_path: dict[str, list[StateRule]] = {}
    for rule in rules:
        by_path.setdefault(rule.path, []).append(rule)
    callers = staged.callers_of(rules)
    return {
        path: StageState(StateTransaction(network, mine), frozenset(callers[mine[0]]), callers[mine[0]][0])
        for path, mine in by_path.items()
    }


def _run(call: Call, values: dict[Slot, Tensor], keep_every: int) -> Any:
    stages, results = call.staged.stages, nodes_in(call.staged.output)
    index_of = {id(p): i for i, p in enumerate(call.aliases.parameters)}
    for start in range(0, len(stages), keep_every):
        members = stages[start : start + keep_every]
        later = _used(stages[start + keep_every :]).union(results)
        runs = [StageRun(call, stage, _parameters(call, stage, index_of)) for stage in members]
        segment = Segment(runs, _slots(runs), frozenset(later))
        outputs = cast(Any, _Node).apply(segment, *(values[s] for s in segment.slots))
        values.update(zip(segment.kept, outputs, strict=True))
        for slot in [s for s in values if s.kind in ("rows", "statistics") and s.key not in later]:
            del values[slot]
    return filled(call.staged.output, lambda node: _result(call, values, node))


def _used(stages: Sequence[Stage]) -> set[Node]:
    """Nodes whose rows, or whose layer's statistics, ``stages`` take."""
    return {node for stage in stages for node in (*stage.inputs, *stage.normalised)}


def _parameters(call: Call, stage: Stage, index_of: Mapping[int, int]) -> tuple[int, ...]:
    used = [p for node in stage.nodes for p in call.recorded.parameters_of(node)]
    return tuple(sorted({index_of[id(p)] for p in used if id(p) in index_of}))


def _result(call: Call, values: Mapping[Slot, Tensor], node: Node) -> Any:
    """What the network returns for ``node``: rows of all chunks, or what no row enters."""
    if node in call.staged.carried:
        crossing = call.crossings[node]
        return crossing.returned([values[Slot("rows", node, i)] for i in range(crossing.tensors)], sum(call.sizes))
    computed: dict[Node, Any] = {s.key: t for s, t in values.items() if s.kind == "shared" and isinstance(s.key, Node)}
    needed, open_nodes = {node}, [node]
    while open_nodes:
        sources = [n for n in open_nodes.pop().all_input_nodes if n not in needed]
        needed.update(sources)
        open_nodes += sources
    call.recorded.run([n for n in call.staged.graph.nodes if n in needed], computed)
    return computed[node]


@dataclasses.dataclass
class Segment:
    """Stages whose inner cuts are not kept. ``later``: nodes that are needed after it; ``kept``: its outputs."""

    runs: list[StageRun]
    slots: list[Slot]
    later: frozenset[Node]
    kept: list[Slot] = dataclasses.field(default_factory=list)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        values, produced = dict(zip(self.slots, inputs)), list[Slot]()
        for number, run in enumerate(self.runs):
            found = run.forward(values)
            produced += found
            values |= found
            needed = self.later | _used([r.stage for r in self.runs[number + 1 :]])
            for slot in [s for s in produced if s.key not in needed]:
                values.pop(slot, None)
        self.kept = [s for s in produced if s in values]
        return tuple(values[s] for s in self.kept)

    def backward(
        self, values: dict[Slot, Tensor], cotangents: dict[Slot, Tensor | None], wanted: set[Slot]
    ) -> dict[Slot, Tensor | None]:
        """Gradients of ``wanted`` inputs. ``values``: the inputs, and the statistics of every layer within."""
        gradients, made = _Sums(cotangents), set[Slot]()
        for run in self.runs[:-1]:
            again = run.forward_again(values)
            values |= again
            made |= again.keys()
        for run in reversed(self.runs):
            outputs = run.output_slots()
            for slot in made.intersection(outputs):
                del values[slot]
            inner = {s for s in run.slots() if s in made and values[s].is_floating_point()}
            inner |= {s for s in run.slots() if s.kind == "statistics" and s not in self.slots}
            chosen = [s for s in run.slots() if s in wanted or s in inner]
            gradients.add(run.pulled_back(values, {s: gradients.taken(s) for s in outputs}, chosen))
        return {slot: gradients.taken(slot) for slot in wanted}


class _Sums:
    """Gradients by slot, added up as stages give them."""

    def __init__(self, given: Mapping[Slot, Tensor | None]) -> None:
        self._sums: dict[Slot, Tensor | None] = dict(given)

    def add(self, found: Mapping[Slot, Tensor | None]) -> None:
        for slot, gradient in found.items():
            before = self._sums.get(slot)
            self._sums[slot] = before if gradient is None else gradient if before is None else before + gradient

    def taken(self, slot: Slot) -> Tensor | None:
        return self._sums.pop(slot, None)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, segment: Segment, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = segment.forward(inputs)
        ctx.segment = segment
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        statistics = [o for s, o in zip(segment.kept, outputs) if s.kind == "statistics"]
        # Outputs too, so that a second derivative finds the statistics as functions of the rows.
        ctx.save_for_backward(*inputs, *statistics)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        segment: Segment = ctx.segment
        call = segment.runs[0].call
        if len(segment.runs) > 1 and torch.is_grad_enabled():
            raise CannotSplit(
                asked="a derivative of a derivative through chunks in lockstep",
                found="several stages between the cuts that are kept",
                do="use keep_every=1",
            )
        values: dict[Slot, Tensor] = {}
        for run in segment.runs:
            if (node := run.stage.barrier) is not None:
                values[Slot("statistics", node, 0)] = call.statistics[node].mean
                values[Slot("statistics", node, 1)] = call.statistics[node].variance
        saved = ctx.saved_tensors
        values |= zip(segment.slots, saved)
        kept = [s for s in segment.kept if s.kind == "statistics"]
        values |= zip(kept, saved[len(segment.slots) :], strict=True)
        wanted = {s for s, needed in zip(segment.slots, ctx.needs_input_grad[1:]) if needed}
        found = segment.backward(values, dict(zip(segment.kept, cotangents)), wanted)
        return (None, *(found.get(s) for s in segment.slots))


def _slots(runs: Sequence[StageRun]) -> list[Slot]:
    """What the stages take from outside, in order."""
    inner = {run.stage.barrier for run in runs if run.stage.barrier is not None}
    # A normalisation that is returned has its layer's statistics as inputs all the same.
    inner |= {node for run in runs for node in run.stage.outputs if node not in run.stage.normalised}
    return list(dict.fromkeys(slot for run in runs for slot in run.slots_beside(inner)))
