"""A function of rows run a few rows at a time, as one autograd node whose gradient is again a chunked map.

Inputs are cut along an axis or shared by all chunks; outputs are joined along an axis or summed. The gradient of a cut
input is joined and that of a shared input summed, so the vector-Jacobian product has the same shape as the map itself
and every order of derivative holds one chunk at a time.

1. Forward keeps no graph; backward runs each chunk again. Both enter the autocast blocks that were open at the call.
2. Inputs are detached: a view taken without grad of a leaf that requires grad claims to require it and is in no graph.
3. Inputs are saved as autograd saves them, so that one changed in place before backward is an error.
4. Modes, buffers and generators are watched in every run, so that what runs again is what ran.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from samegrad.exact.aliases import NARROW
from samegrad.exact.phases import Listener, each_part, listener_now
from samegrad.exact.watch import Watch

Results = Sequence[Tensor | None]


class Magnitudes:
    """Sums over chunks of the absolute gradients of shared inputs: the scale on which rounding is judged."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, shared: int, size: Tensor | None) -> None:
        if size is not None:
            before = self._sums.get(shared)
            self._sums[shared] = size if before is None else before + size

    def of(self, shared: Tensor, gradient: Tensor | None) -> Tensor | None:
        """What was summed for ``shared``; the size of its gradient where no chunk gave it one."""
        return self._sums.get(id(shared), None if gradient is None else gradient.abs())


_magnitudes: contextvars.ContextVar[Magnitudes | None] = contextvars.ContextVar("samegrad_magnitudes", default=None)


def magnitudes_asked_for() -> Magnitudes | None:
    return _magnitudes.get()


@contextlib.contextmanager
def kept_magnitudes(asked: bool) -> Iterator[Magnitudes]:
    """Maps called inside the block keep the magnitudes of their shared inputs, if ``asked``."""
    kept = Magnitudes()
    token = _magnitudes.set(kept if asked else None)
    try:
        yield kept
    finally:
        _magnitudes.reset(token)


