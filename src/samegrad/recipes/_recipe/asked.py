"""What every recipe can be asked, and how what cannot be done is refused. No torch here."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Self

import samegrad as sg

EmptyCache = Literal["never", "validation", "step"]


class OutOfRange(sg.UsageError):
    """A value that is wrong by itself, whatever the other options are.

    The command line asks on past it, so that all such values are told at once.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every recipe can be asked.

    ``changes_on_resume``: what may be another in a run that goes on; all else would make another training of it.
    """

    # Without a type, so that it is no option itself.
    changes_on_resume = frozenset(("budget", "device", "empty_cache"))

    budget: str | None = None
    """Bytes the training step may hold: 6GiB, 512MiB, 80%. Without it, what is free now."""
    device: str = "auto"
    """Device to train on: auto (CUDA if there is one), cpu, cuda, cuda:1; for plan and measure also a card's name."""
    dtype: str = "float32"
    """Number format: float32, float64, or bfloat16 / float16, which mean autocast over float32 weights."""
    random_seed: int = 42
    """Seed of the weights, the split and the order of the rows."""
    empty_cache: EmptyCache = "never"
    """When to hand cached device memory back to the driver; it costs time and lowers no peak of the step."""

    def __post_init__(self) -> None:
        if not 0 <= self.random_seed < 2**63:
            found = "a negative seed" if self.random_seed < 0 else "more than 63 bits"
            self._out_of_range("random_seed", found, f"give 0 to {2**63 - 1}")

    def for_card_elsewhere(self) -> Self:
        """The same program for a card that may be elsewhere: made on the host, and nothing measured for it there."""
        return dataclasses.replace(self, device="cpu", budget=None)

    def _refuse(self, name: str, found: str, do: str) -> NoReturn:
        """Refuses what does not go with other options."""
        raise sg.UsageError(asked=self._as_given(name), found=found, do=do, option=name)

    def _out_of_range(self, name: str, found: str, do: str) -> NoReturn:
        """Refuses what is wrong by itself. These checks come before those of options against each other."""
        raise OutOfRange(asked=self._as_given(name), found=found, do=do, option=name)

    def _as_given(self, name: str) -> str:
        """The option with its value, as it stands in a command line."""
        value: Any = getattr(self, name)
        return f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"

    def _at_least(self, least: int, *names: str, do: str = "give a positive whole number") -> None:
        """Refuses a number below ``least``; None is a number that is left open."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                self._out_of_range(name, f"it must be at least {least}", do)

    def _positive(self, *names: str, do: str) -> None:
        """Refuses what is no finite number above 0; None is a number that is left open."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                self._out_of_range(name, "it must be positive and finite", do)

    def _not_negative(self, *names: str, do: str) -> None:
        """Refuses what is no finite number from 0 up; None is a number that is left open."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                self._out_of_range(name, "it must be 0 or positive, and finite", do)

    def _known_dtype(self, known: Sequence[str]) -> None:
        """Refuses a ``dtype`` that is none of ``known``, with the nearest one."""
        if self.dtype not in known:
            near = difflib.get_close_matches(self.dtype, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            self._out_of_range("dtype", f"no number format of this recipe{hint}", f"use one of {', '.join(known)}")
