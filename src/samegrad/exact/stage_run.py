"""One call of a staged network: each stage as a chunked map, and its vector-Jacobian product with the statistics.

Values are kept by slot: a parameter, a tensor all rows share, row tensors that crossed a cut, statistics of a layer.
The gradient of statistics reaches the rows where they are computed again, chunk by chunk: with m the mean as a
constant, mean = m + Σ (x − m) / M and variance = Σ (x − m)² / M − (mean − m)², for derivatives of every order.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from samegrad.errors import CannotSplit
from samegrad.exact import batchnorm
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.batchnorm import RunningMoments, Statistics
from samegrad.exact.chunk_map import Autocast, ChunkMap, Magnitudes, magnitudes_asked_for
from samegrad.exact.crossings import Crossing
from samegrad.exact.recorded import Recorded
from samegrad.exact.stages import Stage, Stages
from samegrad.exact.state import StateTransaction
from samegrad.exact.watch import Watch

# ``chunk_context(row_numbers, stage)``: entered around every run of a chunk, first or again; row_numbers: (rows,)
# int64 on the rows' device, stage: which part of the network runs.
ChunkContext = Callable[[Tensor, int], AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor of a call is kept: ``key`` is a parameter's index or a node; ``part`` tells its tensors apart."""

    kind: str
    key: int | Node
    part: int = 0


ROW_NUMBERS = Slot("row numbers", 0)


@dataclasses.dataclass(frozen=True)
class StageState:
    """State that the stages ``callers`` change; what counts is what the stage ``first`` makes of it."""

    transaction: StateTransaction
    callers: frozenset[int]
    first: int


@dataclasses.dataclass(frozen=True)
class Call:
    """What the stages of one call share. ``crossings`` and ``statistics`` fill up while it runs forward.

    ``states``: what keeps the state apart that stages change.
    """

    recorded: Recorded
    staged: Stages
    aliases: ParameterAliases
    sizes: tuple[int, ...]
    autocast: Autocast
    watch: Watch
    chunk_context: ChunkContext | None
    states: Mapping[str, StageState]
    magnitudes: Magnitudes | None = dataclasses.field(default_factory=magnitudes_asked_for)
    crossings: dict[Node, Crossing] = dataclasses.field(default_factory=dict)
    statistics: dict[Node, Statistics] = dataclasses.field(default_factory=dict)

    def layer(self, node: Node) -> _BatchNorm:
        layer = self.recorded.modules[str(node.target)]
        assert isinstance(layer, _BatchNorm)
        return layer


