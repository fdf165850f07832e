"""Streams that are closed, full or limited: the exit code is the command's, and half a result is never called whole."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = "import sys; from samegrad.cli.main import main; sys.exit(main())"
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
both_ways = pytest.mark.parametrize("unbuffered", ["", "1"])


def shell(line: str, *, before: str = "", unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    """``samegrad LINE`` in a shell, which knows redirections."""
    program = f"{before}{shlex.quote(sys.executable)} -c {shlex.quote(SCRIPT)} {line}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60, env=environment)


@both_ways
def test_half_a_document_is_a_failure(folder: Path, unbuffered: str) -> None:
    ran = shell("recipes cat autoencoder --json > half.json", before="ulimit -f 1; ", unbuffered=unbuffered)
    assert ran.returncode == 4
    assert "write the result to stdout" in ran.stderr
    assert "1024 bytes (ulimit -f)" in ran.stderr
    assert "Exception ignored" not in ran.stderr


@full
@both_ways
@pytest.mark.parametrize("line", ["recipes", "recipes --json", "plan --help", "--version"])
def test_a_result_that_does_not_get_there_is_a_failure_of_ours(folder: Path, line: str, unbuffered: str) -> None:
    ran = shell(f"{line} > /dev/full", unbuffered=unbuffered)
    assert ran.returncode == 4
    assert "error: " in ran.stderr
    assert "Exception ignored" not in ran.stderr


@full
def test_a_mistake_stays_a_mistake_where_its_document_cannot_be_written(folder: Path) -> None:
    ran = shell("plan autoencoder --budget 8 --json > /dev/full")
    assert ran.returncode == 2
    assert "a number without a unit" in ran.stderr
    assert "write the result to stdout" in ran.stderr


def test_a_closed_stdout_ends_the_output_and_not_the_run(folder: Path) -> None:
    ran = shell("run steps.py:train --output run >&-")
    assert ran.returncode == 0, ran.stderr
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "done"


@full
@pytest.mark.parametrize("nowhere", ["2>&-", "2>/dev/full"])
def test_an_error_keeps_its_code_and_document_where_stderr_takes_nothing(folder: Path, nowhere: str) -> None:
    assert shell(f"plan autoencoder --budget 8 {nowhere}").returncode == 2
    ran = shell(f"plan autoencoder --budget 8 --json {nowhere}")
    assert ran.returncode == 2
    assert json.loads(ran.stdout)["error"]["option"] == "budget"


@full
def test_a_run_goes_on_where_stderr_takes_nothing(folder: Path) -> None:
    ran = shell("run steps.py:train --output run --json 2>/dev/full")
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["steps"] == 12


def test_with_every_stream_closed_the_exit_code_remains(folder: Path) -> None:
    assert shell("plan autoencoder --budget 8 <&- >&- 2>&-").returncode == 2
