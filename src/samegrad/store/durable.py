"""Files and folders that are either whole or not there, also after kill -9 or a full disk.

Rules, cited by number:

1. Nothing stands under its real name before its bytes are on the disk: write under a ``.tmp-`` name, fsync, rename.
2. A rename is on the disk once the folder that holds the name is fsynced.
3. A folder is hidden under a ``.tmp-`` name before it is removed, so no half-removed folder has a real name.
4. ``.tmp-`` names belong to nobody once the run lock is ours; only then are they removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from samegrad.errors import EnvironmentProblem, too_large_a_file
from samegrad.store import faults
from samegrad.units import format_bytes

TEMPORARY = ".tmp-"
_PIECE_BYTES = 16 * 2**20


def unique_name(name: str) -> str:
    """``name`` with a prefix that no other process and no later call takes."""
    return f"{os.getpid()}.{secrets.token_hex(4)}-{name}"


def temporary_name(name: str) -> str:
    return TEMPORARY + unique_name(name)


class DurableFile:
    """A new file whose size and sha256 are known when it is closed, and whose bytes are then on the disk.

    Writes are unbuffered and go on until every byte is taken. Raises OSError (also for a file that exists).
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            self._digest.update(piece)
            while piece:
                # A raw write may take fewer bytes than given, the last one before a full disk does.
                taken = self._file.write(piece)
                self.size_bytes += taken
                piece = piece[taken:]
            faults.reach("save.inside_file")

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step: a reader sees the old or the new file. Raises OSError."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        with DurableFile(temporary) as file:
            file.write(data)
        faults.reach("text.written")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    faults.reach("text.replaced")
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in ``folder`` on the disk (rule 2). Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove ``folder`` so that it never stands half removed under its name (rule 3). Raises OSError."""
    hidden = folder.with_name(temporary_name(folder.name))
    folder.rename(hidden)
    faults.reach("save.old_hidden")
    shutil.rmtree(hidden)
    faults.reach("save.old_removed")


def clean_temporaries(folder: Path) -> tuple[str, ...]:
    """Names of the left-over ``.tmp-`` entries of ``folder``, now removed. Call it only under the run lock (rule 4).

    Links are removed, never followed. Raises OSError.
    """
    if not folder.is_dir():
        return ()
    found = sorted(entry for entry in folder.iterdir() if entry.name.startswith(TEMPORARY))
    for entry in found:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return tuple(entry.name for entry in found)


def free_bytes(folder: Path) -> int:
    """Bytes an ordinary user can still write to the file system of ``folder``. Raises OSError."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def disk_problem(
    error: OSError, *, asked: str, path: Path, do: str, needed_bytes: int | None = None
) -> EnvironmentProblem:
    """The error for a file operation that the system refused, with its reason and the free space."""
    if error.errno == errno.EFBIG:
        reason, do = too_large_a_file()
        needed = "" if needed_bytes is None else f"; needed {format_bytes(needed_bytes)}"
        return EnvironmentProblem(asked=asked, found=f"{path}: {reason}{needed}", do=do, file=str(path))
    if error.errno == errno.EISDIR:
        return EnvironmentProblem(
            asked=asked, found=f"{path}: a folder stands there, where a file is needed", do="move that folder away",
            file=str(path),
        )  # fmt: skip
    found = f"{path}: {error.strerror or error}"
    try:
        free = format_bytes(free_bytes(path if path.is_dir() else path.parent))
    except OSError:
        free = "unknown"
    if needed_bytes is not None:
        found += f"; needed {format_bytes(needed_bytes)}, free {free}"
    return EnvironmentProblem(asked=asked, found=found, do=do, file=str(path))
