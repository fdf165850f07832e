"""``samegrad config show|validate RECIPE``: every option with its value and where that came from. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samegrad.cli.console import Console
from samegrad.cli.options import Call, Switch
from samegrad.cli.target import target_call
from samegrad.cli.values import nearest
from samegrad.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """How the options are shown."""

    origin: Switch = False
    """Also print where each value comes from."""


def main(argv: Sequence[str], console: Console) -> int:
    what = argv[0] if argv else "--help"
    if what in ("-h", "--help"):
        console.result(
            "usage: samegrad config show RECIPE [--origin] [--config FILE ...] [options]\n"
            "       samegrad config validate RECIPE --config FILE [FILE ...]"
        )
        return 0
    if what not in ("show", "validate"):
        raise UsageError(
            asked=f"samegrad config {what}",
            found=f"no such action{nearest(what, ['show', 'validate'])}",
            do="samegrad config show RECIPE --origin, or samegrad config validate RECIPE --config FILE",
        )
    from samegrad.cli.run import RunOptions

    target, call = target_call(f"config {what}", (RunOptions, ShowOptions), argv[1:])
    if what == "show":
        _show(call, (target.options_class, RunOptions), console)
    else:
        _validate(call, console)
    return 0


def _show(call: Call, kinds: Sequence[type], console: Console) -> None:
    values = {name: value for kind in kinds for name, value in values_of(call.part(kind)).items()}
    width = max(map(len, values))
    shown = {name: str(value) for name, value in values.items()}
    value_width = max(map(len, shown.values()))
    for name, text in shown.items():
        line = f"{name:<{width}}  {text:<{value_width}}"
        console.result(f"{line}  {call.origins[name]}" if call.part(ShowOptions).origin else line.rstrip())
    console.document({"options": {n: {"value": v, "origin": call.origins[n]} for n, v in values.items()}})


def _validate(call: Call, console: Console) -> None:
    given = [name for name in call.origins if call.given(name) and name != "config"]
    console.result(f"valid: {len(given)} options set")
    console.document({"valid": True, "set": {name: call.origins[name] for name in given}})


def values_of(part: Any) -> dict[str, Any]:
    """The fields of an options dataclass as JSON takes them."""
    return {field.name: _plain(getattr(part, field.name)) for field in dataclasses.fields(part)}


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return value
