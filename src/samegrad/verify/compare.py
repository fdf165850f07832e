"""Two sides of a comparison, and the checks between their gradients on the contract's scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from samegrad.records import Check
from samegrad.verify import tolerance
from samegrad.verify.tolerance import Precision


@dataclasses.dataclass(frozen=True)
class Gradients:
    """One side of a comparison: gradients by parameter name (None where there is none), and the loss."""

    by_name: Mapping[str, Tensor | None]
    loss: float
    magnitudes: Mapping[str, Tensor | None] = dataclasses.field(default_factory=dict)

    def on(self, device: torch.device) -> Gradients:
        """The same on ``device``."""

        def moved(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
            return {name: None if t is None else t.to(device) for name, t in tensors.items()}

        return dataclasses.replace(self, by_name=moved(self.by_name), magnitudes=moved(self.magnitudes))


@dataclasses.dataclass(frozen=True)
class Unrest:
    """How far the plain step's own gradients, their norm and its loss move by one unit in the last place."""

    by_name: Mapping[str, float] = dataclasses.field(default_factory=dict)
    norm: float = 0.0
    loss: float = 0.0


@dataclasses.dataclass(frozen=True)
class Allowance:
    """What one tier allows: the precision it compares in, and what widens its constants.

    ``place`` ends the checks' names, where one tier is compared more than once. ``lost``: what any entry may lose
    whatever its scale.
    """

    tier: int
    precision: Precision
    unrest: Unrest = dataclasses.field(default_factory=Unrest)
    largest_unrest: float = tolerance.LARGEST_UNREST
    norm_constant: float = tolerance.NORM_CONSTANT
    lost: float = 0.0
    place: str = ""

    def name(self, what: str) -> str:
        return f"{what}, {self.precision.name}{self.place}"

    def widened(self, usual: float, moves: float) -> float:
        return tolerance.allowed_with_unrest(usual, moves, self.largest_unrest)


def same_parameters(plain: Gradients, ours: Gradients) -> Check:
    different = sorted(plain.by_name.keys() ^ ours.by_name.keys())
    return bits_check(
        "which parameters have a gradient", different, f"{len(plain.by_name)} parameters have one in the plain step"
    )


def same_finiteness(plain: Gradients, ours: Gradients) -> Check:
    """What a GradScaler decides on: whether any entry of the gradients is infinite or not a number."""
    found = [sorted(n for n, g in side.by_name.items() if _not_finite(g)) for side in (plain, ours)]
    different = (found[0] or found[1]) if bool(found[0]) != bool(found[1]) else []
    return bits_check("whether a scaler would skip", different, "infinite or not a number in one step and not in both")


def _not_finite(gradient: Tensor | None) -> bool:
    return gradient is not None and not bool(torch.isfinite(gradient).all())


def same_bits(plain: Gradients, ours: Gradients) -> bool:
    """Whether gradients, where there are any and the loss are the same bit for bit."""
    same = plain.by_name.keys() == ours.by_name.keys() and plain.loss == ours.loss
    return same and largest_error(plain.by_name, ours.by_name, plain.by_name)[0] == 0


def bits_check(name: str, different: Sequence[str], detail: str) -> Check:
    """A check of tier 0: nothing may differ; what does is named."""
    return Check(
        name=name,
        passed=not different,
        error=float(len(different)),
        allowed=0.0,
        worst=", ".join(different[:3]),
        detail=detail,
        tier=0,
    )


def same_function(plain: Gradients, ours: Gradients, allowance: Allowance) -> list[Check]:
    """The same real-number function: entries and norms within rounding of the allowance's precision."""
    entries = _check_entries(plain, ours, allowance)
    precision, unrest = allowance.precision, allowance.unrest
    differences = differences_of(plain.by_name, ours.by_name)
    distance = norm_of(differences)
    scale = norm_of([m for m in ours.magnitudes.values() if m is not None]) or 1.0
    of_norm = allowance.widened(tolerance.norm_allowed(precision, allowance.norm_constant), unrest.norm / scale)
    of_norm += allowance.lost * math.sqrt(sum(d.numel() for d in differences)) / scale
    size = abs(plain.loss) or 1.0
    of_loss = allowance.widened(tolerance.loss_allowed(precision), unrest.loss / size)
    checks = [
        check_of(allowance.name("gradient norm"), distance / scale, of_norm, entries.worst),
        check_of(allowance.name("loss"), abs(plain.loss - ours.loss) / size, of_loss, ""),
    ]
    return [entries, *(dataclasses.replace(check, tier=allowance.tier) for check in checks)]


def _check_entries(plain: Gradients, ours: Gradients, allowance: Allowance) -> Check:
    """The tensor whose largest entry difference is the largest share of what it is allowed."""
    usual = tolerance.entry_allowed(allowance.precision)
    errors = _relative_errors(plain.by_name, ours.by_name, ours.magnitudes)
    worst, error, allowed = "", 0.0, usual
    for name, (difference, size) in errors.items():
        moves = allowance.unrest.by_name.get(name, 0.0) / size if size else 0.0
        mine = allowance.widened(usual, moves) + (allowance.lost / size if size else allowance.lost)
        relative = difference / size if size else difference
        # Not a number is worse than anything.
        if not relative / mine <= error / allowed:
            worst, error, allowed = name, relative, mine
    check = check_of(allowance.name("gradient entries"), error, allowed, worst)
    return dataclasses.replace(check, tier=allowance.tier)


def no_further_from_float64(
    plain: Gradients, ours: Gradients, oracle: Gradients, allowance: Allowance
) -> Check:
    """No further from float64 than the plain step is in the precision it runs in."""
    scale = norm_of([m for m in ours.magnitudes.values() if m is not None]) or 1.0
    differences = differences_of(oracle.by_name, ours.by_name)
    mine = norm_of(differences) / scale
    theirs = norm_of(differences_of(oracle.by_name, plain.by_name)) / scale
    # Which products are rounded to TF32 is each kernel's choice: the plain step's may have rounded none.
    rounds_by_choice = allowance.precision is tolerance.TF32
    accumulator = allowance.precision if rounds_by_choice else tolerance.accumulator(allowance.precision.dtype)
    allowed = tolerance.NOISE_RATIO * theirs + tolerance.norm_allowed(accumulator, allowance.norm_constant)
    allowed += allowance.lost * math.sqrt(sum(d.numel() for d in differences)) / scale
    detail = f"distance to float64; the plain step's own is {theirs:.2g}"
    check = check_of(allowance.name("rounding"), mine, allowed, "")
    return dataclasses.replace(check, detail=detail, tier=3)


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
