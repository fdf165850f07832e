"""The step's own code under levers that change what it sees: what it raises there speaks against them, not for an end.

A model that takes ``.view`` of what a convolution made raises with channels last, and runs without.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator

import torch

from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit, SamegradError
from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.measure.failures import first_line, is_of_the_users_code
from samegrad.measure.within_memory import place_of


@contextlib.contextmanager
def own_code_under(levers: Iterable[str], declared: DeclaredStep) -> Iterator[None]:
    """A block that runs the step, which ran as it is, under ``levers`` by name. Raises CannotSplit for its own errors.

    What is wrong with the device, the compiler, the memory or samegrad itself goes on as it is.
    """
    try:
        yield
    except SamegradError:
        raise
    except Exception as error:  # of any type, since it is the user's code that chose it; all others are raised again
        others = is_out_of_memory(error) or of_a_compiler(error) or isinstance(error, torch.AcceleratorError)
        if others or not is_of_the_users_code(error):
            raise
        raise CannotSplit(
            asked=f"run the step under {', '.join(levers)}",
            found=f"the step's own code raises under it, in {place_of(error, declared)}: {first_line(error)}",
            do="change that line if the lever is wanted; without it nothing is to be done",
        ) from error


def of_a_compiler(error: Exception) -> bool:
    """Whether torch.compile raised it."""
    compiler = sys.modules.get("torch._dynamo.exc")
    return compiler is not None and isinstance(error, compiler.TorchDynamoException)
