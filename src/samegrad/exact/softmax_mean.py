"""Log-sum-exp of scores over items and values averaged with their softmax, in one streaming pass; first order only.

State of a pass: the running maximum, and sums of e^(s - maximum) and of e^(s - maximum) v, rescaled when the maximum
moves (Milakov, Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867). With p = softmax(s),
m = Σ p_j v_j and cotangents g of the log-sum-exp and h of m, the gradient is, item by item,

    ds_j = p_j (g + <h, v_j - m>)        dv_j = p_j h

so backward is one more pass over the items: 2F + B in all, one chunk of items alive at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from samegrad.errors import UsageError
from samegrad.exact.chunk_map import ChunkMap, Results
from samegrad.exact.ranks import largest_over_ranks, sum_over_ranks
from samegrad.exact.softmax_loss import beside, wide


def softmax_mean(chunks: ChunkMap, inputs: Sequence[Tensor], group: Any = None) -> tuple[Tensor, ...]:
    """``(lse, *means)``: log-sum-exp over items () + B, and of each value (items, B, ...) its mean (B, ...).

    ``chunks.function`` returns ``[scores, *values]`` of a chunk. Dtypes are those of scores and values; sums are kept
    in float32 at least. Where every score is -inf, lse is -inf and the means are 0, without a gradient.

    ``group``: its ranks hold items of their own; the result is that of all of them, the same on every rank, and each
    rank's items get their gradient there. Only the state of a pass crosses.
    """
    # autograd.Function.apply carries no types.
    return cast(tuple[Tensor, ...], cast(Any, _Node).apply(chunks, group, *inputs))


@dataclasses.dataclass(frozen=True)
class Streamed:
    """The state after some items: ``maximum`` (B,), ``total`` (B,), ``weighted`` (B, ...), in a wide dtype.

    States of different items can be merged in any order, so that ranks may hold items of their own: bring all of them
    to the largest maximum with ``raised`` and add up the rest.
    """

    maximum: Tensor
    total: Tensor
    weighted: tuple[Tensor, ...]

    @classmethod
    def of(cls, scores: Tensor, values: Sequence[Tensor]) -> Streamed:
        wider = scores.to(wide(scores.dtype))
        maximum = wider.amax(0)
        terms = (wider - _shift(maximum)).exp()
        return cls(maximum, terms.sum(0), tuple((beside(terms, v) * v).sum(0) for v in values))

    def raised(self, maximum: Tensor) -> Streamed:
        """The same state relative to ``maximum``, which is at least its own."""
        # Equal maxima may both be infinite, whose difference is no number.
        factor = torch.where(self.maximum == maximum, torch.ones_like(maximum), (self.maximum - maximum).exp())
        return Streamed(maximum, self.total * factor, tuple(beside(factor, w) * w for w in self.weighted))

    def merged(self, other: Streamed) -> Streamed:
        maximum = torch.maximum(self.maximum, other.maximum)
        a, b = self.raised(maximum), other.raised(maximum)
        return Streamed(maximum, a.total + b.total, tuple(x + y for x, y in zip(a.weighted, b.weighted, strict=True)))

    def of_all_ranks(self, group: Any) -> Streamed:
        """The state after the items of every rank of ``group``, each of which brings its own."""
        [maximum] = largest_over_ranks([self.maximum], group)
        mine = self.raised(maximum)
        total, *weighted = sum_over_ranks([mine.total, *mine.weighted], group)
        return Streamed(maximum, total, tuple(weighted))

    def log_sum_exp(self) -> Tensor:
        return torch.where(self.maximum.isfinite(), self.maximum + self.total.log(), self.maximum)

    def means(self) -> tuple[Tensor, ...]:
        divisor = _divisor(self.total)
        return tuple(w / beside(divisor, w) for w in self.weighted)

    @torch.no_grad()
    def pulled_back(
        self, scores: Tensor, values: Sequence[Tensor], means: Sequence[Tensor], cotangents: Mapping[int, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Some items' scores and values, each with its cotangent. ``cotangents``: by place, 0 of the log-sum-exp.

        Only ``maximum`` and ``total`` are looked at, those of all items.
        """
        shares = _softmax(scores, self.maximum, self.total)
        of_scores = torch.zeros_like(shares)
        if 0 in cotangents:
            of_scores += cotangents[0].to(shares.dtype)
        pairs = []
        for place, (value, mean) in enumerate(zip(values, means, strict=True), start=1):
            if place not in cotangents:
                continue
            cotangent = cotangents[place].to(mean.dtype)
            of_scores += _inner((value - mean) * cotangent, scores.dim())
            pairs.append((value, (beside(shares, value) * cotangent).to(value.dtype)))
        pairs.append((scores, (shares * of_scores).to(scores.dtype)))
        return pairs


