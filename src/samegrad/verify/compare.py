"""Two sides of a comparison, and the checks between them on the contract's scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from samegrad.records import Check
from samegrad.verify import tolerance


@dataclasses.dataclass(frozen=True)
class Gradients:
    """One side of a comparison: gradients by parameter name (None where there is none), and the loss."""

    by_name: Mapping[str, Tensor | None]
    loss: float
    magnitudes: Mapping[str, Tensor | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Unrest:
    """How far the plain step's own gradients, their norm and its loss move by one unit in the last place."""

    by_name: Mapping[str, float] = dataclasses.field(default_factory=dict)
    norm: float = 0.0
    loss: float = 0.0


def same_parameters(plain: Gradients, ours: Gradients) -> Check:
    different = sorted(plain.by_name.keys() ^ ours.by_name.keys())
    return Check(
        name="which parameters have a gradient",
        passed=not different,
        error=float(len(different)),
        allowed=0.0,
        worst=", ".join(different[:3]),
        detail=f"{len(plain.by_name)} parameters have one in the plain step",
    )


def same_function(plain: Gradients, ours: Gradients, dtype: torch.dtype, unrest: Unrest) -> list[Check]:
    """The same real-number function: entries and norms within rounding of ``dtype``."""
    kind = str(dtype).removeprefix("torch.")
    entries = _check_entries(plain, ours, dtype, unrest)
    distance = norm_of(differences_of(plain.by_name, ours.by_name))
    scale = norm_of([m for m in ours.magnitudes.values() if m is not None]) or 1.0
    of_norm = tolerance.allowed_with_unrest(tolerance.norm_allowed(dtype), unrest.norm / scale)
    size = abs(plain.loss) or 1.0
    of_loss = tolerance.allowed_with_unrest(tolerance.loss_allowed(dtype), unrest.loss / size)
    return [
        entries,
        check_of(f"gradient norm, {kind}", distance / scale, of_norm, entries.worst),
        check_of(f"loss, {kind}", abs(plain.loss - ours.loss) / size, of_loss, ""),
    ]


def _check_entries(plain: Gradients, ours: Gradients, dtype: torch.dtype, unrest: Unrest) -> Check:
    """The tensor whose largest entry difference is the largest share of what it is allowed."""
    usual = tolerance.entry_allowed(dtype)
    errors = _relative_errors(plain.by_name, ours.by_name, ours.magnitudes)
    worst, error, allowed = "", 0.0, usual
    for name, (difference, size) in errors.items():
        moves = unrest.by_name.get(name, 0.0) / size if size else 0.0
        mine = tolerance.allowed_with_unrest(usual, moves)
        relative = difference / size if size else difference
        # Not a number is worse than anything.
        if not relative / mine <= error / allowed:
            worst, error, allowed = name, relative, mine
    return check_of(f"gradient entries, {str(dtype).removeprefix('torch.')}", error, allowed, worst)


def no_further_from_float64(plain: Gradients, ours: Gradients, oracle: Gradients, dtype: torch.dtype) -> list[Check]:
    """No further from float64 than the plain step is in the dtype it runs in."""
    scale = norm_of([m for m in ours.magnitudes.values() if m is not None]) or 1.0
    mine = norm_of(differences_of(oracle.by_name, ours.by_name)) / scale
    theirs = norm_of(differences_of(oracle.by_name, plain.by_name)) / scale
    accumulator = tolerance.accumulator(dtype)
    allowed = tolerance.NOISE_RATIO * theirs + tolerance.norm_allowed(accumulator)
    kind = str(dtype).removeprefix("torch.")
    detail = f"distance to float64; the plain step's own is {theirs:.2g}"
    return [dataclasses.replace(check_of(f"rounding, {kind}", mine, allowed, ""), detail=detail)]


def check_of(name: str, error: float, allowed: float, worst: str) -> Check:
    # A comparison with NaN is false, so a gradient that is not a number fails.
    return Check(name=name, passed=error <= allowed, error=error, allowed=allowed, worst=worst)


def largest_error(
    plain: Mapping[str, Tensor | None], ours: Mapping[str, Tensor | None], scales: Mapping[str, Tensor | None]
) -> tuple[float, str]:
    """The largest entry difference relative to its tensor's scale, and the parameter it is in."""
    worst, name = 0.0, ""
    for key, (difference, size) in _relative_errors(plain, ours, scales).items():
        relative = difference / size if size else difference
        if not relative <= worst:
            worst, name = relative, key
    return worst, name


def _relative_errors(
    plain: Mapping[str, Tensor | None], ours: Mapping[str, Tensor | None], scales: Mapping[str, Tensor | None]
) -> dict[str, tuple[float, float]]:
    """Each parameter's largest entry difference, and the scale it is measured on."""
    sizes = {key: float(s.double().abs().max()) for key, s in scales.items() if s is not None and s.numel()}
    anywhere = max(sizes.values(), default=0.0)
    errors = {}
    for key, reference in plain.items():
        gradient = ours.get(key)
        if reference is not None and gradient is not None and reference.numel():
            difference = float((gradient.double() - reference.double()).abs().max())
            errors[key] = (difference, tolerance.entry_scale(sizes.get(key, 0.0), anywhere))
    return errors


def differences_of(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> list[Tensor]:
    return [x.double() - y.double() for key, x in a.items() if x is not None and (y := b.get(key)) is not None]


def norm_of(tensors: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([t.double() for t in tensors])) if tensors else 0.0
