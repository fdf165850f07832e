"""What rows and chunks take, read from two probes; and what a forward alone says of rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.declared import DeclaredStep, declare
from samegrad.exact.step_draws import StepDraws
from samegrad.measure.probe import Probe, time_forward
from samegrad.measure.probe_sets import row_seconds, times
from samegrad.trees import even_sizes

# Rows of a chunk and of the batch of the first and the last probe, in one pass and in two.
SHAPES = pytest.mark.parametrize("shapes", [((8, 16), (16, 32)), ((4, 8), (8, 32)), ((8, 8), (32, 32))])


def probe(rows: int, batch_rows: int, seconds: float) -> Probe:
    return Probe(
        sizes=tuple(even_sizes(batch_rows, rows)), peak_bytes=0, by_phase={}, by_category={}, timeline=(),
        seconds=seconds, moments=(),
    )  # fmt: skip


def probes_of(shapes: tuple[tuple[int, int], ...], per_row: float, per_chunk: float) -> list[Probe]:
    return [probe(r, n, per_row * n + per_chunk * len(even_sizes(n, r))) for r, n in shapes]


@SHAPES
@pytest.mark.parametrize(("per_row", "per_chunk"), [(0.002, 0.2), (0.0, 0.2), (0.02, 0.0)])
def test_rows_and_chunks_are_told_apart(
    shapes: tuple[tuple[int, int], ...], per_row: float, per_chunk: float
) -> None:
    found = times(probes_of(shapes, per_row, per_chunk))
    assert found == pytest.approx((per_row, per_chunk), abs=1e-12)


def test_chunks_that_only_launch_are_not_taken_for_rows() -> None:
    # As seen on a card: 0.195 s for a chunk of 4 rows, and once 0.256 s for one of 8; all 240 rows took 0.39 s.
    noisy = [probe(4, 8, 2 * 0.195), probe(8, 32, 4 * 0.256)]
    by_slope, _ = times(noisy)
    assert by_slope is not None and by_slope * 240 > 3.0
    per_row, per_chunk = times(noisy, row_seconds=0.0022)
    assert per_row == 0.0022 and per_chunk == pytest.approx(0.256 - 8 * 0.0022)


@SHAPES
def test_what_probes_and_many_rows_agree_on_stays_as_probed(shapes: tuple[tuple[int, int], ...]) -> None:
    probes = probes_of(shapes, 0.02, 0.1)
    assert times(probes, row_seconds=0.015) == times(probes)


def test_one_probe_tells_no_time() -> None:
    assert times([probe(8, 8, 1.0)]) == (None, None)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of each call of a BatchNorm its rows, and whether it was for a backward. What is the step's own is restored."""
    calls: list[tuple[int, bool]] = []
    plain = nn.BatchNorm1d.forward

    def forward(self: nn.BatchNorm1d, rows: Tensor) -> Tensor:
        calls.append((len(rows), torch.is_grad_enabled()))
        return plain(self, rows)

    monkeypatch.setattr(nn.BatchNorm1d, "forward", forward)
    return calls


def declared() -> DeclaredStep:
    body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    return declare(body, lambda outputs, batch: F.mse_loss(outputs, batch[1]))


def test_a_forward_is_timed_without_a_graph_and_leaves_nothing_behind(seen: list[tuple[int, bool]]) -> None:
    step, batch = declared(), (torch.randn(12, 3), torch.randn(12, 2))
    before = {name: tensor.clone() for name, tensor in step.network.state_dict().items()}
    seconds = time_forward(step, batch, step.layout(batch), batch_rows=10, draws=StepDraws())
    assert math.isfinite(seconds) and seconds > 0
    assert set(seen) == {(10, False)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.network.state_dict().items())


def test_a_processor_launches_nothing_that_could_hide_rows(seen: list[tuple[int, bool]]) -> None:
    step, batch = declared(), (torch.randn(12, 3), torch.randn(12, 2))
    assert row_seconds(step, batch, step.layout(batch), StepDraws(), forwards=1) is None
    assert not seen
