"""A plan tried with too little memory leaves no slow kernel of a convolution to those after it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.out_of_memory import OutOfMemory
from samegrad.measure import counters
from samegrad.measure.fresh_kernels import with_fresh_kernels

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def kernels_of(layer: nn.Module, images: Tensor) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        output = layer(images)
        torch.autograd.grad(output, [*layer.parameters()], torch.ones_like(output))
        torch.cuda.synchronize()
    return {event.name for event in profile.events()}


def test_what_was_chosen_for_want_of_memory_is_forgotten() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 256, 1, bias=False, device=DEVICE, dtype=torch.bfloat16)
    step = sg.Step(layer, lambda outputs, batch: outputs.float().mean())

    def images(rows: int) -> Tensor:
        return torch.randn(rows, 64, 56, 56, device=DEVICE, dtype=torch.bfloat16)

    def short_of_memory(rows: int) -> tuple[int, set[str]]:
        given = images(rows)
        # A gradient comes from ones as large as the output; a workspace is larger.
        output_bytes = 4 * given.nbytes
        counters.release_cached(DEVICE)
        with counters.capped(DEVICE, torch.cuda.memory_reserved() + 2 * output_bytes + (24 << 20)):
            found = kernels_of(layer, given)
        return threading.get_ident(), found

    kernels_of(layer, images(8))
    usual = kernels_of(layer, images(120))
    thread, found = with_fresh_kernels(step.declared, lambda: short_of_memory(121))
    assert thread != threading.get_ident() and found != usual
    assert kernels_of(layer, images(121)) == usual
    # The planted twin: tried on this thread, the slow one stays.
    _, found = short_of_memory(122)
    assert found != usual
    assert kernels_of(layer, images(122)) == found


def test_what_is_raised_on_the_thread_comes_back() -> None:
    step = sg.Step(nn.Conv2d(1, 2, 3, device=DEVICE), lambda outputs, batch: outputs.mean())

    def fails() -> None:
        raise OutOfMemory(asked="a measurement", found="nothing is left", do="nothing")

    with pytest.raises(OutOfMemory, match="nothing is left"):
        with_fresh_kernels(step.declared, fails)
