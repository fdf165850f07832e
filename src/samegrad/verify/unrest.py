"""How far the plain step itself moves when numbers in it move by one unit in the last place.

Those are its rows and weights; under a plan that takes other kernels, also what every operation returns, forward and
backward: another kernel adds up in another order, and its result is another by a few such units.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from samegrad import trees
from samegrad.exact.undisturbed import ModuleState
from samegrad.levers import Slot, levers_of
from samegrad.levers.exact_batchnorm import ExactBatchNorm
from samegrad.verify import tolerance
from samegrad.verify.compare import Gradients, Unrest, differences_of, norm_of
from samegrad.verify.sides import Bench, Planned
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
    by_name: dict[str, float] = {}
    norm = loss = 0.0
    for seed in range(2):
        nudge = Nudge(seed)
        moved = dataclasses.replace(bench, rows=trees.map_tensors(bench.rows, nudge.moved))
        weights = [p for module in twin.declared.modules for p in module.parameters()]
        results = _MovedResults(nudge) if _takes_other_kernels(twin) else contextlib.nullcontext()
        with nudge.applied(weights), results:
            gradients = moved.run(twin.reference)
        for name, gradient in gradients.by_name.items():
            before = reference.by_name.get(name)
            if gradient is not None and before is not None and gradient.numel():
                by_name[name] = max(by_name.get(name, 0.0), float((gradient - before).abs().max()))
        norm = max(norm, norm_of(differences_of(reference.by_name, gradients.by_name)))
        loss = max(loss, abs(gradients.loss - reference.loss))
    ratio = tolerance.OTHER_KERNELS_RATIO if _takes_other_kernels(twin) else 1.0
    return Unrest({name: ratio * moved for name, moved in by_name.items()}, ratio * norm, ratio * loss)


def _takes_other_kernels(planned: Planned) -> bool:
    # BatchNorm in chunks has its statistics, and their gradients, by operations of its own.
    return any(
        lever.slot in (Slot.LAYOUT, Slot.COMPILE) or isinstance(lever, ExactBatchNorm)
        for lever in levers_of(planned.plan)
    )


class _MovedResults(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Inside the block every new tensor that an operation returns is moved by ``nudge``."""

    def __init__(self, nudge: Nudge) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
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
