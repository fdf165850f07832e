"""What the model draws in a step: one key a step, and every draw a function of key, call, row and element.

The key is one int64 from torch's default generator, taken when the first draw happens; nothing else advances. The
loss runs once on all rows in every plan, so what it draws is the plain step's own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from samegrad.exact.draw_sites import DrawSites
from samegrad.exact.draws import Draws, StepKey
from samegrad.exact.randomness import keyed


class StepDraws:
    """The draws of one step, the same for every split. ``sites`` None: the model has no draws that are keyed.

    ``key``: the step's, or a () int64 tensor on the device into which each step's is written. ``are_all``: whether the
    model is known to draw nothing else.
    """

    def __init__(
        self, sites: DrawSites | None = None, key: StepKey | Tensor | None = None, *, are_all: bool = False
    ) -> None:
        self.sites = sites
        self.are_all = are_all or sites is not None
        self._key: StepKey | Tensor = StepKey() if key is None else key
        self._running: Draws | None = None
        # What draws in this thread: some rows, perhaps inside the forward of all.
        self._here = threading.local()

    def rows(self, ids: Tensor | None) -> AbstractContextManager[Draws | None]:
        """A forward of the rows ``ids``, (rows,) int64 on the device: their places in the batch."""
        if self.sites is None or ids is None:
            return contextlib.nullcontext()
        return keyed(self._key, ids, sites=self.sites)

    def take(self) -> None:
        """Takes the key now, where there is anything to draw; whatever advances a generator later is something else."""
        if self.sites is not None and isinstance(self._key, StepKey):
            self._key.take()

    def key_on(self, device: torch.device) -> Tensor:
        """() int64 on ``device``: the step's key."""
        return self._key.tensor(device) if isinstance(self._key, StepKey) else self._key.to(device)

    @contextlib.contextmanager
    def all_rows(self, ids: Tensor | None) -> Iterator[None]:
        """A forward of the whole batch, parts of which may draw in chunks (``part``)."""
        if self.sites is None or ids is None:
            yield
            return
        with keyed(self._key, ids, sites=self.sites.for_all_rows()) as running:
            self._running = running
            try:
                yield
            finally:
                self._running = None

    def again(self) -> Callable[[], AbstractContextManager[object]]:
        """For what begins now and is to run again in backward: the draws that it makes now.

        To be entered by the frame that runs all of it again.
        """
        running, key = getattr(self._here, "running", None) or self._running, self._key
        if running is None:
            return contextlib.nullcontext
        ids, sites, first_call = running.ids, running.sites, running.calls
        return lambda: keyed(key, ids, sites=sites, first_call=first_call)

    @contextlib.contextmanager
    def drawn_by(self, running: Draws | None) -> Iterator[None]:
        """A block in which ``running`` draws, in this thread: what ``again`` makes again there."""
        before = getattr(self._here, "running", None)
        self._here.running = running
        try:
            yield
        finally:
            self._here.running = before

    def part(self) -> Callable[[Tensor], AbstractContextManager[object]]:
        """For the part of the model that runs now, in chunks and again in backward: its draws, given a chunk's rows.

        The first chunk moves the whole forward's count of draws past the part.
        """
        running, sites, key = self._running, self.sites, self._key
        if running is None or sites is None:
            return lambda _: contextlib.nullcontext()
        first_call = running.calls
        counted: list[int] = []

        @contextlib.contextmanager
        def drawing(ids: Tensor) -> Iterator[None]:
            with keyed(key, ids, sites=sites, first_call=first_call) as mine, self.drawn_by(mine):
                yield
            if not counted:
                counted.append(mine.calls)
                running.calls = mine.calls

        return drawing
