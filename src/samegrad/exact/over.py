"""``over``: a function of items (centers, projections, tiles), run a few items at a time, joined or reduced.

    density = sg.over(score, centers, shared=(x, network), reduce="logsumexp", rows=100)

Derivatives of any order hold one chunk of items at a time; "softmax_mean" is a closed form with a first one only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.errors import BadInput, CannotSplit, UsageError
from samegrad.exact import collectives, losses
from samegrad.exact.across_rows import Followed
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.chunk_map import Autocast, ChunkMap
from samegrad.exact.dataless import has_data
from samegrad.exact.held import arrays_held_in
from samegrad.exact.ranks import Ranks, SplitItems, largest_over_ranks, sum_over_ranks
from samegrad.exact.row_comparisons import close
from samegrad.exact.row_count_code import refuse_counting_rows
from samegrad.exact.row_refusals import refuse_data_parallel
from samegrad.exact.sharded import refuse_sharded
from samegrad.exact.softmax_loss import checked
from samegrad.exact.softmax_mean import softmax_mean
from samegrad.exact.undisturbed import Generators, ModuleState
from samegrad.exact.watch import Watch

# Items of the chunk that is tried: what the last one sees of those before it, the first does not see.
_TRIED = 3
# Made anew from the parameters whenever those are others.
_REBUILT = ("_flat_weights", "_flat_weight_refs")
# Codes, and the kinds of items on which they were looked at.
_looked_at: set[object] = set()

Reduce = Literal["cat", "sum", "logsumexp", "softmax_mean"]


def over(
    fn: Callable[[Any, Any], Any],
    items: Any,
    *,
    shared: Any = None,
    reduce: Reduce = "cat",
    rows: int,
    process_group: Any = None,
) -> Any:
    """``fn(items, shared)`` with ``rows`` items at a time.

    ``fn`` returns tensors whose first axis is the items: "cat" keeps that axis, "sum" and "logsumexp" reduce it, the
    latter without ever holding all terms. "softmax_mean": ``fn`` returns ``(scores, values)``, scores (items, B) and
    values (items, B, ...), nested as you like; the result is ``(lse, means)``, the scores' log-sum-exp (B,) and the
    values averaged with their softmax (B, ...), with a first derivative only, at 2F + B; values () give lse alone.

    ``items``: tensors, nested as you like, items on their first axis. ``shared``: what every chunk sees, nested;
    tensors and modules in it receive gradients. Raises CannotSplit when ``fn`` uses parameters that are not in
    ``shared``, draws random numbers or changes state.

    ``process_group``: every rank of it holds items of its own, any number of them, and the same ``shared``; the
    reductions are over the ranks too. Every rank is to compute the same loss from the result: then each holds the
    whole gradient of what is shared (summed over ranks, not averaged) and that of its own items, to any order but for
    "softmax_mean".
    """
    if reduce not in get_args(Reduce):
        raise UsageError(asked=f"reduce={reduce!r}", found="not a reduction", do=f"use one of {get_args(Reduce)}")
    if process_group is not None and reduce == "cat":
        raise UsageError(
            asked="reduce='cat' with process_group=",
            found="it is no sum over the items of all ranks",
            do="use a reduction, or leave process_group out: each rank keeps what its own items give",
        )
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise UsageError(asked=f"rows={rows!r}", found="not a positive whole number", do="give items at a time")
    made = partial(_Over, fn, items, shared, rows)
    mapped = made() if process_group is None else _on_ranks(made, (items, shared), process_group)
    if reduce == "softmax_mean":
        return mapped.softmax_mean(fn)
    if reduce == "cat":
        return mapped(fn, 0)
    if reduce == "sum":
        return mapped(lambda i, s: trees.map_tensors(fn(i, s), lambda t: t.sum(0)), None)
    return _log_sum_exp(mapped, fn)


def _on_ranks(make: Callable[[], _Over], inputs: Any, process_group: Any) -> _Over:
    tensors = [leaf for leaf in trees.leaves_of(inputs) if isinstance(leaf, Tensor)]
    ranks = Ranks((process_group,), tensors[0].device if tensors else torch.device("cpu"))
    mapped, _ = ranks.together(lambda: (make(), 0))
    mapped.split_over(ranks)
    return mapped


def _log_sum_exp(mapped: _Over, fn: Callable[[Any, Any], Any]) -> Any:
    """max + log Σ exp(s - max): the maximum is found first and is a constant, so every order follows by composition."""
    with torch.no_grad():
        tops, spec = trees.flatten(mapped.maximum(fn))
    # Where every term is -inf the shift must not make it -inf - -inf.
    tops = [torch.where(top.isfinite(), top, torch.zeros_like(top)) for top in tops]

    def shifted(items: Any, shared: Any) -> Any:
        leaves = trees.flatten(fn(items, shared))[0]
        return trees.unflatten([(leaf - top).exp().sum(0) for leaf, top in zip(leaves, tops, strict=True)], spec)

    sums = trees.flatten(mapped(shifted, None))[0]
    return trees.unflatten([total.log() + top for total, top in zip(sums, tops)], spec)


def _some_apart(leaf: Tensor, tried: int) -> Tensor:
    """``tried`` items spread over ``leaf``, made others where they are alike: what is alike hides what sees it."""
    some = torch.stack([leaf[place * (len(leaf) - 1) // max(1, tried - 1)] for place in range(tried)])
    if not leaf.is_floating_point() or tried < 2 or not has_data(some) or bool((some != some[:1]).any()):
        return some
    factors = 1 + 0.5 * torch.arange(tried, device=leaf.device, dtype=leaf.dtype)
    return some * factors.view(-1, *[1] * (leaf.dim() - 1)) + 0.25


def _codes_within(fn: Any, deepest: int = 3) -> object:
    """The code that ``fn`` would run: its own, and that of the functions in its closure."""
    code = getattr(fn, "__code__", None)
    if code is None:
        return type(fn)
    held = [cell.cell_contents for cell in fn.__closure__ or () if deepest and _is_set(cell)]
    return code, tuple(_codes_within(value, deepest - 1) for value in held if callable(value))


def _is_set(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # not assigned yet
        return False


def _has_items(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


class _Over:
    """Items and what they share, ready to be mapped over by any function of both."""

    def __init__(self, fn: Callable[[Any, Any], Any], items: Any, shared: Any, rows: int) -> None:
        self._layout = trees.find_rows(items)
        alone = [p for p, a in zip(self._layout.paths, self._layout.axes) if a is None]
        if alone:
            raise BadInput(
                asked="items whose leaves have one length",
                found=f"{alone[0]} has not {self._layout.rows} items on its first axis",
                do="put what all items share into shared=",
            )
        self._sizes = tuple(trees.even_sizes(self._layout.rows, rows))
        self._items, self._items_spec = trees.flatten(items)
        self._shared, self._shared_spec = trees.flatten(shared)
        self._modules = [leaf for leaf in self._shared if isinstance(leaf, nn.Module)]
        self._aliases = ParameterAliases({f"shared[{i}]": module for i, module in enumerate(self._modules)})
        self._places = [i for i, leaf in enumerate(self._shared) if isinstance(leaf, Tensor)]
        self._split: SplitItems | None = None
        self._reached: list[bool] = []
        refuse_sharded(
            self._modules,
            asked="share a module with all chunks of items",
            do="share a module that every rank holds as a whole",
        )
        for module in self._modules:
            refuse_data_parallel(module)
        self._check(fn)

    def split_over(self, ranks: Ranks) -> None:
        """Reduces over ``ranks`` as well, all of which do so now."""
        self._split = SplitItems.agreed(ranks, self._inputs()[len(self._items) :], self._reached)

    def __call__(self, fn: Callable[[Any, Any], Any], out_axis: int | None) -> Any:
        spec: list[Any] = []
        mapped, tensors, items = self._chunks(fn, out_axis, spec), self._inputs(), len(self._items)
        if self._split is None:
            return trees.unflatten(mapped(*tensors), spec[0])
        outputs = mapped(*tensors[:items], *self._split.entering(tensors[items:]))
        return trees.unflatten(sum_over_ranks([o for o in outputs if o is not None], self._split.group), spec[0])

    def softmax_mean(self, fn: Callable[[Any, Any], Any]) -> Any:
        spec: list[Any] = []
        chunks, tensors = self._chunks(lambda items, shared: checked(fn(items, shared)), None, spec), self._inputs()
        if self._split is None:
            return trees.unflatten(softmax_mean(chunks, tensors), spec[0])
        items = len(self._items)
        entering = [*tensors[:items], *self._split.entering(tensors[items:])]
        return trees.unflatten(softmax_mean(chunks, entering, self._split.group), spec[0])

    def _chunks(self, fn: Callable[[Any, Any], Any], out_axis: int | None, spec: list[Any]) -> ChunkMap:
        """``fn`` by chunks of items; ``spec`` will hold how what it returned was nested."""

        def function(inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
            leaves, tree = trees.flatten(self._evaluated(fn, inputs))
            spec[:] = [tree]
            return leaves

        tensors = self._inputs()
        items = len(self._items)
        return ChunkMap(
            function=function,
            in_axes=(*(0 for _ in range(items)), *(None for _ in tensors[items:])),
            out_axes=out_axis,
            sizes=self._sizes,
            autocast=Autocast.now([t.device.type for t in tensors]),
            watch=Watch.of(self._modules, tensors[0].device),
        )

    def maximum(self, fn: Callable[[Any, Any], Any]) -> Any:
        """The largest term over all items, a chunk at a time; under no_grad."""
        tops: list[Tensor] = []
        spec: Any = None
        start = 0
        for size in self._sizes:
            inputs = [leaf.narrow(0, start, size) for leaf in self._items] + self._inputs()[len(self._items) :]
            leaves, spec = trees.flatten(self._evaluated(fn, inputs))
            here = [leaf.amax(0) for leaf in leaves]
            tops = here if not tops else [torch.maximum(a, b) for a, b in zip(tops, here, strict=True)]
            start += size
        return trees.unflatten(tops if self._split is None else largest_over_ranks(tops, self._split.group), spec)

    def _inputs(self) -> list[Tensor]:
        return [*self._items, *(self._shared[i] for i in self._places), *self._aliases.parameters]

    def _evaluated(self, fn: Callable[[Any, Any], Any], inputs: Sequence[Tensor]) -> Any:
        items = len(self._items)
        shared = list(self._shared)
        for place, tensor in zip(self._places, inputs[items:]):
            shared[place] = tensor
        with self._aliases.replaced(inputs[items + len(self._places) :]):
            return fn(
                trees.unflatten(inputs[:items], self._items_spec), trees.unflatten(shared, self._shared_spec)
            )

    def _check(self, fn: Callable[[Any, Any], Any]) -> None:
        """One chunk of three items, to see that nothing but items and shared gets a gradient and nothing changes, and
        that no item sees the others."""
        generators = Generators(self._items[0].device)
        state = ModuleState(self._modules, arrays_held_in(fn, self._modules, each_call=True))
        tried = min(_TRIED, self._layout.rows)
        inputs = [_some_apart(leaf.detach(), tried) for leaf in self._items]
        inputs += [tensor.detach() for tensor in self._inputs()[len(self._items) :]]
        inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
        known = {id(tensor) for tensor in inputs}
        try:
            with torch.enable_grad(), collectives.watched():
                outputs = trees.leaves_of(self._evaluated(fn, inputs))
        except collectives.CollectiveSeen as seen:
            raise CannotSplit(
                asked="a function of items that each rank can run on its own chunks",
                found=f"it calls a collective ({seen}), and ranks with other chunk counts would wait for each other",
                do="reduce over ranks outside of it, or with process_group=",
            ) from None
        drew, changed = generators.advanced(), [name for name in state.changed() if not name.endswith(_REBUILT)]
        generators.restore()
        state.restore()
        if drew or changed:
            draws = f"it draws random numbers ({', '.join(drew)})"
            raise CannotSplit(
                asked="a function of items that is the same for every chunk",
                found=draws if drew else f"it changes {', '.join(changed[:3])}",
                do="draw outside and pass the draw in items or shared; keep what is to change outside of it",
            )
        self._check_alone(fn, inputs, outputs)
        leaves = [leaf for output in outputs for leaf in losses.leaves_under(output)]
        reached = {id(leaf) for leaf in leaves}
        self._reached = [id(tensor) in reached for tensor in inputs[len(self._items) :]]
        missing = [leaf for leaf in leaves if id(leaf) not in known]
        if missing:
            raise CannotSplit(
                asked="gradients of everything that the function uses",
                found=f"it uses a tensor of shape {tuple(missing[0].shape)} that requires grad and is neither in "
                "items nor in shared",
                do="pass the tensor, or the module it belongs to, in shared=",
            )
        # Of one code once for items of a kind: it takes as long as several chunks of few items.
        modes = tuple(part.training for module in self._modules for part in module.modules())
        kinds = tuple(type(module) for module in self._modules)
        signature = self._layout.signature(trees.unflatten(self._items, self._items_spec))
        kind = (_codes_within(fn), signature, self._sizes, kinds, modes)
        if kind not in _looked_at:
            self._check_backward(inputs, outputs)
            self._check_across(fn, inputs, tried)
            self._refuse_counting(fn, tried)
            if hasattr(fn, "__code__"):
                _looked_at.add(kind)

    def _check_backward(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """A gradient of the last item's outputs is zero on the others: items can meet in backward only."""
        items = [leaf for leaf in inputs[: len(self._items)] if leaf.requires_grad]
        with torch.enable_grad():
            # Called under no_grad as well.
            last = [output.narrow(0, len(output) - 1, 1) for output in outputs if output.requires_grad]
        if not items or not last or len(items[0]) < 2:
            return
        # Not all alike: what is summed to nothing would show nothing.
        cotangents = [torch.arange(o.numel(), device=o.device).add(1).cos().view(o.shape).to(o.dtype) for o in last]
        with torch.autocast(items[0].device.type, enabled=False):
            # As backward runs where the user calls it.
            gradients = torch.autograd.grad(last, items, cotangents, allow_unused=True)
        if any(g is not None and has_data(g) and bool(g.narrow(0, 0, len(g) - 1).any()) for g in gradients):
            raise CannotSplit(
                asked="a function whose output has one entry an item, each its own",
                found="the gradient of one item's output reaches other items, in backward only",
                do="leave what items share outside of the function, and pass it in shared=",
            )

    def _refuse_counting(self, fn: Callable[[Any, Any], Any], tried: int) -> None:
        rest = [tensor.detach() for tensor in self._inputs()[len(self._items) :]]

        def run(items: Any) -> Any:
            return self._evaluated(fn, [*trees.leaves_of(items), *rest])

        items = trees.unflatten([leaf.detach() for leaf in self._items], self._items_spec)
        refuse_counting_rows(
            fn, self._modules, run, items, self._layout, [tried, *self._sizes, self._layout.rows]
        )

    def _check_alone(self, fn: Callable[[Any, Any], Any], inputs: Sequence[Tensor], some: Sequence[Tensor]) -> None:
        """The first item alone, and the last one, must give what they give beside the others."""
        items, tried = len(self._items), len(inputs[0])
        for index in sorted({0, tried - 1}):
            single = [leaf.narrow(0, index, 1) for leaf in inputs[:items]]
            with torch.no_grad():
                alone = trees.leaves_of(self._evaluated(fn, [*single, *inputs[items:]]))
            beside = [leaf.detach()[index : index + 1] if _has_items(leaf) else leaf for leaf in some]
            self._compare_alone(alone, beside)

    def _check_across(self, fn: Callable[[Any, Any], Any], inputs: Sequence[Tensor], tried: int) -> None:
        """Nothing is taken over items, a mask's mean say, that these items do not show."""
        if tried < 2:
            return
        # What has a gradient is not tried by itself.
        items = [leaf.detach() for leaf in inputs[: len(self._items)]]
        generators, state = Generators(items[0].device), ModuleState(self._modules)
        with torch.enable_grad(), Followed([(leaf, 0) for leaf in items], tried, strict=True, hooks=False) as followed:
            outputs = self._evaluated(fn, [*items, *inputs[len(items) :]])
        followed.returns(leaf for leaf in trees.leaves_of(outputs) if isinstance(leaf, Tensor))
        generators.restore()
        state.restore()
        if (found := followed.taken) is not None:
            raise CannotSplit(
                asked="a function whose output has one entry an item, each its own",
                found=f"it uses in {found.used} what {found.made} takes over items",
                do="take it over all items outside of the function, and pass it in shared=",
            )

    def _compare_alone(self, alone: Sequence[Tensor], among: Sequence[Tensor]) -> None:
        for place, (mine, beside) in enumerate(zip(alone, among, strict=True)):
            if not isinstance(mine, Tensor):
                raise UsageError(
                    asked="a function of items that returns tensors",
                    found=f"output {place} is a {type(mine).__name__}",
                    do="return tensors whose first axis is the items, nested as you like",
                )
            here = mine.dim() > 0 and mine.shape[0] == 1
            # Without data there is nothing to compare: what is followed was tried, or will be.
            if not here or (has_data(mine) and not close(beside, mine)):
                raise CannotSplit(
                    asked="a function whose output has one entry an item, each its own",
                    found=f"output {place} of one item is {tuple(mine.shape)}, or changes when another item is there",
                    do="return tensors whose first axis is the items, and reduce over items with reduce=",
                )
