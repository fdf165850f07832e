"""torch.compile as the levers use it: static shapes, settings that hold for one step only, and what it did counted.

Each function has code of its own: compilers keep what they made by the code object, and count against its limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from samegrad.errors import CannotSplit
from samegrad.exact.undisturbed import Generators

if TYPE_CHECKING:
    from samegrad.exact.compiled_runs import RunAgain

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class CompilerSettings:
    """``mode`` and ``fullgraph`` as in torch.compile, ``backend`` likewise; ``recompile_limit`` of each function.

    ``again``: runs of submodules, each of which keeps only what enters it and runs again in backward.
    """

    mode: str = "default"
    fullgraph: bool = False
    recompile_limit: int = 8
    backend: str = "inductor"
    again: tuple[tuple[str, ...], ...] = ()


class Compiler:
    """Compiles functions under ``settings``, and counts what came of it. Nothing global stays changed."""

    def __init__(self, settings: CompilerSettings) -> None:
        self._settings = settings
        self._again: RunAgain | None = None
        self.graph_breaks = 0
        self.compilations = 0

    def compiled(self, function: _Function, device: torch.device) -> _Function:
        """``function``, compiled when it is called; its draws on ``device`` are those of its own code alone."""
        settings = self._settings
        made: Callable[..., Any] = torch.compile(
            _own_code(function), mode=settings.mode, fullgraph=settings.fullgraph, backend=settings.backend,
            dynamic=False,
        )  # fmt: skip

        def run(*args: Any) -> Any:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                # Compiled by now, on the run before.
                return made(*args)
            generators, before = Generators(device), self.compilations
            with self._counting():
                found = made(*args)
            if self.compilations != before:
                # Compilers draw numbers to try kernels on.
                generators.restore()
                self._check_again()
            return found

        return cast(_Function, run)

    def notes(self) -> list[str]:
        """How often it compiled and where it broke, in words."""
        if not self.compilations:
            return []
        return [f"compile: {self.compilations} graphs compiled, {self.graph_breaks} graph breaks"]

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        from torch._dynamo import config
        from torch._dynamo.utils import counters

        breaks, made = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
        with config.patch(recompile_limit=self._settings.recompile_limit), self._running_again():
            yield
        self.graph_breaks += sum(counters["graph_break"].values()) - breaks
        self.compilations += counters["stats"]["unique_graphs"] - made

    @contextlib.contextmanager
    def _running_again(self) -> Iterator[None]:
        """Blocks that run again in backward are told to the compiler, for what is compiled inside the block."""
        if not self._settings.again:
            yield
            return
        from torch._inductor import config

        if self._again is None:
            # Imported where it is needed: the compiler takes seconds to import.
            from samegrad.exact.compiled_runs import RunAgain

            self._again = RunAgain(self._settings.again)
        with config.patch(joint_custom_pre_pass=self._again):
            yield

    def _check_again(self) -> None:
        """Raises CannotSplit where a block was to run again and the compiler does not know what came from it.

        Graphs from the compiler's cache are not looked at: they were, when they were made.
        """
        if self._again is None or self._again.graphs != self.compilations:
            return
        if missing := self._again.not_found():
            raise CannotSplit(
                asked=f"compile a chunk in which {missing[0]} runs again in backward",
                found=f"the compiler (torch {torch.__version__}) does not say which of its operations are of it, so "
                "that all of them would be kept",
                do="leave the lever compile or those blocks out of the plan; please report the model and the version",
            )


def _own_code(function: Any) -> Any:
    function.__code__ = function.__code__.replace()
    return function