@dataclasses.dataclass(frozen=True)
class Autocast:
    """The autocast blocks open at the call, by device type."""

    states: tuple[tuple[str, torch.dtype, bool], ...]

    @classmethod
    def now(cls, device_types: Sequence[str]) -> Autocast:
        return cls(
            tuple((d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in dict.fromkeys(device_types))
        )

    def off(self) -> Autocast:
        return Autocast(tuple((d, dtype, False) for d, dtype, _ in self.states))

    def cast(self, factor: Tensor) -> Tensor:
        """``factor`` in the dtype in which a product inside these blocks takes it."""
        for device_type, dtype, enabled in self.states:
            if enabled and device_type == factor.device.type and factor.dtype is not torch.float64:
                return factor.to(dtype)
        return factor

    def widened(self, dtype: torch.dtype, device_type: str) -> torch.dtype:
        """What a likelihood of ``dtype`` computes in inside these blocks: float32 where one is open."""
        inside = any(enabled and kind == device_type for kind, _, enabled in self.states)
        return torch.promote_types(dtype, torch.float32) if inside else dtype

    def entered(self) -> AbstractContextManager[object]:
        """These blocks, open again."""
        blocks = [
            torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
            for device_type, dtype, enabled in self.states
            if enabled or torch.is_autocast_enabled(device_type)
        ]
        # As it is: a compiler knows such a block, but not a stack of them.
        return blocks[0] if len(blocks) == 1 else _all_of(blocks)


@contextlib.contextmanager
def _all_of(blocks: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block)
        yield


@dataclasses.dataclass(frozen=True)
class ChunkMap:
    """``function(chunk of every input) -> tensors``; ``in_axes`` and ``out_axes`` None mean shared and summed.

    ``out_axes`` may be one axis for all outputs, whose number is then known after the first chunk.
    """

    function: Callable[[Sequence[Tensor]], Results]
    in_axes: tuple[int | None, ...]
    out_axes: tuple[int | None, ...] | int | None
    sizes: tuple[int, ...]
    autocast: Autocast
    watch: Watch
    # Looked up when the map is made: backward may run in another thread, where the variable is not set.
    magnitudes: Magnitudes | None = dataclasses.field(default_factory=magnitudes_asked_for)
    listener: Listener | None = dataclasses.field(default_factory=listener_now)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        # autograd.Function.apply carries no types.
        return cast(tuple[Tensor | None, ...], cast(Any, _Node).apply(self, *inputs))

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The outputs, without a graph."""
        with self.watch.held():  # rule 4
            return self._joined(inputs)

    def pulled_back(
        self,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[int],
        input_ids: Sequence[int | None],
    ) -> list[Tensor | None]:
        """The gradients of ``inputs[i]`` for i in ``wanted``, None where there is none.

        ``cotangents``: one an output, None where it has none. ``input_ids``: of the inputs as their owner knows them,
        for magnitudes; None for those whose are not asked for. Differentiable itself where gradients are enabled.
        """
        given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        if not wanted or not given:
            return [None] * len(wanted)
        axes = self._output_axes(len(cotangents))
        sized = [i for i in wanted if self.in_axes[i] is None and input_ids[i] is not None]
        sized = [] if self.magnitudes is None else sized
        product = ChunkMap(
            function=_vector_jacobian(self, len(inputs), wanted, given, sized),
            in_axes=(*self.in_axes, *(axes[i] for i in given)),
            out_axes=(*(self.in_axes[i] for i in wanted), *(None for _ in sized)),
            sizes=self.sizes,
            # Backward runs outside the user's autocast block; the forward inside it enters that block again.
            autocast=self.autocast.off(),
            watch=self.watch,
            magnitudes=None,
            listener=self.listener,
        )
        found = product(*inputs, *(cast(Tensor, cotangents[i]) for i in given))
        for index, size in zip(sized, found[len(wanted) :]):
            cast(Magnitudes, self.magnitudes).add(cast(int, input_ids[index]), size)
        return list(found[: len(wanted)])

    def _output_axes(self, count: int) -> tuple[int | None, ...]:
        return self.out_axes if isinstance(self.out_axes, tuple) else (self.out_axes,) * count

    def _joined(self, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        joined: list[_Joined] = []
        for part in each_part(self.sizes, self.listener):
            self._run_chunk(inputs, part, joined)
        return tuple(place.value() for place in joined)

    def _run_chunk(self, inputs: Sequence[Tensor], part: slice, joined: list[_Joined]) -> None:
        chunk = [
            x.detach() if axis is None else x.detach().narrow(axis, part.start, part.stop - part.start)  # rule 2
            for x, axis in zip(inputs, self.in_axes)
        ]
        with self.autocast.entered():
            results = self.function(chunk)
        if not joined:
            joined += [_Joined(axis, sum(self.sizes)) for axis in self._output_axes(len(results))]
        for place, result in zip(joined, results, strict=True):
            place.take(None if result is None else result.detach(), part.start)


class _Joined:
    """One output of all chunks: rows written into their places, or a sum, float32 where the output is narrower."""

    def __init__(self, axis: int | None, rows: int) -> None:
        self._axis, self._rows = axis, rows
        self._whole: Tensor | None = None
        self._dtype: torch.dtype | None = None

    def take(self, result: Tensor | None, start: int) -> None:
        if result is None:
            return
        if self._axis is None:
            self._dtype = result.dtype
            wide = result.float() if result.dtype in NARROW else result
            self._whole = wide.clone() if self._whole is None else self._whole.add_(wide)
            return
        if self._whole is None:
            shape = list(result.shape)
            shape[self._axis] = self._rows
            self._whole = _zeros(result, shape)
        self._whole.narrow(self._axis, start, result.shape[self._axis]).copy_(result)

    def value(self) -> Tensor | None:
        if self._whole is None or self._dtype is None:
            return self._whole
        return self._whole.to(self._dtype)


def _zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros, since a chunk that the output does not depend on leaves its place empty, in the layout of ``like``."""
    for layout, dimensions in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if like.dim() == dimensions and not like.is_contiguous() and like.is_contiguous(memory_format=layout):
            return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=layout).zero_()
    return like.new_zeros(shape)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: ChunkMap, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        outputs = plan.run(inputs)
        ctx.plan = plan
        # Saved tensors need not come back as the same objects.
        ctx.input_ids = [id(x) for x in inputs]
        ctx.save_for_backward(*inputs)  # rule 3
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o in outputs if o is not None and not o.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: ChunkMap = ctx.plan
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        gradients: list[Tensor | None] = [None] * len(inputs)
        for index, gradient in zip(wanted, plan.pulled_back(inputs, cotangents, wanted, ctx.input_ids)):
            gradients[index] = gradient
        return (None, *gradients)


def _vector_jacobian(
    plan: ChunkMap, count: int, wanted: Sequence[int], given: Sequence[int], sized: Sequence[int]
) -> Callable[[Sequence[Tensor]], Results]:
    """``(inputs, cotangents) -> gradients of the wanted inputs`` for one chunk of ``plan``.

    Followed by the absolute values of those of ``sized``.
    """

    def product(arguments: Sequence[Tensor]) -> Results:
        inputs, cotangents = list(arguments[:count]), arguments[count:]
        # Enabled here only where this product is itself differentiated.
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            for index in wanted:
                if not inputs[index].requires_grad:
                    inputs[index] = inputs[index].detach().requires_grad_()
            with plan.autocast.entered():
                results = plan.function(inputs)
            pairs = [
                (result, cotangent)
                for result, cotangent in ((results[i], c) for i, c in zip(given, cotangents))
                if result is not None and result.requires_grad
            ]
            if not pairs:
                return [None] * (len(wanted) + len(sized))
            gradients = torch.autograd.grad(
                [result for result, _ in pairs],
                [inputs[index] for index in wanted],
                [cotangent for _, cotangent in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        by_place = dict(zip(wanted, gradients))
        return [*gradients, *(None if (g := by_place[i]) is None else g.detach().abs() for i in sized)]

    return product
