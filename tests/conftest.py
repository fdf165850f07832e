"""How the tests are divided among processes (pytest-xdist), where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Each more holds torch and the models of the tests, about half a GiB.
MOST_WORKERS = 8

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is first imported, here and in processes that tests start: workers that each have a thread on
    # every core wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A worker a core where nobody said how many; without pytest-xdist all tests run in this process."""
    option = config.option
    if hasattr(config, "workerinput"):
        # A worker runs what it is given, and makes no workers.
        return
    if not config.pluginmanager.hasplugin("xdist") or option.numprocesses is not None or option.usepdb:
        return
    workers = _workers(config)
    if workers:
        # Workers take from one another what is left: files stay together, and with them what they make once.
        option.numprocesses, option.dist = workers, "worksteal"


def _workers(config: pytest.Config) -> int:
    """None for single files, nor where tests of a card are asked for.

    A worker takes seconds to import what a file needs, and tests that count a card's bytes must be alone on it.
    """
    only_files = all(Path(argument.partition("::")[0]).is_file() for argument in config.args)
    if only_files or "not gpu" not in config.option.markexpr:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)
