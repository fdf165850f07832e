"""The folder of one run, held by one process: its lock, its text files, its metrics, its checkpoints.

    run.lock   held for the life of the process; the kernel frees it, also on kill -9
    status.json   plan.json   config.json   report.html   …   replaced in one move each
    metrics.jsonl   one line a record       checkpoints/   see ``manifest``

1. Nothing in the folder is touched before the lock is held; left-over temporaries are removed after.
2. The lock file stays: removing it would let two processes lock two files of one name.
3. A forked child (a data worker) gives its copy of the lock up, or it would outlive a killed parent.
4. A folder in which nothing has been done yet (a start that was refused: options and a status, no plan) is as good as
   an empty one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from samegrad.errors import BadInput, EnvironmentProblem, UsageError
from samegrad.store.durable import clean_temporaries, disk_problem, temporary_name, write_atomically
from samegrad.store.manifest import is_file_name
from samegrad.store.metrics import append_line, json_line, rewind

LOCK = "run.lock"
_METRICS = "metrics.jsonl"
_STATUS = "status.json"
# rule 4
_OF_A_START = {_STATUS, "config.json"}
_FREE_SPACE = "free space there, or give another --output"


class RunFolder:
    """A run's folder that this process holds until it is closed or dies; a context manager.

    Made by ``create`` for a new run, by ``resume`` for one that goes on.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock of the existing folder ``path``. Raises EnvironmentProblem: held by another, read-only."""
        self.path = path
        self._metrics: int | None = None
        self._lock = _Lock(path)
        try:
            _probe(path)
            clean_temporaries(path)
            clean_temporaries(self.checkpoints)
        except OSError as error:
            self.close()
            raise disk_problem(error, asked="use the run's folder", path=path, do=_WRITABLE) from error
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """A new folder, or an existing one in which nothing was done. Raises UsageError where a run stands already."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.mkdir()
            _refuse_file(path)
            holder = _entries(path) and _other_holder(path)
        except OSError as error:
            raise disk_problem(error, asked="create the run's folder", path=path, do=_WRITABLE) from error
        if holder:
            raise _in_use(path, holder)
        _refuse_used(path)
        run = cls(path)
        try:
            # Another run may have come and gone between the look and the lock.
            _refuse_used(path)
        except UsageError:
            run.close()
            raise
        return run

    @classmethod
    def resume(cls, path: Path) -> RunFolder:
        """The folder of an earlier run, its metrics free of half a line. Raises BadInput where there is none."""
        _refuse_file(path)
        if not path.is_dir():
            raise BadInput(
                asked=f"resume the run in {path}", found="no such folder",
                do="give the folder of an earlier run, or start a new one without --resume",
                file=str(path), option="resume",
            )  # fmt: skip
        run = cls(path)
        run._rewind(step=None)
        return run

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints go: the ``folder`` of ``save_checkpoint`` and ``load_checkpoint``."""
        return self.path / "checkpoints"

    def write_text(self, name: str, text: str) -> Path:
        """The file ``name`` in the folder, now ``text``: replaced in one move, on the disk.

        Raises UsageError for a name with a path in it, EnvironmentProblem when the disk refuses.
        """
        self._check_held()
        if not is_file_name(name):
            raise UsageError(
                asked=f"write {name!r} in {self.path}",
                found="not a plain file name",
                do="give for example plan.json",
            )
        data = text.encode()
        try:
            write_atomically(self.path / name, data)
        except OSError as error:
            raise disk_problem(
                error, asked=f"write {name}", path=self.path / name, do=_FREE_SPACE, needed_bytes=len(data)
            ) from error
        return self.path / name

    def remove(self, name: str) -> None:
        """The file ``name`` in the folder is gone, where it was there."""
        self._check_held()
        (self.path / name).unlink(missing_ok=True)

    def write_status(self, status: Mapping[str, Any]) -> None:
        """``status.json``, replaced in one move; floats that are not finite become null."""
        self.write_text(_STATUS, json_line(status, place=_STATUS) + "\n")

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``, handed to the system before this returns; not-finite floats become null.

        record: needs "step", an int, so that a resumed run can drop what it will do again. Raises UsageError.
        """
        self._check_held()
        if type(record.get("step")) is not int:
            raise UsageError(
                asked=f"write to {_METRICS}",
                found=f"a record whose 'step' is {record.get('step')!r}",
                do="give every record its step as an int",
            )
        line = json_line(record, place=_METRICS)
        try:
            if self._metrics is None:
                self._metrics = os.open(self.path / _METRICS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            append_line(self._metrics, line)
        except OSError as error:
            raise disk_problem(
                error,
                asked=f"write to {_METRICS}",
                path=self.path / _METRICS,
                do=_FREE_SPACE,
                needed_bytes=len(line) + 1,
            ) from error

    def rewind_metrics(self, *, step: int) -> int:
        """How many lines were dropped: those after ``step``, which the resumed run will write again."""
        return self._rewind(step=step)

    def _rewind(self, *, step: int | None) -> int:
        self._check_held()
        self._close_metrics()
        try:
            return rewind(self.path / _METRICS, step=step)
        except OSError as error:
            raise disk_problem(error, asked=f"rewind {_METRICS}", path=self.path / _METRICS, do=_FREE_SPACE) from error

    def _check_held(self) -> None:
        if not self._lock.held:
            raise UsageError(
                asked=f"write in {self.path}",
                found="this process no longer holds the folder (closed, or a forked child)",
                do="write before closing, and only from the process that opened it",
            )

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None

    def close(self) -> None:
        """Give the folder up; safe to call twice."""
        self._close_metrics()
        self._lock.give_up()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Lock:
    """The lock of one folder, held from construction until ``give_up`` or the end of the process."""

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = _take_lock(path)
        # Rule 3. Closing a child's copy leaves the parent's lock alone.
        os.register_at_fork(after_in_child=self.give_up)

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def give_up(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_WRITABLE = "give an --output folder that this user can write to"


def _take_lock(path: Path) -> int:
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise disk_problem(error, asked="use the run's folder", path=path / LOCK, do=_WRITABLE) from error
    try:
        _lock_now(descriptor)
        holder = {
            "pid": os.getpid(), "host": socket.gethostname(), "started": datetime.now(UTC).isoformat("T", "seconds"),
        }  # fmt: skip
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())
    except BlockingIOError:
        os.close(descriptor)
        raise _in_use(path, _read_holder(path)) from None
    except OSError as error:
        os.close(descriptor)
        raise disk_problem(
            error,
            asked=f"lock {LOCK}",
            path=path,
            do=_FREE_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "give an --output on a local disk: locks do not work there",
        ) from error
    return descriptor


def _lock_now(descriptor: int) -> None:
    # A look by ``_other_holder`` and a child just forked hold the lock for a moment; a run holds it for good.
    for _ in range(5):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _other_holder(path: Path) -> str | None:
    """Who holds the lock of ``path``, or None; takes nothing."""
    try:
        descriptor = os.open(path / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(path)
    finally:
        os.close(descriptor)
    return None


def _read_holder(path: Path) -> str:
    try:
        holder = json.loads((path / LOCK).read_bytes())
        return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not written its name yet"


def _in_use(path: Path, holder: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        asked=f"use the run's folder {path}",
        found=f"{path / LOCK} is held by {holder}",
        do="wait for that run to end, or give another --output",
        file=str(path / LOCK),
        option="output",
    )


def _entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def _refuse_used(path: Path) -> None:
    used = [name for name in _entries(path) if name != LOCK]
    # Without a status, config.json is somebody's own.
    if used and not (_STATUS in used and set(used) <= _OF_A_START):
        raise UsageError(
            asked=f"start a new run in {path}",
            found=f"the folder is not empty: {', '.join(used[:5])}",
            do=f"continue that run with --output {path} --resume, or start a new one in another folder with --output",
            option="output",
        )


def _refuse_file(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise EnvironmentProblem(
            asked=f"use {path} as a run's folder", found="a file stands there", do="give another --output",
            file=str(path), option="output",
        )  # fmt: skip


def _probe(path: Path) -> None:
    probe = path / temporary_name("probe")
    write_atomically(probe, b"samegrad can write here\n")
    probe.unlink()