def _softmax(scores: Tensor, maximum: Tensor, total: Tensor) -> Tensor:
    """The items' shares, from the same terms that made ``total``."""
    return (scores.to(total.dtype) - _shift(maximum)).exp() / _divisor(total)


def _shift(maximum: Tensor) -> Tensor:
    """What scores are shifted by: where all are -inf, -inf would make them -inf - -inf."""
    return torch.where(maximum.isfinite(), maximum, torch.zeros_like(maximum))


def _divisor(total: Tensor) -> Tensor:
    return torch.where(total == 0, torch.ones_like(total), total)


def _inner(products: Tensor, dims: int) -> Tensor:
    """The sum over all axes past the first ``dims``."""
    return products.flatten(dims).sum(-1) if products.dim() > dims else products


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: ChunkMap, group: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        state: list[Streamed] = []
        dtypes: list[torch.dtype] = []

        def take(chunk: Sequence[Tensor]) -> Results:
            scores, *values = (cast(Tensor, result) for result in plan.function(chunk))
            dtypes[:] = [t.dtype for t in (scores, *values)]
            here = Streamed.of(scores, values)
            state[:] = [state[0].merged(here) if state else here]
            return ()

        dataclasses.replace(plan, function=take, out_axes=()).run(inputs)
        last = state[0] if group is None else state[0].of_all_ranks(group)
        means = last.means()
        ctx.plan, ctx.count = plan, len(inputs)
        ctx.save_for_backward(*inputs, last.maximum, last.total, *means)
        ctx.set_materialize_grads(False)
        return tuple(t.to(dtype) for t, dtype in zip((last.log_sum_exp(), *means), dtypes))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: ChunkMap = ctx.plan
        inputs, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        gradients: list[Tensor | None] = [None] * len(inputs)
        if wanted and given:
            product = dataclasses.replace(
                plan,
                function=_vector_jacobian(plan, len(inputs), wanted, given),
                in_axes=(*plan.in_axes, *(None for _ in (*kept, *given))),
                out_axes=tuple(plan.in_axes[i] for i in wanted),
                # Backward runs outside the user's autocast block; the forward inside it enters that block again.
                autocast=plan.autocast.off(),
            )
            # autograd.Function.apply carries no types.
            found = cast(Any, _FirstOrder).apply(product, *inputs, *kept, *(cotangents[i] for i in given))
            for index, gradient in zip(wanted, found):
                gradients[index] = gradient
        return (None, None, *gradients)


class _FirstOrder(torch.autograd.Function):
    """The gradient as a node of its own, so that whoever differentiates it again is told."""

    @staticmethod
    def forward(ctx: Any, product: ChunkMap, *arguments: Tensor) -> tuple[Tensor | None, ...]:
        return product.run(arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise UsageError(
            asked='a second derivative of over(..., reduce="softmax_mean")',
            found="its gradient is a closed form of first order",
            do='compose it: lse = over(scores, ..., reduce="logsumexp"), then over((scores - lse).exp() * values, ..., '
            'reduce="sum"); those have derivatives of every order',
        )


def _vector_jacobian(
    plan: ChunkMap, count: int, wanted: Sequence[int], given: Sequence[int]
) -> Callable[[Sequence[Tensor]], Results]:
    """``(inputs, maximum, total, means, cotangents) -> gradients of the wanted inputs`` for one chunk of ``plan``."""

    def product(arguments: Sequence[Tensor]) -> Results:
        inputs, (maximum, total, *rest) = list(arguments[:count]), arguments[count:]
        means, cotangents = rest[: -len(given)], dict(zip(given, rest[-len(given) :]))
        state = Streamed(maximum, total, ())
        with torch.enable_grad():
            for index in wanted:
                inputs[index] = inputs[index].detach().requires_grad_()
            with plan.autocast.entered():
                scores, *values = (cast(Tensor, result) for result in plan.function(inputs))
        pairs = state.pulled_back(scores, values, means, cotangents)
        pairs = [(result, cotangent) for result, cotangent in pairs if result.requires_grad]
        if not pairs:
            return [None] * len(wanted)
        roots, products = zip(*pairs)
        return torch.autograd.grad(roots, [inputs[i] for i in wanted], products, allow_unused=True)

    return product
