"""A plan of levers that nothing was traced for: measured instead of predicted, and a verdict that names what rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from samegrad.records import Exactness, Footprint, Origin, Plan, Verdict

from .conftest import Cli

LEVERS = {"split_rows": {"rows": 16}, "autocast": {"dtype": "bfloat16"}}
GIVEN = ("steps.py:rounded", "--plan", "plan.json")


@pytest.fixture(autouse=True)
def written(folder: Path) -> None:
    plan = Plan(levers=LEVERS, exactness=Exactness.ROUNDED, batch_rows=64)
    (folder / "plan.json").write_text(plan.to_json())


def test_what_no_law_predicts_is_followed_and_called_so(folder: Path, cli: Cli) -> None:
    ran = cli("plan", *GIVEN, "--output", "out", "--json")
    assert ran.code == 0 and ran.document["fits"]
    footprint = Footprint.from_json((folder / "out" / "footprint.json").read_text())
    assert footprint.origin is Origin.PREDICTED and footprint.rows == 16 and footprint.peak_allocated_bytes > 0
    assert "followed" in footprint.basis
    plan = Plan.from_json((folder / "out" / "plan.json").read_text())
    assert plan.levers == LEVERS and plan.predicted_peak_bytes == footprint.peak_allocated_bytes


def test_a_run_says_what_it_did_not_predict(folder: Path, cli: Cli) -> None:
    ran = cli("run", *GIVEN, "--steps", "1", "--output", "run")
    assert ran.code == 0
    assert "Not predicted by laws (predict autocast" in ran.err and "so followed:" in ran.err
    assert Plan.from_json((folder / "run" / "plan.json").read_text()).predicted_peak_bytes


def test_a_followed_peak_over_the_budget_is_refused(folder: Path, cli: Cli) -> None:
    text = (folder / "plan.json").read_text()
    budget = '{"total_bytes": 4096, "device": "cpu", "counting": "counted tensor bytes", "source": "a test"}'
    (folder / "plan.json").write_text(text.replace('"budget": null', f'"budget": {budget}'))
    ran = cli("run", *GIVEN, "--steps", "1", "--output", "run", "--json")
    assert ran.code == 1 and "it is predicted to need" in ran.document["error"]["message"]


def test_the_verdict_names_its_own_reference_and_what_the_lever_costs(folder: Path, cli: Cli) -> None:
    ran = cli("verify", *GIVEN, "--output", "out", "--json")
    assert ran.code == 0 and ran.document["same"]
    assert ran.document["same_as"] == "the plain step under autocast in bfloat16 on cpu"
    verdict = Verdict.from_json((folder / "out" / "verdict.json").read_text())
    assert (verdict.asked, verdict.found) == (Exactness.ROUNDED, Exactness.ROUNDED)
    told = " ".join(cli("verify", *GIVEN).out.split())
    assert told.startswith("Same as its own reference") and "Same gradients" not in told
    assert "not the declared step: its gradients are" in told and "which is what autocast costs" in told


def test_a_step_that_does_not_allow_it_refuses_the_plan(cli: Cli) -> None:
    ran = cli("verify", "steps.py:train", "--plan", "plan.json", "--json")
    assert ran.code == 2 and "a narrower dtype than declared" in ran.document["error"]["message"]


@pytest.mark.parametrize(
    ("levers", "told"),
    [
        ({"split_row": {"rows": 16}}, "a lever 'split_row' (did you mean 'split_rows'?)"),
        ({"split_rows": {"row": 16}}, "it has no 'row'; knobs of split_rows are rows"),
        ({"split_rows": {"rows": -3}}, "split_rows with rows=-3"),
        (LEVERS, None),
    ],
)
def test_a_plan_that_cannot_be_applied_is_told_of_its_file(
    folder: Path, cli: Cli, levers: dict[str, dict[str, int]], told: str | None
) -> None:
    (folder / "plan.json").write_text(Plan(levers=levers, exactness=Exactness.ROUNDED, batch_rows=64).to_json())
    ran = cli("plan", *GIVEN, "--json")
    if told is None:
        assert ran.code == 0
        return
    error = ran.document["error"]
    assert (ran.code, error["code"], error["option"], error["file"]) == (3, "wrong-plan", "plan", "plan.json")
    assert error["message"].startswith("--plan plan.json: ") and told in error["message"]
    assert "samegrad plan steps.py:rounded" in error["hint"]


@pytest.mark.parametrize(("text", "told"), [('{"levers"', "plan.json:1: not JSON"), ("[]", "a list where an object")])
def test_a_plan_file_that_holds_no_plan_is_told_with_its_option(folder: Path, cli: Cli, text: str, told: str) -> None:
    (folder / "plan.json").write_text(text)
    ran = cli("plan", *GIVEN, "--json")
    error = ran.document["error"]
    assert (ran.code, error["option"], error["file"]) == (3, "plan", "plan.json") and told in error["message"]
