"""How the suite divides itself among processes: once, and never in a process that is a part already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from .conftest import pytest_cmdline_main


def config(
    args: list[str], *, there: bool = True, chosen: int | None = None, debugger: bool = False, **more: Any
) -> Any:
    option = SimpleNamespace(
        numprocesses=chosen, dist="no", usepdb=debugger, markexpr=more.pop("markers", "not gpu and not slow")
    )
    plugins = SimpleNamespace(hasplugin=lambda name: there)
    return SimpleNamespace(args=args, option=option, pluginmanager=plugins, **more)


def test_a_folder_is_divided_among_workers() -> None:
    whole = config(["tests"])
    pytest_cmdline_main(whole)
    assert whole.option.numprocesses >= 1 and whole.option.dist == "worksteal"


@pytest.mark.parametrize("one", [
    config(["tests"], workerinput={}), config(["tests"], there=False), config(["tests"], debugger=True),
    config([__file__]), config(["tests"], markers="gpu"), config(["tests"], markers="slow"),
], ids=["a worker", "no plugin", "a debugger", "a file", "a card", "slow ones"])  # fmt: skip
def test_these_run_in_one_process(one: Any) -> None:
    """A worker that made workers would fill the machine with processes."""
    pytest_cmdline_main(one)
    assert one.option.numprocesses is None


def test_a_number_that_somebody_chose_stays() -> None:
    four = config(["tests"], chosen=4)
    pytest_cmdline_main(four)
    assert four.option.numprocesses == 4 and four.option.dist == "no"
