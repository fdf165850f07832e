"""The tree of errors: parts by construction, exit codes as documented, safe to send between processes."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import resource

import pytest

from samegrad import errors
from samegrad.errors import SamegradError

KINDS = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, SamegradError)
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_crosses_a_pickle_unchanged(kind: type[SamegradError]) -> None:
    error = kind(asked="a", found="b", do="c", file="f.json", option="--budget")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and vars(again) == vars(error) and str(again) == str(error)


def test_the_exit_codes_are_those_of_the_documented_tree() -> None:
    documented = dict(re.findall(r"── (\w+)\s+(\d)\s", errors.__doc__ or ""))
    assert documented.keys() == {kind.__name__ for kind in KINDS} - {"SamegradError"}
    for kind in KINDS:
        if kind is not SamegradError:
            assert kind.exit_code == int(documented[kind.__name__]), kind


def test_the_tree_is_nested_as_documented() -> None:
    parents: dict[str, str] = {}
    stack = [(0, "SamegradError")]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.search(r"[├└]── (\w+)", line):
            depth = found.start()
            while stack[-1][0] >= depth:
                stack.pop()
            parents[found[1]] = stack[-1][1]
            stack.append((depth, found[1]))
    assert parents == {k.__name__: k.__bases__[0].__name__ for k in KINDS if k is not SamegradError}


def test_machine_codes_are_distinct() -> None:
    assert len({kind.code for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("missing", ["asked", "found", "do"])
def test_no_part_of_an_error_can_be_forgotten(missing: str) -> None:
    parts = {"asked": "a", "found": "b", "do": "c"}
    del parts[missing]
    with pytest.raises(TypeError, match=missing):
        SamegradError(**parts)  # type: ignore[arg-type]


def test_the_json_document_names_the_place() -> None:
    error = errors.BadInput(asked="read", found="row 3", do="fix it", file="x.npy", option="--data")
    document = json.loads(json.dumps(error.to_json()))["error"]
    assert document == {
        "code": "bad-input", "message": "read: row 3", "hint": "fix it", "file": "x.npy", "option": "--data"
    }  # fmt: skip


def test_a_file_that_is_too_large_is_told_by_the_limit_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2048, 4096))
    found, do = errors.too_large_a_file()
    assert "2048 bytes (ulimit -f)" in found and "ulimit" in do
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found, do = errors.too_large_a_file()
    assert "file system" in found and "ulimit" not in do
