"""What a lever puts in force in a network while a step runs: parts in chunks, blocks that run again in backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from samegrad.exact.state import StateRule
from samegrad.exact.step_draws import StepDraws


class Scheme(Protocol):
    """A block in which ``network`` runs by the scheme, for a step of these ``sizes``; as before on every way out.

    ``rules``: how state that the forward changes, running statistics apart, is reduced over chunks.
    """

    def __call__(
        self, network: nn.Module, *, sizes: Sequence[int], draws: StepDraws, rules: Sequence[StateRule]
    ) -> AbstractContextManager[object]: ...


def nested(outer: Scheme, inner: Scheme) -> Scheme:
    """Both, ``inner`` inside of ``outer``."""

    @contextlib.contextmanager
    def both(
        network: nn.Module, *, sizes: Sequence[int], draws: StepDraws, rules: Sequence[StateRule]
    ) -> Iterator[None]:
        with (
            outer(network, sizes=sizes, draws=draws, rules=rules),
            inner(network, sizes=sizes, draws=draws, rules=rules),
        ):
            yield

    return both


@contextlib.contextmanager
def unchanged(
    network: nn.Module, *, sizes: Sequence[int], draws: StepDraws, rules: Sequence[StateRule]
) -> Iterator[None]:
    """The scheme of a step that runs whole, but whose forward or loss a lever changed."""
    yield
