"""BatchNorm exactly for networks whose Python code cannot be recorded: the chunks meet at every BatchNorm.

    with rendezvous(network, sizes=[64, 64, 40]):
        loss_fn(network(x), batch).backward()

Each chunk runs the network's own forward in a thread, one thread at a time, and stops at each BatchNorm until all have
come there; then the statistics of all rows are known and each goes on. The chunks' graphs are joined by the statistics
alone, one node a layer, so that backward is a single one, in the calling thread, layer by layer for all chunks: no
thread waits in it. To whoever calls, the network is one autograd node: hooks of parameters fire once, on the sum.

1 forward and 1 backward. What backward needs waits in pinned host memory (``saved_on_host.py``); on the CPU nothing is
saved by that, and memory is that of the plain step. On the device: one operation of a chunk, and what is live of all.

1. Statistics are updated once, after the whole forward; nothing is changed when something raises before.
2. Chunks that come to different layers, or to another number of them, are refused by name. No thread is left behind.
3. Nodes of SyncBatchNorm's statistics are chained: its collectives have one order, the same on all ranks.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from samegrad import trees
from samegrad.errors import CannotSplit
from samegrad.exact import batchnorm
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.batchnorm import RunningMoments, Statistics
from samegrad.exact.chunk_map import Autocast
from samegrad.exact.crossings import Crossing
from samegrad.exact.joined_graphs import ChunkGraph, JoinedStatistics, SharedTotals, joined_rows
from samegrad.exact.lockstep import check_rows, check_sizes, watch_beside_batchnorm
from samegrad.exact.replaced_forward import forward_replaced
from samegrad.exact.saved_on_host import SavedOnHost
from samegrad.exact.stage_run import ChunkContext
from samegrad.exact.stages import is_rows
from samegrad.exact.virtual_ranks import Question, Result, Surroundings, VirtualRank


@contextlib.contextmanager
def rendezvous(
    network: nn.Module, *, sizes: Sequence[int], chunk_context: ChunkContext | None = None
) -> Iterator[None]:
    """Calls of ``network`` run in chunks of ``sizes`` rows that meet at every BatchNorm in training mode.

    Tensor arguments with as many rows as ``sizes`` adds up to are cut, others are shared. ``chunk_context(row_numbers,
    0)`` is entered around each chunk's forward, in its thread. First derivatives only. Raises CannotSplit.
    """
    check_sizes(sizes)
    layers, plain, here = batchnorm.coupled_layers(network), network.forward, threading.local()

    # Whoever looks which arguments the network takes sees its own.
    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(sizes) == 1:
            with contextlib.ExitStack() as stack:
                for layer in layers.values():
                    stack.enter_context(forward_replaced(layer, type(layer).forward.__get__(layer)))
                return plain(*args, **kwargs)
        check_rows((args, kwargs), sizes)
        leaves, spec = trees.flatten((args, kwargs))
        call = Meeting(network, plain, layers, leaves, spec, tuple(sizes), chunk_context, here)
        # Chunks must draw nothing and change nothing else, or they would as often as there are chunks.
        with watch_beside_batchnorm(network, call.device).held():
            outputs = cast(Any, _Node).apply(call, *call.given)
        for layer, statistics in call.met:
            batchnorm.commit(layer, statistics)
        return call.crossing.returned(outputs, sum(sizes))

    with contextlib.ExitStack() as stack:
        stack.enter_context(forward_replaced(network, forward))
        for name, layer in layers.items():
            stack.enter_context(forward_replaced(layer, _meeting(name, layer, here)))
        yield


def _meeting(name: str, layer: _BatchNorm, here: threading.local) -> Callable[[Tensor], Tensor]:
    """What stands in for the forward of ``layer`` while chunks run."""

    def forward(input: Tensor) -> Tensor:
        rank: VirtualRank | None = getattr(here, "rank", None)
        if rank is None:
            raise CannotSplit(
                asked="let chunks meet at each BatchNorm",
                found=f"{name} is called outside of the model's forward, by torch.utils.checkpoint in backward perhaps",
                do="switch checkpointing off in the model: what is kept for backward waits on the host already",
            )
        mean, variance = rank.ask((name, input))
        return batchnorm.normalised(layer, input, mean, variance)

    return forward


class Meeting:
    """One call: ``given`` are the parameters and tensor arguments; ``met`` the layers in order with statistics."""

    def __init__(
        self,
        network: nn.Module,
        plain: Callable[..., Any],
        layers: dict[str, _BatchNorm],
        leaves: list[Any],
        spec: Any,
        sizes: tuple[int, ...],
        chunk_context: ChunkContext | None,
        here: threading.local,
    ) -> None:
        self.sizes, self.crossing = sizes, Crossing("what the model returns")
        self.met: list[tuple[_BatchNorm, Statistics]] = []
        self._plain, self._layers, self._here, self._chunk_context = plain, layers, here, chunk_context
        self._leaves, self._spec, self._aliases = leaves, spec, ParameterAliases({"": network})
        rows, places = sum(sizes), [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._cut = [i for i in places if is_rows(leaves[i], rows)]
        self._whole = [i for i in places if i not in self._cut]
        self.parameters, self.device = self._aliases.parameters, leaves[self._cut[0]].device
        # Parameters, shared tensors, rows.
        self.given: list[Tensor] = [*self.parameters, *(leaves[i] for i in (*self._whole, *self._cut))]
        self.shared_count = len(self.parameters) + len(self._whole)
        self.autocast = Autocast.now([t.device.type for t in self.given])
        self._host = SavedOnHost(self.device, [*self.given, *network.buffers()])

    def run(self, needed: Sequence[bool], keep: bool) -> list[ChunkGraph]:
        """All chunks through the network, with their graphs if ``keep``. Ends every thread on every way out."""
        chunks = self._chunks(needed, keep)
        starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        ranks = [
            VirtualRank(self._work(chunk, start, size, keep)) for chunk, start, size in zip(chunks, starts, self.sizes)
        ]
        answers: Any = None
        token = torch.zeros(0, device=self.device, requires_grad=keep)
        try:
            while True:
                said: list[Question | Result] = []
                for rank, chunk in zip(ranks, chunks):
                    with self._aliases.replaced(chunk.shared[: len(self.parameters)]):
                        said.append(rank.advance(answers))
                name = self._common_place(said)
                if name is None:
                    for chunk, result in zip(chunks, said):
                        chunk.outputs = result.value
                    return chunks
                answers, token = self._answer(name, [question.value[1] for question in said], token, keep)
        finally:
            for rank in ranks:
                rank.close()

    def _chunks(self, needed: Sequence[bool], keep: bool) -> list[ChunkGraph]:
        chunks, start = [], 0
        for size in self.sizes:
            chunk = ChunkGraph([t.detach() for t in self.given[: self.shared_count]], [])
            chunk.rows = [t.detach().narrow(0, start, size) for t in self.given[self.shared_count :]]
            if keep:
                for tensor, wanted in zip((*chunk.shared, *chunk.rows), needed):
                    tensor.requires_grad_(wanted)
            chunks.append(chunk)
            start += size
        return chunks

    def _work(self, chunk: ChunkGraph, start: int, size: int, keep: bool) -> Callable[[VirtualRank], list[Tensor]]:
        leaves = list(self._leaves)
        tensors = (*chunk.shared[len(self.parameters) :], *chunk.rows)
        for place, tensor in zip((*self._whole, *self._cut), tensors):
            leaves[place] = tensor
        args, kwargs = trees.unflatten(leaves, self._spec)
        surroundings = Surroundings.now(self.device)

        def work(rank: VirtualRank) -> list[Tensor]:
            self._here.rank = rank
            numbers = torch.arange(start, start + size, device=self.device)
            context = self._chunk_context
            with (
                surroundings.entered(), torch.set_grad_enabled(keep), self.autocast.entered(), self._host.entered(),
                contextlib.nullcontext() if context is None else context(numbers, 0),
            ):  # fmt: skip
                outputs = self.crossing.packed(self._plain(*args, **kwargs), size)
                # A parameter or an argument may be returned as it is; the joined output is another tensor.
                return [o.detach() if not o.is_floating_point() else o for o in outputs]

        return work

    def _common_place(self, said: Sequence[Question | Result]) -> str | None:
        """The layer where all chunks wait, None when all are done."""
        places = [s.value[0] if isinstance(s, Question) else None for s in said]
        if len(set(places)) == 1:
            return places[0]
        other = next(k for k, place in enumerate(places) if place != places[0])
        told = [f"chunk {k} {'is done' if places[k] is None else f'comes to {places[k]}'}" for k in (0, other)]
        raise CannotSplit(
            asked="let chunks meet at each BatchNorm",
            found=f"{told[0]} where {told[1]}: the way through the model depends on the rows",
            do="recompute blocks of the full batch (recomputed_blocks), or run the step whole",
        )

    def _answer(self, name: str, xs: list[Tensor], token: Tensor, keep: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
        layer, moments = self._layers[name], RunningMoments()
        for x in xs:
            moments.add(x)
        statistics = moments.statistics(layer)
        self.met.append((layer, statistics))
        if not keep or not any(x.requires_grad for x in xs):
            return (statistics.mean, statistics.variance), token
        # Without ranks no order is needed, and backward is not to come by layers whose outputs the loss leaves out.
        chained = batchnorm.group_of(layer) is not None
        with torch.enable_grad(), self._host.entered():
            before = token if chained else token.detach()
            mean, variance, after = cast(Any, JoinedStatistics).apply(layer, statistics, before, *xs)
        return (mean, variance), after if chained else token


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Meeting, *given: Tensor) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[1:]
        chunks = call.run(needed, keep=any(needed))
        outputs = tuple(torch.cat([p.detach() for p in parts]) for parts in zip(*(c.outputs for c in chunks)))
        ctx.call, ctx.chunks = call, chunks if any(needed) else []
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Meeting = ctx.call
        # Read for their check only: parameters changed in place since the forward are an error.
        _ = ctx.saved_tensors
        chunks, ctx.chunks = ctx.chunks, None
        if chunks is None:
            raise RuntimeError("Trying to backward through chunks that met at BatchNorm layers a second time")
        totals = SharedTotals(chunks)
        roots, gradients = _roots(call, chunks, cotangents)
        del cotangents
        for chunk in chunks:
            chunk.outputs = []
        if roots:
            # Backward runs outside the user's autocast block.
            with call.autocast.off().entered():
                torch.autograd.backward(roots, gradients)
        return (None, *totals.taken(), *joined_rows(chunks))


def _roots(
    call: Meeting, chunks: Sequence[ChunkGraph], cotangents: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    roots, gradients, start = [], [], 0
    for chunk, size in zip(chunks, call.sizes):
        for output, cotangent in zip(chunk.outputs, cotangents):
            if cotangent is not None and output.requires_grad:
                roots.append(output)
                gradients.append(cotangent.narrow(0, start, size))
        start += size
    return roots, gradients
