"""Models that couple rows on the command line: planned, judged, verified, trained and reported by what runs."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from samegrad.records import Footprint, Plan
from tests.cli.conftest import Cli

STEPS = """
    import torch
    import torch.nn.functional as F
    from torch import nn
    import samegrad as sg

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Dropout(0.2), nn.Linear(96, 8))
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            z = self.encoder(x)
            return {"loss": F.cross_entropy(self.head(z - z.mean(0)), x.argmax(1) % 4)}

    def block(width):
        return nn.Sequential(nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 16))

    def batches():
        generator = torch.Generator().manual_seed(0)
        return [(torch.randn(256, 16, generator=generator), torch.arange(256) % 4) for _ in range(3)]

    def step(model, loss_fn, **how):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return sg.Step(model, loss_fn, optimizer=optimizer, **how), batches()

    def own_loss():
        return step(Attending(), lambda o, b: o["loss"], segments=["encoder"])

    def blocks():
        model = nn.Sequential(*(block(16) for _ in range(4)), nn.Linear(16, 4))
        return step(model, lambda o, b: F.cross_entropy(o, b[1]))
"""

# A budget below the plain step's, and the lever that is taken for it.
TAKEN = {"own_loss": ("170KiB", "segments"), "blocks": ("700KiB", "recompute")}


@pytest.fixture
def coupled(folder: Path) -> Path:
    (folder / "coupled.py").write_text(textwrap.dedent(STEPS))
    return folder


@pytest.mark.parametrize("name", TAKEN)
def test_a_plan_is_made_judged_verified_trained_and_reported(cli: Cli, coupled: Path, name: str) -> None:
    budget, lever = TAKEN[name]
    target = f"coupled.py:{name}"
    planned = cli("plan", target, "--budget", budget, "--output", "plan", "--json")
    assert planned.code == 0, planned.err
    plan = Plan.from_json((coupled / "plan" / "plan.json").read_text())
    assert list(plan.levers) == [lever] and plan.predicted_peak_bytes is not None

    judged = cli("plan", target, "--plan", "plan/plan.json", "--output", "judged", "--json")
    assert judged.code == 0 and judged.document["fits"] is True, judged.err
    found = Footprint.from_json((coupled / "judged" / "measured.json").read_text())
    assert abs(found.peak_allocated_bytes - plan.predicted_peak_bytes) <= 0.03 * found.peak_allocated_bytes
    assert found.timeline and found.by_category and found.batch_rows == 256

    verified = cli("verify", target, "--plan", "plan/plan.json", "--json")
    assert verified.code == 0 and verified.document["same"] is True
    checks = [check["name"] for check in verified.document["verdict"]["checks"]]
    assert "plain run twice" not in checks

    ran = cli("run", target, "--budget", budget, "--output", "out", "--json")
    assert ran.code == 0, ran.err
    page = (coupled / "out" / "report.html").read_text()
    assert lever in page and ("normalises with" in page or "segments= names parts" in page)


def test_a_person_is_told_the_way_and_its_cost(cli: Cli, coupled: Path) -> None:
    said = cli("plan", "coupled.py:blocks", "--budget", "700KiB", "--verbose")
    for part in ("recompute", "2 forwards a row", "normalises with the statistics of all rows"):
        assert part in said.out + said.err


def test_the_whole_step_is_measured_under_the_draws_it_makes(cli: Cli, coupled: Path) -> None:
    measured = cli("measure", "coupled.py:blocks", "--budget", "1GiB", "--json")
    assert measured.code == 0, measured.err
    predicted, found = (measured.document[key]["peak_allocated_bytes"] for key in ("predicted", "measured"))
    assert abs(predicted - found) <= 0.03 * found


def test_segments_of_the_step_are_kept_when_it_is_declared_again(cli: Cli, coupled: Path) -> None:
    planned = cli("plan", "coupled.py:own_loss", "--budget", "170KiB", "--json")
    assert list(planned.document["plan"]["levers"]["segments"]["paths"]) == ["encoder"]


def test_what_is_pinned_and_does_not_fit_is_said_by_its_rows(cli: Cli, coupled: Path) -> None:
    cli("plan", "coupled.py:own_loss", "--budget", "170KiB", "--output", "plan")
    text = (coupled / "plan" / "plan.json").read_text()
    plan = Plan.from_json(text)
    rows = plan.levers["segments"]["rows"]
    (coupled / "plan" / "plan.json").write_text(text.replace(f'"rows": {rows}', '"rows": 255'))
    refused = cli("run", "coupled.py:own_loss", "--plan", "plan/plan.json")
    assert refused.code == 1 and "255 rows at a time" in refused.err
