"""A step in chunks: one pass when the loss is a sum over rows, two passes for every other loss.

Two passes: rows without a graph, the whole loss on those rows for its gradient with respect to each, then every
chunk again with its graph. Source: Gao, Zhang, Han, Callan 2021, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup", arXiv:2101.06983, section 3.

The second forward is paid only for chunks whose graph the budget does not hold: the last ``kept`` chunks of the first
pass keep theirs. Nothing of the user's changes here: gradients are left on aliases and returned as totals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.exact import losses, program
from samegrad.exact.aliases import GradientTotals, ParameterAliases
from samegrad.exact.first_pass import FirstPass, as_in_first_pass, lasting
from samegrad.exact.forward import StepForward
from samegrad.exact.handoff import begin_step, hand_over
from samegrad.exact.loss_gradients import loss_gradients
from samegrad.exact.losses import Form
from samegrad.exact.pass_programs import EAGER, ChunkWork, GradientSums, Inside, Programs
from samegrad.exact.phases import announce
from samegrad.exact.ranks import Agreement
from samegrad.records import Phase


@dataclasses.dataclass
class StepTotals:
    """What a split step hands over: its loss, and a gradient per parameter (None where there is none).

    loss: () on the device, detached, not scaled. parameters: the model's, then those the loss owns.
    mismatches: () int64 on the device, entries whose second-pass bits differ; None after a single pass.
    magnitudes: sums of the chunks' absolute gradients, where the sums kept them. committed: a block for which
    the state that the forward changes is written, once; it is taken back should the block raise.
    """

    loss: Tensor
    parameters: list[nn.Parameter]
    totals: list[Tensor | None]
    mismatches: Tensor | None = None
    magnitudes: list[Tensor | None] | None = None
    committed: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


def handed_over(
    declared: DeclaredStep, totals_now: Callable[[], StepTotals], agreement: Agreement | None
) -> Tensor:
    """The loss, detached, of a step whose totals ``totals_now()`` computes: then they are in ``.grad``.

    As after the plain step's backward, and the state is committed; should anything raise, neither is.
    """
    begin_step(declared.model)
    totals = totals_now()
    with totals.committed():
        hand_over(declared.model, totals.parameters, totals.totals, agreement)
    return totals.loss


def single_pass(
    declared: DeclaredStep,
    aliases: ParameterAliases,
    forward: StepForward,
    form: Form,
    chunks: Iterable[Any],
    sizes: Sequence[int],
    shares: Sequence[float],
    scale: Tensor,
    sums_of: GradientSums = GradientTotals,
    divisor: float = 1.0,
    programs: Programs = EAGER,
    inside: Inside = lambda _: contextlib.nullcontext(),
) -> StepTotals:
    """Totals of a step whose loss is a sum over rows, its chunks run by ``programs``.

    ``shares[k]`` is chunk k's part of the loss: its rows or its count over the batch's for a mean, 1 for a sum. A
    chunk whose share is 0 (no valid target) adds nothing; it is run only when its forward changes state or other
    ranks wait for it.
    ``scale``: () float64, the loss scale. ``divisor``: what the shares were divided by, where that matters for narrow
    dtypes.
    """
    device = declared.device
    # A multiple of a power of two is exact where the loss is narrow, n / rows is not; every row of a chunk would carry
    # that rounding, so what is left of the divisor is made up for on the wide sums.
    rest = 2.0 ** round(math.log2(divisor)) / divisor
    factor = None if rest == 1 else _filled(rest, device)
    with programs.single_pass(ChunkWork(declared, aliases, forward, form, sums_of, inside)) as running:
        for index, chunk, part in numbered(chunks, sizes):
            if shares[index] == 0:
                if aliases.sharded:
                    running.idle(chunk, _used_by(declared))
                else:
                    forward.only_state(chunk, forward.ids(part))
                continue
            cotangent = scale * shares[index] / rest
            running.run_once(chunk, forward.ids(part), _filled(shares[index], device), cotangent)
        sums = running.sums
        loss = sums.loss.clone()
        if form is Form.COUNTED:
            loss = sums.loss / sums.count
            # Chunks ran with cotangents for the count they were expected to have; the true count is known now.
            factor = torch.where(sums.count == 0, torch.zeros_like(sums.count), 1 / (shares[0] * sums.count))
        totals, magnitudes = running.totals(factor), running.magnitudes()
    return StepTotals(
        loss if sums.dtype is None else loss.to(sums.dtype), list(aliases.parameters), totals, magnitudes=magnitudes,
        committed=forward.committed,
    )  # fmt: skip


def _filled(value: float, device: torch.device) -> Tensor:
    """() float64 on ``device``. Not a copy from the host, which would wait for all that runs there."""
    return torch.full((), value, dtype=torch.float64, device=device)


def parts_of(sizes: Sequence[int]) -> Iterator[slice]:
    """Where each chunk's rows are in the batch."""
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def numbered(chunks: Iterable[Any], sizes: Sequence[int]) -> Iterator[tuple[int, Any, slice]]:
    """Each chunk with its number and its place, kept by nobody else: zip would hold the first one to the end."""
    arriving = iter(chunks)
    for index, part in enumerate(parts_of(sizes)):
        yield index, next(arriving), part
    # What ends a stream properly: it looks after its places then.
    if next(arriving, None) is not None:
        raise AssertionError("more chunks than sizes")


