"""``samegrad``: picks the subcommand, imports its file only then, and returns its exit code."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import sys
from collections.abc import Iterator, Sequence

from samegrad import __version__
from samegrad.cli.boundary import Boundary
from samegrad.cli.console import Console, open_closed_streams
from samegrad.errors import UsageError

COMMANDS = {
    "demo": "plan, train, verify and report a small model here and now; no GPU, network or data needed",
    "recipes": "the complete training programs that come along: ls, cat NAME, cp NAME DIR",
    "run": "train a recipe or your own step inside a budget; stops and resumes safely",
    "measure": "what one step holds over its course and at its peak, here or on a card that is not at hand",
    "plan": "the fastest plan that fits a budget, here or on a card by name; exit code 1 when nothing exact fits",
    "verify": "compare gradients, loss and buffers with the plain step; exit code 1 when not proven the same",
    "report": "rebuild the report of a run folder from its records",
    "doctor": "versions, devices, memory, disk, what is missing; --run: how a run went; --cards: cards to plan for",
    "config": "show RECIPE: every option and where its value comes from; validate RECIPE: check config files",
    "completion": "the completion script for bash, zsh or fish",
}
EXIT_CODES = "0 done, or yes · 1 the verdict is no · 2 usage · 3 bad input · 4 environment · 5 out of memory or over\
 budget\n  6 not finite · 70 unknown error, traceback saved · 75 stopped by SIGTERM · 130 stopped by Ctrl-C"


def overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "usage: samegrad COMMAND [TARGET] [options]\n\n"
        "Train inside a memory budget. Same gradients, checked.\n\n"
        f"{commands}\n\n"
        "TARGET is a recipe's name, or file.py:function returning (samegrad.Step, iterable of batches).\n"
        "samegrad COMMAND --help, or samegrad COMMAND RECIPE --help, lists the options.\n\n"
        f"exit codes:\n  {EXIT_CODES}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: this process's) and returns its exit code."""
    line = list(sys.argv[1:] if argv is None else argv)
    open_closed_streams()
    # Read before everything else, because they also decide how a mistake in the line is told.
    flags = {token.replace("-", "_") for token in line if token.startswith("-") and "=" not in token}
    console = Console(
        json="__json" in flags,
        quiet=bool(flags & {"__quiet", "_q"}),
        verbose=bool(flags & {"__verbose", "_v"}),
        color="__no_color" not in flags,
    )
    with Boundary(console, debug="__debug" in flags) as boundary, telling_warnings(console):
        boundary.code = dispatch(line, console)
    return boundary.code


class ToConsole(logging.Handler):
    """What the library logs: warnings as notes on stderr, and what it does just now where somebody looks on."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        say = self._console.note if record.levelno >= logging.WARNING else self._console.working
        say(record.getMessage())


@contextlib.contextmanager
def telling_warnings(console: Console) -> Iterator[None]:
    """The library's warnings go where the command's notes go, and with ``--quiet`` nowhere."""
    logger, handler = logging.getLogger("samegrad"), ToConsole(console)
    propagated, level = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        console.done_working()
        logger.removeHandler(handler)
        logger.propagate = propagated
        logger.setLevel(level)


def dispatch(line: Sequence[str], console: Console) -> int:
    """Exit code of the command in ``line``. Raises UsageError for a command that does not exist."""
    command = line[0] if line else "--help"
    if command in ("-h", "--help", "help"):
        console.result(overview())
        console.document({"commands": COMMANDS})
        # Somebody who typed nothing asked for nothing wrong.
        return 0
    if command in ("-V", "--version"):
        console.result(f"samegrad {__version__}")
        console.document({"version": __version__})
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        raise UsageError(
            asked=f"samegrad {command}",
            found=f"no command {command!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            do=f"use one of {', '.join(COMMANDS)}",
        )
    module = importlib.import_module(f"samegrad.cli.{command}")
    code: int = module.main(list(line[1:]), console)
    return code


if __name__ == "__main__":
    sys.exit(main())
