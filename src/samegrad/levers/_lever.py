"""The contract of a lever: one way to need less memory, one file, one slot.

A lever is a frozen dataclass whose fields are its knobs. A plan holds at most one lever a slot; slot order is nesting
order, so what excludes what is data and not code. Levers never import each other or what executes them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from samegrad.declared import Around, DeclaredStep
from samegrad.exact.compiler import CompilerSettings
from samegrad.exact.find_head import HeadInChunks
from samegrad.exact.schemes import Scheme, nested, unchanged
from samegrad.records import Exactness, Footprint


class Slot(enum.IntEnum):
    """Outermost first."""

    DATA = 0
    SPLIT = 1
    PRECISION = 2
    RECOMPUTE = 3
    SAVED = 4
    LOSS = 5
    STATE = 6
    LAYOUT = 7
    ALGORITHMS = 8
    COMPILE = 9
    CAPTURE = 10
    ALLOCATOR = 11


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a declared step is being run. ``sizes`` are the rows of each chunk, None the plain call.

    ``rows_on_host``: the batch stays where it is and only chunks travel. ``kept_chunks``: how many keep their graph
    from the first of two passes. ``scheme``: what puts parts of the model into chunks, where rows cannot be split
    through the whole model. ``inside``: what is in force in the model itself, whatever rows it is run on.
    ``calls_submodules``: whether the model's own submodules are what is called then. ``needs_scaler``: gradients
    vanish where the loss is not scaled. ``one_pass_for``: the lever that needs the loss in the pass that computes the
    outputs, and ``head`` the head whose loss runs in chunks. ``again``: blocks that run again in backward.
    ``compiler``: what the loss of a chunk is compiled with. ``captures``: chunks are captured and replayed.
    ``travels``: the lever that moves tensors to the host and back meanwhile.
    """

    declared: DeclaredStep
    batch_rows: int
    sizes: tuple[int, ...] | None = None
    rows_on_host: bool = False
    kept_chunks: int = 0
    scheme: Scheme | None = None
    needs_scaler: bool = False
    one_pass_for: str = ""
    head: HeadInChunks | None = None
    inside: Scheme | None = None
    calls_submodules: bool = True
    again: tuple[tuple[str, ...], ...] = ()
    compiler: CompilerSettings | None = None
    captures: bool = False
    travels: str = ""

    @property
    def maps(self) -> bool:
        """Whether something stands in the place of parts of the model."""
        return self.scheme is not None or self.inside is not None

    @property
    def splits(self) -> bool:
        """Whether there are chunks at all."""
        return self.sizes is not None and len(self.sizes) > 1

    @property
    def mapping(self) -> Scheme | None:
        """By what the model runs on the whole batch; None where its rows go through all of it in chunks, or plainly."""
        if self.programmed and self.scheme is unchanged:
            return None
        if self.inside is None or (self.scheme is None and (self.splits or self.programmed)):
            return self.scheme
        return self.inside if self.scheme is None else nested(self.scheme, self.inside)

    @property
    def runs_whole(self) -> bool:
        """Whether this is the plain call."""
        return not self.maps and not self.splits and not self.programmed

    @property
    def programmed(self) -> bool:
        """Whether chunks are more than Python's calls, be there only one of them."""
        return self.captures or self.compiler is not None


class Lever(Protocol):
    """What every lever file brings, as a frozen dataclass.

    One that changes the chunks also predicts itself, a ``PredictedLever``. One that leaves them as they are is followed
    or probed under the knobs that it has by default, and predicted by that.
    """

    name: ClassVar[str]
    slot: ClassVar[Slot]
    exactness: ClassVar[Exactness]

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        """Why this step cannot take the lever, with the place, or None."""
        ...

    def apply(self, execution: Execution) -> AbstractContextManager[Execution]:
        """The execution with this lever in force; leaving the block undoes everything, on every way out."""
        ...

    def knobs(self) -> dict[str, Any]: ...


@runtime_checkable
class PredictedLever(Lever, Protocol):
    """A lever that is predicted by laws of its own, on top of those of the plain step."""

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        """Knob settings worth trying under a budget, fastest first."""
        ...

    def predict(self, footprint: Footprint) -> Footprint:
        """The footprint with this lever taken."""
        ...


@runtime_checkable
class StandingLever(Protocol):
    """A lever that also puts something in place for as long as its plan is in force, between steps as well."""

    def standing(self, declared: DeclaredStep) -> AbstractContextManager[Around]:
        """A block in which it stands; leaving it puts everything back, on every way out.

        It yields what goes around every backward inside it.
        """
        ...


@runtime_checkable
class ChoosyLever(Protocol):
    """The class of a lever that some declared steps cannot take, or gain nothing by, before anything is measured."""

    def unsuited(self, declared: DeclaredStep) -> str | None:
        """Why this step is one of them, with the place, or None."""
        ...
