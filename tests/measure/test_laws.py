"""The peak predicted from a few rows is the peak of the step that then runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.measure.laws import fit_laws
from samegrad.measure.probe import probe_plain
from samegrad.records import Category, Footprint, Phase

# What the prediction may be off by: a hundredth, or the two scalars of each chunk.
WITHIN_FRACTION, WITHIN_BYTES = 0.01, 2 * 8 * 131


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.AvgPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)).mean(1))


class Series(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 64), nn.GELU(), nn.Linear(64, 48), nn.LayerNorm(48), nn.Linear(48, 5))


def _numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


def _tokens(rows: int) -> Tensor:
    return torch.randint(0, 50, (rows, 9), generator=torch.Generator().manual_seed(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "network": (network, _numbers(30)),
    "pictures": (Pictures, _numbers(3, 12, 12)),
    "words": (Words, _tokens),
    # In float64, which oneDNN leaves to PyTorch's own kernels.
    "series": (lambda: Series().double(), lambda rows: _numbers(7, 6)(rows).double()),
}


def one_pass(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch["labels"] if isinstance(batch, dict) else batch[1])


def two_passes(outputs: Tensor, batch: Any) -> Tensor:
    z = F.normalize(outputs, dim=1)
    return (z - z.mean(0)).square().mean() + one_pass(outputs, batch)


OPTIMIZERS = {"sgd": functools.partial(torch.optim.SGD, lr=0.1), "adam": torch.optim.Adam}


def really_run(step: sg.Step, batch: Any) -> int:
    """The counted peak of the second of two real steps: the first creates the optimizer's state."""
    step.prepare(batch)
    counter = sg.count_bytes(step)
    *_, last = sg.train(step, [batch, batch], counter=counter)
    assert last.peak_allocated_bytes is not None
    return last.peak_allocated_bytes


def assert_near(predicted: int, real: int) -> None:
    assert abs(predicted - real) <= max(WITHIN_FRACTION * real, WITHIN_BYTES), (predicted, real, predicted / real)


@pytest.mark.parametrize(("name", "optimizer"), [*((name, "sgd") for name in MODELS), ("network", "adam")])
@pytest.mark.parametrize("loss_fn", [one_pass, two_passes], ids=["one pass", "two passes"])
def test_the_predicted_peak_is_the_counted_peak_of_a_real_step(name: str, loss_fn: Any, optimizer: str) -> None:
    make, data = MODELS[name]
    batch_rows = 131
    batch = data(batch_rows), torch.arange(batch_rows) % 5
    torch.manual_seed(0)
    footprint: Footprint | None = None
    for rows in (1, 7, 60, batch_rows) if name == "network" else (9, 60, batch_rows):
        model = make()
        step = sg.Step(model, loss_fn, rows=rows, optimizer=OPTIMIZERS[optimizer](model.parameters()))
        footprint = footprint or sg.measure_step(step, batch)
        assert_near(footprint.predicted_peak_bytes(rows=rows), really_run(step, batch))


@pytest.mark.parametrize("loss_fn", [one_pass, two_passes], ids=["one pass", "two passes"])
def test_a_mapping_batch_is_predicted_as_well(loss_fn: Any) -> None:
    rows = 120
    batch = {"input": _numbers(30)(rows), "labels": torch.arange(rows) % 5, "extra": torch.zeros(rows, 4)}
    footprint: Footprint | None = None
    for at_a_time in (8, 50, rows):
        model = network()
        step = sg.Step(model, loss_fn, rows=at_a_time, optimizer=torch.optim.SGD(model.parameters(), 0.1))
        footprint = footprint or sg.measure_step(step, batch)
        assert_near(footprint.predicted_peak_bytes(rows=at_a_time), really_run(step, batch))


@pytest.mark.parametrize("batch_rows", [2, 3, 5, 9, 17])
@pytest.mark.parametrize("loss_fn", [one_pass, two_passes], ids=["one pass", "two passes"])
def test_a_short_last_chunk_is_never_predicted_too_low(loss_fn: Any, batch_rows: int) -> None:
    batch = _numbers(30)(batch_rows), torch.arange(batch_rows) % 5
    footprint: Footprint | None = None
    for rows in range(1, batch_rows + 1):
        model = network()
        step = sg.Step(model, loss_fn, rows=rows, optimizer=torch.optim.SGD(model.parameters(), 0.1))
        footprint = footprint or sg.measure_step(step, batch)
        predicted, real = footprint.predicted_peak_bytes(rows=rows), really_run(step, batch)
        # Too high by the gradients at most: they are not there yet while the first, larger chunk runs.
        gradients = footprint.resident_bytes[Category.GRADIENTS]
        assert real - WITHIN_BYTES <= predicted <= real + gradients + WITHIN_BYTES, (rows, predicted, real)


