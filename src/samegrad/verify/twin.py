"""The same step in float64: copies of the model and the loss, and a watch on whether they really compute in it.

Low precision alone proves nothing, so the program that ran in it is run again in float64 on a few rows. Models that
fix a narrower dtype inside (``x.float()`` in a norm) are judged by the narrowest one seen.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.data.prefetch import stream_chunks
from samegrad.declared import DeclaredStep
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.calls import line_from
from samegrad.exact.float64 import float64_declared
from samegrad.exact.looking_on import LookingOn
from samegrad.exact.one_chunk import ChunkedStep
from samegrad.exact.split import SplitStep
from samegrad.verify.sides import Planned


def float64_twin(planned: Planned) -> Planned:
    """The same planned step on copies of the model and the loss in float64."""
    declared = float64_declared(planned.declared, planned.declared.device)
    return dataclasses.replace(
        planned,
        declared=declared,
        split=_on(declared, planned.split),
        by_rows=_on(declared, planned.by_rows),
    )


def _on(declared: DeclaredStep, split: ChunkedStep | None) -> ChunkedStep | None:
    """``split`` of the copy ``declared``."""
    if split is None:
        return None
    roots: dict[str, nn.Module] = {"": declared.network}
    if declared.loss_module is not None:
        roots["loss_fn"] = declared.loss_module
    copy_of_it = dataclasses.replace(split, declared=declared, aliases=ParameterAliases(roots))
    if declared.device.type == "cuda" and isinstance(copy_of_it, SplitStep):
        # Wide rows would leave wide places behind in the step's own prefetcher.
        return dataclasses.replace(copy_of_it, chunks=stream_chunks)
    return copy_of_it


def copied(declared: DeclaredStep) -> DeclaredStep:
    """The declared step on copies of the model and the loss as they are."""
    network, loss_module = copy.deepcopy((declared.network, declared.loss_module))
    loss_fn = declared.loss_fn if loss_module is None else loss_module
    return dataclasses.replace(declared, model=network, loss_fn=loss_fn, optimizer=None)


class NarrowestSeen(LookingOn):
    """Keeps the narrowest floating dtype that any operation inside the block returned, and ``where`` that was first."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64
        self.where = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in trees.leaves_of(result):
            # Scalars on the host, such as constants, are not what is computed with.
            computed = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0
            if computed and torch.finfo(leaf.dtype).eps > torch.finfo(self.dtype).eps:
                self.dtype, self.where = leaf.dtype, _place_of(func, leaf.dtype)
        return result


def _place_of(func: Any, dtype: torch.dtype) -> str:
    """Which operation made a tensor of ``dtype``, where in the user's code, in words."""
    line = line_from(sys._getframe(2))
    name = str(func).removeprefix("aten.").partition(".")[0]
    name = "a cast" if name == "_to_copy" else name
    return f"{name}{f' ({line})' if line else ''} gives {str(dtype).removeprefix('torch.')} there too"


class Nudge:
    """Moves numbers by one unit in the last place, up or down at random; a function of the seed alone."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def moved(self, tensor: Tensor) -> Tensor:
        """``tensor`` with every floating number moved; others as they are."""
        if not tensor.is_floating_point():
            return tensor
        signs = torch.randint(0, 2, tensor.shape, generator=self._generator).to(tensor.device)
        return tensor * (1 + (2 * signs - 1).to(tensor.dtype) * torch.finfo(tensor.dtype).eps)

    @contextlib.contextmanager
    def applied(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """``parameters`` moved inside the block, and bit for bit as before after it."""
        before = [parameter.detach().clone() for parameter in parameters]
        try:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.copy_(self.moved(parameter))
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before):
                    parameter.copy_(value)
