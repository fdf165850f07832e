"""A folder that cannot take the results is refused with what is there, before any work and in every command."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from samegrad.cli.output_folder import check_output, write_output
from samegrad.errors import EnvironmentProblem
from tests.cli.conftest import Cli


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a program fails the test."""
    import samegrad.cli.programs
    import samegrad.cli.run_session

    for module in (samegrad.cli.programs, samegrad.cli.run_session):
        monkeypatch.setattr(module, "load_training", lambda *given: pytest.fail("work was begun"))


@pytest.mark.parametrize(
    "line",
    [
        ("plan", "steps.py:train", "--output", "taken"),
        ("plan", "steps.py:train", "--pareto", "--output", "taken/below"),
        ("measure", "steps.py:train", "--output", "taken"),
        ("verify", "steps.py:train", "--output", "taken"),
        ("run", "steps.py:train", "--output", "taken"),
        ("run", "steps.py:train", "--output", "taken/below/that"),
        ("run", "steps.py:train", "--output", "taken", "--resume"),
        ("demo", "--output", "taken"),
        ("recipes", "cp", "autoencoder", "taken"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_a_file_in_the_way_is_named_before_any_work(cli: Cli, folder: Path, line: tuple[str, ...]) -> None:
    (folder / "taken").write_text("kept")
    ran = cli(*line, "--json")
    told = ran.document["error"]
    assert (ran.code, told["code"], told["file"]) == (4, "environment", "taken")
    assert "taken: a file stands there" in told["message"]
    assert told["option"] == ("output" if "--output" in line else None)
    assert (folder / "taken").read_text() == "kept"


def test_a_report_goes_to_a_folder(cli: Cli, folder: Path) -> None:
    assert cli("run", "steps.py:train", "--output", "run", "--steps", "1").code == 0
    (folder / "taken").touch()
    ran = cli("report", "run", "--output", "taken")
    assert ran.code == 4 and "taken: a file stands there" in ran.err


@pytest.mark.usefixtures("no_work")
def test_a_file_called_runs_is_in_the_way_of_a_new_run(cli: Cli, folder: Path) -> None:
    (folder / "runs").touch()
    ran = cli("run", "steps.py:train")
    assert ran.code == 4
    assert "runs: a file stands there" in ran.err and "--output" in ran.err


def test_what_is_there_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "link").symlink_to("nowhere")
    for path, says in (("link", "a link to nowhere"), ("link/below", "a link to nowhere"), ("x" * 300, "too long")):
        with pytest.raises(EnvironmentProblem, match=says):
            check_output(Path(path))
    monkeypatch.setattr("os.access", lambda *given: False)
    with pytest.raises(EnvironmentProblem, match="may not write"):
        check_output(Path("new/folder"))


def test_what_can_be_made_is_left_to_be_made(folder: Path) -> None:
    (folder / "there").mkdir()
    (folder / "link").symlink_to("there")
    for path in ("new/folder", "there", "link", "link/new", ".", "../beside"):
        check_output(Path(path))
    check_output(None)
    assert sorted(path.name for path in folder.iterdir()) == ["link", "steps.py", "there"]


IN_THE_WAY = [
    (("plan", "steps.py:train", "--output", "out"), ["plan.json", "footprint.json"]),
    (("plan", "steps.py:train", "--pareto", "--output", "out"), ["front.json", "front.svg", "plan-1.json"]),
    (("measure", "steps.py:train", "--output", "out"), ["plan.json", "footprint.json", "measured.json",
                                                         "measure.html", "timeline.svg"]),
    (("verify", "steps.py:train", "--output", "out"), ["verdict.json"]),
    (("demo", "--output", "out"), ["report.html"]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "name"), [(line, name) for line, names in IN_THE_WAY for name in names])
@pytest.mark.usefixtures("no_work")
def test_a_folder_where_a_result_goes_is_named_before_any_work(
    cli: Cli, folder: Path, line: tuple[str, ...], name: str
) -> None:
    (folder / "out" / name).mkdir(parents=True)
    (folder / "out" / name / "theirs").write_text("kept")
    ran = cli(*line, "--json")
    told = ran.document["error"]
    assert (ran.code, told["code"], told["file"]) == (4, "environment", f"out/{name}")
    assert "a folder stands there" in told["message"]
    assert (folder / "out" / name / "theirs").read_text() == "kept"
    assert [path.name for path in (folder / "out").iterdir()] == [name]


@pytest.fixture
def trained(cli: Cli, folder: Path) -> Path:
    assert cli("run", "steps.py:train", "--output", "run", "--steps", "2", "-q").code == 0
    return folder / "run"


def test_a_folder_in_place_of_a_runs_file_stops_a_resume_before_any_work(
    cli: Cli, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import samegrad.cli.run_session

    monkeypatch.setattr(samegrad.cli.run_session, "load_training", lambda *given: pytest.fail("work was begun"))
    files = sorted(path for path in trained.iterdir() if path.is_file())
    assert {"plan.json", "config.json", "status.json", "metrics.jsonl", "report.html"} <= {path.name for path in files}
    for path in files:
        held = path.read_bytes()
        path.unlink()
        path.mkdir()
        ran = cli("run", "steps.py:train", "--output", "run", "--resume")
        assert ran.code in (3, 4) and f"run/{path.name}" in ran.err and "a folder" in ran.err, ran.err
        assert "move that folder away" in ran.err
        path.rmdir()
        path.write_bytes(held)


@pytest.mark.parametrize("line", [("report", "run"), ("doctor", "--run", "run")])
@pytest.mark.parametrize("name", ["summary.json", "plan.json", "metrics.jsonl", "status.json", "report.html"])
def test_a_folder_in_place_of_a_record_is_not_taken_for_a_run_without_it(
    cli: Cli, trained: Path, line: tuple[str, ...], name: str
) -> None:
    read = {"report": {"summary.json", "plan.json", "metrics.jsonl", "report.html"},
            "doctor": {"status.json", "plan.json", "metrics.jsonl"}}[line[0]]  # fmt: skip
    (trained / name).unlink()
    (trained / name).mkdir()
    ran = cli(*line)
    assert ("a folder" in ran.err and f"run/{name}" in ran.err and ran.code in (3, 4)) == (name in read), ran.err
    assert "samegrad does not know" not in ran.err


def test_a_folder_given_as_a_plan_is_told_which_file_to_name(cli: Cli, trained: Path) -> None:
    ran = cli("run", "steps.py:train", "--plan", "run", "--output", "other")
    assert ran.code == 3 and "a folder, where a file is needed" in ran.err and "run/plan.json" in ran.err
    assert not (trained.parent / "other" / "plan.json").exists()


def test_a_run_whose_options_are_gone_is_not_resumed_with_others(cli: Cli, trained: Path) -> None:
    (trained / "config.json").unlink()
    ran = cli("run", "steps.py:train", "--output", "run", "--resume")
    assert ran.code == 3 and "run/config.json: no such file" in ran.err


def test_checkpoints_that_are_a_file_are_not_started_over(cli: Cli, trained: Path) -> None:
    (trained / "checkpoints").rename(trained / "elsewhere")
    (trained / "checkpoints").write_text("theirs")
    ran = cli("run", "steps.py:train", "--output", "run", "--resume", "--steps", "3")
    assert ran.code == 3 and "run/checkpoints: not a folder" in ran.err and "put the checkpoints back" in ran.err
    assert (trained / "checkpoints").read_text() == "theirs"


def test_what_stood_there_stays_where_the_disk_refuses(folder: Path) -> None:
    """Only a child's limit may be lowered; the error is raised as the command line would see it."""
    (folder / "plan.json").write_text("before")
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        try:
            write_output(folder, "plan.json", "x" * 1000)
        except EnvironmentProblem as error:
            os._exit(0 if "ulimit -f" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [path.name for path in folder.iterdir() if path.name != "steps.py"] == ["plan.json"]
    assert (folder / "plan.json").read_text() == "before"
