"""What data workers end in: whose fault it is, the way out, and no plan that a worker's death has changed."""

from __future__ import annotations

import json
import os
import signal
import textwrap
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import samegrad as sg
from samegrad.cli.data_workers import of_a_worker
from samegrad.measure.child_signals import children_heard_later
from samegrad.store import load_checkpoint

from .conftest import Cli, metrics

LOADERS = """
    import os, signal, time
    import torch
    from torch import nn
    import samegrad as sg

    class Two(Exception):
        def __init__(self, what, where):
            super().__init__(f"{what} in {where}")

    def killed(): os.kill(os.getpid(), signal.SIGKILL)
    def out_of_shared_memory(): os.kill(os.getpid(), signal.SIGBUS)
    def left(): os._exit(3)
    def hangs(): time.sleep(60)
    def missing(): {}["no such key"]
    def two(): raise Two("a hole", "row 70")
    def ours(): raise sg.BadInput(asked="read row 70", found="a hole", do="fill it")
    def no_memory(): raise MemoryError("the row is large")
    def no_room(): raise RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")
    def shapes(): torch.ones(3) @ torch.ones(4)

    class Rows(torch.utils.data.Dataset):
        def __init__(self, fault, at=70):
            self.fault, self.at = fault, at

        def __len__(self):
            return 640

        def __getitem__(self, index):
            if index == self.at:
                if self.fault is None:
                    return torch.randn(17), 0
                self.fault()
            return torch.randn(16), index % 4

    def step():
        model = nn.Linear(16, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return sg.Step(model, lambda out, b: nn.functional.cross_entropy(out, b[1]), optimizer=optimizer, rows=32)

    def loader(fault, workers=1, **how):
        return lambda: (step(), torch.utils.data.DataLoader(Rows(fault), batch_size=64, num_workers=workers, **how))

    class Killing(torch.optim.SGD):
        # Its first turn, and not that of a copy, kills the data workers and goes on once they have ended.

        workers = []

        def step(self, closure=None):
            while Killing.workers and self.param_groups[0]["params"][0] is Killing.real:
                worker = Killing.workers.pop()
                worker.kill()
                os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
            return super().step(closure)

    class Seen(torch.utils.data.DataLoader):
        def __iter__(self):
            iterator = super().__iter__()
            Killing.workers = list(iterator._workers)
            return iterator

    def killed_by_the_optimizer():
        declared = step().declared
        optimizer = Killing(declared.model.parameters(), lr=0.1)
        Killing.real = optimizer.param_groups[0]["params"][0]
        rows = torch.utils.data.TensorDataset(torch.randn(640, 16), torch.arange(640) % 4)
        return (
            sg.Step(declared.model, declared.loss_fn, optimizer=optimizer, rows=32),
            Seen(rows, batch_size=64, num_workers=1, prefetch_factor=1),
        )

    for fault in (killed, out_of_shared_memory, left, missing, two, ours, no_memory, no_room, shapes):
        globals()["with_" + fault.__name__] = loader(fault)
    def killed_late():
        return step(), torch.utils.data.DataLoader(Rows(killed, at=400), batch_size=64, num_workers=1)

    with_hangs = loader(hangs, timeout=1)
    with_ragged = loader(None)
    without_workers = loader(None, workers=0)
"""


@pytest.fixture
def loaders(folder: Path) -> Path:
    (folder / "loaders.py").write_text(textwrap.dedent(LOADERS))
    return folder / "loaders.py"


