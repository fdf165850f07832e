"""What makes room for a plan: segments that grow, then channels last, and never instead of a plan that fits."""

from __future__ import annotations

import dataclasses

import pytest

import samegrad as sg
from samegrad.measure.rungs import Rung
from samegrad.plan.options import Options
from samegrad.records import Budget, Counting, Footprint, Plan
from samegrad.settle.making_room import ChannelsLastWhereNeeded

from ..contract.lever_zoo import MODELS
from ..contract.plain import cross_entropy

MOST = 100


def plan_of(rows: int, **levers: dict[str, object]) -> Plan:
    return Plan(
        levers={"split_rows": {"rows": rows}} | levers, exactness=sg.Exactness.SAME_BITS, batch_rows=29,
    )  # fmt: skip


def footprint(refusals: dict[str, str] | None = None) -> Footprint:
    model, batch = MODELS["cnn"]()
    return dataclasses.replace(sg.measure_step(sg.Step(model, cross_entropy), batch), refusals=refusals or {})


def room(
    of: Footprint, *, allow: sg.Exactness = sg.Exactness.SAME_SUM, counting: Counting = Counting.CUDA_ALLOCATOR
) -> ChannelsLastWhereNeeded:
    budget = Budget(total_bytes=MOST, device="cuda:0", counting=counting, source="a test")
    declared = sg.Step(MODELS["cnn"]()[0], cross_entropy).declared
    return ChannelsLastWhereNeeded(declared, of, MOST, Options(allow=allow), budget)


class Card:
    """Measures plans: those with all of ``needed`` and at most ``rows`` rows fit."""

    def __init__(self, *needed: str, rows: int = 29) -> None:
        self.needed, self.rows = needed, rows
        self.measured: list[tuple[int, list[str]]] = []

    def __call__(self, plan: Plan) -> Rung | None:
        rows = plan.levers["split_rows"]["rows"]
        self.measured.append((rows, [name for name in plan.levers if name != "split_rows"]))
        return Rung(90, 1.0) if rows <= self.rows and all(name in plan.levers for name in self.needed) else None


def walked(card: Card, of: ChannelsLastWhereNeeded, *rows: int) -> Plan | None:
    for one in rows:
        found, rung = of.measured(plan_of(one), card)
        if rung is not None:
            return found
    return None


def test_a_plan_that_fits_is_left_as_it_is() -> None:
    card = Card()
    assert walked(card, room(footprint()), 8) == plan_of(8)
    assert card.measured == [(8, [])]


def test_channels_last_comes_after_segments_that_grow_and_stays() -> None:
    card, making = Card("layout", rows=4), room(footprint())
    found = walked(card, making, 8, 4)
    assert found is not None and found.levers.keys() == {"split_rows", "expandable_segments", "layout"}
    assert found.exactness is sg.Exactness.SAME_SUM
    assert "taken: without it memory ran out" in found.reasons["layout"]
    grown = ["expandable_segments"]
    assert card.measured == [(8, []), (8, grown), (8, ["layout", *grown]), (4, ["layout", *grown])]


def test_a_plan_that_does_not_fit_with_channels_last_may_as_it_is() -> None:
    class Refusing(Card):
        def __call__(self, plan: Plan) -> Rung | None:
            found = super().__call__(plan)
            return None if "layout" in plan.levers else found

    card = Refusing(rows=4)
    found = walked(card, room(footprint()), 8, 4)
    assert found is not None and found.levers == {"split_rows": {"rows": 4}, "expandable_segments": {}}
    grown = ["expandable_segments"]
    # Once one needed it, channels last comes first.
    assert [levers for rows, levers in card.measured if rows == 4] == [["layout", *grown], grown]


def test_where_the_models_code_raises_with_channels_last_plans_are_measured_as_they_are() -> None:
    class Views(Card):
        def __call__(self, plan: Plan) -> Rung | None:
            found = super().__call__(plan)
            if "layout" in plan.levers:
                raise RuntimeError("view size is not compatible")
            return found

    card = Views(rows=4)
    found = walked(card, room(footprint()), 8, 6, 4)
    assert found is not None and "view size" in found.reasons["layout"]
    assert found.levers == {"split_rows": {"rows": 4}, "expandable_segments": {}}
    assert sum("layout" in levers for _, levers in card.measured) == 1


@pytest.mark.parametrize(
    "making",
    [
        lambda: room(footprint({"layout": "no convolution"})),
        lambda: room(footprint(), allow=sg.Exactness.SAME_BITS),
        lambda: room(footprint(), counting=Counting.TENSOR_BYTES),
        lambda: room(timed(footprint(), 1.3)),
    ],
    ids=["refused", "not allowed", "counted bytes", "slower"],
)
def test_it_is_not_tried_where_it_cannot_help(making: object) -> None:
    card = Card("layout")
    assert callable(making) and walked(card, making(), 8, 4) is None
    assert all("layout" not in levers for _, levers in card.measured) and card.measured


def test_it_is_tried_where_it_was_timed_to_be_no_slower() -> None:
    assert walked(Card("layout"), room(timed(footprint(), 1.0)), 8) is not None


def timed(of: Footprint, times: float) -> Footprint:
    """``of``, probed with channels last, where rows took ``times`` as long."""
    of = dataclasses.replace(of, seconds_per_row=1e-4)
    way = sg.records.ProbedWay(
        levers={"layout": {}}, plain_laws=(), laws=(), kept_row_bytes=None,
        seconds_per_row=times * 1e-4, seconds_per_chunk=None,
    )  # fmt: skip
    return dataclasses.replace(of, probed=(way,))
