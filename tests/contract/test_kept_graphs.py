"""Two passes that keep the graphs of some chunks: the same gradients, fewer forwards, within a budget."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import BudgetTooSmall
from samegrad.exact import passes
from samegrad.levers.split_rows import SplitRows
from samegrad.plan.choose import choose_plan
from samegrad.plan.floor import floor_bytes
from samegrad.plan.margin import usable_bytes
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Exactness, Footprint, Phase, Plan
from samegrad.verify import tolerance

from ..exact import zoo
from ..plan.test_choose import MIB, footprint, law
from .plain import assert_close, gradients, plain_step, same

D = torch.float64
ROWS = 29
SIZES = [9, 3, 1, 11, 5]


def coupled(outputs: Tensor, batch: Any) -> Tensor:
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(3 * z @ z.T, torch.arange(len(z))) + outputs.std(0).sum()


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 15), nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = F.dropout(self.first(x).tanh(), 0.3, self.training)
        return F.dropout(self.second(z + 0.1 * torch.randn_like(z)), 0.2, self.training)


class Averaging(nn.Module):
    """Keeps an exponential mean of what it computes, and a count of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 15), nn.Tanh(), nn.Linear(15, 5))
        self.register_buffer("mean", torch.ones(5))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * z.detach().mean(0))
            self.steps.add_(1)
        return z


class Series(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(2, 7, 2, dropout=0.3, batch_first=True), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.reshape(len(x), 3, 2))[0][:, -1])


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 5))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain_net, "drawing": Drawing, "averaging": Averaging, "series": Series
}  # fmt: skip


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(D)


def rows() -> tuple[Tensor]:
    return (torch.randn(ROWS, 6, dtype=D, generator=torch.Generator().manual_seed(1)),)


def keeping(kept: int, sizes: list[int] | int = SIZES, batch_rows: int = ROWS) -> Plan:
    levers = {"split_rows": {"rows": sizes, "kept_chunks": kept}}
    return Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=batch_rows)


@pytest.mark.parametrize("kept", range(len(SIZES) + 1))
@pytest.mark.parametrize("name", MODELS)
def test_every_number_of_kept_graphs_gives_the_plain_step(name: str, kept: int) -> None:
    split, layout = zoo.split_step(made(name), coupled, rows(), forward=lambda model, batch: model(batch[0]))
    left, steps = [], []
    for how in ({"rows": ROWS}, {"plan": keeping(kept)}):
        model = made(name)
        steps.append(sg.Step(model, coupled, **how))
        torch.manual_seed(7)
        loss = steps[-1].backward(rows())
        left.append([loss, *model.buffers(), torch.get_rng_state()])
    reference = [p.grad for p in steps[0].declared.model.parameters()]
    torch.manual_seed(7)
    # Of single rows: terms that cancel within a chunk are rounded as terms.
    sizes = [float(m.max()) for m in split.totals(rows(), layout, [1] * ROWS).magnitudes or [] if m is not None]
    torch.manual_seed(7)
    totals = dataclasses.replace(split, kept=kept).totals(rows(), layout, SIZES).totals
    for ours, plain, size in zip(totals, reference, sizes, strict=True):
        assert ours is not None and plain is not None
        allowed = tolerance.entry_allowed(D) * tolerance.entry_scale(size, max(sizes))
        assert float((ours - plain).abs().max()) <= allowed
    for plain, ours in zip(*left, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-15)
    handed = [p.grad for p in steps[1].declared.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(handed, totals) if a is not None and b is not None)


@pytest.mark.parametrize("kept", [0, 1, 3, len(SIZES)])
@pytest.mark.parametrize("name", ["drawing", "averaging"])
def test_the_verifier_says_the_same(name: str, kept: int) -> None:
    assert sg.verify_step(sg.Step(made(name), coupled, plan=keeping(kept)), rows()).same


