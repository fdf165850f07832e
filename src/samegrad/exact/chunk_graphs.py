"""A chunk's forward, loss and backward as one graph of CUDA kernels, captured once and replayed for every chunk.

Small chunks are slow because of launches, not arithmetic; a replay launches them all at once. What a chunk reads and
writes lies in static memory: its inputs are copied into place, and gradients are added where they stand. Graphs of
other sizes share one pool.

1. The chunk runs eagerly first, on the stream that captures: libraries take their workspaces and compilers compile. The
   second time nothing may wait for the device, since a replay could not.
2. What the warm-up and the capture add to the sums does not belong to the step.
3. Python runs only while a chunk is captured: whatever it could read must be as it was (``constants.py``), else the
   chunk is captured again.
4. The totals of a step are those sums themselves: ``.grad`` stands in static memory until the next step begins. What
   still holds it then keeps its numbers: ``.grad`` moves out, and for anything else the graphs get other memory.
5. Whatever raises inside a step drops the graphs and their memory.

Source: PyTorch documentation, "CUDA Graphs".
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.errors import CannotSplit
from samegrad.exact import program
from samegrad.exact.aliases import NARROW, GradientMagnitudes, multiply, zero_sum
from samegrad.exact.captured_chunk import ASKED, CapturedChunk, capture_stream, is_alone, place_of, shape_of
from samegrad.exact.constants import Constants
from samegrad.exact.growing_segments import growing_segments
from samegrad.exact.pass_programs import ChunkWork, LossMaker, eager_loss, notes_of
from samegrad.exact.program import LossSums
from samegrad.exact.state import StateTransaction
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.sums_in_backward import StandingSums

# Each has memory of its own for what its chunk is given.
_MOST_GRAPHS = 8


class CapturedPrograms:
    """Passes whose chunks are replayed, kept from step to step. ``loss_for``: what computes the loss of a chunk."""

    def __init__(self, loss_for: LossMaker = eager_loss) -> None:
        self._loss_for = loss_for
        self._kept: CapturedPass | None = None
        self._again = 0

    @contextlib.contextmanager
    def single_pass(self, work: ChunkWork) -> Iterator[CapturedPass]:
        if self._kept is not None and not (self._kept.holds_for(work) and self._kept.take_back()):
            self._again += 1
            self.close()
        if self._kept is None:
            _refuse(work)
            self._kept = CapturedPass(work, self._loss_for)
        try:
            with work.aliases.replaced(self._kept.aliases):
                self._kept.begin(work)
                yield self._kept
        except BaseException:
            # rule 5
            self.close()
            raise

    def close(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()

    def notes(self) -> list[str]:
        found = notes_of(self._loss_for)
        if self._kept is None:
            return found
        found += [f"graphs: {self._kept.captured} captured, gradients in static memory"]
        if self._again:
            found.append(
                f"graphs: captured again {self._again} times, since what the code reads had changed or gradients of an "
                "earlier step were kept"
            )
        return found


def _refuse(work: ChunkWork) -> None:
    """Raises CannotSplit for what a replay would not do."""
    device = work.declared.device
    if device.type != "cuda":
        raise CannotSplit(
            asked=ASKED, found=f"the model is on {device}", do="leave the lever graphs out of the plan, or use CUDA"
        )
    if work.aliases.sharded:
        raise CannotSplit(
            asked=ASKED,
            found="parameters are sharded over ranks (fully_shard), whose collectives run in Python",
            do="leave the lever graphs out of the plan",
        )
    if len(work.aliases.parameters) != len(work.aliases.names):
        raise CannotSplit(
            asked=ASKED,
            found="a tensor of the batch requires grad, and it is another one in every step",
            do="leave the lever graphs out of the plan",
        )
    if work.forward.state.kept:
        names = ", ".join(work.forward.state.names[:3])
        raise CannotSplit(
            asked=ASKED,
            found=f"the forward changes state ({names}), which a replay would not put aside for each chunk",
            do="leave the lever graphs out of the plan",
        )


class CapturedPass:
    """The static memory of a pass and its graphs, one for each shape of chunk."""

    def __init__(self, work: ChunkWork, loss_for: LossMaker) -> None:
        declared, draws = work.declared, work.forward.draws
        self._device = declared.device
        self._parameters = list(work.aliases.parameters)
        self._form = work.form
        self._constants = Constants.of(declared)
        self.aliases = [nn.Parameter(p.detach()) for p in self._parameters]
        self.sums = LossSums(self._device)
        self._key = None if draws.sites is None else torch.zeros((), dtype=torch.int64, device=self._device)
        forward = self._forward = dataclasses.replace(
            work.forward,
            draws=StepDraws(draws.sites, self._key, are_all=True),
            state=StateTransaction(declared.network, ()),
            row_ids=None,
        )
        own = ChunkWork(declared, work.aliases, forward, work.form)
        self._inside = functools.partial(work.inside, forward.draws)
        self._totals: list[Tensor | None] = [None] * len(self.aliases)
        self._body = program.single_pass_body(loss_for(own, StandingSums(self._standing, always=True)), self.sums)
        self._graphs: dict[Hashable, CapturedChunk] = {}
        self._pool: Any = None
        self._stream = capture_stream(self._device)
        self._running = False
        self._magnitudes: GradientMagnitudes | None = None

    @property
    def captured(self) -> int:
        return len(self._graphs)

    def holds_for(self, work: ChunkWork) -> bool:
        """Whether what was captured is what ``work`` would compute."""
        mine = work.aliases.parameters
        return (
            work.form is self._form
            and len(mine) == len(self._parameters)
            and all(a is b for a, b in zip(mine, self._parameters))
            and (work.forward.draws.sites is None) is (self._key is None)
            and not work.forward.state.kept
            and self._constants.hold()
        )

    def take_back(self) -> bool:
        """rule 4, before a new step: whether the sums are nobody else's now."""
        for parameter, total in zip(self._parameters, self._totals):
            if total is None or is_alone(total):
                continue
            gradient = parameter.grad
            if gradient is not None and gradient.data_ptr() == total.data_ptr():
                # In place of the tensor's own memory, since others may know the tensor.
                gradient.data = gradient.detach().clone()
            if not is_alone(total):
                return False
        return True

    def begin(self, work: ChunkWork) -> None:
        """A new step: sums of nothing, and its key where the graphs read it."""
        self._zero()
        self._running = False
        self._magnitudes = GradientMagnitudes(self.aliases) if work.sums_of is GradientMagnitudes else None
        if self._key is not None:
            self._key.copy_(work.forward.draws.key_on(self._device))

    def run_once(self, chunk: Any, ids: Tensor | None, weight: Tensor, cotangent: Tensor) -> None:
        leaves, spec = trees.flatten((chunk, ids, weight, cotangent))
        shape = spec, tuple(shape_of(leaf) for leaf in leaves)
        graph = self._graphs.get(shape)
        if graph is None:
            if len(self._graphs) == _MOST_GRAPHS:
                # What was used last longest ago; what still runs of it is waited for.
                torch.cuda.synchronize(self._device)
                self._graphs.pop(next(iter(self._graphs)))
            graph = self._capture(leaves, spec)
        self._graphs.pop(shape, None)
        self._graphs[shape] = graph
        graph.replay(leaves)
        self._running = True
        if self._magnitudes is not None:
            self._keep_magnitudes(self._magnitudes)

    def idle(self, chunk: Any, used_by_loss: Callable[[Any, Any], Sequence[bool]]) -> NoReturn:
        raise AssertionError("only sharded parameters have idle chunks, and those are refused")

    def totals(self, factor: Tensor | None) -> list[Tensor | None]:
        if self._magnitudes is not None:
            return self._magnitudes.taken(factor)
        if not self._running:
            return [None] * len(self.aliases)
        multiply(self._totals, factor)
        # rule 4: tensors of their own, so that the one that is handed over is not copied.
        return [
            None if total is None else total.detach().to(alias.dtype)
            for total, alias in zip(self._totals, self.aliases)
        ]

    def magnitudes(self) -> list[Tensor | None] | None:
        return None if self._magnitudes is None else self._magnitudes.magnitudes()

    def _standing(self, index: int) -> Tensor:
        total = self._totals[index]
        if total is None:
            total = self._totals[index] = zero_sum(self.aliases[index])
        return total

    def close(self) -> None:
        """Gives back graphs and static memory; what still runs is waited for."""
        torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._totals = []
        self.aliases = []
        self._pool = None

    def _zero(self) -> None:
        self.sums.zero()
        standing = [total for total in self._totals if total is not None]
        if standing:
            torch._foreach_zero_(standing)

    def _keep_magnitudes(self, magnitudes: GradientMagnitudes) -> None:
        for alias, total in zip(self.aliases, self._totals):
            alias.grad = None if total is None else total.to(alias.dtype, copy=True)
        magnitudes.fold()
        torch._foreach_zero_([total for total in self._totals if total is not None])

    def _capture(self, leaves: list[Any], spec: Any) -> CapturedChunk:
        # rule 2
        before = [None if total is None else total.clone() for total in self._totals] if self._running else None
        sums = self.sums.loss.clone(), self.sums.count.clone()
        places = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        static = trees.unflatten(places, spec)
        here: Any = torch.cuda.current_stream(self._device)
        with self._inside():
            with self._forward.warming_up():
                self._stream.wait_stream(here)
                with cast(Any, torch.cuda).stream(self._stream):
                    self._warm_up(static)
                here.wait_stream(self._stream)
            gc.collect()
            torch.cuda.empty_cache()
            graph = self._captured(static)
        self._zero()
        self.sums.loss.copy_(sums[0])
        self.sums.count.copy_(sums[1])
        for total, kept in zip(self._totals, before or []):
            if total is not None and kept is not None:
                total.copy_(kept)
        return CapturedChunk(graph, places)

    def _warm_up(self, static: Any) -> None:
        """rule 1; afterwards every alias that gets a gradient has its sum."""
        self._body(*static)
        for index, alias in enumerate(self.aliases):
            grad, alias.grad = alias.grad, None
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise CannotSplit(
                    asked=ASKED, found=f"a gradient is {grad.layout}, which has another size in every chunk",
                    do="leave the lever graphs out of the plan, or use sparse=False",
                )  # fmt: skip
            self._standing(index)
        before = torch.cuda.get_sync_debug_mode()
        # torch has no types here.
        cast(Any, torch.cuda).set_sync_debug_mode("error")
        try:
            self._body(*static)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise CannotSplit(
                asked=ASKED,
                found=f"the step waits for the device at {place_of(error)}: a replay cannot read what it decides",
                do="keep .item(), .tolist(), boolean masks and prints of device tensors out of forward and loss, or "
                "leave the lever graphs out of the plan",
            ) from error
        finally:
            cast(Any, torch.cuda).set_sync_debug_mode(before)
            for alias in self.aliases:
                alias.grad = None

    def _captured(self, static: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for alias, total in zip(self.aliases, self._totals):
            alias.grad = total if alias.dtype not in NARROW else None
        try:
            # Other threads (the reader of rows) may allocate while this one captures.
            with growing_segments(), torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                self._body(*static)
                for alias, total in zip(self.aliases, self._totals):
                    if alias.dtype in NARROW and alias.grad is not None and total is not None:
                        total.add_(alias.grad)
                        alias.grad = None
        finally:
            for alias in self.aliases:
                alias.grad = None
        self._pool = graph.pool()
        return graph
