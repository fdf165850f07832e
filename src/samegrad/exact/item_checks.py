"""Whether a function of items treats each alone: three of them are run before all are.

Nothing but items and what is shared may get a gradient, nothing may be drawn or change, and no item may see others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.errors import CannotSplit, UsageError
from samegrad.exact import collectives, losses
from samegrad.exact.across_rows import Followed
from samegrad.exact.dataless import has_data
from samegrad.exact.held import arrays_held_in
from samegrad.exact.item_map import ItemMap
from samegrad.exact.row_comparisons import close
from samegrad.exact.row_count_code import refuse_counting_rows
from samegrad.exact.undisturbed import Generators, ModuleState

Function = Callable[[Any, Any], Any]

# Items of the chunk that is tried: what the last one sees of those before it, the first does not see.
_TRIED = 3
# Made anew from the parameters whenever those are others.
_REBUILT = ("_flat_weights", "_flat_weight_refs")
_EACH_ITS_OWN = "a function whose output has one entry an item, each its own"
# Codes, and the kinds of items on which they were looked at.
_looked_at: set[object] = set()


def check_items(mapped: ItemMap, fn: Function) -> list[bool]:
    """Which shared inputs of ``mapped`` receive a gradient through ``fn``. Raises CannotSplit, UsageError."""
    tried = min(_TRIED, mapped.layout.rows)
    inputs = [_some_apart(leaf.detach(), tried) for leaf in mapped.items]
    inputs += [tensor.detach() for tensor in mapped.shared_inputs()]
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    outputs = _outputs_of_pure(mapped, fn, inputs)
    _check_alone(mapped, fn, inputs, outputs)
    leaves = [leaf for output in outputs for leaf in losses.leaves_under(output)]
    _refuse_unshared(leaves, inputs)
    kind = _kind_of(mapped, fn)
    # Of one code once for items of a kind: it takes as long as several chunks of few items.
    if kind not in _looked_at:
        _check_backward(inputs[: len(mapped.items)], outputs)
        _check_across(mapped, fn, inputs, tried)
        _refuse_counting(mapped, fn, tried)
        if hasattr(fn, "__code__"):
            _looked_at.add(kind)
    reached = {id(leaf) for leaf in leaves}
    return [id(tensor) in reached for tensor in inputs[len(mapped.items) :]]


def _outputs_of_pure(mapped: ItemMap, fn: Function, inputs: Sequence[Tensor]) -> list[Any]:
    """What ``fn`` returns, if it draws nothing, changes nothing and waits for no other rank."""
    generators = Generators(mapped.items[0].device)
    state = ModuleState(mapped.modules, arrays_held_in(fn, mapped.modules, each_call=True))
    try:
        with torch.enable_grad(), collectives.watched():
            outputs = trees.leaves_of(mapped.evaluated(fn, inputs))
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
    return outputs


def _refuse_unshared(leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    known = {id(tensor) for tensor in inputs}
    missing = [leaf for leaf in leaves if id(leaf) not in known]
    if missing:
        raise CannotSplit(
            asked="gradients of everything that the function uses",
            found=f"it uses a tensor of shape {tuple(missing[0].shape)} that requires grad and is neither in "
            "items nor in shared",
            do="pass the tensor, or the module it belongs to, in shared=",
        )


def _check_alone(mapped: ItemMap, fn: Function, inputs: Sequence[Tensor], some: Sequence[Any]) -> None:
    """The first item alone, and the last one, must give what they give beside the others."""
    items, tried = len(mapped.items), len(inputs[0])
    for index in sorted({0, tried - 1}):
        single = [leaf.narrow(0, index, 1) for leaf in inputs[:items]]
        with torch.no_grad():
            alone = trees.leaves_of(mapped.evaluated(fn, [*single, *inputs[items:]]))
        beside = [leaf.detach()[index : index + 1] if _has_items(leaf) else leaf for leaf in some]
        _compare_alone(alone, beside)


def _compare_alone(alone: Sequence[Any], among: Sequence[Any]) -> None:
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
                asked=_EACH_ITS_OWN,
                found=f"output {place} of one item is {tuple(mine.shape)}, or changes when another item is there",
                do="return tensors whose first axis is the items, and reduce over items with reduce=",
            )


def _check_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """A gradient of the last item's outputs is zero on the others: items can meet in backward only."""
    items = [leaf for leaf in inputs if leaf.requires_grad]
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
            asked=_EACH_ITS_OWN,
            found="the gradient of one item's output reaches other items, in backward only",
            do="leave what items share outside of the function, and pass it in shared=",
        )


def _check_across(mapped: ItemMap, fn: Function, inputs: Sequence[Tensor], tried: int) -> None:
    """Nothing is taken over items, a mask's mean say, that these items do not show."""
    if tried < 2:
        return
    # What has a gradient is not tried by itself.
    items = [leaf.detach() for leaf in inputs[: len(mapped.items)]]
    generators, state = Generators(items[0].device), ModuleState(mapped.modules)
    with torch.enable_grad(), Followed([(leaf, 0) for leaf in items], tried, strict=True, hooks=False) as followed:
        outputs = mapped.evaluated(fn, [*items, *inputs[len(items) :]])
    followed.returns(leaf for leaf in trees.leaves_of(outputs) if isinstance(leaf, Tensor))
    generators.restore()
    state.restore()
    if (found := followed.taken) is not None:
        raise CannotSplit(
            asked=_EACH_ITS_OWN,
            found=f"it uses in {found.used} what {found.made} takes over items",
            do="take it over all items outside of the function, and pass it in shared=",
        )


def _refuse_counting(mapped: ItemMap, fn: Function, tried: int) -> None:
    rest = [tensor.detach() for tensor in mapped.shared_inputs()]

    def run(items: Any) -> Any:
        return mapped.evaluated(fn, [*trees.leaves_of(items), *rest])

    items = mapped.nested([leaf.detach() for leaf in mapped.items])
    sizes = [tried, *mapped.sizes, mapped.layout.rows]
    refuse_counting_rows(fn, mapped.modules, run, items, mapped.layout, sizes)


def _some_apart(leaf: Tensor, tried: int) -> Tensor:
    """``tried`` items spread over ``leaf``, made others where they are alike: what is alike hides what sees it."""
    some = torch.stack([leaf[place * (len(leaf) - 1) // max(1, tried - 1)] for place in range(tried)])
    if not leaf.is_floating_point() or tried < 2 or not has_data(some) or bool((some != some[:1]).any()):
        return some
    factors = 1 + 0.5 * torch.arange(tried, device=leaf.device, dtype=leaf.dtype)
    return some * factors.view(-1, *[1] * (leaf.dim() - 1)) + 0.25


def _has_items(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _kind_of(mapped: ItemMap, fn: Function) -> object:
    """What ``fn`` would do alike for: its code, the items' shapes, the modules and their modes."""
    modes = tuple(part.training for module in mapped.modules for part in module.modules())
    signature = mapped.layout.signature(mapped.nested(mapped.items))
    return _codes_within(fn), signature, mapped.sizes, tuple(type(module) for module in mapped.modules), modes


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
