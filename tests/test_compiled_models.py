"""A model that its user has compiled stays compiled, whatever looks at it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.measure.trace import trace_step

from .contract.plain import cross_entropy, labelled

BATCH = labelled(16, torch.float32)
Look = Callable[[sg.Step], object]
LOOKS: dict[str, Look] = {
    "prepare": lambda step: step.prepare(BATCH),
    "measure_step": lambda step: sg.measure_step(step, BATCH),
    "verify_step": lambda step: sg.verify_step(step, BATCH),
    "backward": lambda step: step.backward(BATCH),
    "train with a counter": lambda step: list(sg.train(step, [BATCH], counter=sg.count_bytes(step))),
    "a trace": lambda step: trace_step(step.declared, BATCH, device="cpu"),
}
COMPILES: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "torch.compile": lambda model, backend: torch.compile(model, backend=backend),  # type: ignore[dict-item]
    "in place": lambda model, backend: model.compile(backend=backend) or model,  # type: ignore[func-returns-value]
}


class Layers(nn.Module):
    """Of its own, since the compiler passes by torch's containers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.first(x).tanh())
        return outputs


def compiled_calls(look: Look, compile_it: Callable[[nn.Module, Any], nn.Module]) -> int:
    """How many of three calls after ``look`` run what was compiled."""
    torch._dynamo.reset()
    calls: list[None] = []

    def backend(graph: Any, _: Any) -> Any:
        def run(*given: Any) -> Any:
            calls.append(None)
            return graph(*given)

        return run

    model = compile_it(Layers(), backend)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with sg.Step(model, cross_entropy, budget="1GiB", optimizer=optimizer) as step:
        look(step)
    before = len(calls)
    for _ in range(3):
        cross_entropy(model(BATCH[0]), BATCH).backward()
    return len(calls) - before


@pytest.mark.parametrize("how", COMPILES)
@pytest.mark.parametrize("look", LOOKS)
def test_what_was_compiled_still_is(look: str, how: str) -> None:
    assert compiled_calls(LOOKS[look], COMPILES[how]) == 3


@pytest.mark.skipif(
    torch.__version__ >= (2, 14), reason="torch 2.14 keeps what it compiled where modes are on, with no stance"
)
def test_without_the_stance_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: what the check above must catch."""
    monkeypatch.setattr(torch.compiler, "set_stance", lambda _: contextlib.nullcontext())
    assert compiled_calls(LOOKS["measure_step"], COMPILES["torch.compile"]) == 0
