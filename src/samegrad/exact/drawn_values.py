"""torch's functions that make random numbers, keyed. Each takes ``Draws`` and then what torch's own takes.

``KEYED`` maps torch's function to ours. Own generators never come here: whoever passes one draws as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad.exact.draw_sites import refused
from samegrad.exact.draws import Draw, Draws

# Options that only name what is the default anyway.
_IDLE = {"generator": None, "out": None, "names": None, "layout": torch.strided, "pin_memory": False}


def _options(function: str, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` without the idle ones. Raises CannotSplit for those that have no keyed form."""
    for name, default in _IDLE.items():
        value = options.pop(name, default)
        if value is not None and value is not default and value != default:
            raise refused(function, f"is called with {name}={value!r}, which has no keyed form", f"leave {name} out")
    return options


def _sizes(sizes: Sequence[Any], options: dict[str, Any]) -> tuple[int, ...]:
    if "size" in options:
        return tuple(options.pop("size"))
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        return tuple(sizes[0])
    return tuple(sizes)


Make = Callable[[Draw, torch.dtype], Tensor]


def _fresh(
    draws: Draws, function: str, sizes: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], make: Make
) -> Tensor:
    """A new tensor as torch's factories make one. ``dtype`` is the default; ``options`` are the call's."""
    options = _options(function, options)
    place = options.pop("device", None)
    # Asked of a tensor: compilers do not follow torch.get_default_device.
    draw = draws.next(function, sizes, torch.empty(0).device if place is None else torch.device(place))
    values = make(draw, options.pop("dtype", None) or dtype)
    return values.requires_grad_() if options.pop("requires_grad", False) else values


def _like(
    draws: Draws, function: str, model: Tensor, options: dict[str, Any], make: Make
) -> Tensor:
    format_ = options.pop("memory_format", torch.preserve_format)
    options["device"] = options.get("device") or model.device
    values = _fresh(draws, function, tuple(model.shape), model.dtype, options, make)
    if format_ is torch.preserve_format and model.is_contiguous():
        return values
    return torch.empty_like(model, dtype=values.dtype, device=values.device, memory_format=format_).copy_(values)


def _uniform(draw: Draw, dtype: torch.dtype) -> Tensor:
    return draw.uniform(dtype)


def _normal(draw: Draw, dtype: torch.dtype) -> Tensor:
    return draw.numbers("normal", dtype)


def _between(low: int, high: int) -> Make:
    if low >= high:
        raise RuntimeError(f"random_ expects 'from' to be less than 'to', but got from={low} >= to={high}")
    return lambda draw, dtype: draw.integers(low, high).to(dtype)


def rand(draws: Draws, *sizes: Any, **options: Any) -> Tensor:
    return _fresh(draws, "torch.rand", _sizes(sizes, options), torch.get_default_dtype(), options, _uniform)


def randn(draws: Draws, *sizes: Any, **options: Any) -> Tensor:
    return _fresh(draws, "torch.randn", _sizes(sizes, options), torch.get_default_dtype(), options, _normal)


def randint(draws: Draws, *numbers: Any, **options: Any) -> Tensor:
    given = list(numbers)
    sizes = tuple(options.pop("size") if "size" in options else given.pop())
    make = _between(*_bounds(given, options))
    return _fresh(draws, "torch.randint", sizes, torch.int64, options, make)


def _bounds(given: Sequence[int], options: dict[str, Any]) -> tuple[int, int]:
    low, high = options.pop("low", None), options.pop("high", None)
    if len(given) == 2:
        return int(given[0]), int(given[1])
    if high is None:
        return int(low or 0), int(given[0])
    return int(given[0] if given else low or 0), int(high)


def rand_like(draws: Draws, input: Tensor, **options: Any) -> Tensor:
    return _like(draws, "torch.rand_like", input, options, _uniform)


def randn_like(draws: Draws, input: Tensor, **options: Any) -> Tensor:
    return _like(draws, "torch.randn_like", input, options, _normal)


def randint_like(draws: Draws, input: Tensor, *numbers: int, **options: Any) -> Tensor:
    make = _between(*_bounds(numbers, options))
    return _like(draws, "torch.randint_like", input, options, make)


def bernoulli(draws: Draws, input: Tensor, p: float | None = None, **options: Any) -> Tensor:
    _options("torch.bernoulli", options)
    draw = draws.next("torch.bernoulli", input.shape, input.device)
    return (_below(draw, input) if p is None else ~_kept(draw, p)).to(input.dtype)


def _kept(draw: Draw, drop: float) -> Tensor:
    keep = draw.keep(drop)
    return torch.zeros_like(keep) if drop == 1 else keep


def _below(draw: Draw, probability: Tensor) -> Tensor:
    """bool, True with ``probability``, elementwise."""
    dtype = torch.float64 if probability.dtype == torch.float64 else torch.float32
    return draw.uniform(dtype) < probability.detach().to(dtype)


