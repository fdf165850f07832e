"""How far the plain step itself moves when numbers in it move by one unit in the last place.

Those are its rows and weights; under a plan that takes other kernels, also what every operation returns, forward and
backward: another kernel adds up in another order, and its result is another by a few such units.

BatchNorm has a run of its own: torch's kernel on the CPU adds statistics up one after another, and where most values of
a picture are the same (paper, sky) the rounding of that many additions goes one way. Chunks do not, and are nearer to
the truth than the reference is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.exact.batchnorm import uses_batch_statistics
from samegrad.exact.looking_on import LookingOn
from samegrad.exact.replaced_forward import forward_replaced
from samegrad.exact.undisturbed import ModuleState
from samegrad.levers import Slot, levers_of
from samegrad.levers.exact_batchnorm import ExactBatchNorm
from samegrad.verify import tolerance
from samegrad.verify.compare import Gradients, Unrest, differences_of, norm_of
from samegrad.verify.sides import Bench, Planned
from samegrad.verify.state import LeftBehind
from samegrad.verify.twin import Nudge, copied


def own_unrest(planned: Planned, bench: Bench, plain: Gradients) -> Unrest:
    """That of the reference in the precision that runs, on a copy of the model; none where it cannot be copied."""
    try:
        twin = copied(planned.declared)
    except (RuntimeError, TypeError):
        return Unrest()
    own = dataclasses.replace(bench, state=ModuleState.of(twin))
    return unrest_of(dataclasses.replace(planned, declared=twin, split=None, by_rows=None), own, plain)


def unrest_of(twin: Planned, bench: Bench, reference: Gradients) -> Unrest:
    """The answer of the plain step of ``twin``, a copy of ours, to two nudges of rows and weights."""
    found = Unrest()
    ratio = tolerance.OTHER_KERNELS_RATIO if _takes_other_kernels(twin) else 1.0
    for seed in range(2):
        nudge = Nudge(seed)
        moved = dataclasses.replace(bench, rows=trees.map_tensors(bench.rows, nudge.moved))
        weights = [p for module in twin.declared.modules for p in module.parameters()]
        results = _MovedResults(nudge) if _takes_other_kernels(twin) else contextlib.nullcontext()
        with nudge.applied(weights), results:
            found = _larger(found, _moved_by(moved.run(twin.reference), reference), ratio)
    if splits_statistics(twin):
        with statistics_summed_apart(twin.declared.network):
            found = _larger(found, _moved_by(bench.run(twin.reference), reference), 1.0)
    return found


def _moved_by(gradients: Gradients, reference: Gradients) -> Unrest:
    by_name = {}
    for name, gradient in gradients.by_name.items():
        before = reference.by_name.get(name)
        if gradient is not None and before is not None and gradient.numel():
            by_name[name] = float((gradient - before).abs().max())
    norm = norm_of(differences_of(reference.by_name, gradients.by_name))
    return Unrest(by_name, norm, abs(gradients.loss - reference.loss))


def _larger(one: Unrest, other: Unrest, ratio: float) -> Unrest:
    """The larger of each, ``other`` times ``ratio``."""
    names = one.by_name.keys() | other.by_name.keys()
    return Unrest(
        {name: max(one.by_name.get(name, 0.0), ratio * other.by_name.get(name, 0.0)) for name in names},
        max(one.norm, ratio * other.norm),
        max(one.loss, ratio * other.loss),
    )


def splits_statistics(planned: Planned) -> bool:
    """Whether chunks share BatchNorm's statistics under the plan."""
    return any(isinstance(lever, ExactBatchNorm) for lever in levers_of(planned.plan))


def sums_apart(planned: Planned, bench: Bench, left: LeftBehind) -> Mapping[str, Tensor]:
    """What the plain step leaves where BatchNorm's statistics are added up in another order; nothing for others."""
    if not splits_statistics(planned):
        return {}
    with statistics_summed_apart(planned.declared.network):
        bench.run(planned.reference)
    return left.sums_now()


@contextlib.contextmanager
def statistics_summed_apart(network: nn.Module) -> Iterator[None]:
    """Inside the block BatchNorm takes the statistics of all rows by torch.var_mean."""
    with contextlib.ExitStack() as stack:
        for part in network.modules():
            if uses_batch_statistics(part):
                stack.enter_context(forward_replaced(part, functools.partial(_normalised, part)))
        yield


def _normalised(layer: Any, x: Tensor) -> Tensor:
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    shape = (1, -1, *[1] * (x.dim() - 2))
    variance, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0, keepdim=True)
    result: Tensor = (wide - mean) * (variance + layer.eps).rsqrt()
    if layer.affine:
        result = result * layer.weight.view(shape) + layer.bias.view(shape)
    if layer.running_mean is not None and layer.momentum is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            layer.running_mean.lerp_(mean.flatten().to(layer.running_mean), layer.momentum)
            unbiased = variance.flatten() * (count / max(1, count - 1))
            layer.running_var.lerp_(unbiased.to(layer.running_var), layer.momentum)
    return result.to(x.dtype)


def _takes_other_kernels(planned: Planned) -> bool:
    # BatchNorm in chunks is made of other operations than torch's own kernel.
    return splits_statistics(planned) or any(
        lever.slot in (Slot.LAYOUT, Slot.ALGORITHMS, Slot.COMPILE) for lever in levers_of(planned.plan)
    )


class _MovedResults(LookingOn):
    """Inside the block every new tensor that an operation returns is moved by ``nudge``."""

    def __init__(self, nudge: Nudge) -> None:
        super().__init__()
        self._nudge = nudge

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # What lies in the memory of something else was moved when that was made.
        if not any(returned.alias_info for returned in func._schema.returns):
            for leaf in trees.leaves_of(result):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0:
                    leaf.copy_(self._nudge.moved(leaf))
        return result
