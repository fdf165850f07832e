"""Starting again after a refusal, and resuming with other options, from other checkpoints, on other ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from samegrad.cli import run_loop, run_session
from samegrad.store import RunFolder, load_checkpoint
from tests.cli.conftest import Cli

TRAIN = ("run", "steps.py:train", "--output", "out", "--save_every", "2")
SMALL = ("run", "autoencoder", "--output", "out", "--patch_rows", "64", "--hidden", "8", "--latent_dim", "2")


def plan_of(folder: Path) -> Any:
    return json.loads((folder / "plan.json").read_text())


def test_a_start_that_was_refused_is_made_again_in_the_same_folder(cli: Cli, folder: Path) -> None:
    refused = cli(*TRAIN, "--budget", "1KiB")
    assert refused.code == 1 and (folder / "out" / "status.json").exists()
    assert cli(*TRAIN, "--resume").code == 3
    assert cli(*TRAIN, "--steps", "2").code == 0


def test_a_config_without_a_status_is_somebodys_own(folder: Path, cli: Cli) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text("{}")
    assert cli(*TRAIN).code == 2
    assert (folder / "out" / "config.json").read_text() == "{}"


def test_nothing_saved_says_to_start_without_resume(cli: Cli, folder: Path) -> None:
    RunFolder.create(folder / "out").close()
    assert "start the run, without --resume" in cli(*TRAIN, "--resume").err


@pytest.mark.parametrize("line", [("--learning_rate", "0.5"), ("--random_seed", "7"), ("--patch_rows", "65")])
def test_what_would_make_another_training_is_refused_on_resume(cli: Cli, folder: Path, line: tuple[str, ...]) -> None:
    assert cli(*SMALL, "--steps", "2").code == 0
    before = (folder / "out" / "config.json").read_text()
    name = line[0].removeprefix("--")
    ran = cli(*SMALL, *line, "--steps", "3", "--resume", "--json")
    assert (ran.code, ran.document["error"]["option"]) == (2, name)
    assert "another training" in ran.document["error"]["message"]
    assert (folder / "out" / "config.json").read_text() == before


def test_a_longer_training_is_the_same_training(cli: Cli, folder: Path) -> None:
    assert cli(*SMALL, "--num_epochs", "2").code == 0
    ran = cli(*SMALL, "--num_epochs", "4", "--resume", "--json")
    assert ran.code == 0 and ran.document["epochs"] == 4
    # As it goes on from here.
    assert json.loads((folder / "out" / "config.json").read_text())["num_epochs"] == 4


def test_a_resume_with_nothing_left_to_train_says_so(cli: Cli, folder: Path) -> None:
    assert cli(*TRAIN, "--steps", "4").code == 0
    ran = cli(*TRAIN, "--steps", "4", "--resume")
    assert ran.code == 0 and "nothing is left to train: step 4 is done, and the last one was to be 4" in ran.err
    assert "nothing is left" not in cli(*TRAIN, "--steps", "6", "--resume").err


def test_another_budget_makes_another_plan_and_another_verdict(cli: Cli, folder: Path) -> None:
    assert cli("run", "steps.py:budgeted", "--output", "out", "--budget", "100KiB", "--steps", "2").code == 0
    before = plan_of(folder / "out")
    (folder / "out" / "verdict.json").unlink()
    ran = cli("run", "steps.py:budgeted", "--output", "out", "--budget", "60KiB", "--resume")
    assert ran.code == 0, ran.err
    after = plan_of(folder / "out")
    assert after["budget"]["total_bytes"] == 60 * 1024 < before["budget"]["total_bytes"]
    assert (folder / "out" / "verdict.json").exists()


def test_the_same_options_keep_the_plan_and_the_verdict(cli: Cli, folder: Path) -> None:
    line = ("run", "steps.py:budgeted", "--output", "out", "--budget", "60KiB")
    assert cli(*line, "--steps", "2").code == 0
    verdict = (folder / "out" / "verdict.json").stat().st_mtime_ns
    assert cli(*line, "--resume").code == 0
    assert (folder / "out" / "verdict.json").stat().st_mtime_ns == verdict


def test_an_older_checkpoint_is_resumed_from_by_its_step(cli: Cli, folder: Path) -> None:
    assert cli(*TRAIN, "--steps", "6").code == 0
    ran = cli(*TRAIN, "--resume", "--resume_from", "4", "--steps", "5")
    assert ran.code == 0 and "resuming after step 4" in ran.err
    assert load_checkpoint(folder / "out" / "checkpoints").step == 5
    assert [path.name for path in (folder / "out" / "checkpoints").glob("abandoned-*")]


def test_a_damaged_checkpoint_names_an_option_that_is_there(cli: Cli, folder: Path) -> None:
    assert cli(*TRAIN, "--steps", "6").code == 0
    newest = load_checkpoint(folder / "out" / "checkpoints").path / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x99")
    ran = cli(*TRAIN, "--resume")
    assert ran.code == 3 and "--resume_from 4" in ran.err
    assert cli(*TRAIN, "--resume", "--resume_from", "4", "--steps", "6").code == 0


def test_a_checkpoint_that_is_passed_by_is_said_also_when_quiet_and_refused_when_strict(
    cli: Cli, folder: Path
) -> None:
    assert cli(*TRAIN, "--steps", "6").code == 0
    shutil.copytree(folder / "out", folder / "other")
    for run in ("out", "other"):
        (load_checkpoint(folder / run / "checkpoints").path / "manifest.json").unlink()
    ran = cli(*TRAIN, "--resume", "-q", "--steps", "6")
    assert ran.code == 0 and "step-00000006 is incomplete" in ran.err and "step-00000004" in ran.err
    other = [token.replace("out", "other") if token == "out" else token for token in TRAIN]
    assert cli(*other, "--resume", "--strict_resume", "--steps", "6").code == 3


@pytest.mark.parametrize("option", [("--resume_from", "2"), ("--strict_resume",)])
def test_options_of_a_resume_want_one(cli: Cli, option: tuple[str, ...]) -> None:
    ran = cli(*TRAIN, *option, "--json")
    assert (ran.code, ran.document["error"]["option"]) == (2, option[0].removeprefix("--"))


def test_another_number_of_ranks_is_refused(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli(*TRAIN, "--steps", "2").code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = cli(*TRAIN, "--resume")
    assert ran.code == 3 and "start it without torchrun" in ran.err


def test_a_resume_that_failed_leaves_the_change_to_be_planned_for_by_the_next(cli: Cli, folder: Path) -> None:
    """The plan of the larger budget must not pass for that of the smaller one."""
    line = ("run", "steps.py:budgeted", "--output", "out")
    assert cli(*line, "--budget", "100KiB", "--steps", "2").code == 0
    weights = load_checkpoint(folder / "out" / "checkpoints").path / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + b"\x99")
    assert cli(*line, "--budget", "60KiB", "--resume").code == 3
    weights.write_bytes(sound)
    assert cli(*line, "--budget", "60KiB", "--resume").code == 0
    assert plan_of(folder / "out")["budget"]["total_bytes"] == 60 * 1024


def test_a_verdict_of_the_plan_before_does_not_outlive_it(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("run", "steps.py:budgeted", "--output", "out")
    assert cli(*line, "--budget", "100KiB", "--steps", "2").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(run_session, "_verify", lambda *_, **__: 1 / 0)
        assert cli(*line, "--budget", "60KiB", "--resume").code != 0
    assert not (folder / "out" / "verdict.json").exists()
    assert cli(*line, "--budget", "60KiB", "--resume").code == 0
    assert (folder / "out" / "verdict.json").exists()


class HalfAnEpoch:
    unit = "epoch"

    def ticks(self) -> Any:
        raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")
        yield


def test_an_epoch_that_is_half_done_is_not_saved_as_if_it_had_not_begun() -> None:
    half: Any = HalfAnEpoch()
    ended = run_loop._Ended()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(run_loop._until_workers_end(half, ended))
    assert ended.error is None
    half.unit = "step"
    assert list(run_loop._until_workers_end(half, ended)) == [] and ended.error is not None


@pytest.mark.parametrize("step", ["-1", "0", "7", str(10**20)])
def test_a_step_that_was_not_saved_is_refused_with_those_that_were(
    cli: Cli, folder: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("run", "steps.py:train", "--output", "run", "--save_every", "1", "--steps", "3")
    assert cli(*line).code == 0
    (folder / "run" / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    monkeypatch.setattr(run_session, "load_training", lambda *given: pytest.fail("work was begun"))
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    ran = cli(*line, "--resume", "--resume_from", step)
    assert ran.code == 3, ran.err
    assert f"no step {step}; the steps there are 2 (incomplete or damaged), 3" in ran.err
    after = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    assert before.keys() == after.keys() and {p.name for p in before if before[p] != after[p]} <= {"run.lock"}
