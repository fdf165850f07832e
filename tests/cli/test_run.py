"""A run is whole: its folder says all, it can be stopped and goes on bit for bit, and it disturbs no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from samegrad.cli import programs, run_loop
from samegrad.cli.training import Tick, Training
from samegrad.records import Footprint, Plan, Verdict
from samegrad.store import RunFolder, load_checkpoint
from tests.cli.conftest import Cli, metrics

# A signal, and the exit code of a run that it stopped.
TERMINATED, INTERRUPTED = (signal.SIGTERM, 75), (signal.SIGINT, 130)
TINY = ("--patch_rows", "300", "--latent_dim", "4", "--hidden", "16")


def same_state(one: Path, other: Path) -> None:
    """Asserts that the newest checkpoints are equal bit by bit: weights, optimizer, best weights, generators."""
    first, second = load_checkpoint(one / "checkpoints"), load_checkpoint(other / "checkpoints")
    assert first.step == second.step
    assert first.state == second.state
    assert first.tensors.keys() == second.tensors.keys()
    for entry, tensors in first.tensors.items():
        assert tensors.keys() == second.tensors[entry].keys()
        assert [name for name, tensor in tensors.items() if not torch.equal(tensor, second.tensors[entry][name])] == []


def trace(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(run)]


Process = subprocess.Popen[bytes]


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Process]]:
    """Starts a command line in a process, and group, of its own. A fork of this one, with its threads, may hang."""
    torch.set_num_threads(1)
    started: list[Process] = []

    def begin(*line: str) -> Process:
        command = [sys.executable, "-m", "samegrad", *line]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def wait_for_steps(run: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.exists() and path.read_text().count('"kind": "step"') >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{run} did not reach {count} steps")


def test_a_run_leaves_every_record_and_one_document(cli: Cli, folder: Path) -> None:
    ran = cli("run", "steps.py:budgeted", "--budget", "50KiB", "--output", "out", "--json")
    assert ran.code == 0, ran.err
    run, document = folder / "out", ran.document
    plan = Plan.from_json((run / "plan.json").read_text())
    verdict = Verdict.from_json((run / "verdict.json").read_text())
    assert document["plan"] == plan.to_dict()
    assert document["verdict"] == verdict.to_dict()
    assert verdict.same
    assert plan.budget is not None and plan.budget.total_bytes == 50 * 1024
    assert document["predicted_peak_bytes"] == plan.predicted_peak_bytes
    steps = metrics(run)
    assert document["final_loss"] == steps[-1]["loss"]
    assert document["measured_peak_bytes"] == max(line["peak_allocated_bytes"] for line in steps if line["counted"])
    assert [line["counted"] for line in steps] == [True, False, True]
    assert [line["step"] for line in steps] == [0, 1, 2]
    predicted = Footprint.from_json((run / "footprint.json").read_text())
    measured = Footprint.from_json((run / "measured.json").read_text())
    assert (predicted.origin.value, measured.origin.value) == ("predicted", "measured")
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert json.loads((run / "config.json").read_text())["budget"] == "50KiB"
    assert "<svg" in (run / "report.html").read_text()


def test_the_memory_line_goes_to_stderr_and_metrics(cli: Cli, folder: Path) -> None:
    ran = cli("run", "steps.py:train", "--output", "out", "--log_every", "5")
    told = [line for line in ran.err.splitlines() if "Memory: " in line]
    assert [line.split(":")[0] for line in told] == ["step 1", "step 5", "step 10", "step 12"]
    assert all("counted tensor bytes" in line and "peak" in line and "budget" in line for line in told)
    assert "Memory" not in ran.out
    assert [line["step"] for line in metrics(folder / "out", "memory")] == [0, 4, 9, 11]


def test_quiet_leaves_stderr_empty(cli: Cli) -> None:
    ran = cli("run", "steps.py:train", "--steps", "2", "-q")
    assert ran.code == 0
    assert ran.err == ""
    assert "report: runs/steps-train-" in ran.out


def test_a_budget_reaches_a_function_with_and_without_the_parameter(cli: Cli) -> None:
    documents = [
        cli("run", f"steps.py:{name}", "--budget", "50KiB", "--steps", "1", "--json").document
        for name in ("budgeted", "train")
    ]
    plans = [document["plan"] for document in documents]
    assert plans[0]["levers"] == plans[1]["levers"] != {}
    assert plans[0]["budget"]["total_bytes"] == plans[1]["budget"]["total_bytes"] == 50 * 1024


def test_a_budget_against_rows_pinned_in_the_step_is_refused(cli: Cli) -> None:
    ran = cli("run", "steps.py:pinned", "--budget", "40KiB", "--json")
    assert ran.code == 2
    assert "rows=[32, 32]" in ran.document["error"]["message"]


def test_a_saved_plan_is_run_again(cli: Cli) -> None:
    first = cli("run", "steps.py:train", "--budget", "50KiB", "--steps", "1", "--output", "one", "--json").document
    second = cli("run", "steps.py:train", "--plan", "one/plan.json", "--steps", "1", "--output", "two", "--json")
    assert second.document["plan"]["levers"] == first["plan"]["levers"] != {}


def test_the_resolved_config_fed_back_gives_the_same_run(cli: Cli, folder: Path) -> None:
    assert cli("run", "steps.py:train", "--random_seed", "5", "--steps", "4", "--output", "one").code == 0
    assert cli("run", "steps.py:train", "--config", "one/config.json", "--output", "two").code == 0
    same_state(folder / "one", folder / "two")
    assert cli("run", "steps.py:train", "--steps", "4", "--output", "three").code == 0
    assert trace(folder / "two") != trace(folder / "three")


def test_an_existing_folder_is_left_alone_with_both_choices(cli: Cli, folder: Path) -> None:
    assert cli("run", "steps.py:train", "--steps", "1", "--output", "out").code == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.name != "run.lock"}
    ran = cli("run", "steps.py:train", "--output", "out")
    assert ran.code == 2
    assert "--resume" in ran.err and "--output" in ran.err
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.name != "run.lock"}


@pytest.mark.parametrize("made", [True, False])
def test_resuming_where_nothing_is_is_bad_input(cli: Cli, folder: Path, made: bool) -> None:
    if made:
        (folder / "out").mkdir()
    ran = cli("run", "steps.py:train", "--output", "out", "--resume")
    assert ran.code == 3
    assert not (folder / "out" / "checkpoints" / "step-00000000").exists()


def test_resume_without_a_folder_is_a_usage_error(cli: Cli) -> None:
    ran = cli("run", "steps.py:train", "--resume", "--json")
    assert (ran.code, ran.document["error"]["option"]) == (2, "resume")


def test_two_runs_in_one_second_get_two_folders(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    for _ in range(2):
        assert cli("run", "steps.py:train", "--steps", "1").code == 0
    names = sorted(path.name for path in (folder / "runs").iterdir())
    assert names == ["steps-train-20260101-000000", "steps-train-20260101-000000-2"]


def test_a_folder_in_use_is_refused_and_undisturbed(cli: Cli, folder: Path) -> None:
    with RunFolder.create(folder / "out"):
        ran = cli("run", "steps.py:train", "--output", "out", "--json")
        assert ran.code == 4
        assert str(os.getpid()) in ran.document["error"]["message"]
    assert not (folder / "out" / "config.json").exists()


@pytest.mark.parametrize(("number", "code"), [TERMINATED, pytest.param(*INTERRUPTED, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(
    cli: Cli, folder: Path, start: Callable[..., Process], number: signal.Signals, code: int
) -> None:
    assert cli("run", "steps.py:slow", "--output", "whole").code == 0
    process = start("run", "steps.py:slow", "--output", "out", "-q")
    wait_for_steps(folder / "out", 5)
    process.send_signal(number)
    assert process.wait(60) == code
    status = json.loads((folder / "out" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["saved"]) == ("stopped", code, "out")
    stopped_at = len(metrics(folder / "out"))
    assert 5 <= stopped_at < 40
    assert load_checkpoint(folder / "out" / "checkpoints").step == stopped_at
    ran = cli("run", "steps.py:slow", "--output", "out", "--resume")
    assert ran.code == 0
    assert f"resuming after step {stopped_at}" in ran.err
    same_state(folder / "whole", folder / "out")
    assert trace(folder / "whole") == trace(folder / "out")


def test_a_recipe_stops_between_two_steps_of_an_epoch_and_goes_on_there(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moons = ("run", "score_kernel", "--data", "moons", "--niters", "100", "--train_kernel_size", "10", "--output")
    with monkeypatch.context() as stopping:
        # A pause after every step; the signal comes in the second epoch of fifty.
        stopping.setattr(programs, "_PAUSE_SECONDS", 0.0)
        record = run_loop._record

        def told(tick: Tick, training: Training, run: RunFolder) -> str:
            if training.steps_done == 57:
                signal.raise_signal(signal.SIGTERM)
            return record(tick, training, run)

        stopping.setattr(run_loop, "_record", told)
        assert cli(*moons, "out").code == 75
    assert load_checkpoint(folder / "out" / "checkpoints").step == len(metrics(folder / "out")) == 57
    assert cli(*moons, "out", "--resume").code == 0
    assert cli(*moons, "whole").code == 0
    same_state(folder / "whole", folder / "out")
    assert trace(folder / "whole") == trace(folder / "out")


def test_a_killed_run_goes_on_from_its_last_checkpoint(cli: Cli, folder: Path, start: Callable[..., Process]) -> None:
    assert cli("run", "steps.py:slow", "--output", "whole").code == 0
    process = start("run", "steps.py:slow", "--output", "out", "-q", "--save_every", "4")
    wait_for_steps(folder / "out", 6)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert cli("run", "steps.py:slow", "--output", "out", "--resume").code == 0
    same_state(folder / "whole", folder / "out")
    assert trace(folder / "whole") == trace(folder / "out")


@pytest.mark.parametrize(("number", "code"), [pytest.param(*TERMINATED, marks=pytest.mark.slow), INTERRUPTED])
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_loop(
    folder: Path, start: Callable[..., Process], number: signal.Signals, code: int
) -> None:
    """As Ctrl-C in a terminal and a batch system send it: what was done is saved."""
    process = start("run", "steps.py:with_a_worker", "--output", "out", "-q", "--save_every", "100")
    wait_for_steps(folder / "out", 5)
    os.killpg(process.pid, number)
    assert process.wait(60) == code
    assert load_checkpoint(folder / "out" / "checkpoints").step >= 5


def test_batches_without_a_length_are_run(cli: Cli) -> None:
    ran = cli("run", "steps.py:without_a_length", "--output", "out", "--json")
    assert ran.code == 0 and ran.document["steps"] == 3


def test_a_scheduler_goes_on_where_it_was(cli: Cli, folder: Path) -> None:
    assert cli("run", "steps.py:scheduled", "--output", "whole").code == 0
    assert cli("run", "steps.py:scheduled", "--output", "out", "--steps", "7").code == 0
    assert cli("run", "steps.py:scheduled", "--output", "out", "--resume", "--steps", "12").code == 0
    same_state(folder / "whole", folder / "out")
    assert trace(folder / "whole") == trace(folder / "out")
    source = (folder / "steps.py").read_text()
    (folder / "steps.py").write_text(source.replace("StepLR(optimizer, 3, gamma=0.1)", "ExponentialLR(optimizer, 0.5)"))
    ran = cli("run", "steps.py:scheduled", "--output", "out", "--resume")
    assert ran.code == 3 and "StepLR when it was saved, ExponentialLR now" in ran.err


def test_a_second_signal_ends_at_once(folder: Path, start: Callable[..., Process]) -> None:
    (folder / "stuck.py").write_text(
        (folder / "steps.py").read_text() + "\ndef stuck():\n    return declared(), Batches(4, seconds=30.0)\n"
    )
    source = (folder / "stuck.py").read_text().replace("time.sleep(self.seconds)", "time.sleep(self.seconds * (_ > 0))")
    (folder / "stuck.py").write_text(source)
    process = start("run", "stuck.py:stuck", "--output", "out", "-q")
    wait_for_steps(folder / "out", 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM


def test_a_signal_while_planning_ends_at_once_with_nothing_saved(folder: Path, start: Callable[..., Process]) -> None:
    (folder / "waiting.py").write_text("import time\n\ndef train():\n    time.sleep(30)\n")
    process = start("run", "waiting.py:train", "--output", "out", "-q", "--json")
    deadline = time.monotonic() + 30
    while not (folder / "out" / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert time.monotonic() - begun < 5
    assert json.loads((folder / "out" / "status.json").read_text())["saved"] is None


def test_a_step_that_is_not_finite_keeps_the_good_checkpoint(cli: Cli, folder: Path) -> None:
    ran = cli("run", "steps.py:diverging", "--output", "out")
    assert ran.code == 6
    status = json.loads((folder / "out" / "status.json").read_text())
    assert (status["state"], status["error_code"]) == ("failed", "non-finite")
    assert not (folder / "out" / "checkpoints").exists()


def test_the_autoencoder_resumes_bit_for_bit(cli: Cli, folder: Path) -> None:
    line = ("run", "autoencoder", *TINY, "--budget", "12MiB", "--num_epochs", "6")
    assert cli(*line, "--output", "whole").code == 0
    assert cli(*line, "--output", "out", "--steps", "3").code == 0
    assert load_checkpoint(folder / "out" / "checkpoints").step == 3
    ran = cli("run", "autoencoder", "--output", "out", "--resume", "--steps", "6", "--json")
    assert ran.code == 0, ran.err
    same_state(folder / "whole", folder / "out")
    assert trace(folder / "whole") == trace(folder / "out")
    assert (folder / "whole" / "autoencoder.safetensors").read_bytes() == (
        folder / "out" / "autoencoder.safetensors"
    ).read_bytes()
    assert {"final_loss", "test_mse", "pca_test_mse", "plan", "verdict"} <= ran.document.keys()
    assert max(line["peak_allocated_bytes"] or 0 for line in metrics(folder / "whole")) <= 12 * 2**20
