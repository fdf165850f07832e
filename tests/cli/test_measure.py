"""``measure``: the course of a step as predicted and as measured, on stdout, in the records and in pictures."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from samegrad.measure import trace_reading
from samegrad.records import Footprint, Phase, Plan, TimelinePoint
from samegrad.report.aligned import aligned
from tests.cli.conftest import Cli

STEPS = '''
    import torch
    from torch import nn
    import samegrad as sg

    def net(last=4):
        return nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, last))

    def loss(out, batch):
        return nn.functional.cross_entropy(out, batch[1])

    def batches():
        return [(torch.randn(300, 32), torch.randint(0, 4, (300,)))]

    def train():
        model = net()
        return sg.Step(model, loss, optimizer=torch.optim.Adam(model.parameters(), foreach=False)), batches()

    def without_optimizer():
        return sg.Step(net(), loss), batches()

    def reads_values():
        model = net()
        def judged(out, batch):
            return loss(out, batch) * (2.0 if out.detach().sum().item() > 1e9 else 1.0)
        return sg.Step(model, judged, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)), batches()
'''
LINES = {"whole": ("--budget", "100MiB"), "split": ("--budget", "1800KiB")}


@pytest.fixture(autouse=True)
def courses(folder: Path) -> None:
    (folder / "courses.py").write_text(textwrap.dedent(STEPS))


def total(point: TimelinePoint) -> int:
    return sum(point.live_bytes.values())


def settled(footprint: Footprint) -> dict[str, int]:
    """Bytes by category; a gradient in the making may count as temporary."""
    found = {category.value: amount for category, amount in footprint.by_category.items()}
    in_the_making = found.pop("gradients", 0) + found.pop("temporary", 0)
    return {name: amount for name, amount in found.items() if amount} | {"in the making": in_the_making}


def read(folder: Path) -> tuple[Footprint, Footprint]:
    predicted, measured = (
        Footprint.from_json((folder / "out" / f"{name}.json").read_text()) for name in ("footprint", "measured")
    )
    return predicted, measured


def apart(*courses: Sequence[TimelinePoint]) -> float:
    """How far from each other the phases of two courses begin, at most, as a fraction of the step."""
    both = [
        [next(run).position_fraction for _, run in itertools.groupby(course, key=lambda point: point.phase)]
        for course in courses
    ]
    return max(abs(a - b) for a, b in zip(*both, strict=True))


def highest(course: Sequence[TimelinePoint]) -> float:
    return max(course, key=total).position_fraction


@pytest.mark.parametrize("name", LINES)
def test_what_is_followed_is_what_is_measured(cli: Cli, folder: Path, name: str) -> None:
    ran = cli("measure", "courses.py:train", *LINES[name], "--output", "out", "--json")
    assert ran.code == 0, ran.err
    predicted, measured = read(folder)
    assert ran.document["predicted"] == predicted.to_dict() and ran.document["measured"] == measured.to_dict()
    assert bool(Plan.from_json((folder / "out" / "plan.json").read_text()).levers) == (name == "split")
    # Here both count tensor bytes of the same operations: every byte is the same one.
    assert predicted.peak_allocated_bytes == measured.peak_allocated_bytes
    assert settled(predicted) == settled(measured)
    assert Phase.HANDOFF in predicted.by_phase and predicted.by_phase.keys() == measured.by_phase.keys()
    # So one lies over the other, highest moments too, which a course without the hand-over does not by itself.
    laid = aligned(predicted.timeline, measured.timeline)
    assert apart(laid, measured.timeline) == pytest.approx(0)
    assert abs(highest(laid) - highest(measured.timeline)) < 0.02
    plain = [point for point in predicted.timeline if point.phase is not Phase.HANDOFF]
    evenly = [dataclasses.replace(p, position_fraction=i / (len(plain) - 1)) for i, p in enumerate(plain)]
    assert apart(evenly, [p for p in measured.timeline if p.phase is not Phase.HANDOFF]) > 0.02
    assert predicted.rows == measured.rows and predicted.batch_rows == measured.batch_rows == 300
    for footprint in (predicted, measured):
        assert max(map(total, footprint.timeline)) == footprint.peak_allocated_bytes
    assert measured.seconds is not None and measured.seconds > 0


def test_the_peak_is_that_of_a_plain_loop(cli: Cli, folder: Path) -> None:
    """Its bytes, added up by hand from the layers' shapes."""
    assert cli("measure", "courses.py:train", *LINES["whole"], "--output", "out").code == 0
    _, measured = read(folder)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    parameters = sum(p.nbytes for p in model.parameters())
    state = 2 * parameters + torch.tensor(0.0).nbytes * len(list(model.parameters()))
    found = {category.value: amount for category, amount in measured.by_category.items()}
    assert (found["parameters"], found["optimizer_state"]) == (parameters, state)
    assert found["inputs"] == 300 * (32 * 4 + 8)
    assert found["activations"] >= 2 * 300 * 256 * 4


