"""Each command answers its question, on stdout for a person and as one document, and with its exit code."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import samegrad as sg
from samegrad.cli.stopping import Stopped
from samegrad.errors import IN_THE_DECLARATION
from samegrad.recipes import find_recipe, recipe_names
from samegrad.records import Footprint, Plan, Same, Verdict
from samegrad.store import RunFolder
from samegrad.verify.gradients import verify_step
from tests.cli.conftest import Cli
from tests.cli.test_main import WATCHED, spawn

BUDGET = ("--budget", "50KiB")


def test_plan_fits_and_is_written(cli: Cli, folder: Path) -> None:
    ran = cli("plan", "steps.py:train", *BUDGET, "--output", "out", "--json")
    assert ran.code == 0
    assert ran.document["fits"] is True
    plan = Plan.from_json((folder / "out" / "plan.json").read_text())
    assert ran.document["plan"] == plan.to_dict()
    assert plan.levers["split_rows"]["rows"] < plan.batch_rows
    assert plan.predicted_peak_bytes is not None and plan.predicted_peak_bytes <= 50 * 1024


def test_plan_tells_a_person_the_budget_the_levers_and_why(cli: Cli) -> None:
    out = cli("plan", "steps.py:train", *BUDGET).out
    for part in ("50.0 KiB", "counted tensor bytes", "split_rows", "rows = ", "(chosen)", "host_rows: refused"):
        assert part in out


def test_below_the_floor_the_answer_is_no_with_what_it_is_made_of(cli: Cli) -> None:
    ran = cli("plan", "steps.py:train", "--budget", "20KiB", "--json")
    assert ran.code == 1
    error = ran.document["error"]
    for part in ("parameters", "gradients", "optimizer state", "one row"):
        assert part in error["message"]
    assert len(error["hint"].split("; ")) >= 3
    assert f"{IN_THE_DECLARATION}: an optimizer with less state" in error["hint"]


def test_a_recipes_refusal_comes_with_its_own_advice_in_order(cli: Cli) -> None:
    refused = cli("plan", "autoencoder", "--patch_rows", "200", "--budget", "1MiB")
    assert refused.code == 1
    advice = find_recipe("autoencoder").troubleshooting
    places = [refused.err.find(f"{number}. {line}") for number, line in enumerate(advice, start=1)]
    assert -1 not in places
    assert places == sorted(places)
    # What only the step's author could declare is none of it.
    assert "raise the budget to" in refused.err and IN_THE_DECLARATION not in refused.err


def test_no_advice_on_memory_where_the_mistake_is_another(cli: Cli) -> None:
    mistaken = cli("plan", "autoencoder", "--patch_rows", "200", "--data_root", "nowhere.npy")
    assert mistaken.code == 3
    assert "Advice" not in mistaken.err
    yours = cli("plan", "steps.py:train", "--budget", "20KiB")
    assert yours.code == 1
    assert "Advice" not in yours.err


def test_a_given_plan_is_measured_and_judged(cli: Cli, folder: Path) -> None:
    cli("plan", "steps.py:train", *BUDGET, "--output", "out")
    fits = cli("plan", "steps.py:train", "--plan", "out/plan.json", "--json")
    assert (fits.code, fits.document["fits"]) == (0, True)
    path = folder / "out" / "plan.json"
    tight = json.loads(path.read_text())
    measured = fits.document["measured"]["peak_allocated_bytes"]
    predicted = fits.document["plan"]["predicted_peak_bytes"]
    tight["budget"]["total_bytes"] = min(measured, predicted) - 1
    path.write_text(json.dumps(tight))
    assert cli("plan", "steps.py:train", "--plan", "out/plan.json").code == 1


def test_a_damaged_plan_is_bad_input_with_its_field(cli: Cli, folder: Path) -> None:
    (folder / "plan.json").write_text('{"record": "Plan", "levers": {}, "exactness": "SAME_BITS", "rows": 3}')
    ran = cli("plan", "steps.py:train", "--plan", "plan.json", "--json")
    assert (ran.code, ran.document["error"]["file"]) == (3, "plan.json")
    assert "unknown field 'rows'" in ran.document["error"]["message"]


def test_a_plan_and_a_budget_together_are_refused(cli: Cli) -> None:
    cli("plan", "steps.py:train", *BUDGET, "--output", "out")
    ran = cli("run", "steps.py:train", *BUDGET, "--plan", "out/plan.json", "--json")
    assert (ran.code, ran.document["error"]["option"]) == (2, "budget")


def test_the_table_stands_beside_the_documents_figures(cli: Cli) -> None:
    ran = cli("plan", "autoencoder", "--table", "--patch_rows", "300", "--hidden", "16", "--latent_dim", "4", "--json")
    assert ran.code == 0
    rows = ran.document["table"]
    assert [row["partitions"] for row in rows] == [1, 2, 3, 6, 12]
    assert all(isinstance(row["predicted_peak_bytes"], int) for row in rows)
    assert any(row["document_times_smaller"] == 6 for row in rows)


def test_a_function_has_no_table(cli: Cli) -> None:
    assert cli("plan", "steps.py:train", "--table").code == 2


def test_measure_shows_predicted_beside_measured(cli: Cli, folder: Path) -> None:
    ran = cli("measure", "steps.py:train", *BUDGET, "--output", "out", "--json")
    assert ran.code == 0
    predicted = Footprint.from_json((folder / "out" / "footprint.json").read_text())
    measured = Footprint.from_json((folder / "out" / "measured.json").read_text())
    assert ran.document["predicted"] == predicted.to_dict()
    assert ran.document["measured"] == measured.to_dict()
    assert (predicted.origin.value, measured.origin.value) == ("predicted", "measured")
    parameters = 4 * (16 * 64 + 64 + 64 * 4 + 4)
    assert {c.value: n for c, n in measured.by_category.items()}["parameters"] == parameters
    # Adam keeps two moments a parameter, and one float32 step count a tensor.
    assert {c.value: n for c, n in measured.by_category.items()}["optimizer_state"] == 2 * parameters + 4 * 4
    assert abs(measured.peak_allocated_bytes / predicted.peak_allocated_bytes - 1) < 0.1


def test_verify_says_the_same_with_its_number(cli: Cli, folder: Path) -> None:
    ran = cli("verify", "steps.py:train", *BUDGET, "--rows", "40", "--output", "out", "--json")
    assert ran.code == 0
    assert ran.document["same"] is True
    verdict = Verdict.from_json((folder / "out" / "verdict.json").read_text())
    assert ran.document["verdict"] == verdict.to_dict()
    assert verdict.rows_checked == 40
    told = cli("verify", "steps.py:train", *BUDGET, "--rows", "40").out
    assert "Same gradients" in told and "of the allowed" in told
    for part in ("against the plain step on cpu", "40 of 64 rows", "0 bit for bit, 1 the same function, 2 directly"):
        assert part in " ".join(told.split())


def test_verify_compares_with_the_reference_that_is_asked_for(cli: Cli) -> None:
    ran = cli("verify", "steps.py:train", *BUDGET, "--reference", "cpu", "--json")
    assert ran.code == 0
    assert ran.document["verdict"]["reference"] == "the plain step on cpu in float64"
    assert cli("verify", "steps.py:train", "--reference", "tpu").code == 2
    assert cli("verify", "steps.py:train", "--rows", "65").code == 2


VERIFY_EXITS = {
    "same": (("steps.py:train", *BUDGET), 0),
    "differs": (("unequal.py:train",), 1),
    "no such option": (("steps.py:train", "--row", "8"), 2),
    "more rows than there are": (("steps.py:train", "--rows", "65"), 2),
    "no such plan": (("steps.py:train", "--plan", "no.json"), 3),
    "no such device": (("autoencoder", "--device", "cuda:99"), 4),
    "out of memory": (("steps.py:exhausted",), 5),
}


@pytest.mark.parametrize("name", VERIFY_EXITS)
def test_verify_exits_as_documented(cli: Cli, folder: Path, name: str) -> None:
    (folder / "unequal.py").write_text(UNEQUAL)
    line, code = VERIFY_EXITS[name]
    ran = cli("verify", *line, "--json")
    assert ran.code == code
    assert ("error" in ran.document) == (code > 1)


def test_a_step_that_runs_whole_is_compared_bit_for_bit_and_no_further(cli: Cli) -> None:
    ran = cli("verify", "steps.py:coupled", "--rows", "8", "--json")
    assert ran.code == 0
    checks = ran.document["verdict"]["checks"]
    assert {check["tier"] for check in checks} == {0} and all(check["error"] == 0 for check in checks)


UNEQUAL = """
import torch, samegrad as sg

