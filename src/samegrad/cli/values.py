"""Option values from what somebody wrote: one rule for flags, environment variables and config files.

A value is *written* as a word (flags and the environment carry no types) or as a typed scalar (YAML, JSON). The type
an option declares decides what it becomes; ``convert`` raises ValueError with a sentence, the caller adds the place.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_DECIMAL = re.compile(r"[+-]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_OTHER_BASE = re.compile(r"[+-]?(?:0[0-9_]+|0[box][0-9a-f_]+)", re.IGNORECASE)


class Kind(enum.Enum):
    """How a value was written. WORD is untyped; TEXT is text on purpose, as in quotes."""

    WORD = "a word"
    TEXT = "text"
    INT = "a whole number"
    FLOAT = "a number"
    BOOL = "true or false"
    NULL = "null"
    LIST = "a list"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """One value as its source has it: the text, how it was typed there, and the place (``run.yaml:3``)."""

    text: str
    kind: Kind
    where: str
    items: tuple[Written, ...] = ()


class NotFinite(ValueError):
    """A number that is NaN or infinite; ``value`` is it, so that what accepts the option can say what it accepts."""

    def __init__(self, sentence: str, value: float) -> None:
        self.value = value
        super().__init__(sentence)


def convert(written: Written, hint: Any) -> Any:
    """``written`` as the type ``hint``. Raises ValueError saying what was found and what is accepted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return convert(written, args[0])
    if origin in (typing.Union, types.UnionType):
        return _one_of(written, args)
    if origin is typing.Literal:
        return _choice(written, {str(choice): choice for choice in args})
    if origin in (tuple, list):
        return _items(written, origin, args)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choice(written, {member.name: member for member in hint})
    simple = {bool: _bool, int: _int, float: _float, str: _text, Path: _path, types.NoneType: _none}
    if hint in simple:
        return simple[hint](written)
    raise ValueError(f"an option of type {hint!r} cannot be set from a file or the environment")


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known name, or nothing when none is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def describe(hint: Any) -> str:
    """What an option of type ``hint`` accepts, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return describe(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in args)
    if origin in (tuple, list):
        return f"a list of {describe(args[0])}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " or ".join(repr(member.name) for member in hint)
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Path: "a path"}
    return words.get(hint, "nothing (null)")


def _wrong(written: Written, hint: Any) -> ValueError:
    found = repr(written.text) if written.kind is not Kind.LIST else "a list"
    quoted = " (in quotes)" if written.kind is Kind.TEXT and hint in (bool, int, float) else ""
    return ValueError(f"{found}{quoted} is not {describe(hint)}")


def _bool(written: Written) -> bool:
    word = written.text.lower()
    if written.kind in (Kind.BOOL, Kind.INT, Kind.WORD) and word in ("true", "false", "1", "0"):
        return word in ("true", "1")
    raise _wrong(written, bool)


def _int(written: Written) -> int:
    if written.kind in (Kind.INT, Kind.WORD):
        text = written.text.strip()
        if _DECIMAL.fullmatch(text):
            return int(text)
        if _OTHER_BASE.fullmatch(text):
            # 010 is eight to some readers of YAML and ten to others; nobody is to guess.
            raise ValueError(f"{text!r} is not a whole number in decimal digits without a leading 0")
    raise _wrong(written, int)


def _float(written: Written) -> float:
    if written.kind in (Kind.INT, Kind.FLOAT, Kind.WORD):
        # YAML writes .nan and -.inf.
        yaml = written.kind is Kind.FLOAT and written.text.lower().lstrip("+-") in (".nan", ".inf")
        try:
            value = float(written.text.replace(".", "") if yaml else written.text)
        except ValueError:
            raise _wrong(written, float) from None
        if math.isfinite(value):
            return value
        raise NotFinite(str(_wrong(written, float)), value)
    raise _wrong(written, float)


def _text(written: Written) -> str:
    # `t: 12:30` and `latent: 8` mean what the same words mean as flags.
    if written.kind in (Kind.LIST, Kind.NULL):
        raise _wrong(written, str)
    return written.text


def _path(written: Written) -> Path:
    if not _text(written):
        raise _wrong(written, Path)
    return Path(written.text)


def _none(written: Written) -> None:
    if written.kind is not Kind.NULL and (written.kind is not Kind.WORD or written.text != "None"):
        raise _wrong(written, None)


def _choice(written: Written, choices: dict[str, Any]) -> Any:
    if written.kind is Kind.LIST or written.text not in choices:
        names = " or ".join(repr(c) for c in choices)
        raise ValueError(f"{written.text!r} is not {names}{nearest(written.text, choices)}")
    return choices[written.text]


def _one_of(written: Written, hints: tuple[Any, ...]) -> Any:
    # None first: a path or a text would swallow the word "None".
    for hint in sorted(hints, key=lambda h: h is not types.NoneType):
        try:
            return convert(written, hint)
        except ValueError:
            continue
    wanted = [h for h in hints if h is not types.NoneType]
    if len(wanted) == 1:
        return convert(written, wanted[0])
    raise _wrong(written, typing.Union[tuple(wanted)])  # noqa: UP007


def _items(written: Written, origin: Any, args: tuple[Any, ...]) -> Any:
    if written.kind is Kind.LIST:
        parts = written.items
    elif written.kind is Kind.WORD:
        words = written.text.replace(",", " ").split()
        parts = tuple(dataclasses.replace(written, text=word) for word in words)
    else:
        raise _wrong(written, origin[args] if origin is tuple else origin[args[0]])
    if origin is tuple and args[-1] is not Ellipsis:
        if len(parts) != len(args):
            raise ValueError(f"{len(parts)} values where {len(args)} are needed")
        return tuple(convert(part, hint) for part, hint in zip(parts, args))
    return origin(convert(part, args[0]) for part in parts)
