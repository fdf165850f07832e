"""ResNet-18 with BatchNorm in three uneven chunks: arithmetic, memory and gradient error against the plain step.

Arithmetic is counted by torch.utils.flop_counter (convolutions and matrix products), also in the threads that chunks
run in; bytes are live tensors of everything that is there during the step, parameters and gradients included. On the
CPU chunks that meet keep as much as the plain step does: their saved tensors have no other place to go. The network is
recorded before the step that is counted. How far the plain step is from itself with its rows in another order says
what rounding makes of 20 layers whose statistics come from few values.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import _results
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from samegrad.exact.batchnorm import has_batchnorm
from samegrad.exact.lockstep import lockstep
from samegrad.exact.recomputed import recomputed_blocks
from samegrad.exact.rendezvous import rendezvous
from samegrad.exact.tracings import Tracings
from samegrad.measure.counting import ByteCounter
from samegrad.records import Category

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.exact.batchnorm_zoo import resnet18

SIZES = [5, 6, 1]
LONG_SIZES = [4, 3] * 6
PIXELS = 32

class Flops(TorchDispatchMode):
    """Counts the arithmetic of what runs inside. FlopCounterMode's own module tracker does not stand autograd.grad."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


class _InThread(TorchDispatchMode):
    """The counter for operations of another thread: modes belong to one."""

    def __init__(self, counter: TorchDispatchMode) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._counter.__torch_dispatch__(func, types, args, kwargs)


# What chunks run in, given what counts their work.
KNOWN = Tracings()
Scheme = Callable[[nn.Module, list[int], TorchDispatchMode], AbstractContextManager[Any]]
SCHEMES: dict[str, Scheme] = {
    "plain": lambda network, sizes, counter: contextlib.nullcontext(),
    "lockstep, every cut kept": lambda network, sizes, counter: lockstep(network, sizes=sizes, tracings=KNOWN),
    "lockstep, every fourth cut kept": lambda network, sizes, counter: lockstep(
        network, sizes=sizes, keep_every=4, tracings=KNOWN
    ),
    "full batch, blocks recomputed": lambda network, sizes, counter: recomputed_blocks(network),
    "chunks meet at each BatchNorm": lambda network, sizes, counter: rendezvous(
        network, sizes=sizes, chunk_context=lambda numbers, stage: _InThread(counter)
    ),
}


def step(
    network: nn.Module, x: Tensor, y: Tensor, sizes: list[int], scheme: Scheme, counter: TorchDispatchMode
) -> None:
    KNOWN.stages_of(network, (x,), {}, rows=len(x))
    with counter, scheme(network, sizes, counter):
        F.cross_entropy(network(x), y).backward()


def state(network: nn.Module) -> list[Tensor]:
    return [*(p.grad for p in network.parameters() if p.grad is not None), *network.buffers()]


def flops_and_error(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    plain, reference = 0.0, list[Tensor]()
    for name, scheme in SCHEMES.items():
        twin, counter = copy.deepcopy(network), Flops()
        step(twin, x, y, SIZES, scheme, counter)
        if name == "plain":
            plain, reference = float(counter.total), state(twin)
        found[name] = {"flops_over_plain": counter.total / plain} | _errors(network, state(twin), reference)
    order, twin = torch.randperm(len(x)), copy.deepcopy(network)
    F.cross_entropy(twin(x[order]), y[order]).backward()
    found["plain, rows in another order"] = _errors(network, state(twin), reference)
    return found


def _errors(network: nn.Module, left: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
    count = len(list(network.parameters()))
    largest = max(float(g.abs().max()) for g in reference[:count])
    # Entries relative to themselves, or to a thousandth of the largest gradient where they are smaller.
    entries = [float(((a - b).abs() / b.abs().clamp_min(1e-3 * largest)).max()) for a, b in zip(left, reference)]
    apart = sum(float((a - b).square().sum()) for a, b in zip(left[:count], reference))
    units = (apart / sum(float(b.square().sum()) for b in reference[:count])) ** 0.5 / 2**-53
    return {"largest_relative_error": max(entries), "gradient_norm_error_units_of_roundoff": units}


def peak_bytes(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, int]:
    found = {}
    for name, scheme in SCHEMES.items():
        twin = copy.deepcopy(network)
        counter = ByteCounter(torch.device("cpu"), gradients_of=[twin])
        counter.claim([x, *twin.parameters(), *twin.buffers()], Category.PARAMETERS)
        step(twin, x, y, LONG_SIZES, scheme, counter)
        found[name] = counter.peak_bytes
    return found


def main() -> None:
    torch.manual_seed(0)
    network = resnet18().double()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.3)
    rows, many = sum(SIZES), sum(LONG_SIZES)
    x, y = torch.randn(rows, 3, PIXELS, PIXELS).double(), torch.randint(0, 10, (rows,))
    figures: dict[str, Any] = {"batchnorm_layers": len(has_batchnorm(network)), "sizes": SIZES, "pixels": PIXELS}
    table: dict[str, dict[str, float]] = flops_and_error(network, x, y)
    wide = torch.randn(many, 3, 4 * PIXELS, 4 * PIXELS)
    peaks = peak_bytes(copy.deepcopy(network).float(), wide, torch.randint(0, 10, (many,)))
    for name, peak in peaks.items():
        table[name]["peak_bytes"] = peak
    figures |= {"sizes_for_peak_bytes": LONG_SIZES, "pixels_for_peak_bytes": 4 * PIXELS, "cases": table}
    _results.write("exact_batchnorm", figures)


if __name__ == "__main__":
    main()
