"""A run that torchrun started several times over: one process a device, of which the first one speaks.

Every rank keeps a folder of its own, since each is a whole run with a plan of its own; what is resumed is the first
rank's checkpoint on all of them, so that nobody is a save ahead of the others.
"""

from __future__ import annotations

import os
from pathlib import Path


def own_rank() -> int:
    """This process's number among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def rank_count() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_folder(output: Path) -> Path:
    """The folder of this rank for ``--output``: the one asked for, or a neighbour of it."""
    rank = own_rank()
    return output.with_name(f"{output.name}-rank-{rank}") if rank else output


def first_folder(own: Path) -> Path:
    """The first rank's folder, from this rank's."""
    return own.with_name(own.name.removesuffix(f"-rank-{own_rank()}")) if own_rank() else own