def test_what_lives_at_the_peak_adds_up(cli: Cli, folder: Path) -> None:
    assert cli("measure", "courses.py:train", *LINES["whole"], "--output", "out").code == 0
    predicted, _ = read(folder)
    assert sum(entry.size_bytes for entry in predicted.at_peak) == predicted.peak_allocated_bytes
    sizes = [entry.size_bytes for entry in predicted.at_peak]
    assert sizes == sorted(sizes, reverse=True)
    by_module = {(e.module, e.operation): e.size_bytes for e in predicted.at_peak if e.category.value == "activations"}
    assert by_module["1", "aten.relu.default"] == 300 * 256 * 4


def test_a_person_sees_the_course_and_what_lives_at_its_peak(cli: Cli) -> None:
    told = cli("measure", "courses.py:train", *LINES["split"]).out
    for part in ("measured on cpu", "░", "█", "backward", "1.76 MiB", "budget", "Live at the peak", "relu"):
        assert part in told
    assert max(map(len, told.splitlines())) <= 100


def test_the_pictures_stand_alone(cli: Cli, folder: Path) -> None:
    assert cli("measure", "courses.py:train", *LINES["split"], "--output", "out").code == 0
    svg = ET.fromstring((folder / "out" / "timeline.svg").read_text())
    words = " ".join("".join(element.itertext()) for element in svg.iter() if element.tag.endswith("text"))
    assert "predicted total" in words and "budget 1.76 MiB" in words
    # The band of modules; their names show on hovering.
    titles = {"".join(e.itertext()) for e in svg.iter() if e.tag.endswith("title")}
    assert {"0 (Linear)", "2 (Linear)", "3 (ReLU)"} <= titles and not titles & {"0", "2", "3"}
    page = (folder / "out" / "measure.html").read_text()
    assert "Within the budget" in page and "<script" not in page
    assert "Not verified" not in page
    assert "the prediction was exact" in page


def test_a_wrong_prediction_is_seen(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_peak = trace_reading.find_peak

    def too_low(*given: object, **how: object) -> trace_reading.Moment:
        peak = find_peak(*given, **how)  # type: ignore[arg-type]
        return trace_reading.Moment(peak.event, peak.operation, peak.live_bytes - 4096, peak.by_category)

    monkeypatch.setattr("samegrad.cli.measured.find_peak", too_low)
    assert cli("measure", "courses.py:train", *LINES["whole"], "--output", "out").code == 0
    predicted, measured = read(folder)
    assert predicted.peak_allocated_bytes == measured.peak_allocated_bytes - 4096
    assert "too low" in (folder / "out" / "measure.html").read_text()


def test_without_an_optimizer_the_step_is_measured_up_to_its_gradients(cli: Cli) -> None:
    ran = cli("measure", "courses.py:without_optimizer", *LINES["split"], "--json")
    assert ran.code == 0
    assert "optimizer" not in ran.document["measured"]["by_phase"]


def test_what_cannot_be_followed_is_measured_and_predicted_by_probes(cli: Cli) -> None:
    ran = cli("measure", "courses.py:reads_values", *LINES["whole"], "--json")
    assert ran.code == 0
    assert "cannot be followed" in ran.err and "courses.py:" in ran.err
    predicted, measured = ran.document["predicted"], ran.document["measured"]
    assert predicted["timeline"] == [] and measured["timeline"]
    assert abs(predicted["peak_allocated_bytes"] / measured["peak_allocated_bytes"] - 1) < 0.1
