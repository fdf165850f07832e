"""Submodules that a lever's knobs name, and a forward of the lever's own in their place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import fx, nn

from samegrad import trees
from samegrad.errors import BadInput, Untraceable
from samegrad.exact.replaced_forward import forward_replaced

# around(forward, args, kwargs): what a call of a part does, given its own forward.
Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def parts_called(lever: str, network: nn.Module, paths: Sequence[str], around: Around) -> Iterator[None]:
    """Calls of the submodules ``paths`` go through ``around``, also where a block runs again in backward.

    Raises BadInput for a path that is none.
    """
    known = dict(network.named_modules())
    with ExitStack() as stack:
        for path in paths:
            if path not in known:
                raise BadInput(
                    asked=f"{lever} for the part {path!r}",
                    found="the model has no such part",
                    do="use names of model.named_modules()",
                )
            stack.enter_context(_called(lever, path, known[path], around))
        yield


def _called(lever: str, path: str, part: nn.Module, around: Around) -> AbstractContextManager[None]:
    return forward_replaced(part, functools.partial(_call, lever, path, part.forward, around))


def _call(lever: str, path: str, forward: Callable[..., Any], around: Around, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(leaf, fx.Proxy) for leaf in trees.leaves_of((args, kwargs))):
        # A record holds the part's operations, and nothing of what is round them.
        raise Untraceable(
            asked="record what the model computes",
            found=f"{lever} names the part {path!r}, which is taken apart when it is recorded",
            do="name the layers in it, leave it out, or let chunks meet at each BatchNorm (rendezvous)",
        )
    return around(forward, args, kwargs)
