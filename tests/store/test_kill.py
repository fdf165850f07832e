"""An acknowledged checkpoint outlives kill -9 at any moment of a save, and at every named place of one."""

from __future__ import annotations

import ast
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import samegrad.store
from samegrad.store import RunFolder, load_checkpoint, save_checkpoint
from samegrad.store.faults import POINTS, Action, planned

Save = Callable[[Path, int], object]
ELEMENTS = 40_000


def save(folder: Path, step: int) -> None:
    tensors = {"model": {"w": torch.full((ELEMENTS,), float(step))}, "rng": {"s": torch.tensor([step])}}
    save_checkpoint(folder, step=step, tensors=tensors, state={"step": step}, keep=2)


def check(folder: Path, acknowledged: int) -> int:
    """The newest checkpoint's step, after seeing that it is whole and not older than the acknowledged one."""
    loaded = load_checkpoint(folder)
    assert loaded.step >= acknowledged
    assert loaded.warnings == ()
    assert loaded.state == {"step": loaded.step}
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((ELEMENTS,), float(loaded.step)))
    assert torch.equal(loaded.tensors["rng"]["s"], torch.tensor([loaded.step]))
    return loaded.step


def save_and_acknowledge(folder: Path, start: int, pipe: int) -> None:
    for step in range(start, start + 10_000):
        save(folder, step)
        os.write(pipe, b"%08d" % step)


def test_fifty_kills_at_random_moments_lose_no_acknowledged_step(
    folder: Path, fork: Callable[..., int], wait: Callable[..., int]
) -> None:
    began = time.monotonic()
    save(folder, 0)
    save_seconds = time.monotonic() - began
    moments, newest, kills, in_the_middle = random.Random(5), 0, 0, 0
    while kills < 50 and time.monotonic() - began < 6:
        reader, writer = os.pipe()
        pid = fork(lambda start=newest + 1, pipe=writer: save_and_acknowledge(folder, start, pipe))
        os.close(writer)
        told = os.read(reader, 8)
        # From here the child does nothing but save, so a kill within a few saves' time meets one.
        time.sleep(moments.uniform(0.0, 3 * save_seconds))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
        told = (told + os.read(reader, 1 << 20))[-8:]
        os.close(reader)
        kills += 1
        in_the_middle += any(path.name.startswith(".tmp-") for path in folder.iterdir())
        newest = check(folder, acknowledged=int(told))
    # The kills must have met saves, or this proves nothing.
    assert kills >= 10
    assert in_the_middle >= 3


@pytest.fixture
def run_of_two(tmp_path: Path) -> Path:
    with RunFolder.create(tmp_path / "run") as run:
        save(run.checkpoints, 1)
        save(run.checkpoints, 2)
        run.append_metrics({"step": 1})
        run.append_metrics({"step": 2})
        run.write_status({"step": 2})
    return tmp_path / "run"


def killed_at(point: str, path: Path) -> None:
    with RunFolder.resume(path) as run, planned(point, Action.KILL):
        # Step 2 again meets the places of a replacement, step 3 those of retention.
        save(run.checkpoints, 2)
        save(run.checkpoints, 3)
        run.write_status({"step": 3})
        (path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
        run.rewind_metrics(step=1)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_every_named_place_loses_nothing(
    run_of_two: Path, fork: Callable[..., int], wait: Callable[..., int], point: str
) -> None:
    assert wait(fork(lambda: killed_at(point, run_of_two))) == -signal.SIGKILL, "the place was never reached"
    check(run_of_two / "checkpoints", acknowledged=2)
    assert (run_of_two / "status.json").read_text() in ('{"step": 2}\n', '{"step": 3}\n')
    # The next start frees the lock by itself, cleans up, and saves on.
    with RunFolder.resume(run_of_two) as run:
        assert not list(run_of_two.rglob(".tmp-*"))
        assert "ste" not in (run_of_two / "metrics.jsonl").read_text().replace('"step"', "")
        save(run.checkpoints, 4)
        assert check(run.checkpoints, acknowledged=4) == 4
        kept = [path.name for path in run.checkpoints.iterdir()]
        assert len(kept) == 2, kept


@pytest.mark.parametrize("visit", range(1, 6))
def test_a_kill_in_any_of_the_files_loses_nothing(
    run_of_two: Path, fork: Callable[..., int], wait: Callable[..., int], visit: int
) -> None:
    def killed() -> None:
        with planned("save.inside_file", Action.KILL, visit=visit):
            save(run_of_two / "checkpoints", 3)

    assert wait(fork(killed)) == -signal.SIGKILL
    assert check(run_of_two / "checkpoints", acknowledged=2) == 2


def test_a_checkpoint_on_its_way_out_has_no_real_name_while_it_is_taken_apart(
    run_of_two: Path, fork: Callable[..., int], wait: Callable[..., int]
) -> None:
    def killed() -> None:
        with planned("save.old_hidden", Action.KILL):
            save(run_of_two / "checkpoints", 3)

    assert wait(fork(killed)) == -signal.SIGKILL
    steps = {path.name for path in (run_of_two / "checkpoints").glob("step-*")}
    assert steps == {"step-00000002", "step-00000003"}


def save_in_place(folder: Path, step: int) -> None:
    """A planted fault: the new checkpoint grows under its real name."""
    save(folder / "made", step)
    target = folder / f"step-{step:08d}"
    target.mkdir()
    for name in ("manifest.json", "model.safetensors", "rng.safetensors", "state.json"):
        (target / name).write_bytes((folder / "made" / target.name / name).read_bytes())
        if name == "model.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)


def save_after_removing(folder: Path, step: int) -> None:
    """A planted fault: the old ones go before the new one is there."""
    for old in folder.glob("step-*"):
        shutil.rmtree(old)
    with planned("save.file_done", Action.KILL):
        save(folder, step)


@pytest.mark.parametrize("faulty", [save_in_place, save_after_removing])
def test_the_check_catches_a_save_that_is_not_safe(
    run_of_two: Path, fork: Callable[..., int], wait: Callable[..., int], faulty: Save
) -> None:
    assert wait(fork(lambda: faulty(run_of_two / "checkpoints", 3))) == -signal.SIGKILL
    with pytest.raises((AssertionError, samegrad.BadInput)):
        check(run_of_two / "checkpoints", acknowledged=2)


def test_every_fault_point_in_the_source_is_listed_and_every_listed_one_exists() -> None:
    reached = []
    for source in Path(samegrad.store.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.reach":
                (name,) = node.args
                assert isinstance(name, ast.Constant)
                reached.append(name.value)
    assert sorted(reached) == sorted(POINTS)
