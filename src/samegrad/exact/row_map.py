"""A call of rows as a chunked map: arguments cut where their rows are, parameters and everything else shared."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from samegrad import trees
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.chunk_map import Autocast, ChunkMap
from samegrad.exact.watch import Watch
from samegrad.trees import RowLayout


@dataclasses.dataclass(frozen=True)
class RowCall:
    """``function(*args, **kwargs)`` with parameters that stand in ``aliases``' modules.

    ``out_axis``: where the outputs' rows are. ``drawing``: entered for every chunk, first or again, with its rows' ids.
    """

    function: Callable[..., Any]
    aliases: ParameterAliases
    modules: Sequence[nn.Module]
    out_axis: int = 0
    drawing: Callable[[Tensor], AbstractContextManager[object]] | None = None

    def in_chunks(self, batch: Any, layout: RowLayout, sizes: tuple[int, ...], ids: Tensor | None = None) -> Any:
        """The call's outputs for ``batch``, (args, kwargs), with gradients of any order.

        ``ids``: (rows,) int64 on the rows' device, what draws are keyed by, where something is drawn.
        """
        leaves, spec = trees.flatten(batch)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in places]
        device = tensors[0].device
        returned = _Returned()
        parameters = self.aliases.parameters

        def function(inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
            arguments = list(leaves)
            for place, tensor in zip(places, inputs[len(parameters) :]):
                arguments[place] = tensor
            args, kwargs = trees.unflatten(arguments, spec)
            drawing: AbstractContextManager[object] = contextlib.nullcontext()
            if ids is not None and self.drawing is not None:
                drawing = self.drawing(inputs[len(parameters) + len(places)])
            with self.aliases.replaced(inputs[: len(parameters)]), drawing:
                return returned.take(self.function(*args, **kwargs))

        mapped = ChunkMap(
            function=function,
            in_axes=(*(None for _ in parameters), *(layout.axes[i] for i in places), *[0] * (ids is not None)),
            out_axes=self.out_axis,
            sizes=sizes,
            autocast=Autocast.now([t.device.type for t in (*tensors, *parameters)]),
            watch=Watch.of(self.modules, device),
        )
        inputs = [*parameters, *tensors] if ids is None else [*parameters, *tensors, ids]
        return returned.rebuilt(mapped(*inputs))


class _Returned:
    """What the function returned: tensors go through the map, everything else is kept from the first chunk."""

    def __init__(self) -> None:
        self._leaves: list[Any] = []
        self._spec: Any = None

    def take(self, result: Any) -> list[Tensor | None]:
        leaves, self._spec = trees.flatten(result)
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        return [leaves[i] for i in self._tensors]

    def rebuilt(self, outputs: Sequence[Tensor | None]) -> Any:
        leaves = list(self._leaves)
        for index, output in zip(self._tensors, outputs, strict=True):
            leaves[index] = output
        return trees.unflatten(leaves, self._spec)
