"""Storages that come back beside the computation on a real device: bits, memory that is given on, and the peak."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.levers import _host_copies
from samegrad.levers._host_copies import Arriving, HostCopy
from samegrad.levers._saved_tensors import SavedTensors

from ..contract.lever_zoo import forced
from ..contract.plain import assert_bitwise, cross_entropy, gradients

pytestmark = pytest.mark.gpu

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# Of a storage of float32; a copy of it takes a third of a millisecond, and what is computed with it much less.
ENTRIES = 2**22
LAYERS = 12


def leaf() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(ENTRIES, device="cuda", requires_grad=True)


def on_host(forward: Any, x: Tensor) -> Any:
    with SavedTensors(0, [x]).travelling():
        return forward(x)


def sines(x: Tensor, layers: int = LAYERS) -> Tensor:
    for k in range(layers):
        x = (x * (1 + 0.01 * k)).sin()
    return x


def write_no_numbers(_: Tensor) -> None:
    """Takes memory of a storage's size, writes on it, and gives it back, while copies are on their way."""
    for _ in range(3):
        torch.full((ENTRIES,), float("nan"), device="cuda")


def busy_sines(x: Tensor) -> Tensor:
    for k in range(LAYERS):
        x = (x * (1 + 0.01 * k)).sin()
        x.register_hook(write_no_numbers)
    return x.sum()


def test_a_device_that_is_busy_in_backward_is_given_what_was_saved() -> None:
    x = leaf()
    [expected] = torch.autograd.grad(busy_sines(x), x)
    for _ in range(5):
        y = on_host(busy_sines, x)
        for retain in (True, False):
            [ours] = torch.autograd.grad(y, x, retain_graph=retain)
            assert torch.equal(ours, expected)


def assert_nothing_writes_on_memory_that_is_free() -> None:
    """Called when backward has ended for the host and hardly begun on the device."""
    others = [torch.zeros(ENTRIES, device="cuda") for _ in range(6)]
    torch.cuda.synchronize()
    assert all(not other.any() for other in others)


def test_a_backward_that_ends_early_leaves_nothing_that_writes() -> None:
    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        middle = sines(x)
        return middle, sines(middle).sum()

    x = leaf()
    with torch.no_grad():
        middle = sines(x)
    middle.requires_grad_()
    [expected] = torch.autograd.grad(sines(middle).sum(), middle)
    for _ in range(5):
        middle, y = on_host(parts, x)
        # Of the first half, which it does not go into, some is on its way.
        [ours] = torch.autograd.grad(y, middle, retain_graph=True)
        del middle, y
        assert_nothing_writes_on_memory_that_is_free()
        assert torch.equal(ours, expected)


def test_what_is_passed_over_is_let_go_of_and_writes_on_nobodys_memory() -> None:
    def branches(x: Tensor) -> tuple[Tensor, Tensor]:
        before = sines(x)
        other = sines(x, 3)
        return sines(before, 2).sum(), other.sum()

    x = leaf()
    [expected] = torch.autograd.grad(branches(x)[0], x)
    for _ in range(5):
        first, second = on_host(branches, x)
        [ours] = torch.autograd.grad(first, x, retain_graph=True)
        assert_nothing_writes_on_memory_that_is_free()
        assert torch.equal(ours, expected)
        del first, second


def test_a_graph_is_gone_through_again_on_another_stream() -> None:
    x = leaf()
    [expected] = torch.autograd.grad(sines(x).sum(), x)
    y = on_host(lambda x: sines(x).sum(), x)
    side = torch.cuda.Stream()
    torch.autograd.grad(y, x, retain_graph=True)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        [ours] = torch.autograd.grad(y, x)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(ours, expected)


def network() -> tuple[nn.Module, Any]:
    """Pictures through convolutions, BatchNorm and ReLU in place, whose output two operations save."""
    torch.manual_seed(0)
    widths = [16, *[32] * 6]
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
        for a, b in itertools.pairwise(widths)
    ]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).cuda()
    return model, (torch.randn(64, 16, 56, 56, device="cuda"), torch.randint(0, 10, (64,), device="cuda"))


KNOBS: dict[str, Any] = {"smallest_bytes": 2**20}


def test_each_storage_comes_once_and_the_gradients_are_the_plain_ones(monkeypatch: Patch) -> None:
    counts = {"sent": 0, "came": 0}
    send, coming = HostCopy._send, HostCopy.coming

    def sent(self: HostCopy, there: Tensor) -> None:
        counts["sent"] += 1
        send(self, there)

    def came(self: HostCopy) -> Arriving:
        counts["came"] += 1
        return coming(self)

    monkeypatch.setattr(HostCopy, "_send", sent)
    monkeypatch.setattr(HostCopy, "coming", came)
    runs = []
    for levers in ({}, {"offload_saved": KNOBS}):
        model, batch = network()
        with forced(model, cross_entropy, **levers) as step:
            step.backward(batch)
        runs.append(gradients(model))
    assert_bitwise(runs[1], runs[0])
    assert counts["sent"] == counts["came"] > 6


def peak_of(levers: dict[str, Any]) -> int:
    model, batch = network()
    with forced(model, cross_entropy, **levers) as step:
        step.backward(batch)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step.backward(batch)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def test_the_peak_is_that_of_what_comes_when_asked_for_and_two_storages(monkeypatch: Patch) -> None:
    plain, ours = peak_of({}), peak_of({"offload_saved": KNOBS})
    monkeypatch.setattr(_host_copies, "MOST_AHEAD", 0)
    on_demand = peak_of({"offload_saved": KNOBS})
    storage_bytes = 64 * 32 * 56 * 56 * 4
    assert on_demand <= ours <= on_demand + 2 * storage_bytes
    # Two storages of each of six blocks are saved.
    assert plain - ours >= (12 - 7) * storage_bytes
