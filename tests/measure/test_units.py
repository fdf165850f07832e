"""The table of units that a trace shows, on traces laid down by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from samegrad.errors import BadInput
from samegrad.measure.events import MemoryEvent, Operation, Trace
from samegrad.measure.units import units_of
from samegrad.plan.chain import plain_stages, predict_chain
from samegrad.records import Category, Phase

ACTIVATION, GRADIENT, TEMPORARY = Category.ACTIVATIONS, Category.GRADIENTS, Category.TEMPORARY
FORWARD, LOSS, BACKWARD = Phase.FORWARD, Phase.LOSS, Phase.BACKWARD


class Written:
    """A trace as it is written down: operations, and what each takes and gives back."""

    def __init__(self, resident_bytes: int = 1000) -> None:
        self.operations: list[Operation] = []
        self.events = [MemoryEvent(0, resident_bytes, -1, Category.PARAMETERS)]
        self.categories: dict[int, tuple[int, Category]] = {0: (resident_bytes, Category.PARAMETERS)}

    def does(
        self, module: str, phase: Phase, takes: Sequence[tuple[int, Category]] = (), gives: Sequence[int] = ()
    ) -> list[int]:
        """One operation; returns the storages that it took."""
        index = len(self.operations)
        self.operations.append(Operation("aten.op.default", module, phase, 1, 10, 100, "float32", 1))
        taken = []
        for size, category in takes:
            storage = len(self.categories)
            self.categories[storage] = (size, category)
            self.events.append(MemoryEvent(storage, size, index, category))
            taken.append(storage)
        for storage in gives:
            size, category = self.categories[storage]
            self.events.append(MemoryEvent(storage, -size, index, category))
        return taken

    def trace(self) -> Trace:
        return Trace(tuple(self.operations), tuple(self.events), "cpu", 8, (8,))

    def peak_bytes(self) -> int:
        live, peak = 0, 0
        for event in self.events:
            live += event.change_bytes
            peak = max(peak, live)
        return peak


def two_blocks_and_a_gap() -> Written:
    """Block a keeps 30 inside and hands 20 on; code between doubles it in place of a copy; block b; the loss."""
    step = Written()
    [inner] = step.does("a.linear", FORWARD, [(30, ACTIVATION)])
    [scratch] = step.does("a", FORWARD, [(50, TEMPORARY)])
    [out] = step.does("a.linear", FORWARD, [(20, ACTIVATION)], [scratch])
    [between] = step.does("", FORWARD, [(24, ACTIVATION)])
    [saved] = step.does("b", FORWARD, [(70, ACTIVATION)])
    [end] = step.does("b", FORWARD, [(12, ACTIVATION)])
    [loss] = step.does("", LOSS, [(4, ACTIVATION)])
    [seed] = step.does("", BACKWARD, [(4, TEMPORARY)])
    [grad_end] = step.does("", BACKWARD, [(12, TEMPORARY)], [seed, end])
    [fresh, weight_b] = step.does("b", BACKWARD, [(90, TEMPORARY), (15, GRADIENT)])
    [grad_between] = step.does("b", BACKWARD, [(24, TEMPORARY)], [fresh, saved, grad_end, between])
    [grad_out] = step.does("", BACKWARD, [(20, TEMPORARY)], [grad_between, out])
    [weight_a] = step.does("a.linear", BACKWARD, [(35, GRADIENT)], [inner, grad_out])
    step.does("", Phase.OPTIMIZER, [], [weight_a, weight_b, loss])
    return step


def test_a_step_laid_down_by_hand_has_the_units_that_were_laid_down() -> None:
    step = two_blocks_and_a_gap()
    seconds = [2.0**k for k in range(len(step.operations))]
    table = units_of(step.trace(), ["a", "b"], seconds)
    assert (table.rows, table.resident_bytes) == (8, 1000)
    a, gap, b, loss = table.units
    assert [unit.name for unit in table.units] == ["a", "", "b", ""]
    assert [unit.recomputable for unit in table.units] == [True, False, True, False]
    assert [unit.kept_bytes for unit in table.units] == [50, 24, 82, 4]
    assert [unit.output_bytes for unit in table.units] == [20, 24, 12, 4]
    assert (a.forward_extra_bytes, b.forward_extra_bytes) == (100, 82)
    # The gradient of what block b made stands, its output is gone; then its parameter's gradient stays.
    assert (b.incoming_bytes, b.arrival_extra_bytes, b.backward_extra_bytes) == (4 + 12, 4, 129)
    assert (gap.incoming_bytes, a.incoming_bytes) == (4 + 15 + 24, 4 + 15 + 20)
    assert (a.gradient_bytes, b.gradient_bytes) == (35, 15)
    assert (a.offloadable_bytes, b.offloadable_bytes) == (30, 70)
    assert a.forward_seconds == sum(seconds[:3])
    assert a.backward_seconds == seconds[12]
    assert gap.backward_seconds == seconds[11]
    assert loss.backward_seconds == seconds[7] + seconds[8]
    assert predict_chain(table.units, plain_stages(table.units), resident_bytes=1000).peak_bytes == step.peak_bytes()


def test_an_output_that_its_own_block_needs_is_found_by_its_gradient() -> None:
    step = Written()
    [inner] = step.does("a", FORWARD, [(64, ACTIVATION)])
    [out, statistics] = step.does("a", FORWARD, [(64, ACTIVATION), (8, ACTIVATION)])
    [loss] = step.does("", LOSS, [(4, ACTIVATION)])
    [grad_out] = step.does("", BACKWARD, [(64, TEMPORARY)])
    step.does("a", BACKWARD, [], [grad_out, out, statistics, inner])
    step.does("", Phase.OPTIMIZER, [], [loss])
    [a, _] = units_of(step.trace(), ["a"], [0.0] * 6).units
    assert (a.output_bytes, a.offloadable_bytes) == (64, 72)


def test_a_block_that_runs_twice_cannot_be_chosen() -> None:
    step = Written()
    kept = [step.does(module, FORWARD, [(10, ACTIVATION)])[0] for module in ("a", "b", "a")]
    [loss] = step.does("", LOSS, [(4, ACTIVATION)])
    for module, storage in zip(("a", "b", "a"), reversed(kept)):
        step.does(module, BACKWARD, [(6, TEMPORARY)], [storage])
    step.does("", Phase.OPTIMIZER, [], [loss])
    units = units_of(step.trace(), ["a", "b"], [1.0] * 8).units
    assert [(unit.name, unit.recomputable) for unit in units] == [("a", False), ("b", True), ("a", False), ("", False)]
    assert [unit.backward_seconds for unit in units] == [1.0, 1.0, 1.0, 0.0]


def test_modules_that_run_again_as_one_are_one_unit() -> None:
    step = Written()
    kept = [step.does(module, FORWARD, [(10, ACTIVATION)])[0] for module in ("a.in", "b", "c", "cc")]
    [loss] = step.does("", LOSS, [(4, ACTIVATION)])
    for module, storage in zip(("cc", "c", "b", "a.in"), reversed(kept)):
        step.does(module, BACKWARD, [(6, TEMPORARY)], [storage])
    step.does("", Phase.OPTIMIZER, [], [loss])
    units = units_of(step.trace(), [["a", "b"], "c"], [1.0] * 10).units
    assert [(unit.name, unit.modules) for unit in units] == [("a to b", ("a", "b")), ("c", ("c",)), ("", ())]
    assert [unit.recomputable for unit in units] == [True, True, False]
    assert [unit.kept_bytes for unit in units] == [20, 10, 14]
    assert [unit.backward_seconds for unit in units] == [2.0, 1.0, 1.0]
    # A trace in which other modules run between the two has no such unit.
    apart = units_of(step.trace(), [["a", "c"], "b"], [1.0] * 10).units
    assert [unit.recomputable for unit in apart] == [False, True, False, False]


def test_storages_are_rounded_up_one_by_one() -> None:
    rounded = units_of(two_blocks_and_a_gap().trace(), ["a", "b"], [0.0] * 14, round_to_bytes=512)
    assert rounded.resident_bytes == 1024
    assert [unit.kept_bytes for unit in rounded.units] == [1024, 512, 1024, 512]


def test_what_a_chunk_costs_is_its_launches() -> None:
    units = units_of(
        two_blocks_and_a_gap().trace(), ["a", "b"], [0.0] * 14, row_independent=["b"], launch_seconds=0.5
    ).units
    assert [unit.row_independent for unit in units] == [False, False, True, False]
    # Forward twice and backward once, two kernels each.
    assert [unit.chunk_seconds for unit in units] == [0.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize("field", ["kept_bytes", "arrival_extra_bytes", "backward_extra_bytes"])
def test_a_planted_table_without_a_column_is_caught_by_the_peak(field: str) -> None:
    step = two_blocks_and_a_gap()
    units = units_of(step.trace(), ["a", "b"], [0.0] * 14).units
    planted = [dataclasses.replace(unit, **{field: 0}) for unit in units]
    if field == "kept_bytes":
        planted = [dataclasses.replace(unit, offloadable_bytes=0) for unit in planted]
    predicted = predict_chain(planted, plain_stages(planted), resident_bytes=1000)
    assert predicted.peak_bytes != step.peak_bytes()


def test_seconds_of_another_trace_are_refused() -> None:
    with pytest.raises(BadInput, match="3 times for 14 operations"):
        units_of(two_blocks_and_a_gap().trace(), ["a"], [0.0] * 3)


def test_a_step_in_chunks_is_refused() -> None:
    trace = dataclasses.replace(two_blocks_and_a_gap().trace(), sizes=(4, 4))
    with pytest.raises(BadInput, match="a step in 2 chunks"):
        units_of(trace, ["a"], [0.0] * 14)


def test_a_forward_in_backward_is_refused_by_its_module() -> None:
    step = two_blocks_and_a_gap()
    step.does("b", FORWARD)
    with pytest.raises(BadInput, match="of b in backward"):
        units_of(step.trace(), ["a", "b"], [0.0] * 15)


def test_a_trace_without_a_backward_is_refused() -> None:
    step = Written()
    step.does("a", FORWARD)
    with pytest.raises(BadInput, match="without a forward or a backward"):
        units_of(step.trace(), ["a"], [0.0])
