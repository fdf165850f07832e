"""The chunked step's gradient is that of one plain batch, and what would make it another one is caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import samegrad as sg
from samegrad.exact.unit_chain import find_units
from samegrad.recipes.flow_style.calling import Calling
from samegrad.recipes.flow_style.data import ROW_AXES, ROW_FIELDS, Drawing, Latents, StyleBatch, draw_batch
from samegrad.recipes.flow_style.losses import Energy
from samegrad.recipes.flow_style.model import StyleFlow, make_flow
from samegrad.recipes.flow_style.plans import step_blocks

ROWS = 7  # prime, so that no chunk but one row divides it
SIZES = [3, 1, 3]
ODE_STEPS = 3
ENERGY = Energy(patch_sizes=(3, 5), size_weights=(1.0, 0.5), velocity_weight=0.3, style_weights=(1.0, 1.7))
DRAWING = Drawing(rows=ROWS, label_drop_probability=0.4, patch_sizes=(3, 5), projections=ROWS, max_samples=200)

forward = Calling()
Gradients = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def latents() -> Latents:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(12, 4, 8, 8, generator=generator, dtype=torch.float64)
    ids = torch.arange(12) % 2
    return Latents(drawn * (1 + ids[:, None, None, None]), ids, ("calm", "wild"))


@pytest.fixture
def batch(latents: Latents) -> StyleBatch:
    drawn = draw_batch(latents, DRAWING, earliest=0.01, seed=(0, 3))
    assert 0 < int(drawn.dropped.sum()) < ROWS
    return drawn


@pytest.fixture
def model() -> StyleFlow:
    flow = make_flow(2, base_channels=4, ode_steps=ODE_STEPS, seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Away from the start, where the flow is the identity and most gradients are zero.
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return flow


def gradients_of(model: StyleFlow) -> Gradients:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain(model: StyleFlow, batch: StyleBatch, energy: Energy = ENERGY) -> Gradients:
    energy(forward(model, batch), batch).backward()
    return gradients_of(model)


def apart(found: Gradients, expected: Gradients) -> float:
    """The largest difference, as a share of the largest gradient."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((found[name] - gradient).abs().max()) for name, gradient in expected.items()) / largest


def step_of(model: StyleFlow, *, run: Callable[..., Any] = forward, energy: Any = ENERGY, **how: Any) -> sg.Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return sg.Step(model, energy, optimizer=optimizer, forward=run, batch_axes=ROW_AXES, **how)


def plan_of(model: StyleFlow, sizes: list[int] | None, every: int) -> sg.Plan:
    levers: dict[str, dict[str, Any]] = {} if sizes is None else {"split_rows": {"rows": sizes}}
    if every:
        levers["recompute"] = {"blocks": step_blocks(model, every)}
    return sg.Plan(levers=levers, exactness=sg.Exactness.SAME_SUM, batch_rows=ROWS)


