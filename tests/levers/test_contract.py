"""The contract of a lever, held by every file of the folder, and by planted ones that break it."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import samegrad.levers as folder
from samegrad.declared import DeclaredStep, declare
from samegrad.errors import BadInput
from samegrad.exact import growing_segments
from samegrad.execute.apply import applied
from samegrad.levers import Execution, Lever, Slot, find_levers, find_whole_levers, levers_of, weakest_exactness
from samegrad.records import Exactness, HeadLaws, Phase, Plan, Variant

from ..contract.lever_zoo import cnn
from ..contract.plain import cross_entropy
from ..plan.test_choose import MIB, footprint, law

LEVERS = find_levers()
BATCH_ROWS = 1000


def declared() -> DeclaredStep:
    """A step that every lever can be forced on."""
    model, _ = cnn()
    return declare(model, cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


# What those levers that run parts of a model in chunks have measured.
VARIANTS = tuple(
    Variant(lever=name, knobs=knobs, laws=(law(Phase.BACKWARD, 25 * MIB, per_row, MIB / 5),))
    for name, knobs, per_row in (
        ("segments", {"paths": {"0": 1}}, MIB / 2),
        ("exact_batchnorm", {"scheme_name": "lockstep", "keep_every": 1, "together": 1}, MIB / 2),
        ("exact_batchnorm", {"scheme_name": "rendezvous", "keep_every": 1, "together": 1}, MIB),
        ("recompute", {"blocks": ["0", "2"]}, 0.0),
    )
)
# Those that leave the chunks as they are: settings beside that of their defaults.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "autocast": [{"dtype": "float16", "full_precision": ["0", "4"]}],
    "offload_saved": [{"smallest_bytes": 0, "modules": ["0"]}],
}
HEAD = HeadLaws(path="2", classes=3, positions_per_row=9.0, laws=(law(Phase.LOSS, 25 * MIB, MIB / 100, MIB / 5),))
STEP = footprint(refusals={}, variants=VARIANTS, head=HEAD)


def examples(lever: type[Lever]) -> list[Lever]:
    """A few settings of its knobs: its defaults, or as the lever itself proposes them."""
    if lever.name in find_whole_levers():
        return [lever(), *(lever(**knobs) for knobs in SETTINGS.get(lever.name, []))]
    assert hasattr(lever, "candidates")
    return list(itertools.islice(lever.candidates(STEP, 300 * MIB), 3))


EVERY = pytest.mark.parametrize("lever", LEVERS.values(), ids=LEVERS)


@EVERY
def test_a_lever_is_a_frozen_dataclass_with_name_slot_and_exactness(lever: Any) -> None:
    assert dataclasses.is_dataclass(lever) and lever.__dataclass_params__.frozen
    assert LEVERS[lever.name] is lever
    assert isinstance(lever.slot, Slot) and isinstance(lever.exactness, Exactness)
    assert inspect.getmodule(lever).__name__ == f"samegrad.levers.{lever.name}"


@EVERY
def test_a_lever_says_what_it_saves_costs_keeps_and_refuses(lever: Any) -> None:
    text = inspect.getmodule(lever).__doc__ or ""
    for head in ("Saves:", "Costs:", "Why the gradient is the same:", "Refuses:", "Source:"):
        assert f"\n{head}" in text


@EVERY
def test_knobs_are_the_fields_and_come_back_through_a_saved_plan(lever: Any) -> None:
    assert examples(lever)
    for example in examples(lever):
        knobs = example.knobs()
        assert knobs.keys() == {field.name for field in dataclasses.fields(lever)}
        plan = Plan(levers={lever.name: knobs}, exactness=lever.exactness, batch_rows=BATCH_ROWS)
        assert levers_of(Plan.from_json(plan.to_json())) == [example]


@EVERY
def test_a_lever_undoes_itself_also_after_an_exception(lever: Any) -> None:
    step = declared()
    model = step.model
    before = {name: dict(vars(part)) for name, part in model.named_modules()}
    execution = Execution(declared=step, batch_rows=BATCH_ROWS)
    for example in examples(lever):
        with example.apply(execution) as changed:
            assert isinstance(changed, Execution) and changed.batch_rows == BATCH_ROWS
        with pytest.raises(ZeroDivisionError), example.apply(execution):
            raise ZeroDivisionError
    assert {name: dict(vars(part)) for name, part in model.named_modules()} == before


@pytest.mark.parametrize("lever", [lever for lever in LEVERS.values() if hasattr(lever, "standing")])
def test_a_lever_that_stands_between_steps_undoes_that_also_after_an_exception(lever: Any) -> None:
    step = declared()
    assert step.optimizer is not None
    batch = cnn()[1]
    cross_entropy(step.model(batch[0]), batch).backward()
    step.optimizer.step()
    before = standing_of(step)
    for example in examples(lever):
        with example.standing(step):
            assert standing_of(step) != before
            # As where a plan that stands is measured.
            with example.standing(step):
                pass
        assert standing_of(step) == before
        with pytest.raises(ZeroDivisionError), example.standing(step):
            raise ZeroDivisionError
        assert standing_of(step) == before


def standing_of(step: DeclaredStep) -> list[Any]:
    """What a lever may change between steps: strides, values, the optimizer's hooks and its state."""
    assert step.optimizer is not None
    state = [leaf for entry in step.optimizer.state.values() for leaf in entry.values() if leaf is not None]
    tensors = [*step.model.state_dict().values(), *(p.grad for p in step.model.parameters()), *state]
    return [
        [(t.stride(), t.tolist(), t.device) for t in tensors],
        list(step.optimizer._optimizer_step_pre_hooks),
        list(step.optimizer._optimizer_step_post_hooks),
        {name: dict(vars(part)) for name, part in step.model.named_modules()},
        growing_segments.why_not(),
    ]


