"""What is said of a file that a user brought and that cannot be taken, the same for every kind of file."""

from __future__ import annotations

from pathlib import Path

import samegrad as sg


def refused_file(path: Path, *, what: str, found: str | BaseException, do: str) -> sg.BadInput:
    """The error for ``path``, in which ``what`` was asked for: "picture 3 of the class cat", "a log-mel".

    ``found``: in words, or what a library raised; of that the first line, since what follows is advice for programmers.
    """
    match found:
        case FileNotFoundError():
            told = "no such file"
        case IsADirectoryError():
            told = "a folder, not a file"
        case BaseException():
            told = str(found).strip().partition("\n")[0] or type(found).__name__
        case _:
            told = found
    return sg.BadInput(asked=f"{what} in {path}", found=told, do=do, file=str(path))
