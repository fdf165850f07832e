"""What ends a command, turned into an exit code and a text; the last line of defence around every subcommand.

    0 done or yes · 1 the verdict is no · 2 usage · 3 bad input · 4 environment · 5 out of memory or over budget
    6 not finite · 70 a bug in us, traceback saved · 75 stopped by SIGTERM · 130 stopped by Ctrl-C
"""

from __future__ import annotations

import errno
import os
import sys
import sysconfig
import tempfile
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from samegrad.cli.console import Console, end_output
from samegrad.cli.data_workers import frames_in, of_a_worker, told_in
from samegrad.cli.stopping import Stopped
from samegrad.errors import BadInput, EnvironmentProblem, OverBudget, SamegradError, too_large_a_file

INTERNAL = 70
_OURS = str(Path(__file__).parent.parent)
_LONGEST_LAYER = 100
_ENVIRONMENT = {
    errno.ENOSPC: "no space is left on the device",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "the file system is read-only",
    errno.EDQUOT: "the disk quota is used up",
    errno.EIO: "the device failed to read or write",
}
# Of a path that the command line named; one that the user's own code made is told with its line.
_IN_THE_WAY = {
    errno.EISDIR: "a folder stands there, where a file is needed",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.ELOOP: "its links lead in a circle",
    errno.EMFILE: "this process has too many files open (ulimit -n)",
}


class Boundary:
    """A ``with`` block whose every ending has an exit code, in ``code`` afterwards.

    ``debug`` lets the traceback through to the terminal as well; without it a person sees what was asked, what was
    found and what to do.
    """

    def __init__(self, console: Console, *, debug: bool) -> None:
        self.console, self.debug, self.code = console, debug, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> bool:
        try:
            if error is not None:
                self._end(error)
            self.console.finish()
        except EnvironmentProblem as unwritten:
            # What the command came to counts for more than that nobody could be told.
            self.code = self.code or unwritten.exit_code
            self.console.error(f"error: {unwritten}")
        return True

    def _end(self, error: BaseException) -> None:
        """The exit code of ``error``, told."""
        if self.debug and not isinstance(error, SystemExit):
            self.console.error("".join(traceback.format_exception(error)))
        match error:
            case SystemExit():
                self.code = error.code if isinstance(error.code, int) else 0 if error.code is None else 2
            case Stopped():
                self._stopped(error.exit_code, str(error), error.saved)
            case BrokenPipeError():
                # --help is not written by the console.
                end_output(sys.stdout)
            case KeyboardInterrupt():
                self._stopped(130, "stopped by Ctrl-C", None)
            case _ if (known := known_error(error)) is not None:
                # Notes of what the user's own code raised are part of the message.
                notes = getattr(error, "__notes__", [])
                self._tell(known, [] if isinstance(known, BadInput) and known is not error else notes)
            case _:
                self._bug(error)

    def _tell(self, error: SamegradError, advice: Sequence[str]) -> None:
        self.code = error.exit_code
        self.console.error(f"error: {error}")
        if advice:
            numbered = (f"  {i}. {line}" for i, line in enumerate(advice, start=1))
            self.console.error("\n".join(["Advice:", *numbered]))
        self.console.document(error.to_json())

    def _stopped(self, code: int, what: str, saved: str | None) -> None:
        self.code = code
        hint = f"continue with --resume; saved in {saved}" if saved else "nothing was begun that needs saving"
        self.console.error(f"{what}; {hint}")
        self.console.document(
            {"error": {"code": "stopped", "message": what, "hint": hint, "file": saved, "option": None}}
        )

    def _bug(self, error: BaseException) -> None:
        self.code = INTERNAL
        path = save_traceback(error)
        # The last line of a traceback says what; the saved file says where.
        what = traceback.format_exception_only(error)[-1].strip()
        hint = f"the traceback is in {path}; please report it with that file, or look with --debug"
        self.console.error(f"error: samegrad does not know this one: {what}\n  do:    {hint}")
        self.console.document(
            {"error": {"code": "internal", "message": what, "hint": hint, "file": path, "option": None}}
        )


