"""Children made by fork, for tests that kill them; importing torch anew would cost seconds each."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

Fork = Callable[[Callable[[], object]], int]


@pytest.fixture
def fork() -> Iterator[Fork]:
    """Run a function in a forked child: exit code 0, or 99 with the traceback on stderr. Returns its pid."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    children: list[int] = []

    def start(function: Callable[[], object]) -> int:
        pid = os.fork()
        if pid:
            children.append(pid)
            return pid
        code = 99
        try:
            function()
            code = 0
        finally:
            # pytest's own code must not go on in the child, whatever was raised.
            if code:
                traceback.print_exc()
            os._exit(code)

    yield start
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue
    torch.set_num_threads(threads)


def ended(pid: int, *, within_seconds: float = 20.0) -> int:
    """The child's exit code, or minus the signal that ended it. A child that hangs fails the test."""
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    raise AssertionError(f"child {pid} still runs after {within_seconds} s")


@pytest.fixture
def wait() -> Callable[..., int]:
    return ended


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"
