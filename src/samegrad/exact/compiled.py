"""The loss of a chunk, forward and all, in one compiled function; its backward is compiled with it.

The function is compiled, never the model: nothing is wrapped and names of state stay. Shapes are static, since chunks
of a step have one size, or two. What it was compiled for is guarded by the compiler itself: a value that changed, a
layer that was replaced or frozen compiles again, up to ``recompile_limit``; beyond that Python runs it.

1. Draws are keyed inside the function, by operations that the compiler does not look into (``keyed_ops.py``).
2. A compiled loss has no graph to read its count from; it is taken from the call of the likelihood, and compared with
   that graph once, before anything is compiled.
3. Blocks that run again in backward are told to the compiler, node by node, by the module that each came from: only
   what enters a run of blocks is kept. Draws are the same again by their keys.
4. A head whose loss runs in chunks is left out of the function (``compiled_head.py``).
5. What was tried on a few rows holds for the Python that ran then: which parameters are reached, where logits come out,
   the count. Where anything that code could read has changed since (``constants.py``), it is tried again.
6. The backward adds to the sums of the step itself (``sums_in_backward.py``), where several chunks share them: for one
   alone they would stand through its forward, before there are gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from samegrad import trees
from samegrad.declared import checked_loss
from samegrad.errors import CannotSplit
from samegrad.exact.compiled_head import LogitPlace, find_place, own_losses_of_chunk
from samegrad.exact.compiler import Compiler, CompilerSettings
from samegrad.exact.constants import Constants
from samegrad.exact.find_head import HeadInChunks
from samegrad.exact.losses import Form, count_of, leaves_under
from samegrad.exact.pass_programs import ChunkWork, eager_loss
from samegrad.exact.phases import announce
from samegrad.exact.program import LossOfChunk
from samegrad.exact.randomness import keyed
from samegrad.exact.sums_in_backward import NamedSums, StandingSums, adding_to
from samegrad.records import Phase

# Rows on which is tried, before anything is compiled, what it may rest on.
_TRIED_ROWS = 2
_ASKED = "compile the loss of a chunk"
# (chunk, ids, key, sums): a chunk's loss and what a COUNTED one is divided by.
_KeyedLoss = Callable[[Any, Tensor | None, Tensor | None, NamedSums], tuple[Tensor, Tensor | None]]


class CompiledLoss:
    """Makes the compiled loss of a chunk, and keeps it from step to step. ``head``: one whose loss runs in chunks."""

    def __init__(self, settings: CompilerSettings, head: HeadInChunks | None = None) -> None:
        self.compiler = Compiler(settings)
        self._head = head
        self._of: tuple[Any, Any] = (None, None)
        self._made: _KeyedLoss | None = None
        self._constants: Constants | None = None
        self._reached: tuple[str, ...] = ()
        self._place: LogitPlace | None = None

    def __call__(self, work: ChunkWork, sums: StandingSums | None) -> LossOfChunk:
        if work.forward.state.kept:
            names = ", ".join(work.forward.state.names[:3])
            raise CannotSplit(
                asked=_ASKED,
                found=f"the forward changes state ({names}), which is put aside for each chunk",
                do="leave the lever compile out of the plan",
            )
        network, loss_fn = work.declared.network, work.declared.loss_fn
        if self._of[0] is not network or self._of[1] is not loss_fn:
            self._of, self._made, self._constants = (network, loss_fn), None, None
        elif self._constants is not None and not self._constants.hold():
            self._constants = None
        draws = work.forward.draws
        key = None if draws.sites is None else draws.key_on(work.declared.device)
        index_of = {name: index for index, name in enumerate(work.aliases.names)}

        def loss_of(chunk: Any, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
            announce(Phase.FORWARD)
            ids = ids if key is not None else None
            if self._constants is None:
                self._try(work, chunk, ids, key)
                self._constants = Constants.of(work.declared)
            if self._made is None:
                self._made = self._compiled(work)
            named: NamedSums = {}
            # rule 6
            if sums is not None and (sums.always or work.declared.layout(chunk).rows < work.forward.batch_rows):
                # What was frozen since has no sum.
                named = {name: sums.of(index_of[name]) for name in self._reached if name in index_of}
            return self._made(chunk, ids, key, named)

        return loss_of

    def notes(self) -> list[str]:
        """How often it was compiled and where it broke, in words."""
        return self.compiler.notes()

    def _try(self, work: ChunkWork, chunk: Any, ids: Tensor | None, key: Tensor | None) -> None:
        """rule 5. Raises CannotSplit."""
        few, few_ids = _few(work, chunk, ids)
        network = work.declared.network
        with torch.enable_grad():
            if self._head is not None:
                forward = _under_draws(work.declared.forward, work)
                self._place = find_place(self._head, network, lambda: forward(few, few_ids, key, {}))
                with self._head.handing_on(network):
                    outputs = forward(few, few_ids, key, {})
                self._reached = _names_under(trees.leaves_of(outputs), network)
                return
            loss, count = eager_loss(work)(few, few_ids)
            self._reached = _names_under([loss], network)
            if count is not None:
                _check_count(work, few, few_ids, key, count)

    def _compiled(self, work: ChunkWork) -> _KeyedLoss:
        if self._head is not None:
            return _loss_outside(self.compiler, work, self._head, lambda: self._place)
        return self.compiler.compiled(_loss_of(work), work.declared.device)


def _under_draws(function: Callable[[nn.Module, Any], Any], work: ChunkWork) -> Callable[..., Any]:
    """function(network, chunk) as (chunk, ids, key, sums): rules 1 and 6."""
    network, sites = work.declared.network, work.forward.draws.sites

    # The network is handed on: where a compiled function knows a module from is how rule 3 finds its blocks.
    def run(network: nn.Module, chunk: Any, ids: Tensor | None, key: Tensor | None) -> Any:
        if sites is None or ids is None or key is None:
            return function(network, chunk)
        with keyed(key, ids, sites=sites):
            return function(network, chunk)

    def adding(chunk: Any, ids: Tensor | None, key: Tensor | None, sums: NamedSums) -> Any:
        if not sums:
            return run(network, chunk, ids, key)
        with adding_to(network, sums):
            return run(network, chunk, ids, key)

    return adding


def _names_under(outputs: Sequence[Any], network: nn.Module) -> tuple[str, ...]:
    """The parameters of ``network`` that ``outputs`` depend on, by name."""
    under = {id(leaf) for out in outputs if isinstance(out, Tensor) for leaf in leaves_under(out)}
    return tuple(name for name, parameter in network.named_parameters() if id(parameter) in under)


def _loss_of(work: ChunkWork) -> _KeyedLoss:
    declared, counted = work.declared, work.form is Form.COUNTED

    def loss_and_count(network: nn.Module, chunk: Any) -> tuple[Tensor, Tensor | None]:
        outputs = declared.forward(network, chunk)
        if not counted:
            return checked_loss(declared.loss_fn(outputs, chunk)).reshape(()), None
        counts: list[Tensor] = []
        with _Counting(counts):
            loss = checked_loss(declared.loss_fn(outputs, chunk)).reshape(())
        return loss, counts[-1] if counts else None

    return _under_draws(loss_and_count, work)


def _loss_outside(
    compiler: Compiler, work: ChunkWork, head: HeadInChunks, place_now: Callable[[], LogitPlace | None]
) -> _KeyedLoss:
    """rule 4: the forward compiled up to the head, the user's loss in Python, its chunks compiled."""
    # Of ``work`` only what every step has: this outlives the first one.
    declared, network, counted = work.declared, work.declared.network, work.form is Form.COUNTED
    hidden_outputs = compiler.compiled(_under_draws(declared.forward, work), declared.device)
    of_chunk = compiler.compiled(own_losses_of_chunk(), declared.device)

    def loss_of(
        chunk: Any, ids: Tensor | None, key: Tensor | None, sums: NamedSums
    ) -> tuple[Tensor, Tensor | None]:
        with head.handing_on(network):
            outputs = hidden_outputs(chunk, ids, key, sums)
        announce(Phase.LOSS)
        place = place_now()
        assert place is not None
        outputs = place.with_logits(network, outputs, of_chunk)
        loss = checked_loss(declared.loss_fn(outputs, chunk)).reshape(())
        return loss, count_of(loss) if counted else None

    return loss_of