def normal(draws: Draws, mean: float | Tensor = 0.0, std: float | Tensor = 1.0, *size: Any, **options: Any) -> Tensor:
    if not isinstance(mean, Tensor) and not isinstance(std, Tensor):
        scale, shift = float(std), float(mean)
        return _fresh(
            draws, "torch.normal", _sizes(size, options), torch.get_default_dtype(), options,
            lambda draw, dtype: draw.numbers("normal", dtype, scale, shift),
        )  # fmt: skip
    _options("torch.normal", options)
    with torch.no_grad():
        tensors = [part for part in (mean, std) if isinstance(part, Tensor)]
        shape = torch.broadcast_shapes(*(part.shape for part in tensors))  # type: ignore[no-untyped-call]
        draw = draws.next("torch.normal", shape, tensors[0].device)
        return draw.numbers("normal", tensors[0].dtype) * std + mean


def multinomial(draws: Draws, input: Tensor, num_samples: int, replacement: bool = False, **options: Any) -> Tensor:
    """By a race: category k arrives after an exponential time over its weight; the first to arrive is drawn."""
    _options("torch.multinomial", options)
    again = replacement and num_samples > 1
    weights = input.detach().unsqueeze(-2) if again else input.detach()
    shape = (*input.shape[:-1], num_samples, input.shape[-1]) if again else tuple(input.shape)
    draw = draws.next("torch.multinomial", shape, input.device)
    arrivals = draw.numbers("exponential", torch.float64) / weights.to(torch.float64)
    return arrivals.argmin(-1) if again else arrivals.topk(num_samples, largest=False).indices


def _filled(name: str, make: Callable[..., Make]) -> Callable[..., Tensor]:
    """The in-place method ``name``; ``make`` takes the method's arguments."""

    def fill(draws: Draws, input: Tensor, *arguments: Any, **options: Any) -> Tensor:
        function = f"torch.Tensor.{name}"
        made = make(*arguments, **_options(function, options))
        draw = draws.next(function, input.shape, input.device)
        return input.copy_(made(draw, input.dtype))

    return fill


def _bernoulli_(p: float | Tensor = 0.5) -> Make:
    if isinstance(p, Tensor):
        return lambda draw, dtype: _below(draw, p).to(dtype)
    return lambda draw, dtype: (~_kept(draw, p)).to(dtype)


def _uniform_(*bounds: float, **named: float) -> Make:
    low, high = (*bounds, *(0.0, 1.0)[len(bounds) :])
    low, high = named.get("from", low), named.get("to", high)
    if (low, high) == (0, 1):
        return _uniform
    return lambda draw, dtype: draw.numbers("uniform", dtype, high - low, low)


def _normal_(mean: float = 0.0, std: float = 1.0) -> Make:
    return lambda draw, dtype: draw.numbers("normal", dtype, std, mean)


def _log_normal_(mean: float = 1.0, std: float = 2.0) -> Make:
    return lambda draw, dtype: draw.numbers("log_normal", dtype, std, mean)


def _exponential_(lambd: float = 1.0) -> Make:
    return lambda draw, dtype: draw.numbers("exponential", dtype, 1 / lambd)


def _cauchy_(median: float = 0.0, sigma: float = 1.0) -> Make:
    return lambda draw, dtype: draw.numbers("cauchy", dtype, sigma, median)


def _geometric_(p: float) -> Make:
    scale = -1 / math.log1p(-p) if p < 1 else 0.0
    return lambda draw, dtype: draw.numbers("exponential", torch.float64, scale).ceil_().clamp_min_(1).to(dtype)


def _random_(*bounds: int, **named: int) -> Make:
    low = named.get("from", bounds[0] if len(bounds) > 1 else 0)
    high = named.get("to", bounds[-1] if bounds else None)
    if high is not None:
        return _between(int(low), int(high))
    return lambda draw, dtype: draw.integers(int(low), _most(dtype) + 1).to(dtype)


def _most(dtype: torch.dtype) -> int:
    """The largest number that ``random_()`` gives: every whole number up to it is one of the dtype."""
    if dtype == torch.bool:
        return 1
    return int(2 / torch.finfo(dtype).eps) if dtype.is_floating_point else int(torch.iinfo(dtype).max)


KEYED: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.rand: rand,
    torch.randn: randn,
    torch.randint: randint,
    torch.rand_like: rand_like,
    torch.randn_like: randn_like,
    torch.randint_like: randint_like,
    torch.bernoulli: bernoulli,
    torch.Tensor.bernoulli: bernoulli,
    torch.normal: normal,
    torch.multinomial: multinomial,
    torch.Tensor.multinomial: multinomial,
    torch.Tensor.bernoulli_: _filled("bernoulli_", _bernoulli_),
    torch.Tensor.uniform_: _filled("uniform_", _uniform_),
    torch.Tensor.normal_: _filled("normal_", _normal_),
    torch.Tensor.log_normal_: _filled("log_normal_", _log_normal_),
    torch.Tensor.exponential_: _filled("exponential_", _exponential_),
    torch.Tensor.cauchy_: _filled("cauchy_", _cauchy_),
    torch.Tensor.geometric_: _filled("geometric_", _geometric_),
    torch.Tensor.random_: _filled("random_", _random_),
}
