"""Whether a folder that results are to go to can be written to; asked before the work and not after it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from samegrad.errors import EnvironmentProblem


def check_output(folder: Path | None, *, option: str | None = "output") -> None:
    """Raises EnvironmentProblem where ``folder`` is no folder, cannot become one or is closed to this user.

    Makes nothing. ``option``: the one that names the folder.
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
            return


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
