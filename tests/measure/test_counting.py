"""Counted bytes are those one can work out by hand for a small network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.measure.counting import ByteCounter
from samegrad.records import Category, Phase

from ..contract.plain import cross_entropy, labelled, mlp

CPU = torch.device("cpu")
ROWS, WIDE, HIDDEN, OUT, EIGHT = 64, 5, 40, 3, 8
PARAMETERS = (WIDE * HIDDEN + HIDDEN + HIDDEN * OUT + OUT) * EIGHT
INPUTS = ROWS * (WIDE + OUT) * EIGHT


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDE, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT)).double()


def run_step(counter: ByteCounter, model: nn.Module) -> dict[str, dict[Category, int]]:
    """One plain step under ``counter``; what was live after its parts."""
    batch = torch.randn(ROWS, WIDE, dtype=torch.float64), torch.randn(ROWS, OUT, dtype=torch.float64)
    counter.claim(model.parameters(), Category.PARAMETERS)
    counter.claim(batch, Category.INPUTS)
    live = {}
    with counter:
        counter.announce(Phase.FORWARD)
        outputs = model(batch[0])
        live["forward"] = dict(counter.live)
        counter.announce(Phase.LOSS)
        loss = (outputs - batch[1]).square().mean()
        del outputs
        live["loss"] = dict(counter.live)
        counter.announce(Phase.BACKWARD)
        loss.backward()
        counter.announce(Phase.HANDOFF)
        live["backward"] = dict(counter.live)
    return live


def new_counter(model: nn.Module, **options: Any) -> ByteCounter:
    return ByteCounter(CPU, gradients_of=[model], **options)


def test_a_network_step_is_counted_as_worked_out_by_hand() -> None:
    model = network()
    live = run_step(new_counter(model), model)
    kept = ROWS * (HIDDEN + OUT) * EIGHT
    for moment in live.values():
        assert moment[Category.PARAMETERS] == PARAMETERS and moment[Category.INPUTS] == INPUTS
    # The first layer's sums are gone once the tanh is taken: its gradient needs its own result only.
    assert live["forward"][Category.ACTIVATIONS] == kept
    assert live["loss"][Category.ACTIVATIONS] == kept + EIGHT
    assert live["backward"][Category.ACTIVATIONS] == EIGHT
    assert live["backward"][Category.GRADIENTS] == PARAMETERS
    assert live["backward"][Category.TEMPORARY] == 0


def test_each_phase_keeps_its_own_peak() -> None:
    model = network()
    counter = new_counter(model)
    run_step(counter, model)
    held = PARAMETERS + INPUTS
    # At the tanh its input and its result are both there.
    assert counter.peak_by_phase[Phase.FORWARD] == held + 2 * ROWS * HIDDEN * EIGHT
    # Outputs, differences, their squares and the mean, above what the tanh keeps.
    assert counter.peak_by_phase[Phase.LOSS] == held + ROWS * (HIDDEN + 3 * OUT) * EIGHT + EIGHT
    assert counter.peak_bytes == max(counter.peak_by_phase.values())
    assert sum(counter.peak_by_category.values()) == counter.peak_bytes


class CountsResults(ByteCounter):
    """The planted fault: every result counts, whether or not it is a view of something that was there."""

    def _see(self, tensor: Tensor, category: Category, *, relabel: bool = False) -> None:
        super()._see(tensor if relabel else tensor.clone(), category, relabel=relabel)
        self.live[category] += tensor.nbytes if not relabel else 0


def test_a_counter_that_counts_views_is_not_what_hand_works_out() -> None:
    model = network()
    counter = CountsResults(CPU, gradients_of=[model])
    live = run_step(counter, model)
    assert live["forward"][Category.ACTIVATIONS] > ROWS * (HIDDEN + OUT) * EIGHT


def test_views_and_detached_results_share_one_count() -> None:
    counter = ByteCounter(CPU)
    with counter:
        base = torch.zeros(100, dtype=torch.float64)
        kept = [base[10:], base.view(10, 10), base.detach(), base.t()]
        assert counter.live_bytes == 800
        del base
        assert counter.live_bytes == 800
        kept.clear()
    assert counter.live_bytes == 0


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    counter = new_counter(model)
    counter.claim([p for part in model for p in part.parameters()], Category.PARAMETERS)
    assert counter.live[Category.PARAMETERS] == 6 * 6 * 4


def test_what_is_claimed_again_moves_and_does_not_add_up() -> None:
    counter = ByteCounter(CPU)
    tensor = torch.zeros(10)
    counter.claim([tensor], Category.ACTIVATIONS)
    counter.claim([tensor], Category.INPUTS)
    assert counter.live[Category.INPUTS] == counter.live_bytes == 40 and counter.live[Category.ACTIVATIONS] == 0


def test_tensors_on_other_devices_do_not_count() -> None:
    counter = ByteCounter(torch.device("meta"))
    with counter:
        kept = torch.zeros(10), torch.zeros(10, device="meta")
    assert counter.live_bytes == 40 and len(kept) == 2


def test_bytes_that_no_tensor_shows_stand_until_they_are_replaced() -> None:
    counter = ByteCounter(CPU)
    counter.stand(100, Category.INPUTS)
    counter.stand(60, Category.INPUTS)
    assert counter.live_bytes == counter.live[Category.INPUTS] == 60 and counter.peak_bytes == 100


def test_the_timeline_is_short_and_keeps_the_peak() -> None:
    model = network()
    counter = new_counter(model, with_timeline=True)
    for _ in range(40):
        run_step(counter, model)
    points = counter.timeline()
    assert 2 <= len(points) <= 240
    assert [p.position_fraction for p in points] == sorted(p.position_fraction for p in points)
    assert all(0 <= p.position_fraction <= 1 for p in points)
    assert max(sum(p.live_bytes.values()) for p in points) == counter.peak_bytes


def test_peaks_start_again_from_what_is_live() -> None:
    counter = ByteCounter(CPU)
    with counter:
        kept = torch.zeros(10)
        torch.zeros(1000)
        assert counter.peak_bytes == 4040
        counter.reset_peaks()
        assert counter.peak_bytes == counter.live_bytes == 40 and kept.numel() == 10


def test_counting_changes_no_bit_of_a_step() -> None:
    models = mlp(), mlp()
    for model, counted in zip(models, (True, False)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        step = sg.Step(model, cross_entropy, rows=4, optimizer=optimizer)
        counter = sg.count_bytes(step) if counted else None
        [result] = sg.train(step, [labelled(29)], counter=counter)
        assert (result.peak_allocated_bytes is not None) == counted
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


def test_the_course_of_a_step_is_kept_where_it_is_asked_for() -> None:
    model = mlp()
    step = sg.Step(model, cross_entropy, rows=4, optimizer=torch.optim.Adam(model.parameters()))
    plainly, kept = sg.count_bytes(step), sg.count_bytes(step, with_timeline=True)
    for counter in (plainly, kept):
        list(sg.train(step, [labelled(29)], counter=counter))
    assert plainly.timeline() == ()
    course = kept.timeline()
    assert max(sum(point.live_bytes.values()) for point in course) == kept.peak_bytes
    assert {point.phase.value for point in course} >= {"forward", "backward", "optimizer"}


def test_the_counter_returns_to_its_level_after_every_step() -> None:
    model = mlp()
    step = sg.Step(model, cross_entropy, rows=4, optimizer=torch.optim.Adam(model.parameters()))
    counter = sg.count_bytes(step)
    batch = labelled(29)
    levels = [r.allocated_bytes for r in sg.train(step, [batch] * 12, counter=counter)]
    assert len(set(levels[1:])) == 1
