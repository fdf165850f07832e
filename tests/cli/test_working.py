"""What a command says while it thinks: a line that changes on a terminal, notes with --verbose, else nothing."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from samegrad.cli.console import Console
from samegrad.cli.main import telling_warnings
from samegrad.cli.plan import rows_with_bar
from samegrad.recipes._recipe import LongTable
from tests.cli.conftest import Cli

BUDGETED = ("plan", "steps.py:train", "--budget", "60KiB")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def played_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """In the place of stderr, from inside a test: pytest sets its own again before one begins."""
    played = Terminal()
    monkeypatch.setattr(sys, "stderr", played)
    monkeypatch.setenv("TERM", "xterm")
    return played


def test_verbose_tells_what_is_examined_and_tried(cli: Cli) -> None:
    said = cli(*BUDGETED, "--verbose")
    assert said.code == 0
    assert "examining the step on a few rows" in said.err and "trying split_rows" in said.err
    assert "a step, " in said.err and "(tried in " in said.err
    quiet = cli(*BUDGETED)
    assert quiet.code == 0 and "examining" not in quiet.err and "examining" not in quiet.out


def test_with_json_nothing_of_it_is_on_stdout(cli: Cli) -> None:
    assert cli(*BUDGETED, "--verbose", "--json").document["plan"]["levers"]


def test_on_a_terminal_the_line_changes_and_is_gone_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = played_terminal(monkeypatch)
    console = Console()
    with telling_warnings(console):
        logging.getLogger("samegrad").info("samegrad: trying [red]one\nplan")
        drawn = console._working
        assert drawn is not None and "trying [red]one plan" in terminal.getvalue()
        logging.getLogger("samegrad").info("samegrad: trying another")
        assert console._working is drawn
        console.result("the plan")
        assert console._working is None
    # The cursor, hidden while the line is drawn, is back.
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("how", ["quiet", "json"])
def test_no_line_is_drawn_where_nobody_wants_one(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = played_terminal(monkeypatch)
    console = Console(**{how: True})
    with telling_warnings(console):
        logging.getLogger("samegrad").info("samegrad: trying one")
    assert console._working is None and terminal.getvalue() == ""


def test_beside_a_bar_no_line_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    played_terminal(monkeypatch)
    console = Console()
    with telling_warnings(console), console.progress("steps", 2):
        logging.getLogger("samegrad").info("samegrad: trying one")
        assert console._working is None


def test_rows_that_are_measured_one_by_one_come_with_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"setting": "batch 16", "peak_bytes": 2}, {"setting": "[red]batch 8", "peak_bytes": 1}]
    told = []
    for table in (LongTable(2, iter(rows)), rows):
        terminal = played_terminal(monkeypatch)
        assert list(rows_with_bar("vq_spectrogram", table, Console())) == rows
        told.append(terminal.getvalue())
    assert "vq_spectrogram" in told[0] and "2/2" in told[0] and "[red]batch 8" in told[0]
    # What was measured in one go is there at once.
    assert told[1] == ""


def test_the_logger_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    played_terminal(monkeypatch)
    logger = logging.getLogger("samegrad")
    before = logger.level, logger.propagate, list(logger.handlers)
    with telling_warnings(Console()):
        logger.info("samegrad: trying one")
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
