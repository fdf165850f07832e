"""State beside running statistics, a codebook say, in chunks that share BatchNorm's: updated once a step."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact import tracings
from samegrad.exact.lockstep import lockstep
from samegrad.exact.state import Reducer, StateRule, StateTransaction

from .batchnorm_zoo import D, left_by, row_loss, worst_share

ROWS, CODES, WIDTH = 23, 7, 5
RULES = [StateRule("codebook", name, Reducer.SUM, decay=0.99) for name in ("counts", "sums")]
SIZES = [[9, 10, 4], [1, 21, 1]]


class Codebook(nn.Module):
    """The nearest of CODES vectors, each the mean of what was assigned to it (arXiv:1711.00937, appendix A.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False
        self.register_buffer("counts", torch.ones(CODES))
        self.register_buffer("sums", torch.randn(CODES, WIDTH))

    def forward(self, z: Tensor) -> Tensor:
        codes = self.sums / self.counts[:, None]
        nearest = torch.cdist(z.detach(), codes).argmin(1)
        if self.frozen:
            return z + (codes[nearest] - z).detach()
        with torch.no_grad():
            self.counts.mul_(0.99).index_add_(0, nearest, torch.ones_like(nearest, dtype=z.dtype), alpha=0.01)
            self.sums.mul_(0.99).index_add_(0, nearest, z, alpha=0.01)
        return z + (codes[nearest] - z).detach() + 0.1 * torch.tanh(z * codes[nearest])


class Coded(nn.Module):
    """BatchNorm before and after the codebook; ``calls``: how often it is called."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.calls = calls
        self.encoder = nn.Sequential(nn.Linear(6, WIDTH), nn.BatchNorm1d(WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.codebook = Codebook()
        self.decoder = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        for _ in range(self.calls):
            z = self.codebook(z)
        return self.decoder(z)


def made(calls: int = 1) -> tuple[Coded, Tensor]:
    torch.manual_seed(0)
    network = Coded(calls).to(D)
    return network, torch.randn(ROWS, 6, dtype=D) + torch.linspace(-2, 2, ROWS, dtype=D)[:, None]


def in_lockstep(sizes: list[int], **how: int) -> Any:
    return lambda twin: lockstep(twin, sizes=sizes, rules=RULES, **how)


@pytest.mark.parametrize("how", [{}, {"keep_every": 2}, {"keep_every": 99}, {"together": 2}, {"together": 99}], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_codebook_and_all_gradients_are_those_of_the_plain_step(sizes: list[int], how: dict[str, int]) -> None:
    network, x = made()
    plain = left_by(network, x, row_loss)
    assert not torch.equal(plain["buffer codebook.sums"], network.codebook.sums)
    assert worst_share(left_by(network, x, row_loss, in_lockstep(sizes, **how)), plain) <= 1


def _second_runs_see_the_new_codebook(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StateTransaction.commit

    def planted(self: StateTransaction) -> None:
        plain(self)
        for slot in self._slots:
            slot.start = slot.before

    monkeypatch.setattr(StateTransaction, "commit", planted)


def _every_chunk_sees_the_last_ones_update(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StateTransaction._fold

    def planted(self: StateTransaction, copies: Any, share: float) -> None:
        plain(self, copies, share)
        for slot, copy in zip(self._slots, copies):
            slot.start = copy

    monkeypatch.setattr(StateTransaction, "_fold", planted)


def _second_runs_are_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StateTransaction.chunk
    monkeypatch.setattr(StateTransaction, "chunk", lambda self, share: plain(self, 1.0))
    commit, fold = StateTransaction.commit, StateTransaction._fold

    def folded(self: StateTransaction, copies: Any, share: float) -> None:
        fold(self, copies, share)
        commit(self)

    monkeypatch.setattr(StateTransaction, "_fold", folded)


@pytest.mark.parametrize(
    "plant", [_second_runs_see_the_new_codebook, _every_chunk_sees_the_last_ones_update, _second_runs_are_kept_too]
)
def test_a_planted_fault_in_the_codebooks_update_is_seen(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = made()
    plain = left_by(network, x, row_loss)
    plant(monkeypatch)
    assert worst_share(left_by(network, x, row_loss, in_lockstep(SIZES[0])), plain) > 1e3


def test_nothing_is_written_when_something_raises_after_the_codebook() -> None:
    network, x = made()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.decoder[2].forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        network(x)
    assert not torch.equal(network.codebook.sums, before["codebook.sums"]), "the plain forward has written by then"
    del network.decoder[2].forward
    network, x = made()
    network.decoder[1].forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError), lockstep(network, sizes=SIZES[0], rules=RULES):
        network(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


def test_a_codebook_that_is_frozen_after_its_rules_were_found_stays_as_it_is() -> None:
    network, x = made()
    step = sg.Step(network, lambda outputs, _: row_loss(outputs), rows=[9, 10, 4])
    step.backward(x)
    network.codebook.frozen = True
    before = network.codebook.sums.clone()
    step.backward(x)
    assert torch.equal(network.codebook.sums, before)


def test_a_codebook_that_is_called_twice_is_refused_by_name() -> None:
    network, x = made(calls=2)
    with (
        pytest.raises(sg.CannotSplit, match=r"codebook\.counts is changed by 2 calls between BatchNorm layers"),
        lockstep(network, sizes=SIZES[0], rules=RULES),
    ):
        network(x)


def test_a_step_finds_the_rules_and_is_verified() -> None:
    network, x = made()
    step = sg.Step(network, lambda outputs, _: row_loss(outputs), rows=[9, 10, 4])
    verdict = sg.verify_step(step, x)
    assert verdict.same and verdict.rows_checked == ROWS
    assert step.plan is not None and "exact_batchnorm" in step.plan.levers


@pytest.mark.parametrize("scheme_name", ["lockstep", "rendezvous"])
def test_of_a_mapping_the_model_is_given_what_its_own_forward_takes(scheme_name: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).to(D)
    batch = {"input": torch.randn(ROWS, 6, dtype=D), "weight": torch.rand(ROWS, dtype=D)}
    plan = sg.Plan(
        levers={"exact_batchnorm": {"rows": 9, "scheme_name": scheme_name}}, exactness=sg.Exactness.SAME_SUM,
        batch_rows=ROWS,
    )  # fmt: skip
    step = sg.Step(network, lambda outputs, b: (outputs.square().sum(1) * b["weight"]).mean(), plan=plan)
    assert sg.verify_step(step, batch).same


def test_the_verdict_sees_a_codebook_that_is_updated_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = made()
    step = sg.Step(network, lambda outputs, _: row_loss(outputs), rows=[9, 10, 4])
    step.prepare(x)
    _every_chunk_sees_the_last_ones_update(monkeypatch)
    assert not sg.verify_step(step, x).same


def _counted_recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    recorded, plain = list[int](), tracings.trace_stages
    monkeypatch.setattr(tracings, "trace_stages", lambda *a, **k: recorded.append(1) or plain(*a, **k))
    return recorded


def test_the_steps_of_a_loop_share_one_recording_until_the_model_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = made()
    step = sg.Step(network, lambda outputs, _: row_loss(outputs), rows=[9, 10, 4])
    step.backward(x)
    recorded = _counted_recordings(monkeypatch)
    step.backward(x)
    assert not recorded
    network.encoder[2] = nn.Tanh()
    step.backward(x)
    assert len(recorded) == 1


def test_a_hook_that_comes_later_is_not_passed_over_by_an_old_recording() -> None:
    network, x = made()
    step = sg.Step(network, lambda outputs, _: row_loss(outputs), rows=[9, 10, 4])
    step.backward(x)
    network.encoder.register_forward_hook(lambda *_: None)
    with pytest.raises(sg.CannotSplit, match="encoder has hooks"):
        step.backward(x)


def test_a_recording_does_not_keep_its_network() -> None:
    network, x = made()
    sg.Step(network, lambda outputs, _: row_loss(outputs), rows=[9, 10, 4]).backward(x)
    kept = weakref.ref(network)
    del network
    gc.collect()
    assert kept() is None
