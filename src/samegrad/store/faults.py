"""Named places where a save can be made to fail, so that a test can visit every one of them.

``reach("save.renamed")`` does nothing unless a test planned a fault there. Every name is in ``POINTS``; a test
compares that list with the calls in the source and runs them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import os
import signal
from collections.abc import Iterator

POINTS = (
    "save.begun",
    "save.inside_file",
    "save.file_done",
    "save.files_done",
    "save.manifest_done",
    "save.folder_synced",
    "save.old_aside",
    "save.renamed",
    "save.parent_synced",
    "save.old_hidden",
    "save.old_removed",
    "text.written",
    "text.replaced",
    "metrics.aside",
)


class Action(enum.Enum):
    """What happens at the planned place."""

    NO_SPACE = "OSError with ENOSPC, as a full disk gives"
    KILL = "SIGKILL to this process"
    TERMINATE = "SIGTERM to this process"


@dataclasses.dataclass(kw_only=True)
class _Plan:
    point: str
    action: Action
    visits_left: int


_planned: list[_Plan] = []


@contextlib.contextmanager
def planned(point: str, action: Action, *, visit: int = 1) -> Iterator[None]:
    """While open, the ``visit``-th arrival at ``point`` meets ``action``. For tests."""
    if point not in POINTS:
        raise ValueError(f"no fault point {point!r}; there are {', '.join(POINTS)}")
    plan = _Plan(point=point, action=action, visits_left=visit)
    _planned.append(plan)
    try:
        yield
    finally:
        _planned.remove(plan)


def reach(point: str) -> None:
    """Nothing, unless a fault is planned at ``point``. Raises OSError for a planned NO_SPACE."""
    for plan in _planned:
        if plan.point != point:
            continue
        plan.visits_left -= 1
        if plan.visits_left == 0:
            _act(plan.action)


def _act(action: Action) -> None:
    if action is Action.NO_SPACE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getpid(), signal.SIGKILL if action is Action.KILL else signal.SIGTERM)
