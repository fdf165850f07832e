"""What cannot be followed is refused with its place, and what can be is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.errors import CannotTrace
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.mapped import MappedStep
from samegrad.execute.ways import find_ways
from samegrad.levers.exact_batchnorm import ExactBatchNorm
from samegrad.measure.trace import in_chunks, plainly, trace_step
from samegrad.records import Category

from .traced import (
    ROWS,
    SIZES,
    Words,
    blocks,
    counted_peaks,
    cross_entropy,
    declared_on,
    pictures,
    traced_peaks,
    words,
)


class Reads(nn.Module):
    """``reads`` is called with the output of a part named ``inner.1``."""

    def __init__(self, reads: Callable[[Tensor], Tensor]) -> None:
        super().__init__()

        class Part(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return reads(x)

        self.inner = nn.Sequential(nn.Linear(6, 3), Part())

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x)
        return made


NEEDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "item": (lambda x: x * x.detach().mean().item(), "_local_scalar_dense"),
    "branch": (lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense"),
    "mask": (lambda x: x[x[:, 0] > 0], "aten.index"),
    "numpy": (lambda x: x * float(x.detach().numpy()[0, 0]), "numpy"),
    "raises": (lambda x: x.view(-1, 5, 5, 5), "view"),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NEEDS)
def test_what_needs_values_is_named_with_its_place(name: str, device: str) -> None:
    reads, word = NEEDS[name]
    declared = declare(Reads(reads), lambda outputs, batch: outputs.sum())
    with pytest.raises(CannotTrace) as caught:
        trace_step(declared, torch.ones(4, 6), device=device)
    assert word in caught.value.found and "inner.1 (test_trace_failures.py:" in caught.value.found


def test_chunks_in_threads_are_refused() -> None:
    declared, batch = declared_on(blocks()), pictures(ROWS)
    aliases = ParameterAliases({"": declared.network})
    ways = find_ways(declared, aliases, batch, declared.layout(batch))
    step = MappedStep(declared, aliases, ways.mapped_examination(), ExactBatchNorm(1, "rendezvous").scheme())
    with pytest.raises(CannotTrace, match="threads"):
        trace_step(declared, batch, run=in_chunks(step, SIZES))


def test_hooks_that_could_step_inside_backward_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(CannotTrace, match=r"0\.weight"):
        trace_step(declare(model, lambda outputs, batch: outputs.sum()), torch.ones(4, 6))


def test_an_optimizer_that_reads_values_leaves_a_note() -> None:
    model = Words()
    declared = declare(model, cross_entropy, optimizer=torch.optim.Adafactor(model.parameters()))
    trace = trace_step(declared, words(ROWS))
    assert "Adafactor" in trace.notes["optimizer"]
    assert any(event.category is Category.OPTIMIZER_STATE for event in trace.events)


def test_another_device_is_refused() -> None:
    with pytest.raises(CannotTrace, match="mps"):
        trace_step(declared_on(Words()), words(ROWS), device="mps")


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * (ctx.saved_tensors[0] > 0)


def test_functions_and_hooks_of_the_users_run() -> None:
    declared = declared_on(Reads(Clamped.apply), lambda outputs, batch: outputs.sum())
    declared.network.inner[0].weight.register_hook(lambda gradient: gradient * torch.ones(50, 1, 1).mean(0))
    declared.network.inner.register_forward_hook(lambda module, given, made: made.repeat(1, 40))
    batch = torch.ones(ROWS, 6)
    assert traced_peaks(declared, batch, plainly()) == counted_peaks(declared, batch, plainly())
