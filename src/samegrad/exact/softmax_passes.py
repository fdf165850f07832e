"""Two passes of a step whose loss is of softmax means: rows are streamed through the softmax, and none is kept.

What the loss needs of all rows is B x (1 + values) numbers. The first pass streams them (``softmax_mean.py``), the loss
gives their cotangents, and the second pass turns these into the cotangents of each chunk's scores and values.

The second pass is streamed as well, in the same order: that it repeated the first one shows in the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.exact import program
from samegrad.exact.aliases import GradientTotals, ParameterAliases
from samegrad.exact.first_pass import FirstPass, as_in_first_pass, lasting
from samegrad.exact.forward import StepForward
from samegrad.exact.loss_gradients import loss_gradients
from samegrad.exact.pass_programs import GradientSums
from samegrad.exact.passes import StepTotals, numbered
from samegrad.exact.phases import announce
from samegrad.exact.softmax_loss import SoftmaxLoss, checked
from samegrad.exact.softmax_mean import Streamed
from samegrad.records import Phase

Scored = list[Tensor]


@dataclasses.dataclass
class _Stream:
    """What has been streamed so far. ``dtypes``: of scores and values; ``spec``: how the values are nested."""

    state: Streamed | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    spec: Any = None

    def scored(self, outputs: Any) -> Scored:
        """``[scores, *values]`` of a chunk's outputs."""
        scores, values = checked(outputs)
        leaves, self.spec = trees.flatten(values)
        self.dtypes = tuple(leaf.dtype for leaf in (scores, *leaves))
        return [scores, *leaves]

    @torch.no_grad()
    def take(self, scored: Scored) -> None:
        scores, *values = (leaf.detach() for leaf in scored)
        here = Streamed.of(scores, values)
        self.state = here if self.state is None else self.state.merged(here)

    def reduced(self) -> program.OutputRows:
        """``(lse, means)`` as the loss is to see them."""
        assert self.state is not None
        leaves = [t.to(dtype) for t, dtype in zip((self.state.log_sum_exp(), *self.state.means()), self.dtypes)]
        _, spec = trees.flatten((0, trees.unflatten([0] * (len(leaves) - 1), self.spec)))
        return program.OutputRows(rows=0, spec=spec, joined=[*leaves])

    def different_bits(self, other: _Stream) -> Tensor:
        """() int64: in how many numbers two streams of the same rows differ."""
        assert self.state is not None
        assert other.state is not None
        pairs = zip(_tensors(self.state), _tensors(other.state), strict=True)
        return torch.stack([program.different_bits(a, b) for a, b in pairs]).sum()


def _tensors(state: Streamed) -> tuple[Tensor, ...]:
    return (state.maximum, state.total, *state.weighted)


def softmax_passes(
    declared: DeclaredStep,
    aliases: ParameterAliases,
    forward: StepForward,
    batch_for_loss: Any,
    chunks: Callable[[Sequence[int]], Iterable[Any]],
    sizes: Sequence[int],
    scale: Tensor,
    sums_of: GradientSums = GradientTotals,
    first_pass: FirstPass = FirstPass.WITHOUT_GRAPH,
    kept: int = 0,
) -> StepTotals:
    """Totals of a step whose loss is a ``SoftmaxLoss``; arguments as of ``passes.two_passes``."""
    assert isinstance(declared.loss_fn, SoftmaxLoss)
    of_means = dataclasses.replace(declared, loss_fn=declared.loss_fn.function)
    again = len(sizes) - kept
    with aliases.swapped() as swapped:
        gradients = sums_of(swapped)
        first, repeated, graphs = _first_pass(declared, forward, chunks(sizes), sizes, first_pass, kept)
        of_loss = loss_gradients(of_means, first.reduced(), batch_for_loss, scale, aliases, swapped)
        assert first.state is not None
        means = [mean.detach() for mean in first.state.means()]
        by_place = {place: cotangent for place, cotangent in enumerate(of_loss.cotangents) if cotangent is not None}

        def pull_back(scored: Scored) -> None:
            """Backward from a chunk; ``scored`` is emptied, so that its graph goes as it is used."""
            announce(Phase.BACKWARD)
            assert first.state is not None
            pairs = first.state.pulled_back(scored[0], scored[1:], means, by_place)
            scored.clear()
            live = [(result, cotangent) for result, cotangent in pairs if result.requires_grad]
            pairs.clear()
            if live:
                program.backward_outside_autocast([result for result, _ in live], [c for _, c in live])

        for scored in graphs:
            pull_back(scored)
            gradients.fold()
        second = _Stream()

        def body(chunk: Any, ids: Tensor | None) -> None:
            announce(Phase.FORWARD)
            scored = second.scored(forward.again(chunk, ids))
            second.take(scored)
            pull_back(scored)

        repeating = program.ChunkProgram(body, gradients)
        for _, chunk, part in numbered(chunks(sizes[:again]) if again else (), sizes[:again]):
            repeating.run_once(chunk, forward.ids(part))
        mismatches = second.different_bits(repeated) if again else torch.zeros((), dtype=torch.int64)
        totals, magnitudes = repeating.totals(), gradients.magnitudes()
    parameters = of_loss.joined(aliases.parameters, totals)
    return StepTotals(of_loss.loss, parameters, totals, mismatches, magnitudes, forward.committed)


def _first_pass(
    declared: DeclaredStep,
    forward: StepForward,
    chunks: Iterable[Any],
    sizes: Sequence[int],
    first_pass: FirstPass,
    kept: int,
) -> tuple[_Stream, _Stream, list[Scored]]:
    """All rows streamed, those that will run again, and the last ``kept`` chunks' outputs with their graphs."""
    stream, repeated = _Stream(), _Stream()
    graphs: list[Scored] = []
    again = len(sizes) - kept
    with as_in_first_pass(declared.device.type, first_pass):
        for index, chunk, part in numbered(chunks, sizes):
            announce(Phase.FORWARD)
            with_graph = index >= again
            with torch.set_grad_enabled(with_graph or torch.is_grad_enabled()):
                scored = stream.scored(forward.first(lasting(chunk) if with_graph else chunk, forward.ids(part)))
            stream.take(scored)
            if index == again - 1:
                repeated = dataclasses.replace(stream)
            if with_graph:
                graphs.append(scored)
            # Its graph holds the chunk, whose memory the next but one is read into.
            del scored
    return stream, repeated, graphs