def two_passes(
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
    """Totals of a step with any loss of the outputs.

    ``chunks(sizes)`` yields the batch's chunks of these sizes from its first row on; it is asked for all of them and
    then, without the last ``kept``, again. ``batch_for_loss`` is the whole batch as the loss is to see it. A chunk of
    size 0 has rows that other chunks bring: it is run for the ranks that wait for it and adds nothing.
    """
    mismatches = torch.zeros((), dtype=torch.int64, device=declared.device)
    again = len(sizes) - kept
    with aliases.swapped() as swapped:
        gradients = sums_of(swapped)
        outputs, graphs = _first_pass(declared, forward, chunks(sizes), sizes, first_pass, kept)
        of_loss = loss_gradients(declared, outputs, batch_for_loss, scale, aliases, swapped)
        cotangents = of_loss.cotangents
        parts = list(parts_of(sizes))
        for leaves, part in zip(graphs, parts[again:], strict=True):
            # The graphs go first, so that recomputed chunks come when they are gone.
            program.backward_of_rows(leaves, [None if c is None else c[part] for c in cotangents])
            gradients.fold()
        second = program.ChunkProgram(program.second_pass_body(forward.again, mismatches), gradients)
        idle = program.ChunkProgram(
            program.idle_body(forward.idle, lambda *_: [c is not None for c in cotangents]), gradients
        )
        rows = [leaf.detach() for leaf in outputs.leaves()]
        for _, chunk, part in numbered(chunks(sizes[:again]) if again else (), sizes[:again]):
            if part.start == part.stop:
                idle.run_once(chunk)
                continue
            mine = [None if c is None else c[part] for c in cotangents]
            second.run_once(chunk, forward.ids(part), [leaf[part] for leaf in rows], mine)
        totals, magnitudes = second.totals(), gradients.magnitudes()
    parameters = of_loss.joined(aliases.parameters, totals)
    return StepTotals(of_loss.loss, parameters, totals, mismatches, magnitudes, forward.committed)


def _first_pass(
    declared: DeclaredStep,
    forward: StepForward,
    chunks: Iterable[Any],
    sizes: Sequence[int],
    first_pass: FirstPass,
    kept: int,
) -> tuple[program.OutputRows, list[list[Tensor]]]:
    """All output rows, and for each of the last ``kept`` chunks its outputs with their graphs."""
    outputs = program.OutputRows(rows=sum(sizes))
    graphs: list[list[Tensor]] = []
    body = program.first_pass_body(forward.first)
    again = len(sizes) - kept
    with as_in_first_pass(declared.device.type, first_pass):
        for index, chunk, part in numbered(chunks, sizes):
            if part.start == part.stop:
                forward.idle(chunk)
                continue
            if index and index < again:
                body(chunk, forward.ids(part), [leaf[part] for leaf in outputs.leaves()])
                continue
            announce(Phase.FORWARD)
            with torch.set_grad_enabled(index >= again or torch.is_grad_enabled()):
                made = forward.first(lasting(chunk) if index >= again else chunk, forward.ids(part))
            if index == 0:
                outputs.allocate(made, sizes[0])
            _write(outputs, part, made)
            if index >= again:
                graphs.append(program.tensors_in(made))
            # Its graph holds the chunk, whose memory the next but one is read into.
            del made
    return outputs, graphs


def _write(outputs: program.OutputRows, part: slice, made: Any) -> None:
    for place, leaf in zip(outputs.leaves(), program.tensors_in(made)):
        place[part].copy_(leaf.detach())


def _used_by(declared: DeclaredStep) -> Callable[[Any, Any], list[bool]]:
    """Which output tensors of a chunk the loss depends on."""

    def used(outputs: Any, chunk: Any) -> list[bool]:
        leaves, spec = trees.flatten(outputs)
        apart = [
            leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        with torch.enable_grad():
            loss = checked_loss(declared.loss_fn(trees.unflatten(apart, spec), chunk))
        reached = {id(leaf) for leaf in losses.leaves_under(loss)}
        return [id(leaf) in reached for leaf in apart if isinstance(leaf, Tensor)]

    return used
