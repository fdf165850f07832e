"""How far the plain step itself moves when rows and weights move by one unit in the last place."""

from __future__ import annotations

import dataclasses

from samegrad import trees
from samegrad.exact.undisturbed import ModuleState
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
        with nudge.applied([p for module in twin.declared.modules for p in module.parameters()]):
            gradients = moved.run(twin.reference)
        for name, gradient in gradients.by_name.items():
            before = reference.by_name.get(name)
            if gradient is not None and before is not None and gradient.numel():
                by_name[name] = max(by_name.get(name, 0.0), float((gradient - before).abs().max()))
        norm = max(norm, norm_of(differences_of(reference.by_name, gradients.by_name)))
        loss = max(loss, abs(gradients.loss - reference.loss))
    return Unrest(by_name, norm, loss)
