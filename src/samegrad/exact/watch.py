"""A function that runs again later must be the same function: modes, buffers and generators are watched.

Recomputation in backward happens whenever the user calls it. Between the two a module may have been switched to
training, or its buffers updated, and what runs again would be another function without a word.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from samegrad.errors import CannotSplit, GradientsDiffer
from samegrad.exact.undisturbed import Generators


@dataclasses.dataclass(frozen=True)
class Watch:
    """Modes and buffers of ``modules`` as they were at the call."""

    modules: tuple[nn.Module, ...]
    device: torch.device
    modes: tuple[bool, ...]
    buffers: tuple[tuple[str, Tensor, int], ...]

    @classmethod
    def of(cls, modules: Sequence[nn.Module], device: torch.device) -> Watch:
        kept = tuple(modules)
        named = [(name, buffer) for module in kept for name, buffer in module.named_buffers()]
        return cls(kept, device, _modes(kept), tuple((n, b, b._version) for n, b in named))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A run of the function: the one watched, drawing nothing and changing nothing.

        Raises GradientsDiffer when it would be another one than at the call, CannotSplit when it draws or changes a
        buffer; generators are put back.
        """
        if _modes(self.modules) != self.modes:
            raise GradientsDiffer(
                asked="run rows again in backward as they ran at the call",
                found="modules were switched between training and eval mode in between",
                do="call backward() before train() or eval()",
            )
        if changed := self._changed():
            raise GradientsDiffer(
                asked="run rows again in backward as they ran at the call",
                found=f"buffers were changed in between: {', '.join(changed[:3])}",
                do="call backward() before whatever updates them",
            )
        generators = Generators(self.device)
        with generators.restored_on_failure():
            yield
            drew, changed = generators.advanced(), self._changed()
            if drew or changed:
                found = f"it draws random numbers ({', '.join(drew)})" if drew else f"it changes {changed[:3]}"
                raise CannotSplit(
                    asked="a function that is the same for every chunk",
                    found=f"{found}, although it did not when it was examined",
                    do="draw outside and pass the draw in; update state outside the function",
                )

    def _changed(self) -> list[str]:
        return [name for name, buffer, version in self.buffers if buffer._version != version]


def _modes(modules: Sequence[nn.Module]) -> tuple[bool, ...]:
    return tuple(part.training for module in modules for part in module.modules())