class Net(torch.nn.Linear):
    # Wrong at exactly the chunk's size, where no probe at a few rows looks, and only with data.
    def forward(self, x):
        return super().forward(x) * (2.0 if len(x) == 13 and type(x) is torch.Tensor else 1.0)

def train():
    net = Net(16, 4)
    step = sg.Step(net, lambda out, b: torch.nn.functional.mse_loss(out, b[1]), rows=[13, 19],
                   optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    return step, [(torch.randn(32, 16), torch.randn(32, 4))]
"""


def test_verify_says_no_when_the_gradients_differ_and_run_does_not_train(cli: Cli, folder: Path) -> None:
    (folder / "unequal.py").write_text(UNEQUAL)
    ran = cli("verify", "unequal.py:train", "--json")
    assert ran.code == 1
    assert ran.document["same"] is False
    assert ran.document["verdict"]["answer"] == "differs"
    assert "lever split_rows" in ran.document["verdict"]["fault"]
    told = " ".join(cli("verify", "unequal.py:train").out.split())
    assert "Not the same" in told and "at fault: lever split_rows" in told and "✗ tier 1, gradient entries" in told
    assert "module the model (Net), the first whose rows are others in a chunk" in told
    trained = cli("run", "unequal.py:train", "--output", "out", "--json")
    assert (trained.code, trained.document["error"]["code"]) == (1, "gradients-differ")
    assert not (folder / "out" / "checkpoints").exists()


def test_unproven_is_not_the_same_and_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def unproven(step: Any, batch: object, **how: Any) -> Verdict:
        proven = verify_step(step, batch, **how)
        return dataclasses.replace(proven, answer=Same.UNPROVEN)

    monkeypatch.setattr(sg, "verify_step", unproven)
    ran = cli("verify", "steps.py:train", *BUDGET)
    assert ran.code == 1
    assert "unproven is not the same" in ran.out


def test_report_is_rebuilt_without_torch(cli: Cli, folder: Path) -> None:
    cli("run", "steps.py:train", "--output", "out")
    before = (folder / "out" / "report.html").read_text()
    (folder / "out" / "report.html").unlink()
    ran = spawn(WATCHED, "report", "out", "--json", cwd=folder)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["report_html"] == "out/report.html"
    assert (folder / "out" / "report.html").read_text() == before
    assert (folder / "out" / "report.md").read_text()


def test_a_report_reads_no_picture_from_outside_its_folder(cli: Cli, folder: Path) -> None:
    cli("run", "steps.py:train", "--steps", "1", "--output", "out")
    (folder / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    path = folder / "out" / "summary.json"
    summary = json.loads(path.read_text())
    summary["pictures"] = [{"file": "../secret.png", "caption": "not ours"}]
    path.write_text(json.dumps(summary))
    ran = cli("report", "out")
    assert ran.code == 3
    assert "outside the folder" in ran.err


def test_recipes_are_listed_printed_and_copied(cli: Cli, folder: Path) -> None:
    assert [recipe["name"] for recipe in cli("recipes", "--json").document["recipes"]] == recipe_names()
    assert cli("recipes", "ls").out == cli("recipes").out
    assert "class AutoencoderOptions" in cli("recipes", "cat", "autoencoder").out
    assert cli("recipes", "cp", "autoencoder", "mine").code == 0
    assert (folder / "mine" / "autoencoder" / "recipe.py").is_file()
    assert not list((folder / "mine").rglob("__pycache__"))
    again = cli("recipes", "cp", "autoencoder", "mine")
    assert again.code == 2
    assert "exists already" in again.err


@pytest.mark.parametrize("line", [["cat"], ["cat", "autoencodr"], ["cp", "autoencoder"], ["mv", "autoencoder"]])
def test_recipes_refuses_half_a_line(cli: Cli, line: list[str]) -> None:
    assert cli("recipes", *line).code == 2


def test_config_show_tells_where_each_value_comes_from(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "run.yaml").write_text("patience: 7\n")
    monkeypatch.setenv("SAMEGRAD_BUDGET", "1GiB")
    ran = cli("config", "show", "autoencoder", "--origin", "--config", "run.yaml", "--num_epochs", "9")
    origins = {line.split()[0]: line.split()[-1] for line in ran.out.splitlines()}
    expected = {
        "patience": "run.yaml:1", "budget": "SAMEGRAD_BUDGET", "num_epochs": "--num_epochs",
        "learning_rate": "recipe", "random_seed": "default", "save_every": "default",
    }  # fmt: skip
    assert {name: origins[name] for name in expected} == expected
    document = cli("config", "show", "autoencoder", "--json", "--num_epochs", "9").document
    assert document["options"]["num_epochs"] == {"value": 9, "origin": "--num_epochs"}


def test_config_validate_answers_with_the_exit_code(cli: Cli, folder: Path) -> None:
    (folder / "good.yaml").write_text("num_epochs: 20\n")
    (folder / "bad.yaml").write_text("# lines\n\nnum_epoch: 20\n")
    assert cli("config", "validate", "autoencoder", "--config", "good.yaml").code == 0
    bad = cli("config", "validate", "autoencoder", "--config", "bad.yaml", "--json")
    assert bad.code == 2
    error = bad.document["error"]
    assert "bad.yaml:3: unknown option 'num_epoch'; did you mean 'num_epochs'?" in error["message"]
    assert error["file"] == "bad.yaml"


def test_config_validate_lists_all_values_out_of_range(cli: Cli, folder: Path) -> None:
    (folder / "bad.yaml").write_text(
        "learning_rate: -1\nlatent_dim: 0\ntrain_fraction: 1.5\nsave_every: 0\nsteps: -4\nweight_penalty: .nan\n"
    )
    ran = cli("config", "validate", "autoencoder", "--config", "bad.yaml")
    assert ran.code == 2
    for line in (
        "bad.yaml:1: learning_rate -1.0: it must be positive and finite",
        "bad.yaml:2: latent_dim 0: it must be at least 1",
        "bad.yaml:3: train_fraction 1.5: it must lie between 0 and 1",
        "bad.yaml:4: save_every 0: it must be at least 1",
        "bad.yaml:5: steps -4: it must be at least 1",
        "bad.yaml:6: weight_penalty: '.nan' is not a finite number: it must be 0 or positive, and finite",
    ):
        assert line in ran.err


@pytest.mark.parametrize("budget", ["8", "0", "110%"])
def test_config_reads_a_budget_as_a_run_does(cli: Cli, budget: str) -> None:
    shown, run = (cli(*command, "autoencoder", "--budget", budget) for command in (("config", "show"), ("run",)))
    assert (shown.code, shown.err) == (run.code, run.err)
    assert shown.code == 2


@pytest.mark.parametrize(
    ("line", "has"),
    [
        (("autoencoder", "--device", "cpu"), "cpu has "),
        (("steps.py:budgeted",), "cpu has "),
        (("steps.py:train",), "cpu has "),
        (("autoencoder", "--device", "RTX 4070 Laptop"), "RTX 4070 Laptop has 8.00 GiB"),
    ],
)
def test_a_budget_of_more_than_there_is_is_refused_with_what_there_is(
    cli: Cli, line: tuple[str, ...], has: str
) -> None:
    ran = cli("plan", *line, "--budget", "1PiB", "--json")
    assert (ran.code, ran.document["error"]["option"]) == (2, "budget")
    assert has in ran.document["error"]["message"]


def test_config_refuses_another_action(cli: Cli) -> None:
    assert "did you mean 'show'" in cli("config", "shwo", "autoencoder").err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_recipes_and_options(cli: Cli, shell: str) -> None:
    ran = cli("completion", shell)
    assert ran.code == 0
    for word in ("verify", "autoencoder", "num_epochs", "save_every"):
        assert word in ran.out


def test_the_bash_completion_is_a_script_bash_can_read(cli: Cli) -> None:
    script = cli("completion", "bash").out
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=20).returncode == 0


def test_doctor_tells_what_is_here_and_how_to_get_what_is_not(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samegrad.cli.doctor.EXTRAS", {"recipes": ("json",), "gpu": ("no_such_package",)})
    ran = cli("doctor", "--json")
    assert ran.code == 0
    findings = {finding["name"]: finding for finding in ran.document["findings"]}
    assert {"versions", "torch", "cpu", "memory", "disk", "extra recipes", "extra gpu"} <= findings.keys()
    assert findings["extra recipes"]["answer"] == "ok"
    assert findings["extra gpu"]["answer"] == "unknown"
    assert "pip install 'samegrad[gpu]'" in findings["extra gpu"]["do"]


def test_doctor_judges_a_run(cli: Cli) -> None:
    cli("run", "steps.py:train", *BUDGET, "--output", "out")
    ran = cli("doctor", "--run", "out", "--json")
    findings = {finding["name"]: finding for finding in ran.document["findings"]}
    assert findings["ended"]["answer"] == "ok"
    assert findings["no out-of-memory"]["answer"] == "ok"
    assert findings["memory stable"]["answer"] == "ok"
    assert "50.0 KiB" in findings["within the budget"]["detail"]
    answers = {finding["answer"] for finding in findings.values()}
    assert ran.document["passed"] == (answers == {"ok"}) and ran.code == (0 if answers == {"ok"} else 1)


def test_demo_keeps_the_whole_promise(cli: Cli, folder: Path) -> None:
    ran = cli("demo", "--json")
    assert ran.code == 0, ran.err
    document = ran.document
    assert document["verdict"]["answer"] == "same"
    assert document["measured_peak_bytes"] <= document["plan"]["budget"]["total_bytes"]
    assert document["plan"]["levers"]["split_rows"]
    assert document["test_mse"] < document["pca_test_mse"]
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "<script" not in page
    assert "Same gradients" in page
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "steps.py"]


def test_a_demo_that_is_stopped_promises_no_folder_that_goes(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(target: object, call: object, folder: RunFolder, console: object) -> None:
        raise Stopped(signal.SIGINT, saved=str(folder.path))

    monkeypatch.setattr("samegrad.cli.run_session.run_session", stopped)
    ran = cli("demo", "--output", "out")
    assert ran.code == 130 and "--resume" not in ran.err


@pytest.mark.parametrize("command", ["plan", "measure", "verify", "run"])
def test_one_batch_in_the_place_of_batches_is_told(cli: Cli, command: str) -> None:
    """Iterated over, (x, y) would be a batch x and a batch y."""
    ran = cli(command, "steps.py:one_batch")
    assert ran.code == 3 and "return step, [batch]" in ran.err