@pytest.mark.parametrize("kept", [0, 1, 3, len(SIZES)])
def test_a_kept_graph_spares_its_chunks_second_forward(kept: int) -> None:
    model, seen = made("plain"), []
    step = sg.Step(model, coupled, plan=keeping(kept))
    step.backward(rows())
    model[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    step = sg.Step(model, coupled, plan=keeping(kept))
    step.backward(rows())
    seen.clear()
    step.backward(rows())
    assert seen == SIZES + SIZES[: len(SIZES) - kept]


def test_a_planted_fault_in_what_is_kept_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs meet the cotangents of the first chunks."""
    step = sg.Step(made("plain"), coupled, plan=keeping(2))
    step.backward(rows())
    backward = passes.program.backward_of_rows

    def turned(leaves: list[Tensor], cotangents: list[Tensor | None]) -> None:
        backward(leaves, [None if c is None else c.flip(0) for c in cotangents])

    monkeypatch.setattr(passes.program, "backward_of_rows", turned)
    assert not sg.verify_step(step, rows()).same


def test_more_graphs_than_chunks_is_all_of_them_and_a_shorter_batch_keeps_fewer() -> None:
    model = made("plain")
    step = sg.Step(model, coupled, plan=keeping(4, sizes=8, batch_rows=29))
    for count in (29, 9, 5):
        batch = (rows()[0][:count],)
        model.zero_grad()
        _, expected = plain_step(model, coupled, batch)
        step.backward(batch)
        assert_close(gradients(model), expected)


@pytest.mark.parametrize("at", [2, 4, 7])
def test_an_exception_between_kept_graphs_leaves_everything_as_it_was(at: int) -> None:
    """In the first pass, at a chunk whose graph is kept, and in the second."""
    model, calls, armed = made("averaging"), [], []

    def hook(_: nn.Module, args: Any) -> None:
        calls.extend(armed)
        if len(calls) == at:
            raise ZeroDivisionError

    model.register_forward_pre_hook(hook)
    step = sg.Step(model, coupled, plan=keeping(3))
    step.backward(rows())
    state, before, generator = copy.deepcopy(model.state_dict()), gradients(model), torch.get_rng_state()
    armed.append(True)
    with pytest.raises(ZeroDivisionError):
        step.backward(rows())
    assert same(state, model.state_dict()) and same(before, gradients(model))
    assert torch.equal(generator, torch.get_rng_state())


LARGE = 512


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 96), nn.GELU(), nn.Dropout(0.1), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 4))


def spread(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.std(0).sum() + outputs.square().mean().sqrt()


def large() -> tuple[Tensor]:
    return (torch.randn(LARGE, 16, generator=torch.Generator().manual_seed(1)),)


def optimised(loss_fn: Any, **how: Any) -> sg.Step:
    model = wide()
    return sg.Step(model, loss_fn, optimizer=torch.optim.SGD(model.parameters(), 0.1), **how)


def really_needed(step: sg.Step) -> int:
    """The counted peak of the second of two real steps."""
    *_, last = sg.train(step, [large()] * 2, counter=sg.count_bytes(step))
    assert last.peak_allocated_bytes is not None
    return last.peak_allocated_bytes


@pytest.fixture(scope="module")
def wide_footprint() -> Footprint:
    return sg.measure_step(sg.Step(wide(), spread), large())


@pytest.mark.parametrize("rows_at_a_time", [16, 100, 128])
def test_the_counted_peak_is_within_the_prediction(rows_at_a_time: int, wide_footprint: Footprint) -> None:
    chunks = -(-LARGE // rows_at_a_time)
    peaks = []
    for kept in sorted({0, 1, chunks // 2, chunks}):
        needed = really_needed(optimised(spread, plan=keeping(kept, rows_at_a_time, LARGE)))
        predicted = SplitRows(rows_at_a_time, kept).predict(wide_footprint).peak_allocated_bytes
        # Too high by the graph of the chunk whose gradients are the first, and by what a short last chunk lacks.
        graph = rows_at_a_time * (wide_footprint.kept_row_bytes or 0)
        assert needed <= 1.001 * predicted and predicted <= 1.02 * needed + (1 + bool(LARGE % rows_at_a_time)) * graph
        peaks.append(predicted)
    assert peaks == sorted(peaks) and peaks[-1] > peaks[0]


def test_what_a_row_holds_does_not_depend_on_the_loss(wide_footprint: Footprint) -> None:
    """A loss over pairs leaves more behind the larger the batch, which is not a row's graph."""
    other = sg.measure_step(sg.Step(wide(), coupled), large())
    assert other.kept_row_bytes == wide_footprint.kept_row_bytes


def test_a_loss_over_pairs_of_rows_is_predicted_in_two_passes(wide_footprint: Footprint) -> None:
    footprint = sg.measure_step(sg.Step(wide(), coupled), large())
    for kept in (0, 3):
        needed = really_needed(optimised(coupled, plan=keeping(kept, 64, LARGE)))
        predicted = SplitRows(64, kept).predict(footprint).peak_allocated_bytes
        assert abs(needed - predicted) <= 0.03 * predicted
    assert footprint.predicted_peak_bytes(rows=64) > 4 * wide_footprint.predicted_peak_bytes(rows=64)


def test_the_planner_keeps_graphs_where_the_budget_allows_and_is_faster_for_it(wide_footprint: Footprint) -> None:
    low, high = floor_bytes(wide_footprint), wide_footprint.predicted_peak_bytes(rows=LARGE)
    found = {}
    for share in (0.05, 0.6, 0.95):
        total = int(low + share * (high - low))
        step = optimised(spread, budget=total)
        plan = step.prepare(large())
        knobs = plan.levers["split_rows"]
        chunks = -(-LARGE // knobs["rows"])
        found[share] = knobs["kept_chunks"] / chunks
        assert really_needed(step) <= total
        if knobs["kept_chunks"]:
            assert f"{knobs['kept_chunks']} of them keep their graph from the first" in step.explain()
            predictions = [SplitRows(knobs["rows"], n).predict(wide_footprint).seconds for n in range(chunks + 1)]
            assert predictions == sorted(predictions, reverse=True) and predictions[0] > predictions[-1]
    # How many chunks there are is a matter of what a chunk is timed to take.
    assert found[0.95] > found[0.05] and found[0.95] >= 1 / 3


def test_one_pass_keeps_nothing() -> None:
    step = sg.Step(wide(), lambda o, b: o.square().mean())
    footprint = sg.measure_step(step, large())
    assert footprint.kept_row_bytes is None and SplitRows(8).keeping(footprint, 2**40).kept_chunks == 0


BYTES = st.floats(0, 1e8)


@settings(deadline=None)
@given(
    batch_rows=st.integers(2, 2000), chunk_row=BYTES, batch_row=st.floats(0, 1e5), graph_row=st.floats(1, 1e8),
    loss_fixed=st.floats(0, 1e9), total=st.integers(1, 2**40), seconds=st.floats(1e-6, 1),
)  # fmt: skip
def test_the_ladder_with_kept_graphs_falls_and_is_within_the_budget(
    batch_rows: int, chunk_row: float, batch_row: float, graph_row: float, loss_fixed: float, total: int,
    seconds: float,
) -> None:  # fmt: skip
    laws = (
        law(Phase.FORWARD, MIB, chunk_row / 2, batch_row), law(Phase.LOSS, loss_fixed, 0.0, 2 * batch_row),
        law(Phase.BACKWARD, MIB, chunk_row, batch_row),
    )  # fmt: skip
    step = footprint(
        laws=laws, plain_laws=(law(Phase.BACKWARD, 2.0**45, 0.0),), batch_rows=batch_rows, refusals={},
        forwards_per_step=2, kept_row_bytes=graph_row, seconds_per_row=seconds,
    )  # fmt: skip
    budget = Budget(total_bytes=total, device="cpu", counting=Counting.TENSOR_BYTES, source="given")
    try:
        ladder = choose_plan(step, Options(), budget)
    except BudgetTooSmall:
        assert step.predicted_peak_bytes(rows=1) > usable_bytes(budget)
        return
    peaks = [plan.predicted_peak_bytes or 0 for plan in ladder]
    assert peaks == sorted(peaks, reverse=True) and max(peaks) <= usable_bytes(budget) + 1
    assert ladder[0].predicted_seconds == min(plan.predicted_seconds or 0.0 for plan in ladder)
    for plan in ladder:
        knobs = plan.levers["split_rows"]
        assert 0 <= knobs["kept_chunks"] <= -(-batch_rows // knobs["rows"])
    # The last resort keeps nothing.
    assert peaks[-1] == step.predicted_peak_bytes(rows=1)