def line_of(loaders: Path, what: str) -> int:
    return 1 + next(n for n, line in enumerate(loaders.read_text().splitlines()) if what in line)


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("killed", 4, ["was killed by SIGKILL", "host memory", "num_workers=0"]),
        ("out_of_shared_memory", 4, ["was killed by SIGBUS", "shared memory", "--shm-size"]),
        ("left", 3, ["exit code 3", "num_workers=0"]),
        ("hangs", 4, ["timeout of 1 s", "num_workers=0"]),
        ("no_memory", 4, ["host memory: MemoryError: the row is large", "num_workers="]),
        ("no_room", 4, ["no shared memory left", "--shm-size"]),
        ("ours", 3, ["read row 70", "found: a hole", "do:    fill it"]),
        ("ragged", 3, ["equal size, but got [16] at entry 0 and [17] at entry 6", "collate_fn="]),
    ],
)
def test_the_end_of_a_worker_is_told_with_its_way_out(
    cli: Cli, loaders: Path, name: str, code: int, said: list[str]
) -> None:
    ran = cli("run", f"loaders.py:with_{name}", "--output", "out")
    assert ran.code == code, ran.err
    assert [words for words in said if words not in ran.err] == [], ran.err
    assert "samegrad does not know" not in ran.err


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("missing", "def missing", "KeyError: 'no such key'"),
        ("two", "def two", "loaders.Two: a hole in row 70"),
        ("shapes", "def shapes", "RuntimeError: inconsistent tensor size"),
    ],
)
def test_what_a_worker_raises_is_told_with_the_users_line(
    cli: Cli, loaders: Path, name: str, line: str, said: str
) -> None:
    ran = cli("run", f"loaders.py:with_{name}", "--output", "out")
    assert ran.code == 3 and f"loaders.py:{line_of(loaders, line)}: {said}" in ran.err, ran.err


def test_what_was_done_before_a_worker_died_is_saved(cli: Cli, loaders: Path) -> None:
    ran = cli("run", "loaders.py:killed_late", "--output", "out", "--save_every", "100")
    steps = len(metrics(loaders.parent / "out"))
    assert ran.code == 4 and 1 <= steps <= 6
    assert f"saved after step {steps}; --resume goes on from there" in ran.err
    assert load_checkpoint(loaders.parent / "out" / "checkpoints").step == steps
    status = json.loads((loaders.parent / "out" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 4)


def test_a_death_in_the_optimizers_turn_is_raised_after_the_step(cli: Cli, loaders: Path) -> None:
    ran = cli("run", "loaders.py:killed_by_the_optimizer", "--output", "out")
    assert ran.code == 4 and "was killed by SIGKILL" in ran.err
    steps = [line["step"] for line in metrics(loaders.parent / "out")]
    found = load_checkpoint(loaders.parent / "out" / "checkpoints")
    assert found.state["done"] == len(steps) >= 1 and found.step == len(steps)


def test_rows_that_cannot_be_one_batch_are_no_bug_of_ours(cli: Cli, loaders: Path) -> None:
    ran = cli("run", "loaders.py:without_workers", "--output", "out")
    assert ran.code == 3 and "equal size, but got [16] at entry 0" in ran.err, ran.err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("my DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("Caught KeyError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"),
    ],
)
def test_a_text_that_only_looks_like_it_is_left_alone(error: Exception) -> None:
    assert of_a_worker(error) is None


def test_a_child_that_ends_inside_an_examination_is_heard_of_afterwards() -> None:
    heard: list[bool] = []
    inside = True

    def handler(number: int, frame: FrameType | None) -> None:
        heard.append(inside)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with pytest.raises(RuntimeError, match="is killed by signal"), children_heard_later():
            signal.raise_signal(signal.SIGCHLD)
            inside = False
        assert heard == [False] and signal.getsignal(signal.SIGCHLD) is handler
        with pytest.raises(KeyError), children_heard_later():
            signal.raise_signal(signal.SIGCHLD)
            raise KeyError
        assert heard == [False]
    finally:
        signal.signal(signal.SIGCHLD, before)


class Killing(torch.nn.Linear):
    """Its first forward kills the workers of ``loader`` and goes on once they have ended."""

    workers: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while self.workers:
            worker = self.workers.pop()
            worker.kill()
            # Not joined: torch looks for children that ended and that nobody has asked for.
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        return super().forward(x)


def test_no_plan_comes_of_a_workers_death() -> None:
    loader = torch.utils.data.DataLoader(torch.randn(640, 16), batch_size=64, num_workers=1)
    model = Killing(16, 4)
    step = sg.Step(model, lambda out, batch: out.square().mean(), forward=lambda m, b: m(b), budget="1GiB")
    batch = next(iterator := iter(loader))
    model.workers = list(iterator._workers)
    with pytest.raises(RuntimeError, match="is killed by signal: Killed"):
        step.prepare(batch)
    assert step.plan is not None and not any("killed" in fact for fact in step.explain().splitlines())