@pytest.mark.parametrize("lever", [lever for name, lever in LEVERS.items() if name not in find_whole_levers()])
def test_a_lever_predicts_a_footprint_and_changes_none(lever: Any) -> None:
    step = STEP
    whole = step.predicted_peak_bytes(rows=step.batch_rows)
    again = dataclasses.replace(step)
    for example in examples(lever):
        assert example.predict(step).peak_allocated_bytes <= whole
        assert step == again


@EVERY
def test_a_refusal_recorded_in_the_footprint_is_the_levers_own(lever: Any) -> None:
    assert lever.refusal(footprint(refusals={lever.name: "because"})) == "because"
    assert lever.refusal(footprint(refusals={})) is None


def test_one_lever_a_slot_and_slot_order_is_nesting_order() -> None:
    assert [lever.slot for lever in LEVERS.values()] == sorted(lever.slot for lever in LEVERS.values())
    plan = Plan(
        levers={"split_rows": {"rows": 3}, "host_rows": {}}, exactness=Exactness.SAME_SUM, batch_rows=7
    )  # fmt: skip
    assert [lever.name for lever in levers_of(plan)] == ["host_rows", "split_rows"]


@EVERY
@pytest.mark.parametrize("said", Exactness)
def test_a_plan_is_as_exact_as_its_weakest_lever_or_as_it_says_itself(lever: Any, said: Exactness) -> None:
    [example, *_] = examples(lever)
    levers = {"host_rows": {}, lever.name: example.knobs()}
    assert weakest_exactness(Plan(levers=levers, exactness=said, batch_rows=3)) == max(said, lever.exactness)


PAIRS = list(itertools.combinations(LEVERS, 2))


@pytest.mark.parametrize("pair", [p for p in PAIRS if LEVERS[p[0]].slot is LEVERS[p[1]].slot], ids="+".join)
def test_two_levers_of_one_slot_are_refused_together(pair: tuple[str, str]) -> None:
    first, second = (examples(LEVERS[name])[0] for name in pair)
    plan = Plan(
        levers={first.name: first.knobs(), second.name: second.knobs()}, exactness=Exactness.SAME_SUM,
        batch_rows=BATCH_ROWS,
    )  # fmt: skip
    with pytest.raises(BadInput, match=f"{first.name} and {second.name}|{second.name} and {first.name}"):
        levers_of(plan)


@pytest.mark.parametrize("pair", [p for p in PAIRS if LEVERS[p[0]].slot is not LEVERS[p[1]].slot], ids="+".join)
def test_every_pair_of_levers_can_be_in_force_together(pair: tuple[str, str]) -> None:
    first, second = (examples(LEVERS[name])[0] for name in pair)
    plan = Plan(
        levers={first.name: first.knobs(), second.name: second.knobs()},
        exactness=max(first.exactness, second.exactness),
        batch_rows=BATCH_ROWS,
    )
    with applied(plan, declared(), BATCH_ROWS) as execution:
        assert execution.sizes is None or sum(execution.sizes) == BATCH_ROWS


def plant(monkeypatch: pytest.MonkeyPatch, path: Path, text: str) -> None:
    (path / "planted.py").write_text(text)
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(path)])


LEVER_FILE = """
import dataclasses
from samegrad.levers._lever import Slot
"""
ONE = """
@dataclasses.dataclass(frozen=True)
class {name}:
    name = "{name}"
    slot = Slot.STATE
"""


def test_a_file_added_to_the_folder_is_a_lever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch, tmp_path, LEVER_FILE + ONE.format(name="planted"))
    monkeypatch.delitem(__import__("sys").modules, "samegrad.levers.planted", raising=False)
    assert "planted" in find_levers()
    monkeypatch.undo()
    assert "planted" not in find_levers()


@pytest.mark.parametrize(
    "text", [LEVER_FILE, LEVER_FILE + ONE.format(name="one") + ONE.format(name="two")], ids=["none", "two"]
)
def test_a_file_without_exactly_one_lever_is_refused_by_its_name(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(__import__("sys").modules, "samegrad.levers.planted", raising=False)
    plant(monkeypatch, tmp_path, text)
    with pytest.raises(TypeError, match=r"samegrad\.levers\.planted must define exactly one lever"):
        find_levers()
    monkeypatch.delitem(__import__("sys").modules, "samegrad.levers.planted", raising=False)


@pytest.mark.parametrize("levers", [{"magic": {}}, {"split_rows": {"lines": 3}}, {"split_rows": {}}], ids=str)
def test_a_plan_with_an_unknown_lever_or_knob_is_refused_by_name(levers: dict[str, Any]) -> None:
    plan = Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=3)
    with pytest.raises(BadInput, match=next(iter(levers))):
        levers_of(plan)
