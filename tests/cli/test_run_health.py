"""What doctor says about a run follows from its records, and too short a run says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from samegrad.cli.run_health import FEWEST_STEPS, Answer, Finding, examine_run
from samegrad.errors import BadInput
from samegrad.records import Budget, Counting, Exactness, Plan
from tests.cli.conftest import Cli


def write_run(
    folder: Path,
    losses: Sequence[float | None],
    *,
    peaks: Sequence[int] | None = None,
    seconds: float = 0.1,
    status: dict[str, object] | None = None,
    retries: int = 0,
) -> Path:
    """A run folder of so many steps, under a budget of 1000 bytes and a predicted step of 0.1 s."""
    folder.mkdir(exist_ok=True)
    (folder / "status.json").write_text(json.dumps(status or {"state": "done", "exit_code": 0}))
    budget = Budget(total_bytes=1000, device="cpu", counting=Counting.TENSOR_BYTES, source="budget 1000B")
    plan = Plan(levers={}, exactness=Exactness.SAME_BITS, batch_rows=8, budget=budget, predicted_seconds=0.1)
    (folder / "plan.json").write_text(plan.to_json())
    lines = []
    for step, loss in enumerate(losses):
        peak = peaks[step] if peaks else 900
        record = {"index": step, "loss": loss, "seconds": seconds, "batch_rows": 8, "peak_allocated_bytes": peak}
        lines.append(json.dumps({"kind": "step", "step": step, **record, "allocator_retries": retries}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def finding(run: Path, name: str) -> Finding:
    return next(found for found in examine_run(run) if found.name == name)


FALLING = [3.0, 2.5, 2.0, 1.5, 1.2, 1.0, 0.9, 0.8, 0.7]


def test_a_healthy_run_passes_every_check(tmp_path: Path) -> None:
    answers = {found.name: found.answer for found in examine_run(write_run(tmp_path / "run", FALLING))}
    assert set(answers.values()) == {Answer.OK}
    assert len(answers) == 7


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("ended", {"status": {"state": "failed", "exit_code": 6}}),
        ("no out-of-memory", {"status": {"state": "failed", "exit_code": 5, "error_code": "over-budget"}}),
        ("no out-of-memory", {"retries": 1}),
        ("within the budget", {"peaks": [900] * 8 + [1001]}),
        ("memory stable", {"peaks": [800 + 20 * step for step in range(9)]}),
        ("losses finite", {"losses": [*FALLING[:-1], None]}),
        ("losses falling", {"losses": FALLING[::-1]}),
        ("step time as planned", {"seconds": 0.16}),
    ],
)
def test_each_check_catches_its_own_fault_and_says_what_to_do(
    tmp_path: Path, name: str, how: dict[str, object]
) -> None:
    losses = how.pop("losses", FALLING)
    found = finding(write_run(tmp_path / "run", losses, **how), name)  # type: ignore[arg-type]
    assert found.answer is Answer.FAILS
    assert any(character.isdigit() for character in found.detail)
    assert found.do


def with_counted(run: Path, *, growth: int = 0, marked: bool = True) -> Path:
    """``run`` on the CPU: every other step was counted, which made it take three times as long."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, line in enumerate(lines):
        if step % 2:
            line["peak_allocated_bytes"] = None
        else:
            line["seconds"] *= 3
            line |= {"counted": marked, "peak_allocated_bytes": line["peak_allocated_bytes"] + growth * step}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return run


def test_steps_that_were_counted_tell_bytes_and_no_times(tmp_path: Path) -> None:
    name, losses = "step time as planned", FALLING[:7]
    run = with_counted(write_run(tmp_path / "run", losses))
    assert {found.answer for found in examine_run(run)} == {Answer.OK}
    assert "median 100 ms" in finding(run, name).detail
    assert finding(with_counted(write_run(tmp_path / "all", losses), marked=False), name).answer is Answer.FAILS
    grown = with_counted(write_run(tmp_path / "grown", losses), growth=10)
    assert finding(grown, "memory stable").answer is Answer.FAILS


@pytest.mark.parametrize("name", ["memory stable", "losses falling", "step time as planned"])
def test_too_short_a_run_says_not_enough_epochs(tmp_path: Path, name: str) -> None:
    short = finding(write_run(tmp_path / "short", FALLING[: FEWEST_STEPS - 1]), name)
    assert short.answer is Answer.UNKNOWN
    assert short.detail == f"not judged, not enough epochs: {FEWEST_STEPS - 1} steps, needs {FEWEST_STEPS}"
    assert finding(write_run(tmp_path / "long", FALLING[:FEWEST_STEPS]), name).answer is Answer.OK


@pytest.mark.parametrize(
    ("steps", "state", "code", "told"),
    [
        (9, "done", 0, "all 7 checks passed"),
        (3, "done", 1, "4 of 7 checks passed, 0 failed, 3 could not be judged: exit code 1"),
        (9, "failed", 1, "6 of 7 checks passed, 1 failed, 0 could not be judged: exit code 1"),
    ],
)
def test_doctor_passes_a_run_only_when_all_of_it_was_judged(
    cli: Cli, tmp_path: Path, steps: int, state: str, code: int, told: str
) -> None:
    write_run(tmp_path / "out", FALLING[:steps], status={"state": state})
    ran = cli("doctor", "--run", str(tmp_path / "out"))
    assert ran.code == code and ran.out.splitlines()[-1] == told


def test_half_a_line_from_a_crash_is_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", FALLING)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 9, "lo')
    assert "0 of 9" in finding(run, "losses finite").detail


def test_a_folder_without_a_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no status"):
        examine_run(tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        examine_run(tmp_path / "none")