@pytest.mark.parametrize("every", [0, 1, 2, 3])
@pytest.mark.parametrize("sizes", [SIZES, [1] * ROWS], ids=["ragged", "single rows"])
def test_chunks_and_steps_run_again_give_the_plain_gradient(
    model: StyleFlow, batch: StyleBatch, sizes: list[int], every: int
) -> None:
    expected = plain(model, batch)
    with step_of(model, plan=plan_of(model, sizes, every)) as step:
        loss = step.backward(batch)
    assert apart(gradients_of(model), expected) <= 1e-11
    assert float(loss) == pytest.approx(float(ENERGY(forward(model, batch), batch).detach()), rel=1e-12)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_models_own_checkpoints_change_no_bit(model: StyleFlow, batch: StyleBatch, every: int) -> None:
    expected = plain(model, batch)
    model.checkpoint_every = every
    again = plain(model, batch)
    assert all(torch.equal(again[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("every", [0, 2])
def test_the_engine_finds_the_steps_unless_the_model_checkpoints_them(
    model: StyleFlow, batch: StyleBatch, every: int
) -> None:
    model.checkpoint_every = every
    with step_of(model, rows=SIZES) as step:
        chain = find_units(step.declared, batch)
    found = [unit.name for unit in chain.units if unit.has_parts]
    assert found == ([] if every else ["steps.0", "steps.1", "steps.2"])


def test_steps_run_again_on_the_whole_batch_change_no_bit(model: StyleFlow, batch: StyleBatch) -> None:
    expected = plain(model, batch)
    with step_of(model, plan=plan_of(model, None, 2)) as step:
        step.backward(batch)
    assert all(torch.equal(found, expected[name]) for name, found in gradients_of(model).items())


@pytest.mark.parametrize("changed", [{"by_style": False}, {"velocity_weight": 0.0}, {"style_weights": ()}])
def test_every_energy_is_exact(model: StyleFlow, batch: StyleBatch, changed: dict[str, Any]) -> None:
    energy = dataclasses.replace(ENERGY, **changed)
    expected = plain(model, batch, energy)
    with step_of(model, rows=SIZES, energy=energy) as step:
        step.backward(batch)
    assert apart(gradients_of(model), expected) <= 1e-11


def test_positions_of_the_self_similarity_are_one_draw(model: StyleFlow, latents: Latents) -> None:
    few = draw_batch(latents, dataclasses.replace(DRAWING, max_positions=20), earliest=0.01, seed=(0, 4))
    expected = plain(model, few)
    with step_of(model, rows=SIZES) as step:
        step.backward(few)
    assert apart(gradients_of(model), expected) <= 1e-11


def test_the_plan_is_verified(model: StyleFlow, batch: StyleBatch) -> None:
    with step_of(model, plan=plan_of(model, SIZES, 2)) as step:
        assert sg.verify_step(step, batch).same


def chunks_of(batch: StyleBatch, sizes: list[int]) -> list[StyleBatch]:
    parts = {name: getattr(batch, name).split(sizes) for name in ROW_FIELDS}
    return [batch._replace(**{name: part[i] for name, part in parts.items()}) for i in range(len(sizes))]


def accumulated(
    model: StyleFlow, batch: StyleBatch, drawn: Callable[[StyleBatch, int], StyleBatch] = lambda part, _: part
) -> Gradients:
    """What the document's loop does: each chunk's own energy, weighted by its rows."""
    for index, part in enumerate(chunks_of(batch, SIZES)):
        part = drawn(part, index)
        (ENERGY(forward(model, part), part) * len(part.source) / ROWS).backward()
    return gradients_of(model)


def own_places(part: StyleBatch, _: int) -> StyleBatch:
    """All patches of the chunk, once each."""
    spots = part.source.shape[2] * part.source.shape[3]
    return part._replace(places=tuple(torch.arange(len(part.source) * spots) for _ in part.places))


def test_a_distance_averaged_over_chunks_would_be_caught(model: StyleFlow, batch: StyleBatch) -> None:
    every = batch._replace(places=own_places(batch, 0).places)
    assert apart(accumulated(model, every, own_places), plain(model, every)) > 1e-3


def test_directions_drawn_again_in_each_chunk_would_be_caught(
    model: StyleFlow, batch: StyleBatch, latents: Latents
) -> None:
    """Even where all else is right: one energy of all rows, but each chunk's cotangent along directions of its own."""
    expected = plain(model, batch)
    parts = chunks_of(batch, SIZES)
    for index, part in enumerate(parts):
        other = draw_batch(latents, DRAWING, earliest=0.01, seed=(7, index))
        redrawn = batch._replace(directions=other.directions)
        outputs = forward(model, batch)
        leaf = outputs.latents.detach().requires_grad_()
        ENERGY(outputs._replace(latents=leaf, velocity_energy=outputs.velocity_energy.detach()), redrawn).backward()
        assert leaf.grad is not None
        first = sum(SIZES[:index])
        rows = slice(first, first + SIZES[index])
        again = forward(model, part)
        penalty = ENERGY.velocity_weight * again.velocity_energy.sum() / ROWS
        ((again.latents * leaf.grad[rows]).sum() + penalty).backward()
    assert apart(gradients_of(model), expected) > 1e-3


def test_the_same_by_hand_with_one_draw_is_the_plain_gradient(model: StyleFlow, batch: StyleBatch) -> None:
    """The twin of the fault above: so it is the redrawing that is caught."""
    expected = plain(model, batch)
    outputs = forward(model, batch)
    leaf = outputs.latents.detach().requires_grad_()
    ENERGY(outputs._replace(latents=leaf, velocity_energy=outputs.velocity_energy.detach()), batch).backward()
    assert leaf.grad is not None
    for part, cotangent in zip(chunks_of(batch, SIZES), leaf.grad.split(SIZES)):
        again = forward(model, part)
        penalty = ENERGY.velocity_weight * again.velocity_energy.sum() / ROWS
        ((again.latents * cotangent).sum() + penalty).backward()
    assert apart(gradients_of(model), expected) <= 1e-11


class DropsAgain:
    """A forward that draws the dropped labels itself, from a generator that nobody restores."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, model: StyleFlow, batch: StyleBatch) -> Any:
        return forward(model, batch._replace(dropped=torch.rand(len(batch.start), generator=self.generator) < 0.4))


def test_labels_dropped_again_in_recomputation_would_be_caught(model: StyleFlow, batch: StyleBatch) -> None:
    expected = plain(model, batch)
    model.checkpoint_every = 0
    drops = DropsAgain()
    outputs = drops(model, batch)
    leaf = outputs.latents.detach().requires_grad_()
    ENERGY(outputs._replace(latents=leaf), batch).backward()
    (drops(model, batch).latents * leaf.grad).sum().backward()
    assert apart(gradients_of(model), expected) > 1e-3


def test_a_forward_that_draws_labels_out_of_sight_is_refused(model: StyleFlow, batch: StyleBatch) -> None:
    with step_of(model, run=DropsAgain(), rows=SIZES) as step, pytest.raises(sg.SamegradError):
        step.backward(batch)


class AveragedOverChunks:
    """The planted fault in the loss itself: the mean of the energies of parts of the rows it is given."""

    def __call__(self, outputs: Any, batch: StyleBatch) -> Tensor:
        halves = []
        for rows in (slice(0, 3), slice(3, None)):
            part = batch._replace(**{name: getattr(batch, name)[rows] for name in ROW_FIELDS})
            halves.append(ENERGY(type(outputs)(*(output[rows] for output in outputs)), part))
        return torch.stack(halves).mean()


def test_half_batches_have_another_energy(model: StyleFlow, batch: StyleBatch) -> None:
    with torch.no_grad():
        outputs = forward(model, batch)
        whole, halves = ENERGY(outputs, batch), AveragedOverChunks()(outputs, batch)
    assert abs(float(halves / whole) - 1) > 1e-2
