"""Every kind of loss against plain PyTorch in float64, with ragged chunks, beside the usual way to save memory.

Errors are judged as ``samegrad.verify.tolerance`` says: largest entry difference over the largest sum of the rows'
absolute gradients, and the norm of the difference. A row beyond its allowance makes the script exit with 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import _exact_items
import _exact_losses
import _exact_models
import _results
import torch
from _exact_case import Case
from torch import Tensor

from samegrad.verify import tolerance

AT_A_TIME = (1, 7, 8, 28)
PARTS = 64
ROWS = {**_exact_losses.ROWS, **_exact_models.ROWS, **_exact_items.ROWS}
# What the project's specification states for each scheme (its table of barriers), found by prototypes on networks and
# batches of their own: the order to be expected, beside the contract and never in its place.
# Steps of an equation that run again are bit for bit the plain ones; here rows are split beside, which is a sum.
PROTOTYPE_ERRORS = {
    "(a) mean over rows": 6e-16,
    "(b) ignored targets": 7e-16,
    "(b) class weights and smoothing": 7e-16,
    "(b) two terms with two counts": 7e-16,
    "(b') numerator and denominator learned": 4e-13,
    "(b'') expert balance": 2e-16,
    "(c) InfoNCE with temperature": 4e-16,
    "(c) InfoNCE by tiles": 7e-16,
    "(c) sliced Wasserstein": 3e-16,
    "(c) sliced Wasserstein by directions": 6e-16,
    "(c) VICReg": 3e-16,
    "(c) VICReg by moments": 7e-16,
    "(c) self-similarity": 3e-16,
    "(c) self-similarity by row tiles": 5e-16,
    "(c) prototypes, a shared leaf": 1e-12,
    "(d) log-sum-exp over centers": 1e-15,
    "(d) log-sum-exp over centers, first order": 1e-15,
    "(e) BatchNorm": 2e-14,
    "(e) dropout": 1e-15,
    "(e) BatchNorm and dropout": 2e-14,
    "(i) sliced score matching": 7e-16,
    "(i) implicit score matching": 7e-16,
    "(i) score matching of a density, closed form": 1e-15,
}
# A gradient that is zero by structure (a bias that the loss centres away) holds rounding alone: the contract judges it.
STRUCTURAL_ZERO = 1e-10


def magnitudes(case: Case) -> list[Tensor]:
    """Σ_k |g_k| for each parameter: the gradient of the plain loss through a few rows at a time, added up."""
    outputs = case.outputs()
    loss = lambda o: case.loss(o, case.batch)
    most = max(len(o) for o in outputs)
    sums = [torch.zeros_like(p) for p in case.parameters]
    for rows in torch.arange(most).chunk(min(PARTS, most)):
        live = [torch.isin(torch.arange(len(o)), rows).reshape(-1, *(1 for _ in o.shape[1:])) for o in outputs]
        cut = [torch.where(mask, o, o.detach()) for mask, o in zip(live, outputs)]
        found = torch.autograd.grad(loss(cut), list(case.parameters), retain_graph=True, allow_unused=True)
        sums = [s if g is None else s + g.abs() for s, g in zip(sums, found)]
    # What the loss uses beside the rows has no parts.
    own = torch.autograd.grad(loss(outputs), list(case.own)) if case.own else ()
    return [*sums, *(g.abs() for g in own)]


def naive(case: Case) -> Sequence[Tensor]:
    if case.naive is not None:
        return case.naive()
    outputs = case.outputs()
    parts = torch.arange(len(outputs[0])).split(8)
    losses = [case.loss([o[part] for o in outputs], {k: v[part] for k, v in case.batch.items()}) for part in parts]
    return torch.autograd.grad(torch.stack(losses).mean(), [*case.parameters, *case.own])


def relative_error(mine: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """Largest difference over the tensor's largest entry, or a thousandth of the largest of all."""
    sizes = [g.abs().max().item() for g in plain]
    return max(
        (a - b).abs().max().item() / max(size, 1e-3 * max(sizes))
        for a, b, size in zip(mine, plain, sizes, strict=True)
        if size > STRUCTURAL_ZERO * max(sizes)
    )


def share_of_contract(mine: Sequence[Tensor], plain: Sequence[Tensor], sums: Sequence[Tensor]) -> float:
    sizes = [s.max().item() for s in sums]
    entries = max(
        (a - b).abs().max().item() / tolerance.entry_scale(size, max(sizes)) for a, b, size in zip(mine, plain, sizes)
    )
    flat = [torch.cat([t.flatten() for t in tensors]) for tensors in (mine, plain, sums)]
    norm = ((flat[0] - flat[1]).norm() / flat[2].norm()).item()
    dtype = torch.float64
    return max(entries / tolerance.entry_allowed(dtype), norm / tolerance.norm_allowed(dtype))


def measured(case: Case) -> dict[str, Any]:
    wanted = [*case.parameters, *case.own]
    plain = torch.autograd.grad(case.loss(case.outputs(), case.batch), wanted)
    sums = magnitudes(case)
    errors, shares = [], []
    for rows in AT_A_TIME:
        mine = [torch.full_like(p, torch.nan) if g is None else g for g, p in zip(case.ours(rows), wanted)]
        errors.append(relative_error(mine, plain))
        shares.append(share_of_contract(mine, plain, sums))
    wrong = naive(case)
    return {
        "error": max(errors),
        "naive_error": relative_error(wrong, plain),
        # NaN is beyond every allowance.
        "share_of_contract": max(shares) if all(s == s for s in shares) else float("inf"),
        "naive_share_of_contract": share_of_contract(wrong, plain, sums),
    }


def main() -> int:
    table = {name: measured(make()) | {"prototype_error": PROTOTYPE_ERRORS.get(name)} for name, make in ROWS.items()}
    beyond = [name for name, row in table.items() if not row["share_of_contract"] <= 1]
    unseen = [name for name, row in table.items() if not row["naive_share_of_contract"] > 1]
    _results.write(
        "exact_table",
        {"rows_at_a_time": AT_A_TIME, "beyond_contract": beyond, "naive_within_contract": unseen, "table": table},
    )
    return 1 if beyond or unseen else 0


if __name__ == "__main__":
    sys.exit(main())
