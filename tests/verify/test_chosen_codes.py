"""Steps that choose by comparing numbers (the nearest code): rounding may choose otherwise, and hides no fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.state import StateTransaction
from tests.exact.batchnorm_zoo import row_loss
from tests.exact.test_lockstep_state import Coded

ROWS = 64


class Chosen(Coded):
    """With the codes' numbers among the outputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x).to(self.codebook.sums.dtype)
        codes = self.codebook.sums / self.codebook.counts[:, None]
        return self.decoder(self.codebook(z)), torch.cdist(z, codes).argmin(1)


def step_under_bfloat16() -> tuple[sg.Step, Tensor]:
    torch.manual_seed(0)
    network = Chosen()

    def forward(module: nn.Module, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    step = sg.Step(network, lambda outputs, _: row_loss(outputs[0].double()), rows=9, forward=forward)
    return step, torch.randn(ROWS, 6) + torch.linspace(-2, 2, ROWS)[:, None]


def _codes_apart(step: sg.Step, x: Tensor) -> int:
    """Rows whose code is another one when half of them run at a time, with the statistics that all have."""
    network = step.declared.network
    network.eval()
    whole = step.declared.forward(network, x)[1]
    nudged = step.declared.forward(network, x * (1 + 2**-8))[1]
    network.train()
    return int((whole != nudged).sum())


def test_codes_that_rounding_chooses_otherwise_are_no_difference_between_the_steps() -> None:
    step, x = step_under_bfloat16()
    assert _codes_apart(step, x)
    verdict = sg.verify_step(step, x)
    assert verdict.same
    assert step.plan is not None and "exact_batchnorm" in step.plan.levers
    names = [check.name for check in verdict.checks]
    assert "buffers that are sums, float64" in names


def _updated_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StateTransaction._fold

    def planted(self: StateTransaction, copies: Any, share: float) -> None:
        plain(self, copies, share)
        for slot, copy in zip(self._slots, copies):
            slot.start = copy

    monkeypatch.setattr(StateTransaction, "_fold", planted)


def _half_a_percent_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StateTransaction._reduce

    def planted(self: StateTransaction, slot: Any, so_far: Any, now: Any, share: float) -> Any:
        reduced = plain(self, slot, so_far, now, share)
        return reduced * (1 + 5e-3) if so_far is None else reduced

    monkeypatch.setattr(StateTransaction, "_reduce", planted)


@pytest.mark.parametrize("plant", [_updated_every_chunk, _half_a_percent_too_much])
def test_a_fault_in_the_codebooks_update_is_seen_in_bfloat16_too(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step, x = step_under_bfloat16()
    step.prepare(x)
    plant(monkeypatch)
    assert not sg.verify_step(step, x).same
