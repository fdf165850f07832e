"""Results on stdout, everything else on stderr.

1. With ``--json`` stdout holds exactly one JSON document, on success and on failure; nothing else is written there.
2. Progress is drawn only on a terminal, and not with ``--quiet`` or ``--json``.
3. What goes on while a command thinks is one line that changes, drawn where progress is and gone before anything else
   is written; with ``--verbose`` it is notes.
4. Text from users, files and data is stripped of control characters and never read as markup.
5. A reader that closes stdout early ends the output, not the command; so does a stream that was closed from the start.
6. A result that stdout does not take whole is an error. What stderr does not take is lost, and changes nothing else:
   there is nowhere left to tell it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from samegrad.errors import EnvironmentProblem, too_large_a_file
from samegrad.json_record import SCHEMA_VERSION
from samegrad.report.words import clean_block, clean_line

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.live import Live
    from rich.progress import Progress


class Console:
    """The two streams of one command, and whether they are talked to."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False, color: bool = True) -> None:
        self.json, self.quiet, self.verbose, self.color = json, quiet, verbose, color
        self.answered = False
        self._working: Live | None = None
        self._bar_is_drawn = False

    def result(self, text: str = "") -> None:
        """One paragraph of the result, for a person; silent with ``--json``."""
        if not self.json:
            self._write(sys.stdout, clean_block(text) + "\n")

    def document(self, document: Mapping[str, Any]) -> None:
        """The JSON document; silent without ``--json``. Not-finite floats must have become null before."""
        if self.json and not self.answered:
            self.answered = True
            whole = {"schema_version": SCHEMA_VERSION, **document}
            self._write(sys.stdout, json.dumps(whole, indent=2, allow_nan=False, ensure_ascii=False) + "\n")

    def note(self, text: str) -> None:
        """One line for the person at the terminal, on stderr."""
        if not self.quiet:
            self._write(sys.stderr, clean_block(text) + "\n")

    def detail(self, text: str) -> None:
        """A note for ``--verbose``."""
        if self.verbose:
            self.note(text)

    def working(self, text: str) -> None:
        """What goes on just now (rule 3); silent with ``--quiet`` and ``--json``."""
        if self.verbose or self.quiet or self.json or self._bar_is_drawn or not sys.stderr.isatty():
            self.detail(text)
            return
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.text import Text

        line = Spinner("dots", Text(clean_line(text)))
        if self._working is None:
            # What others print meanwhile is theirs.
            self._working = Live(
                line, console=self._rich(sys.stderr), transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._working.start(refresh=True)
        else:
            self._working.update(line)

    def done_working(self) -> None:
        """The line of ``working`` goes."""
        working, self._working = self._working, None
        if working is not None:
            working.stop()

    def error(self, text: str) -> None:
        """What went wrong, on stderr, also with ``--quiet``."""
        self._write(sys.stderr, clean_block(text) + "\n")

    def finish(self) -> None:
        """Raises EnvironmentProblem where what others wrote to stdout, help say, did not all get there."""
        self._write(sys.stdout, "")
        self._write(sys.stderr, "")

    def show(self, *renderables: RenderableType) -> None:
        """Rich tables and panels on stdout, for a person; silent with ``--json``."""
        if not self.json:
            rich = self._rich(sys.stdout)
            with rich.capture() as captured:
                for renderable in renderables:
                    rich.print(renderable, markup=False, highlight=False)
            self._write(sys.stdout, captured.get())

    def _write(self, stream: TextIO, text: str) -> None:
        self.done_working()
        _write(stream, text)

    @contextmanager
    def progress(self, title: str, total: int | None) -> Iterator[Bar]:
        """A bar with rate and remaining time on stderr where that is a terminal, else a bar nobody sees."""
        self.done_working()
        if self.quiet or self.json or not sys.stderr.isatty():
            yield Bar(self, None, title, total)
            return
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}", markup=False),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[state]}", markup=False),
        )
        with progress.Progress(*columns, console=self._rich(sys.stderr), transient=False) as drawn:
            self._bar_is_drawn = True
            try:
                yield Bar(self, drawn, title, total)
            finally:
                self._bar_is_drawn = False

    def _rich(self, stream: TextIO) -> RichConsole:
        from rich.console import Console as RichConsole

        return RichConsole(file=stream, no_color=not self.color or None, highlight=False, markup=False)


class Bar:
    """One line of progress, and what is said above it."""

    def __init__(self, console: Console, drawn: Progress | None, title: str, total: int | None) -> None:
        self._console, self._drawn = console, drawn
        self._task = drawn.add_task(clean_block(title), total=total, rate="", state="") if drawn else None

    def advance(self, state: str, *, done: int | None = None) -> None:
        """One unit further, or ``done`` in all; ``state`` stands at the end of the line."""
        if self._drawn is None or self._task is None:
            return
        step = {"advance": 1} if done is None else {"completed": done}
        speed = self._drawn.tasks[0].speed
        rate = "" if not speed else f"{speed:.3g}/s" if speed >= 1 else f"{1 / speed:.3g} s each"
        self._drawn.update(self._task, rate=rate, state=clean_block(state), **step)  # type: ignore[arg-type]

    def say(self, text: str) -> None:
        """A note that does not tear the bar apart."""
        if self._drawn is None:
            self._console.note(text)
        else:
            self._drawn.console.print(clean_block(text), markup=False, highlight=False)


def open_closed_streams() -> None:
    """Gives this process somewhere to write where it was started without stdout or stderr (rule 5).

    Without that the next file to be opened would get the stream's number, and what a library prints.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends


def end_output(stream: TextIO) -> None:
    """Lets all that is still written to ``stream`` go nowhere (rule 5)."""
    # The interpreter flushes once more at exit and would complain: give it somewhere to write.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _write(stream: TextIO, text: str) -> None:
    try:
        _write_whole(stream, text)
    except BrokenPipeError:
        end_output(stream)
    except OSError as error:
        end_output(stream)
        if stream is sys.stderr:
            return
        found, do = f"{error.strerror or error}", "write it to a place with free space"
        if error.errno == errno.EFBIG:
            found, do = too_large_a_file()
        raise EnvironmentProblem(asked="write the result to stdout", found=found, do=do) from error


def _write_whole(stream: TextIO, text: str) -> None:
    raw = getattr(stream, "buffer", None)
    stream.flush()
    if not isinstance(raw, io.RawIOBase):
        stream.write(text)
        stream.flush()
        return
    # With PYTHONUNBUFFERED a stream passes over that fewer bytes were taken than given; the next write says why.
    rest = memoryview(text.encode(stream.encoding, stream.errors or "strict"))
    while rest:
        taken = raw.write(rest)
        if taken is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        rest = rest[taken:]
