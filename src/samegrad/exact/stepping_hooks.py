"""Optimizers that step inside backward, by hooks on parameters: what they cannot be combined with.

Such a hook steps and clears a gradient as soon as it is whole. A gradient that is still scaled by a GradScaler, or to
which other batches of the same step are to be added, is not whole yet, and nobody would see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from samegrad.errors import UsageError
from samegrad.exact import containers
from samegrad.exact.handoff import post_accumulate_hooks


def refuse_stepping_hooks(parameters: Iterable[nn.Parameter], *, asked: str, do: str) -> None:
    """Raises UsageError where a hook of a parameter holds an optimizer."""
    for parameter in parameters:
        for hook in (post_accumulate_hooks(parameter) or {}).values():
            if _holds_optimizer(hook):
                raise UsageError(
                    asked=asked,
                    found=f"a hook on a parameter of shape {tuple(parameter.shape)} "
                    f"({getattr(hook, '__qualname__', type(hook).__name__)}) steps an optimizer inside backward, "
                    "before the gradient is whole",
                    do=do,
                )


def _holds_optimizer(hook: Callable[..., Any]) -> bool:
    function: Any = getattr(hook, "__func__", hook)
    held = [getattr(hook, "__self__", None), *(getattr(hook, "args", None) or ())]
    held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    held += [*(getattr(function, "__defaults__", None) or ()), *getattr(hook, "__dict__", {}).values()]
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    held += [names[name] for name in (code.co_names if code is not None else ()) if name in names]
    known = containers.CONTAINERS
    entries = [entry for value in held if isinstance(value, known) for entry in containers.values(value)]
    return any(isinstance(value, Optimizer) for value in (*held, *entries))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # an empty one raises
    except ValueError:
        return False
    return True
