"""Items and what they share, with a function of both run on a few items at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.errors import BadInput
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.chunk_map import Autocast, ChunkMap
from samegrad.exact.ranks import Ranks, SplitItems, largest_over_ranks, sum_over_ranks
from samegrad.exact.row_refusals import refuse_data_parallel
from samegrad.exact.sharded import refuse_sharded
from samegrad.exact.softmax_loss import checked
from samegrad.exact.softmax_mean import softmax_mean
from samegrad.exact.watch import Watch


class ItemMap:
    """``items`` and ``shared``, ready to be mapped over by any function of both, ``rows`` items at a time.

    A function is run on a flat list of tensors, ``inputs()``: the items' leaves, then the tensors and the parameters
    that all chunks share (``shared_inputs()``).
    """

    def __init__(self, items: Any, shared: Any, rows: int) -> None:
        self.layout = trees.find_rows(items)
        alone = [p for p, a in zip(self.layout.paths, self.layout.axes) if a is None]
        if alone:
            raise BadInput(
                asked="items whose leaves have one length",
                found=f"{alone[0]} has not {self.layout.rows} items on its first axis",
                do="put what all items share into shared=",
            )
        self.sizes = tuple(trees.even_sizes(self.layout.rows, rows))
        self.items, self._items_spec = trees.flatten(items)
        self._shared, self._shared_spec = trees.flatten(shared)
        self.modules = [leaf for leaf in self._shared if isinstance(leaf, nn.Module)]
        self._aliases = ParameterAliases({f"shared[{i}]": module for i, module in enumerate(self.modules)})
        self._places = [i for i, leaf in enumerate(self._shared) if isinstance(leaf, Tensor)]
        self._split: SplitItems | None = None
        refuse_sharded(
            self.modules,
            asked="share a module with all chunks of items",
            do="share a module that every rank holds as a whole",
        )
        for module in self.modules:
            refuse_data_parallel(module)

    def split_over(self, ranks: Ranks, reached: Sequence[bool]) -> None:
        """Reduces over ``ranks`` as well, all of which do so now.

        ``reached[i]``: whether shared input i receives a gradient.
        """
        self._split = SplitItems.agreed(ranks, self.shared_inputs(), reached)

    def shared_inputs(self) -> list[Tensor]:
        return [*(self._shared[i] for i in self._places), *self._aliases.parameters]

    def inputs(self) -> list[Tensor]:
        return [*self.items, *self.shared_inputs()]

    def nested(self, items: Sequence[Tensor]) -> Any:
        """Leaves of items, nested as the items were given."""
        return trees.unflatten(items, self._items_spec)

    def evaluated(self, fn: Callable[[Any, Any], Any], inputs: Sequence[Tensor]) -> Any:
        """What ``fn`` returns on ``inputs``, a flat list like ``inputs()`` with any number of items."""
        items = len(self.items)
        shared = list(self._shared)
        for place, tensor in zip(self._places, inputs[items:]):
            shared[place] = tensor
        with self._aliases.replaced(inputs[items + len(self._places) :]):
            return fn(self.nested(inputs[:items]), trees.unflatten(shared, self._shared_spec))

    def mapped(self, fn: Callable[[Any, Any], Any], out_axis: int | None) -> Any:
        """``fn`` by chunks: joined along ``out_axis`` of what it returns, or summed where that is None."""
        spec: list[Any] = []
        outputs = self._chunks(fn, out_axis, spec)(*self._entering())
        if self._split is not None:
            outputs = sum_over_ranks([o for o in outputs if o is not None], self._split.group)
        return trees.unflatten(outputs, spec[0])

    def softmax_mean(self, fn: Callable[[Any, Any], Any]) -> Any:
        """The log-sum-exp of the scores that ``fn`` returns first, and its values averaged by their softmax."""
        spec: list[Any] = []
        chunks = self._chunks(lambda items, shared: checked(fn(items, shared)), None, spec)
        group = None if self._split is None else self._split.group
        return trees.unflatten(softmax_mean(chunks, self._entering(), group), spec[0])

    def maximum(self, fn: Callable[[Any, Any], Any]) -> Any:
        """The largest term over all items, a chunk at a time; under no_grad."""
        tops: list[Tensor] = []
        spec: Any = None
        start = 0
        for size in self.sizes:
            inputs = [leaf.narrow(0, start, size) for leaf in self.items] + self.shared_inputs()
            leaves, spec = trees.flatten(self.evaluated(fn, inputs))
            here = [leaf.amax(0) for leaf in leaves]
            tops = here if not tops else [torch.maximum(a, b) for a, b in zip(tops, here, strict=True)]
            start += size
        return trees.unflatten(tops if self._split is None else largest_over_ranks(tops, self._split.group), spec)

    def _entering(self) -> list[Tensor]:
        shared = self.shared_inputs()
        return [*self.items, *(shared if self._split is None else self._split.entering(shared))]

    def _chunks(self, fn: Callable[[Any, Any], Any], out_axis: int | None, spec: list[Any]) -> ChunkMap:
        """``fn`` by chunks of items; ``spec`` will hold how what it returned was nested."""

        def function(inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
            leaves, tree = trees.flatten(self.evaluated(fn, inputs))
            spec[:] = [tree]
            return leaves

        tensors = self.inputs()
        items = len(self.items)
        return ChunkMap(
            function=function,
            in_axes=(*(0 for _ in range(items)), *(None for _ in tensors[items:])),
            out_axes=out_axis,
            sizes=self.sizes,
            autocast=Autocast.now([t.device.type for t in tensors]),
            watch=Watch.of(self.modules, tensors[0].device),
        )