@pytest.mark.parametrize("loss_fn", [one_pass, two_passes], ids=["one pass", "two passes"])
def test_the_first_step_is_within_the_prediction_although_its_state_was_not_there(loss_fn: Any) -> None:
    model = network()
    batch = _numbers(30)(200), torch.arange(200) % 5
    step = sg.Step(model, loss_fn, rows=20, optimizer=torch.optim.Adam(model.parameters()))
    predicted = sg.measure_step(step, batch).predicted_peak_bytes(rows=20)
    step.backward(batch)
    model.zero_grad()
    [first] = sg.train(step, [batch], counter=sg.count_bytes(step))
    assert first.peak_allocated_bytes is not None
    assert first.peak_allocated_bytes <= predicted * (1 + WITHIN_FRACTION) + WITHIN_BYTES


@pytest.mark.xfail(strict=True, reason="oneDNN pads its recurrent workspace, which is then not affine in the rows")
def test_a_recurrent_network_in_float32_is_predicted_as_well() -> None:
    batch = _numbers(7, 6)(131), torch.arange(131) % 5
    model = Series()
    step = sg.Step(model, one_pass, rows=131, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    footprint = sg.measure_step(step, batch)
    # 3.5 % too low for the whole batch, 28 % too low one row at a time.
    assert_near(footprint.predicted_peak_bytes(rows=131), really_run(step, batch))


def test_a_recurrent_network_in_float32_repeats_its_first_pass() -> None:
    # oneDNN's recurrent kernels without a graph differ in the last bits from those with one.
    torch.manual_seed(0)
    model = Series()
    batch = _numbers(7, 6)(31), torch.arange(31) % 5
    step = sg.Step(model, two_passes, rows=8)
    assert sg.verify_step(step, batch).same


def test_a_line_through_the_peaks_would_be_far_off() -> None:
    # A wide layer: at few rows the peak is its weight's gradient, at many an activation.
    model = nn.Sequential(nn.Linear(30, 400), nn.Tanh(), nn.Linear(400, 5))
    step = sg.Step(model, one_pass)
    few, many = 4, 1024
    batch = _numbers(30)(many), torch.arange(many) % 5
    layout = step.declared.layout(batch)
    probes = [probe_plain(step.declared, batch, layout, batch_rows=rows) for rows in (few, 2 * few)]
    real = probe_plain(step.declared, batch, layout, batch_rows=many).peak_bytes
    slope = (probes[1].peak_bytes - probes[0].peak_bytes) / few
    through_peaks = probes[0].peak_bytes + slope * (many - few)
    laws = fit_laws(probes, missing_bytes=0)
    predicted = max(law.peak_bytes(rows=many, batch_rows=many) for law in laws)
    assert abs(predicted - real) <= WITHIN_FRACTION * real
    assert abs(through_peaks - real) > 0.2 * real


def test_state_that_is_missing_is_added_to_every_law() -> None:
    step = sg.Step(network(), one_pass)
    batch = _numbers(30)(16), torch.arange(16) % 5
    layout = step.declared.layout(batch)
    probes = [probe_plain(step.declared, batch, layout, batch_rows=rows) for rows in (4, 8)]
    without, with_state = (fit_laws(probes, missing_bytes=n) for n in (0, 1000))
    assert [a.fixed_bytes + 1000 for a in without] == [b.fixed_bytes for b in with_state]


def test_the_footprint_names_its_basis_and_its_parts() -> None:
    model = network()
    step = sg.Step(model, one_pass, optimizer=torch.optim.Adam(model.parameters()))
    batch = _numbers(30)(64), torch.arange(64) % 5
    footprint = sg.measure_step(step, batch)
    parameters = sum(p.nbytes for p in model.parameters())
    assert footprint.resident_bytes[Category.PARAMETERS] == parameters
    assert footprint.resident_bytes[Category.GRADIENTS] == parameters
    assert footprint.resident_bytes[Category.OPTIMIZER_STATE] >= 2 * parameters
    assert {law.phase for law in footprint.laws} >= {Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER}
    assert "probes of the real step" in footprint.basis
    assert Footprint.from_json(footprint.to_json()) == footprint


def test_measuring_for_a_card_that_is_not_there_is_refused() -> None:
    with pytest.raises(sg.EnvironmentProblem, match="meta"):
        sg.measure_step(sg.Step(network(), one_pass), (_numbers(30)(8), torch.arange(8) % 5), device="meta")
