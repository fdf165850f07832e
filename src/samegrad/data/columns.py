"""Which of a file's columns or tensors was meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from samegrad.errors import BadInput

_SHOWN = 12


def chosen_column(path: str, *, column: str | None, names: Sequence[str], kind: str) -> str:
    """The name that ``column`` means among ``names``; the only one there is when it is None.

    ``kind`` is what the format calls them. Raises BadInput listing the names, with the nearest one first.
    """
    if column is not None and column in names:
        return column
    if column is None and len(names) == 1:
        return names[0]
    listed = ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.4) if column else []
    raise BadInput(
        asked=f"rows of {path}" if column is None else f"{kind} {column!r} of {path}",
        found=f"no {kind} of numbers" if not names else f"the {kind}s {listed}",
        do=f"did you mean column={near[0]!r}?" if near else f"name one {kind} with column=",
        file=path,
        option="column",
    )
