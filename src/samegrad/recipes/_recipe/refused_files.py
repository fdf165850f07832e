"""Files that a user brought: how any kind is opened, and what is said of one that cannot be taken."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import samegrad as sg


def open_file(path: Path) -> BinaryIO:
    """``path``, to be read. Raises OSError where that cannot be, also for a pipe, a socket or a device: reading one of
    these would wait for whoever writes into it, or never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError("a pipe, a socket or a device, not a file")
    return path.open("rb")


def refused_file(path: Path, *, what: str, found: str | BaseException, do: str) -> sg.BadInput:
    """The error for ``path``, in which ``what`` was asked for: "picture 3 of the class cat", "a log-mel".

    ``found``: in words, or what a library raised; of that the first line, since what follows is advice for programmers.
    """
    match found:
        case FileNotFoundError():
            told = "no such file"
        case IsADirectoryError():
            told = "a folder, not a file"
        case OSError(strerror=str(reason)):
            told = reason
        case BaseException():
            told = str(found).strip().partition("\n")[0] or type(found).__name__
        case _:
            told = found
    return sg.BadInput(asked=f"{what} in {path}", found=told, do=do, file=str(path))
