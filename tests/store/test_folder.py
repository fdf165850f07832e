"""One run a folder, locked by the kernel; files replaced whole; metrics with every step exactly once."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from samegrad.errors import BadInput, EnvironmentProblem, UsageError
from samegrad.store import RunFolder, load_checkpoint, save_checkpoint
from samegrad.store.faults import Action, planned

Fork = Callable[[Callable[[], object]], int]
NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first"


def metrics(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_new_run_makes_its_folder_and_may_use_an_empty_one(path: Path) -> None:
    RunFolder.create(path).close()
    (path / "run.lock").unlink()
    RunFolder.create(path).close()
    assert path.is_dir()


def test_a_used_folder_is_refused_with_both_ways_on(path: Path) -> None:
    with RunFolder.create(path) as run:
        run.write_text("plan.json", "{}")
    with pytest.raises(UsageError) as caught:
        RunFolder.create(path)
    assert "plan.json" in caught.value.found
    assert "--resume" in caught.value.do
    assert "--output" in caught.value.do
    assert caught.value.exit_code == 2


def test_resuming_where_nothing_is_makes_nothing(path: Path) -> None:
    with pytest.raises(BadInput):
        RunFolder.resume(path)
    assert not path.exists()


def hold(path: Path, ready: int) -> None:
    with RunFolder.create(path) as run:
        run.write_status({"by": os.getpid()})
        os.write(ready, b"!")
        time.sleep(60)


@pytest.fixture
def holder(path: Path, fork: Fork) -> Iterator[int]:
    reader, writer = os.pipe()
    pid = fork(lambda: hold(path, writer))
    assert os.read(reader, 1) == b"!"
    yield pid
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("start", [RunFolder.create, RunFolder.resume])
def test_a_second_run_is_told_who_holds_the_folder_and_disturbs_nothing(
    path: Path, holder: int, start: Callable[[Path], RunFolder]
) -> None:
    before = {entry: entry.read_bytes() for entry in path.iterdir()}
    with pytest.raises(EnvironmentProblem) as caught:
        start(path)
    assert f"process {holder} on {socket.gethostname()}" in caught.value.found
    started = datetime.fromisoformat(caught.value.found.rsplit("started ", 1)[1])
    assert timedelta(0) <= datetime.now(UTC) - started < timedelta(minutes=1)
    assert caught.value.exit_code == 4
    assert {entry: entry.read_bytes() for entry in path.iterdir()} == before


def test_kill_9_frees_the_folder(path: Path, holder: int, wait: Callable[..., int]) -> None:
    os.kill(holder, signal.SIGKILL)
    assert wait(holder) == -signal.SIGKILL
    with RunFolder.resume(path):
        pass


def test_a_worker_that_outlives_a_killed_run_does_not_keep_the_lock(
    path: Path, fork: Fork, wait: Callable[..., int]
) -> None:
    reader, writer = os.pipe()

    def run_with_a_worker() -> None:
        RunFolder.create(path)
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        os.write(writer, b"%d\n" % worker)
        time.sleep(60)

    pid = fork(run_with_a_worker)
    worker = int(os.read(reader, 20))
    try:
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        os.kill(worker, 0)  # it lives
        RunFolder.resume(path).close()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def test_a_worker_cannot_write_and_the_run_keeps_its_lock(path: Path, fork: Fork, wait: Callable[..., int]) -> None:
    with RunFolder.create(path) as run:

        def write() -> None:
            with pytest.raises(UsageError):
                run.write_text("plan.json", "{}")

        assert wait(fork(write)) == 0
        with pytest.raises(EnvironmentProblem):
            RunFolder.resume(path)


def test_runs_that_start_together_never_share_the_folder(path: Path, fork: Fork, wait: Callable[..., int]) -> None:
    reader, writer = os.pipe()

    def start() -> None:
        with RunFolder.create(path):
            os.read(reader, 1)

    children = {fork(start) for _ in range(4)}
    codes, deadline = [], time.monotonic() + 20
    while len(codes) < 3 and time.monotonic() < deadline:
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.005)
    assert codes == [99, 99, 99], "more or fewer than one of the four hold the folder"
    os.write(writer, b"!")
    assert [wait(pid) for pid in children] == [0]
    os.close(reader)
    os.close(writer)


def test_leftovers_are_cleaned_only_by_the_holder(path: Path, tmp_path: Path) -> None:
    with RunFolder.create(path) as run:
        (run.checkpoints / ".tmp-9-step-00000003").mkdir(parents=True)
        (path / ".tmp-9-plan.json").touch()
        (tmp_path / "precious").touch()
        (path / ".tmp-link").symlink_to(tmp_path)
        with pytest.raises(EnvironmentProblem):
            RunFolder.resume(path)
        assert (run.checkpoints / ".tmp-9-step-00000003").exists()
    with RunFolder.resume(path):
        assert [entry.name for entry in path.rglob(".tmp-*")] == []
    assert (tmp_path / "precious").exists()


# --- a place that cannot be written


@pytest.mark.parametrize("start", [RunFolder.create, RunFolder.resume])
def test_a_file_in_the_place_of_the_folder_is_an_environment_problem(
    tmp_path: Path, start: Callable[[Path], RunFolder]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match=r"a file stands there"):
        start(tmp_path / "file")


def test_a_file_above_the_folder_is_an_environment_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match=r"Not a directory|File exists"):
        RunFolder.create(tmp_path / "file" / "run")


def test_a_read_only_folder_is_refused_at_the_start(fork: Fork, wait: Callable[..., int]) -> None:
    with TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        used, parent = Path(name) / "used", Path(name) / "parent"
        RunFolder.create(used).close()
        parent.mkdir()
        for closed in (used / "run.lock", used, parent):
            closed.chmod(0o555 if closed.is_dir() else 0o666)

        def as_nobody() -> None:
            if os.getuid() == 0:
                os.setuid(NOBODY)
            for start in (lambda: RunFolder.resume(used), lambda: RunFolder.create(parent / "run")):
                with pytest.raises(EnvironmentProblem, match="Permission denied"):
                    start()

        assert wait(fork(as_nobody)) == 0
        used.chmod(0o755)
        parent.chmod(0o755)


def test_files_are_not_writable_by_others(path: Path) -> None:
    before = os.umask(0o022)
    try:
        with RunFolder.create(path) as run:
            run.write_text("plan.json", "{}")
            run.append_metrics({"step": 1})
            save_checkpoint(run.checkpoints, step=1, tensors={"model": {"w": torch.ones(1)}}, state={})
        modes = {stat.S_IMODE(entry.stat().st_mode) for entry in path.rglob("*") if entry.is_file()}
    finally:
        os.umask(before)
    assert modes == {0o644}


# --- text files


def test_a_text_is_replaced_whole_or_not_at_all(path: Path) -> None:
    with RunFolder.create(path) as run:
        run.write_text("plan.json", "old")
        with planned("text.written", Action.NO_SPACE), pytest.raises(EnvironmentProblem, match="No space left"):
            run.write_text("plan.json", "new")
        assert (path / "plan.json").read_text() == "old"
        assert sorted(entry.name for entry in path.iterdir()) == ["plan.json", "run.lock"]
        with open(path / "plan.json") as reader:
            run.write_text("plan.json", "new")
            assert reader.read() == "old"
        assert (path / "plan.json").read_text() == "new"


@pytest.mark.parametrize("name", ["../plan.json", "/tmp/plan.json", "a/b", "", ".", "..", ".tmp-x", "a\0b"])
def test_a_text_cannot_leave_the_folder(path: Path, name: str) -> None:
    with RunFolder.create(path) as run, pytest.raises(UsageError):
        run.write_text(name, "{}")


def test_status_is_strict_json_also_with_a_loss_that_is_not_finite(path: Path) -> None:
    with RunFolder.create(path) as run:
        run.write_status({"step": 3, "loss": math.nan, "deep": [{"x": math.inf}, (1, 2.5)]})
    status = json.loads((path / "status.json").read_text(), parse_constant=pytest.fail)
    assert status == {"step": 3, "loss": None, "deep": [{"x": None}, [1, 2.5]]}


# --- metrics


def test_metrics_stand_line_by_line_at_once_and_strict(path: Path) -> None:
    with RunFolder.create(path) as run:
        for step in range(3):
            run.append_metrics({"step": step, "loss": math.inf if step else 0.1})
            assert metrics(path)[-1] == {"step": step, "loss": None if step else 0.1}


@pytest.mark.parametrize("record", [{}, {"step": None}, {"step": 1.0}, {"step": True}, {"step": 1, "x": object()}])
def test_a_record_without_a_step_or_without_a_json_form_is_refused(path: Path, record: dict[str, object]) -> None:
    with RunFolder.create(path) as run:
        with pytest.raises(UsageError):
            run.append_metrics(record)
        assert not (path / "metrics.jsonl").exists()


@pytest.mark.parametrize("cut", range(1, 16))
def test_half_a_line_is_set_aside_on_resume_and_later_steps_stand_once(path: Path, cut: int) -> None:
    with RunFolder.create(path) as run:
        for step in range(1, 8):
            run.append_metrics({"step": step, "run": 1})
    file = path / "metrics.jsonl"
    line = b'{"step": 8, "run": 1}\n'
    file.write_bytes(file.read_bytes() + line[:cut])
    with RunFolder.resume(path) as run:
        assert [m["step"] for m in metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
        assert (path / "metrics.jsonl.partial").read_bytes() == line[:cut] + b"\n"
        assert run.rewind_metrics(step=5) == 2
        for step in range(6, 9):
            run.append_metrics({"step": step, "run": 2})
    assert [(m["step"], m["run"]) for m in metrics(path)] == [(s, 1 if s < 6 else 2) for s in range(1, 9)]


def test_a_last_record_that_lacks_only_its_newline_is_kept(path: Path) -> None:
    with RunFolder.create(path) as run:
        run.append_metrics({"step": 1})
    (path / "metrics.jsonl").write_text('{"step": 1}')
    with RunFolder.resume(path) as run:
        run.append_metrics({"step": 2})
    assert [m["step"] for m in metrics(path)] == [1, 2]
    assert not (path / "metrics.jsonl.partial").exists()


def test_a_rewind_that_changes_nothing_leaves_the_file_alone(path: Path) -> None:
    with RunFolder.create(path) as run:
        run.append_metrics({"step": 1})
        before = (path / "metrics.jsonl").stat().st_ino
        assert run.rewind_metrics(step=1) == 0
        assert (path / "metrics.jsonl").stat().st_ino == before


def test_a_line_that_the_disk_refuses_is_not_left_by_half(path: Path, fork: Fork, wait: Callable[..., int]) -> None:
    with RunFolder.create(path) as run:
        run.append_metrics({"step": 1})

    def full() -> None:
        with RunFolder.resume(path) as run:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
            with pytest.raises(EnvironmentProblem) as caught:
                run.append_metrics({"step": 2})
            assert "20 bytes (ulimit -f)" in caught.value.found
            cause = caught.value.__cause__
            assert isinstance(cause, OSError)
            assert cause.errno == errno.EFBIG

    assert wait(fork(full)) == 0
    assert metrics(path) == [{"step": 1}]


def test_a_run_killed_every_few_steps_ends_as_the_unbroken_one(
    path: Path, fork: Fork, wait: Callable[..., int]
) -> None:
    def weight_after(step: int, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1.01 + torch.rand(4, generator=torch.Generator().manual_seed(step))

    def run_on() -> None:
        with RunFolder.resume(path) if path.exists() else RunFolder.create(path) as run:
            start, weight = 0, torch.zeros(4)
            if run.checkpoints.exists():
                loaded = load_checkpoint(run.checkpoints)
                start, weight = loaded.step, loaded.tensors["model"]["w"]
            run.rewind_metrics(step=start)
            for step in range(start + 1, 21):
                weight = weight_after(step, weight)
                run.append_metrics({"step": step, "sum": float(weight.sum())})
                if step % 2 == 0:
                    save_checkpoint(run.checkpoints, step=step, tensors={"model": {"w": weight}}, state={})
                if step == start + 3:
                    os.kill(os.getpid(), signal.SIGKILL)

    starts = 1
    while wait(fork(run_on)) != 0:
        starts += 1
        assert starts < 30
    assert starts > 5
    weight, expected = torch.zeros(4), []
    for step in range(1, 21):
        weight = weight_after(step, weight)
        expected.append({"step": step, "sum": float(weight.sum())})
    assert metrics(path) == expected
    assert torch.equal(load_checkpoint(path / "checkpoints").tensors["model"]["w"], weight)


@pytest.mark.parametrize("name", ["plan.json", "metrics.jsonl", "run.lock"])
def test_a_folder_where_a_file_is_needed_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    there = rf"{name}: a folder stands there"
    with pytest.raises(EnvironmentProblem, match=there) as raised, RunFolder(tmp_path) as run:
        run.append_metrics({"step": 0})
        run.write_text("plan.json", "{}")
    assert raised.value.do == "move that folder away" and (tmp_path / name).is_dir()


def test_a_lock_that_a_full_disk_refuses_asks_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(EnvironmentProblem) as raised:
        RunFolder(tmp_path)
    assert "free space there" in raised.value.do
