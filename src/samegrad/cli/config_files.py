"""Config files, read strictly: YAML or JSON, one mapping of option names, every value with its line.

1. Only plain scalars and lists of them: no tags, anchors, aliases; nothing in a file can run code or grow.
2. A key stands once. JSON is JSON: no NaN. A comment from // to the end of its line is passed over.
3. Nested mappings become dotted names (``optim: {name: x}`` is ``optim.name``).
4. What is wrong is wrong with ``file:line``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from samegrad.cli.values import Kind, Written
from samegrad.errors import UsageError

LARGEST_FILE_BYTES = 64 * 2**10
DEEPEST_LEVEL = 16
_KINDS = {"str": Kind.TEXT, "int": Kind.INT, "float": Kind.FLOAT, "bool": Kind.BOOL, "null": Kind.NULL}
_TAG = "tag:yaml.org,2002:"
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*')
_CORE_TAG = re.compile(re.escape(_TAG) + "(str|int|float|bool|null)")


def read_config(path: Path) -> dict[str, Written]:
    """Options written in ``path``, by dotted name. Raises UsageError naming file and line."""
    text = _read_text(path)
    if path.suffix == ".json":
        text = _without_comments(text)
        _check_json(path, text)
        # Between JSON tokens a tab is white space; YAML, which gives us the lines, does not take it.
        text = text.replace("\t", " ")
    root = _compose(path, text)
    if root is None:
        _refuse(path, None, "the file is empty")
    if root.tag != f"{_TAG}map":
        _refuse(path, root, f"a {'list' if root.tag.endswith('seq') else 'single value'} at top level")
    options: dict[str, Written] = {}
    for name, written in _flatten(path, root, ""):
        if name in options:
            line = int(written.where.rpartition(":")[2])
            _refuse(path, line, f"{name!r} stands here and at {options[name].where}")
        options[name] = written
    return options


def _read_text(path: Path) -> str:
    try:
        size_bytes = path.stat().st_size
        if not path.is_file():
            _refuse(path, None, "not a file")
        if size_bytes > LARGEST_FILE_BYTES:
            _refuse(path, None, f"{size_bytes} bytes; a config file has at most {LARGEST_FILE_BYTES}")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(path, None, f"not UTF-8 text (byte {error.start})")
    except OSError as error:
        _refuse(path, None, f"cannot be read: {error.strerror}")


def _without_comments(text: str) -> str:
    """JSON ``text`` with blanks for // and what follows it on a line, unless it stands in a string."""
    return _STRING_OR_COMMENT.sub(lambda m: m[0] if m[0].startswith('"') else " " * len(m[0]), text)


def _check_json(path: Path, text: str) -> None:
    def constant(name: str) -> NoReturn:
        line = text[: text.find(name)].count("\n") + 1
        _refuse(path, line, f"{name} is not JSON")

    try:
        json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as error:
        _refuse(path, error.lineno, f"not JSON: {error.msg}")
    except RecursionError:
        _refuse(path, None, f"nested deeper than {DEEPEST_LEVEL} levels")


def _compose(path: Path, text: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

    reader = YAML(typ="safe", pure=True)
    depth = 0
    try:
        # Events come one by one, so depth and aliases are seen before anything recursive or growing is built.
        for event in reader.parse(text):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > DEEPEST_LEVEL:
                _refuse(path, event, f"nested deeper than {DEEPEST_LEVEL} levels")
            if isinstance(event, AliasEvent) or getattr(event, "anchor", None) is not None:
                _refuse(path, event, "anchors and aliases are not accepted")
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        _refuse(path, mark.line + 1 if mark else None, str(error.problem or error.context))
    except YAMLError as error:
        _refuse(path, None, str(error).splitlines()[0])


def _flatten(path: Path, node: Any, prefix: str) -> Iterator[tuple[str, Written]]:
    for key, value in node.value:
        if key.tag != f"{_TAG}str" and not _CORE_TAG.fullmatch(key.tag):
            _refuse(path, key, "a key must be an option's name")
        # Dashes and underscores name the same option, as they do for flags.
        name = prefix + str(key.value).replace("-", "_")
        if value.tag == f"{_TAG}map":
            yield from _flatten(path, value, name + ".")
        else:
            yield name, _written(path, value, key.start_mark.line + 1)


def _written(path: Path, node: Any, line: int) -> Written:
    where = f"{path}:{line}"
    if node.tag == f"{_TAG}seq":
        items = tuple(_written(path, item, item.start_mark.line + 1) for item in node.value)
        return Written(text="", kind=Kind.LIST, where=where, items=items)
    core = _CORE_TAG.fullmatch(node.tag)
    if core is None:
        shown = node.tag.replace(_TAG, "!!")
        _refuse(path, line, f"the tag {shown} is not accepted" if node.tag != f"{_TAG}map" else "a mapping in a list")
    # An unquoted word is typed by nobody but its reader; only quotes make text of a number.
    plain = core[1] == "str" and not node.style
    return Written(text=str(node.value), kind=Kind.WORD if plain else _KINDS[core[1]], where=where)


def _refuse(path: Path, place: Any, found: str) -> NoReturn:
    """Raises UsageError; ``place`` is a line number, or a YAML node or event, or nothing."""
    mark = getattr(place, "start_mark", None)
    line = place if isinstance(place, int) else mark.line + 1 if mark is not None else None
    raise UsageError(
        asked=f"--config {path}",
        found=f"{path}:{line}: {found}" if line is not None else f"{path}: {found}",
        do="write one option a line, for example `num_epochs: 20` (YAML), or one JSON object",
        file=str(path),
        option="config",
    )