def _few(work: ChunkWork, chunk: Any, ids: Tensor | None) -> tuple[Any, Tensor | None]:
    """A few rows of ``chunk``, since Python keeps more of one than the compiler."""
    layout = work.declared.layout(chunk)
    rows = min(_TRIED_ROWS, layout.rows)
    return trees.slice_rows(chunk, layout, 0, rows), None if ids is None else ids[:rows]


class _Counting(TorchFunctionMode):
    """Appends the denominator of a likelihood to ``counts``: targets that are not ignored, or their weights."""

    def __init__(self, counts: list[Tensor]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is F.cross_entropy or func is F.nll_loss:
            self._counts.append(_count(*args, **options))
        return func(*args, **options)


def _count(input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None,
           ignore_index: int = -100, *_: Any, **__: Any) -> Tensor:  # fmt: skip
    valid = target != ignore_index
    if weight is None:
        return valid.sum().to(input.dtype)
    return torch.where(valid, weight[torch.where(valid, target, 0)], 0).sum()


def _check_count(work: ChunkWork, few: Any, ids: Tensor | None, key: Tensor | None, expected: Tensor) -> None:
    """rule 2. Raises CannotSplit."""
    _, found = _loss_of(work)(few, ids, key, {})
    if found is None or not bool(torch.isclose(found.double(), expected.double(), rtol=1e-6, atol=0)):
        raise CannotSplit(
            asked=_ASKED,
            found="what the loss is divided by is not that of a call of torch.nn.functional.cross_entropy or nll_loss",
            do="declare normalise=lambda batch: the count, or leave the lever compile out of the plan",
        )