def known_error(error: BaseException) -> SamegradError | None:
    """``error`` as one with an exit code of its own, or None where it can only be a bug in us."""
    if isinstance(error, SamegradError):
        return error
    if (workers := of_a_worker(error)) is not None:
        return workers
    if isinstance(error, OSError) and error.errno in (*_ENVIRONMENT, errno.EFBIG):
        return _environment(error)
    if isinstance(error, OSError) and error.errno in _IN_THE_WAY and users_line(error) is None:
        return _environment(error)
    if _is_out_of_memory(error):
        return OverBudget(
            asked="run within the memory there is",
            found=f"out of memory: {str(error).splitlines()[0] if str(error) else 'no more of it on the host'}",
            do="give a smaller --budget, so that the plan takes fewer rows at a time",
        )
    if not isinstance(error, Exception):
        return None
    theirs = users_line(error)
    if theirs is None:
        return _of_a_layer(error)
    notes = getattr(error, "__notes__", [])
    lines = traceback.format_exception_only(error)
    what = "; ".join([told_in(error) or lines[len(lines) - len(notes) - 1].strip(), *notes])
    return BadInput(
        asked="run your code", found=f"{theirs}: {what}", do="correct it there; --debug shows the traceback",
        file=theirs.rpartition(":")[0],
    )  # fmt: skip


def _is_out_of_memory(error: BaseException) -> bool:
    # Whoever raised torch's error has imported torch; asking for it here would cost every command its start-up.
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from samegrad.exact.out_of_memory import is_out_of_memory

    return is_out_of_memory(error)


def _of_a_layer(error: Exception) -> BadInput | None:
    """The error for what a module of a library raised that samegrad called on the user's batch; None for any other.

    A model that is made of torch's layers alone has no line of the user's.
    """
    layer, place = None, error.__traceback__
    while place is not None:
        frame = place.tb_frame
        if frame.f_code.co_filename.startswith(_OURS):
            layer = None
        elif frame.f_code.co_name == "_call_impl":
            layer = frame.f_locals.get("self")
        place = place.tb_next
    if layer is None:
        return None
    # A line, also of a layer that holds others.
    name = textwrap.shorten(repr(layer), _LONGEST_LAYER, placeholder=" …")
    return BadInput(
        asked="run the model on the batch",
        found=f"{name} raised {type(error).__name__}: {error}",
        do="see whether the batch has the shape, dtype and nesting that the model takes; --debug shows the traceback",
    )


def users_line(error: BaseException) -> str | None:
    """``file.py:12`` where a user's own code raised ``error``; None where samegrad did.

    Frames of libraries are passed over: what calls them wrongly is the code around them. An exception that a data
    worker raised has the worker's frames.
    """
    here = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    libraries = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    for file, line in reversed(frames_in(error) or here):
        if file.startswith(_OURS):
            return None
        if not file.startswith((*libraries, "<")):
            return f"{file}:{line}"
    return None


def save_traceback(error: BaseException) -> str:
    """Path of a new file that holds the traceback of ``error``."""
    handle, path = tempfile.mkstemp(prefix="samegrad-traceback-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    return path


def _environment(error: OSError) -> EnvironmentProblem:
    path = os.fspath(error.filename) if isinstance(error.filename, (str, os.PathLike)) else "a file"
    if error.errno == errno.EFBIG:
        found, do = too_large_a_file()
    else:
        found, do = (_ENVIRONMENT | _IN_THE_WAY)[error.errno or 0], "choose another folder with --output, or make room"
    if error.errno in (errno.EACCES, errno.EPERM):
        do = "give this user the right to it, or choose another folder with --output"
    if (theirs := users_line(error)) is not None:
        found, do = f"{theirs}: {found}", "see that your code may use it, and that there is room"
    return EnvironmentProblem(asked=f"use {path}", found=found, do=do, file=str(path))
