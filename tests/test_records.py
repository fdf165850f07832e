"""Records: to JSON and back equal, and a wrong file is refused by the field's name."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import types
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samegrad import records
from samegrad.errors import BadInput
from samegrad.json_record import Record
from samegrad.records import (
    Budget,
    Category,
    Counting,
    Exactness,
    Footprint,
    Origin,
    Phase,
    PhaseLaw,
    Plan,
    StepResult,
)

KINDS = [
    kind for _, kind in inspect.getmembers(records, inspect.isclass)
    if issubclass(kind, Record) and kind is not Record
]  # fmt: skip
KNOBS = st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.lists(st.integers(), max_size=3)), max_size=2)


def strategy(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a record's field by its annotation; floats are finite, since JSON has no others."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return st.integers()
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*[st.none() if a is type(None) else strategy(a) for a in args])
    if origin is tuple:
        return st.lists(strategy(args[0]), max_size=2).map(tuple)
    if origin is dict:
        values = KNOBS if typing.get_origin(args[1]) is dict else strategy(args[1])
        return st.dictionaries(strategy(args[0]), values, max_size=2)
    if isinstance(hint, type) and issubclass(hint, Record):
        return of(hint)
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(), str: st.text(max_size=8), bool: st.booleans()
    }  # fmt: skip
    return plain[hint] if hint in plain else st.sampled_from(hint)


def of(kind: type[Record]) -> st.SearchStrategy[Record]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{f.name: strategy(hints[f.name]) for f in dataclasses.fields(kind)})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_record_comes_back_from_json_equal(kind: type[Record], data: Any) -> None:
    record = data.draw(of(kind))
    text = record.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert kind.from_json(text) == record


RESULT = StepResult(index=3, loss=0.5, seconds=0.1, batch_rows=8)
PLAN = Plan(levers={"split_rows": {"rows": [2, 3]}}, exactness=Exactness.SAME_SUM, batch_rows=5)


def document(record: Record) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(record.to_json())
    return loaded


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(BadInput, match="unknown field 'lossy'"):
        StepResult.from_dict(document(RESULT) | {"lossy": 1})


def test_a_missing_field_is_named_with_its_file() -> None:
    broken = document(RESULT)
    del broken["seconds"]
    with pytest.raises(BadInput, match=r"run\.json.*'seconds' is missing") as caught:
        StepResult.from_json(json.dumps(broken), file="run.json")
    assert caught.value.file == "run.json"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("index", "3"), ("index", 1.5), ("index", True), ("index", None), ("loss", "0.5"), ("loss", [0.5]),
        ("loss", True),
        ("peak_allocated_bytes", "many"), ("grad_norm", {}),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(BadInput, match=f"field '{name}'"):
        StepResult.from_dict(document(RESULT) | {name: value})


@pytest.mark.parametrize("value", ["SAME", 1, None])
def test_a_word_outside_an_enumeration_is_named(value: Any) -> None:
    with pytest.raises(BadInput, match="field 'exactness'"):
        Plan.from_dict(document(PLAN) | {"exactness": value})


def test_a_wrong_field_inside_a_nested_record_names_both() -> None:
    footprint = Footprint(
        device="cpu", counting=Counting.TENSOR_BYTES, origin=Origin.PREDICTED, basis="", rows=1, batch_rows=1,
        peak_allocated_bytes=1,
        laws=(PhaseLaw(phase=Phase.LOSS, fixed_bytes=1.0, per_chunk_row_bytes=1.0, per_batch_row_bytes=0.0),),
    )  # fmt: skip
    broken = document(footprint)
    broken["laws"][0]["fixed_bytes"] = "x"
    with pytest.raises(BadInput, match=r"plan\.json.*'laws'.*'fixed_bytes'"):
        Footprint.from_dict(broken, file="plan.json")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_float_that_is_not_finite_is_null_in_json_and_nan_when_read(value: float) -> None:
    text = dataclasses.replace(RESULT, loss=value).to_json()
    assert json.loads(text)["loss"] is None
    assert math.isnan(StepResult.from_json(text).loss)


def test_another_schema_version_is_refused() -> None:
    with pytest.raises(BadInput, match="schema_version 2"):
        StepResult.from_dict(document(RESULT) | {"schema_version": 2})


def test_another_record_is_refused_by_its_name() -> None:
    with pytest.raises(BadInput, match="a StepResult"):
        Plan.from_json(RESULT.to_json())


@pytest.mark.parametrize(
    ("text", "place"), [("{\n,", "plan.json:2"), ("[1]", "list"), ("3", "int"), ("", "plan.json:1")]
)
def test_what_is_no_json_object_is_refused_with_the_line(text: str, place: str) -> None:
    with pytest.raises(BadInput, match=place):
        Plan.from_json(text, file="plan.json")


def test_records_are_frozen_and_take_keywords_only() -> None:
    for kind in KINDS:
        assert kind.__dataclass_params__.frozen, kind  # type: ignore[attr-defined]
        assert all(field.kw_only for field in dataclasses.fields(kind)), kind


def test_keys_that_are_enumerations_come_back_as_such() -> None:
    budget = Budget(total_bytes=1, device="cpu", counting=Counting.TENSOR_BYTES, source="")
    assert Budget.from_json(budget.to_json()).counting is Counting.TENSOR_BYTES
    footprint = Footprint(
        device="cpu", counting=Counting.TENSOR_BYTES, origin=Origin.MEASURED, basis="", rows=1, batch_rows=1,
        peak_allocated_bytes=1, resident_bytes={Category.PARAMETERS: 4},
    )  # fmt: skip
    assert Footprint.from_json(footprint.to_json()).resident_bytes == {Category.PARAMETERS: 4}
