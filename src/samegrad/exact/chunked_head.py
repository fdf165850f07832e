"""The loss of a linear head, some positions at a time: no more logits exist than those of one chunk.

A loss is one number, so the gradient of its terms can be formed while they are computed: each chunk's logits give the
chunk's losses and, for cotangent 1 of the loss, what it adds to the gradients of the hidden rows, the weight and the
bias. Backward multiplies those sums by the cotangent that arrives. Nothing runs twice. Losses that are not reduced here
have a cotangent each, which is not known yet: their chunks run again in backward. First order only.

1. Operations and dtypes of a chunk are those of the plain step, its own autocast blocks included, and so is what each
   position's term is multiplied by (one over the count): the hidden rows' gradients differ by the kernels' choice only.
2. Not in float16, where that leaves nothing of small probabilities before a scaler's scale arrives, nor where the loss
   is narrow itself: there terms have the cotangent 1, and the sums are divided by the count.
3. Sums over chunks are kept in float32 at least, and narrow ones are multiplied there: a factor rounded to the head's
   dtype would weigh all rows wrongly.
4. One operation computes a cross-entropy of float32 and writes its gradient over the logits (``cross_entropy_ops.py``)
   on CUDA, where reading and writing them is what a chunk's time goes to. Every other likelihood is called as it is.

Sources: Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989, for gradients formed in the forward; Wijmans et al. 2024,
"Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from samegrad.errors import UsageError
from samegrad.exact import program
from samegrad.exact.aliases import NARROW
from samegrad.exact.chunk_map import Autocast
from samegrad.exact.cross_entropy_ops import cross_entropy_over
from samegrad.exact.logit_rows import Cast, LogitRows
from samegrad.exact.phases import each_part, listener_now

Reduction = Literal["mean", "sum", "none"]
# losses(scores (positions, classes), targets (positions,)) -> (positions,)
Likelihood = Callable[[Tensor, Tensor], Tensor]
# losses(loss, logits, hidden (positions, width), targets (positions,)) -> (positions,), of one chunk
ChunkLosses = Callable[["HeadLoss", "LogitRows", Tensor, Tensor], Tensor]
# rule 4
_SWEPT_ON = {"cuda"}
_SWEPT_DTYPES = (torch.float32, *NARROW)


def losses_of_chunk(loss: HeadLoss, logits: LogitRows, hidden: Tensor, targets: Tensor) -> Tensor:
    """(positions,) the losses of ``hidden`` (positions, width): the operations of the plain step."""
    scores = logits.of(hidden)
    with loss.autocast.entered():
        return loss.likelihood(scores, targets)


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """A likelihood of logits, ``rows`` positions at a time.

    ``class_weight`` (classes,) and ``ignore_index`` are the likelihood's own; they say what a mean is divided by.
    ``of_chunk``: what computes the losses of a chunk. ``smoothing``: of labels, where the likelihood is a cross-entropy
    of classes that weigh the same; None elsewhere.
    """

    logits: LogitRows
    likelihood: Likelihood
    autocast: Autocast
    rows: int
    reduction: Reduction
    class_weight: Tensor | None
    ignore_index: int
    of_chunk: ChunkLosses = losses_of_chunk
    smoothing: float | None = None

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The loss of ``hidden`` (positions, width) and ``targets`` (positions,): () or, not reduced, (positions,)."""
        node = SeparateLikelihoods if self.reduction == "none" else ChunkedLikelihood
        # autograd.Function.apply carries no types.
        inputs = (targets, hidden, self.logits.weight, self.logits.bias)
        return cast(Tensor, cast(Any, node).apply(self, torch.is_grad_enabled(), *inputs))

    def parts(self, positions: int) -> Iterator[slice]:
        """Where each chunk's positions are. Chunks that only repeat are announced as such."""
        starts = range(0, max(1, positions), self.rows)
        return each_part([min(self.rows, positions - start) for start in starts], listener_now())

    def is_swept(self, hidden: Tensor) -> bool:
        """Whether rule 4 holds: the likelihood is one of float32, and what is in between only widens scores."""
        if self.smoothing is None or hidden.device.type not in _SWEPT_ON:
            return False
        dtype = self.logits.autocast.cast(hidden[:0]).dtype
        widths = [dtype, *(step.dtype for step in self.logits.then if isinstance(step, Cast))]
        if len(widths) <= len(self.logits.then) or any(d not in _SWEPT_DTYPES for d in widths):
            return False
        if any(torch.promote_types(a, b) is not b for a, b in itertools.pairwise(widths)):
            return False
        return self.autocast.widened(widths[-1], hidden.device.type) not in NARROW

    def has_half_products(self, hidden: Tensor) -> bool:
        """Whether the head computes in float16; rule 2."""
        return self.logits.autocast.cast(hidden[:0]).dtype is torch.float16

    def divisor(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """() float64 what the sum is divided by, and () int64 how many targets count."""
        counted = targets != self.ignore_index
        count = counted.sum()
        if self.reduction == "sum":
            return torch.ones((), dtype=torch.float64, device=targets.device), count
        if self.class_weight is None:
            return count.double(), count
        weights = self.class_weight.double()[targets.where(counted, torch.zeros_like(targets))]
        return (weights * counted).sum(), count


class _Sums:
    """What chunks add to the gradients of the hidden rows, the weight and the bias, where those are wanted."""

    def __init__(self, loss: HeadLoss, hidden: Tensor, wanted: Sequence[bool]) -> None:
        self.wanted = tuple(wanted)
        self._like: Sequence[Tensor | None] = (hidden, loss.logits.weight, loss.logits.bias)
        self._parts = loss.parts
        self._hidden = torch.empty_like(hidden) if self.wanted[0] else None
        self._parameters: list[Tensor | None] = [None, None]

    def add(self, part: slice, gradients: Sequence[Tensor | None]) -> None:
        """``gradients``: of the hidden rows ``part``, of the weight and of the bias; None where there is none."""
        rows, *parameters = gradients
        if self._hidden is not None:
            self._hidden[part] = 0 if rows is None else rows
        for index, gradient in enumerate(parameters):
            before, like = self._parameters[index], self._like[1 + index]
            if gradient is None or like is None:
                continue
            gradient = gradient[: len(like)]
            if before is None:
                self._parameters[index] = gradient.to(torch.float32 if like.dtype in NARROW else like.dtype)
            else:
                before.add_(gradient)

    def let_go_of_inputs(self) -> None:
        """Keeps of the inputs what says how their gradients look."""
        self._like = tuple(None if t is None else torch.empty_like(t, device="meta") for t in self._like)

    def taken(self, factor: Tensor | None = None) -> list[Tensor | None]:
        """The gradients times ``factor`` (() float64), in the dtypes of their tensors. The sums are given up."""
        hidden, self._hidden = self._hidden, None
        if hidden is not None and factor is not None:
            for part in self._parts(len(hidden)):
                multiply(hidden[part], factor)
        found = [hidden]
        for index, like in enumerate(self._like[1:]):
            total, self._parameters[index] = self._parameters[index], None
            if total is not None and like is not None:
                if factor is not None:
                    multiply(total, factor)
                total = total.to(like.dtype)
            found.append(total)
        return found


def multiply(gradients: Tensor, factor: Tensor) -> None:
    """``gradients`` times ``factor``, () float64, in place; narrow ones are multiplied in float32."""
    if gradients.dtype in NARROW:
        gradients.copy_(gradients.float().mul_(factor.float()))
    else:
        gradients.mul_(factor.to(gradients.dtype))


def _in_chunks(
    loss: HeadLoss, hidden: Tensor, targets: Tensor, sums: _Sums, cotangents: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk's place and losses, (positions,), when its gradients are in ``sums``.

    ``cotangents``: (positions,), or () for all of them; a narrow loss takes 1 instead of the latter (rule 2).
    """
    logits, swept = loss.logits.as_leaves(), loss.is_swept(hidden)

    def run(part: slice) -> Tensor:
        if swept:
            losses, gradients = _swept(loss, logits, hidden.detach(), targets, part, cotangents, sums.wanted)
            sums.add(part, gradients)
            return losses
        rows = hidden.detach()[part].requires_grad_(sums.wanted[0])
        leaves = [rows, logits.weight, logits.bias]
        live = [leaf for leaf, wanted in zip(leaves, sums.wanted) if wanted and leaf is not None]
        with torch.set_grad_enabled(bool(live)):
            losses = loss.of_chunk(loss, logits, rows, targets[part])
        if live:
            given = _given(cotangents, part, len(hidden), losses.dtype, hidden.device)
            by_leaf = dict(zip(map(id, live), program.gradients_outside_autocast(losses, given, live)))
            sums.add(part, [by_leaf.get(id(leaf)) for leaf in leaves])
        return losses.detach()

    for part in loss.parts(len(hidden)):
        # A call of its own: nothing of a chunk is there while the next one runs.
        yield part, run(part)


def _given(
    cotangents: Tensor | None, part: slice, positions: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The cotangents of the losses of ``part``, in their ``dtype``."""
    if cotangents is None or (cotangents.dim() == 0 and dtype in NARROW):
        return torch.ones(part.stop - part.start, dtype=dtype, device=device)
    return cotangents.to(dtype).expand(positions)[part]


@torch.no_grad()
def _swept(
    loss: HeadLoss,
    logits: LogitRows,
    hidden: Tensor,
    targets: Tensor,
    part: slice,
    cotangents: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """rule 4: the losses of ``part``, and the gradients of its rows, the weight and the bias, as autograd has them."""
    rows, weight = logits.autocast.cast(hidden[part]), logits.weight
    given = _given(cotangents, part, len(hidden), torch.promote_types(rows.dtype, torch.float32), hidden.device)
    assert loss.smoothing is not None
    with logits.autocast.off().entered():
        scores = F.linear(rows, weight, logits.bias)
        classes = len(weight) - logits.beyond
        losses = cross_entropy_over(scores, classes, targets[part], given, loss.ignore_index, loss.smoothing)
        return losses, [
            (scores @ weight).to(hidden.dtype) if wanted[0] else None,
            scores.mT @ rows if wanted[1] else None,
            scores.sum(0) if wanted[2] and logits.bias is not None else None,
        ]


class ChunkedLikelihood(torch.autograd.Function):
    """A sum over positions, or a mean, whose gradients are formed in the forward."""

    @staticmethod
    def forward(
        ctx: Any, loss: HeadLoss, with_grad: bool, targets: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        sums = _Sums(loss, hidden, [with_grad and needed for needed in ctx.needs_input_grad[3:]])
        divisor, count = loss.divisor(targets)
        # Without a target the plain loss is 0/0, and its gradient nothing.
        share = torch.where(count == 0, torch.zeros_like(divisor), 1 / divisor)
        total, dtype = torch.zeros((), dtype=torch.float64, device=hidden.device), torch.float32
        undivided = loss.has_half_products(hidden)
        for _, losses in _in_chunks(loss, hidden, targets, sums, None if undivided else share):
            total += losses.sum(dtype=torch.float64)
            dtype = losses.dtype
        sums.let_go_of_inputs()
        ctx.sums, ctx.share = sums, share if undivided or dtype in NARROW else None
        # As torch's own likelihoods save it: ``losses.count_of`` reads it from either.
        ctx._saved_total_weight = divisor
        return (total / divisor).to(dtype)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_order()
        if ctx.sums is None:
            raise UsageError(
                asked="a second backward through one chunked loss",
                found="its gradients were formed once, in the forward, and were handed over",
                do="run the step again, or leave the lever chunk_loss out of the plan",
            )
        sums, ctx.sums = ctx.sums, None
        factor = cotangent.double()
        return (None, None, None, *sums.taken(factor if ctx.share is None else factor * ctx.share))


class SeparateLikelihoods(torch.autograd.Function):
    """The losses of positions, whose chunks run again in backward."""

    @staticmethod
    def forward(
        ctx: Any, loss: HeadLoss, with_grad: bool, targets: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.loss = loss
        ctx.save_for_backward(targets, hidden, weight, bias)
        whole = None
        for part, losses in _in_chunks(loss, hidden, targets, _Sums(loss, hidden, [False] * 3)):
            whole = losses.new_empty(len(hidden)) if whole is None else whole
            whole[part] = losses
        assert whole is not None
        return whole

    @staticmethod
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_order()
        # Read through autograd, so that one that was changed in place since is an error.
        targets, hidden, _, _ = ctx.saved_tensors
        sums = _Sums(ctx.loss, hidden, ctx.needs_input_grad[3:])
        for _ in _in_chunks(ctx.loss, hidden, targets, sums, cotangents):
            pass
        return (None, None, None, *sums.taken())


def _refuse_second_order() -> None:
    if torch.is_grad_enabled():
        raise UsageError(
            asked="derivatives of gradients of a chunked loss (create_graph=True)",
            found="its gradients are formed without a graph of their own",
            do="leave the lever chunk_loss out of the plan",
        )
