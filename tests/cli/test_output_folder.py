"""A folder that cannot take the results is refused with what is there, before any work and in every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from samegrad.cli.output_folder import check_output
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
