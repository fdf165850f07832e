"""Frozen records that go to JSON and come back equal, strictly: what is unknown, missing or wrong is named."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Self

from samegrad.errors import BadInput

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Base of all records: strict JSON both ways. Not-finite floats become null, since JSON has no NaN."""

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        document = {"schema_version": SCHEMA_VERSION, "record": type(self).__name__}
        return document | {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, text: str, *, file: str | None = None) -> Self:
        """The record that ``text`` holds. Raises BadInput naming the field that is missing, unknown or wrong."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            place = f"{file or 'text'}:{error.lineno}"
            raise BadInput(
                asked=f"read a {cls.__name__}", found=f"{place}: not JSON ({error.msg})",
                do="give the file that samegrad wrote", file=file,
            ) from None  # fmt: skip
        return cls.from_dict(document, file=file)

    @classmethod
    def from_dict(cls, document: Any, *, file: str | None = None) -> Self:
        def wrong(found: str) -> BadInput:
            where = f"{file}: " if file else ""
            return BadInput(
                asked=f"read a {cls.__name__}", found=where + found,
                do=f"give a {cls.__name__} that samegrad {SCHEMA_VERSION}.x wrote", file=file,
            )  # fmt: skip

        if not isinstance(document, dict):
            raise wrong(f"a {type(document).__name__} where an object is needed")
        if document.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise wrong(f"schema_version {document['schema_version']}, this samegrad reads {SCHEMA_VERSION}")
        if document.get("record", cls.__name__) != cls.__name__:
            raise wrong(f"a {document['record']}")
        hints = typing.get_type_hints(cls)
        names = {f.name for f in dataclasses.fields(cls)}
        given = {k: v for k, v in document.items() if k not in ("schema_version", "record")}
        for name in given.keys() - names:
            raise wrong(f"unknown field {name!r}")
        for field in dataclasses.fields(cls):
            needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if needed and field.name not in given:
                raise wrong(f"field {field.name!r} is missing")
        values = {}
        for name, value in given.items():
            try:
                values[name] = _typed(value, hints[name])
            except BadInput as error:
                # The file and the outer field are known only here.
                raise wrong(f"field {name!r}: {error.found}") from None
            except (TypeError, ValueError, KeyError) as error:
                raise wrong(f"field {name!r}: {error}") from None
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.IntEnum):
        return value.name
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _typed(value: Any, hint: Any) -> Any:
    """``value`` from JSON as the type ``hint`` says; TypeError, ValueError or KeyError when it is not one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        for kind in kinds[:-1]:
            try:
                return _typed(value, kind)
            except (TypeError, ValueError, KeyError):
                continue
        return _typed(value, kinds[-1])
    if origin is tuple:
        return tuple(_typed(v, args[0]) for v in _checked(value, list))
    if origin in (dict, Mapping) or origin is typing.get_origin(Mapping[str, int]):
        return {_typed(k, args[0]): _typed(v, args[1]) for k, v in _checked(value, dict).items()}
    if isinstance(hint, type) and issubclass(hint, enum.IntEnum):
        return hint[value]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_dict(value)
    if hint in (int, float) and isinstance(value, bool):
        raise TypeError("true or false where a number is needed")
    if hint is float:
        # A float that was not finite was written as null.
        return math.nan if value is None else float(_checked(value, (int, float)))
    return _checked(value, hint)


def _checked(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not {getattr(kind, '__name__', 'a number')}")
    return value
