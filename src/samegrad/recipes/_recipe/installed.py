"""What is said where a package is missing that recipes need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import samegrad as sg

INSTALL = "pip install 'samegrad[recipes]'"


@contextlib.contextmanager
def needed_for_pictures() -> Iterator[None]:
    """A block that draws. Raises EnvironmentProblem where a package for that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise sg.EnvironmentProblem(asked="the pictures of the run", found=str(error), do=INSTALL) from None