@dataclasses.dataclass(frozen=True)
class StageRun:
    """A stage within a call. ``slots``: its inputs, in order; ``parameters``: indices of those it may use."""

    call: Call
    stage: Stage
    parameters: tuple[int, ...]

    def slots(self) -> list[Slot]:
        """Known once the stages before it have run."""
        return self.slots_beside(())

    def slots_beside(self, unknown: Collection[Node]) -> list[Slot]:
        """Those that are not of the nodes ``unknown``."""
        stage, crossings = self.stage, self.call.crossings
        inputs = [node for node in stage.inputs if node not in unknown]
        layers = [node for node in stage.normalised if node not in unknown]
        return [
            *(Slot("parameter", i) for i in self.parameters),
            *(Slot("shared", node) for node in stage.shared),
            *(Slot("statistics", node, part) for node in layers for part in (0, 1)),
            *(Slot("rows", node, part) for node in inputs for part in range(crossings[node].tensors)),
            ROW_NUMBERS,
        ]

    def output_slots(self) -> list[Slot]:
        """Known after the first run."""
        stage, crossings = self.stage, self.call.crossings
        rows = [Slot("rows", node, part) for node in stage.outputs for part in range(crossings[node].tensors)]
        statistics = [] if stage.barrier is None else [Slot("statistics", stage.barrier, part) for part in (0, 1)]
        return [*rows, *statistics]

    def forward(self, values: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
        """The stage on all rows without a graph, and the statistics at its end."""
        moments = RunningMoments()

        def function(chunk: Sequence[Tensor]) -> Sequence[Tensor]:
            outputs, observed = self._chunk(chunk, first=True)
            if observed is not None:
                moments.add(observed)
            return outputs

        found = self._mapped(function).run([values[s] for s in self.slots()])
        if self.stage.barrier is not None:
            statistics = moments.statistics(self.call.layer(self.stage.barrier))
            self.call.statistics[self.stage.barrier] = statistics
            found = (*found, statistics.mean.clone(), statistics.variance.clone())
        return _filled(self.output_slots(), found)

    def forward_again(self, values: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
        """The same rows once more; the statistics are known."""
        found = self._mapped(lambda chunk: self._chunk(chunk)[0]).run([values[s] for s in self.slots()])
        return _filled([s for s in self.output_slots() if s.kind == "rows"], found)

    def pulled_back(
        self, values: Mapping[Slot, Tensor], cotangents: Mapping[Slot, Tensor | None], wanted: Sequence[Slot]
    ) -> dict[Slot, Tensor | None]:
        """Gradients of the slots ``wanted``, given those of the outputs. ``values``: the inputs and the statistics."""
        slots, barrier = self.slots(), self.stage.barrier
        rows = [cotangents.get(s) for s in self.output_slots() if s.kind == "rows"]
        mapped = self._mapped(lambda chunk: self._chunk(chunk)[0])
        if barrier is not None:
            given = self._of_statistics(values, cotangents)
            if given:
                rows += given
                mapped = self._mapped(self._centred, summed=2)
        parameters = self.call.aliases.parameters
        # Nobody asks for those of statistics, and a number of theirs would be another's as soon as they are gone.
        ids = [id(parameters[s.key]) if isinstance(s.key, int) and s.kind == "parameter" else None for s in slots]
        found = mapped.pulled_back([values[s] for s in slots], rows, [slots.index(s) for s in wanted], ids)
        return dict(zip(wanted, found))

    def _of_statistics(self, values: Mapping[Slot, Tensor], cotangents: Mapping[Slot, Tensor | None]) -> list[Tensor]:
        """Cotangents of Σ (x − m) / M and Σ (x − m)² / M, from those of the statistics."""
        barrier = self.stage.barrier
        assert barrier is not None
        g_mean, g_variance = (cotangents.get(Slot("statistics", barrier, part)) for part in (0, 1))
        if g_mean is None and g_variance is None:
            return []
        mean = values[Slot("statistics", barrier, 0)]
        both = [torch.zeros_like(mean) if g is None else g for g in (g_mean, g_variance)]
        g_mean, g_variance = batchnorm.summed_over_ranks(both, batchnorm.group_of(self.call.layer(barrier)))
        if torch.is_grad_enabled():
            # Nothing in value; its derivative is what the constant m leaves out of the variance's.
            g_mean = g_mean - 2 * g_variance * (mean - mean.detach())
        return [g_mean, g_variance]

    def _centred(self, chunk: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs, observed = self._chunk(chunk)
        assert observed is not None and self.stage.barrier is not None
        statistics, axes = self.call.statistics[self.stage.barrier], batchnorm.channel_axes(observed)
        centred = batchnorm.widened(observed) - batchnorm.along_channels(statistics.mean, observed)
        return [*outputs, centred.sum(axes) / statistics.count, centred.square().sum(axes) / statistics.count]

    def _mapped(self, function: Callable[[Sequence[Tensor]], Sequence[Tensor]], summed: int = 0) -> ChunkMap:
        slots, call = self.slots(), self.call
        outputs = len([s for s in self.output_slots() if s.kind == "rows"]) if summed else 0
        return ChunkMap(
            function=function,
            in_axes=tuple(0 if s.kind in ("rows", ROW_NUMBERS.kind) else None for s in slots),
            out_axes=(*(0 for _ in range(outputs)), *(None for _ in range(summed))) if summed else 0,
            sizes=call.sizes,
            autocast=call.autocast,
            watch=call.watch,
            magnitudes=call.magnitudes,
        )

    def _chunk(self, chunk: Sequence[Tensor], *, first: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """The stage on one chunk of its slots: what crosses the cut, and what the barrier looks at.

        State that it changes is what it was before the step, and kept if these rows run for the ``first`` time.
        """
        call, stage, given = self.call, self.stage, dict(zip(self.slots(), chunk))
        numbers = given[ROW_NUMBERS]
        rows, values = len(numbers), dict[Node, Any]()
        for node in stage.shared:
            values[node] = given[Slot("shared", node)]
        for node in stage.inputs:
            crossing = call.crossings[node]
            parts = [given[Slot("rows", node, part)] for part in range(crossing.tensors)]
            values[node] = crossing.unpacked(parts, rows)
        parameters: list[Tensor] = list(call.aliases.parameters)
        for index in self.parameters:
            parameters[index] = given[Slot("parameter", index)]
        versions = [(t, t._version) for s, t in given.items() if s.kind == "rows"]
        context = contextlib.nullcontext() if call.chunk_context is None else call.chunk_context(numbers, stage.number)
        share = rows / sum(call.sizes) if first else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(call.aliases.replaced(parameters))
            stack.enter_context(context)
            for state in call.states.values():
                if stage.number in state.callers:
                    stack.enter_context(state.transaction.chunk(share if stage.number == state.first else None))
            self._run(values, given)
        if any(tensor._version != before for tensor, before in versions):
            raise self._changed_in_place("a value that later parts of the model or its backward need")
        outputs = []
        for node in stage.outputs:
            crossing = call.crossings.setdefault(node, Crossing(_described(node)))
            outputs += crossing.packed(values[node], rows)
        return outputs, None if stage.observed is None else values[stage.observed]

    def _run(self, values: dict[Node, Any], given: Mapping[Slot, Tensor]) -> None:
        twice, again = self.call.staged.computed_twice, list[Tensor]()
        for node, done in zip(self.stage.nodes, self.stage.last_uses):
            if node in self.stage.normalised:
                x, layer = values[node.all_input_nodes[0]], self.call.layer(node)
                mean, variance = (given[Slot("statistics", node, part)] for part in (0, 1))
                values[node] = batchnorm.normalised(layer, x, mean, variance)
                again += [values[node]] if node in twice else []
            else:
                values[node] = self.call.recorded.evaluated(node, values)
            for value in done:
                values.pop(value, None)
        if any(tensor._version for tensor in again):
            raise self._changed_in_place("the result of a BatchNorm that other parts of the model use as well")

    def _changed_in_place(self, what: str) -> CannotSplit:
        return CannotSplit(
            asked="cut the model at its BatchNorm layers",
            found=f"what follows {self._place()} changes in place {what}",
            do="use the operation that returns a new tensor there (inplace=False), or run the step whole",
        )

    def _place(self) -> str:
        layers = self.call.staged.layer_names()
        return layers[self.stage.number - 1] if self.stage.number else "the model's input"


def _described(node: Node) -> str:
    what = str(node.target) if node.op in ("call_module", "get_attr") else node.name
    return f"{what}'s output" if node.op == "call_module" else f"the result of {what}"


def _filled(slots: Sequence[Slot], found: Sequence[Tensor | None]) -> dict[Slot, Tensor]:
    return {slot: tensor for slot, tensor in zip(slots, found, strict=True) if tensor is not None}
