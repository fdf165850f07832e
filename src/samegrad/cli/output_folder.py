"""The folder that results go to: whether it can be written to, asked before the work, and files replaced in it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from samegrad.errors import EnvironmentProblem, too_large_a_file


def check_output(folder: Path | None, *, option: str | None = "output", files: Sequence[str] = ()) -> None:
    """Raises EnvironmentProblem where ``folder`` is no folder, cannot become one or is closed to this user.

    Makes nothing. ``option``: the one that names the folder. ``files``: what will be written in it; where a folder of
    such a name stands, it is in the way.
    """
    if folder is None:
        return
    # What is not there will be made below the nearest that is.
    for place in (folder, *folder.parents):
        found = _wrong_with(place)
        if found is not None:
            raise EnvironmentProblem(
                asked=f"write results to {folder}",
                found=f"{place}: {found}",
                do="name another folder, or move away what is there" if option is None
                else f"name another folder with --{option}, or move away what is there",
                file=str(place),
                option=option,
            )  # fmt: skip
        if place.exists():
            break
    for path in (folder / name for name in files):
        if path.exists() and not path.is_file():
            raise EnvironmentProblem(
                asked=f"write {path}",
                found="a folder stands there, where a file is needed",
                do="move that folder away" if option is None
                else f"move that folder away, or name another one for the results with --{option}",
                file=str(path),
                option=option,
            )  # fmt: skip


def write_output(folder: Path, name: str, text: str) -> None:
    """``name`` in ``folder``, which is made if need be: replaced in one move, so that what stood there is not lost.

    Raises EnvironmentProblem where the system refuses.
    """
    path, temporary = folder / name, folder / f".tmp-{os.getpid()}-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        found, do = error.strerror or str(error), "make room, or name another folder"
        if error.errno == errno.EFBIG:
            found, do = too_large_a_file()
        elif error.errno == errno.EISDIR:
            found, do = "a folder stands there, where a file is needed", "move that folder away"
        raise EnvironmentProblem(
            asked=f"write {path}", found=found, do=f"{do}; what stood there before is as it was", file=str(path)
        ) from error


def _wrong_with(place: Path) -> str | None:
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        return f"a link to {os.readlink(place)}, which is not there" if place.is_symlink() else None
    except NotADirectoryError:
        # The file that stands in the way is one of the parents.
        return None
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(mode):
        return "a file stands there, where a folder is needed"
    return None if os.access(place, os.W_OK | os.X_OK) else "this user may not write there"
