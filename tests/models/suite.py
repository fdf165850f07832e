"""What samegrad promises of any model, as checks of one ``Case``: a small model of somebody else's, built from scratch.

Family files list cases, and run every check on every one of them. What a model cannot do is expected by name.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad import trees
from samegrad.declared import DeclaredStep, declare, default_forward
from samegrad.errors import CannotSplit, CannotTrace
from samegrad.exact.find_head import find_head
from samegrad.exact.unit_chain import UnitChain, find_units
from samegrad.measure import trace_reading
from samegrad.measure.trace import plainly, trace_step
from samegrad.verify import tolerance

from ..contract.plain import left_alone
from ..measure.traced import counted_peaks

ROWS, SIZES = 5, [2, 2, 1]
Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch of so many rows, and the loss of the plain step.

    ``blocks``: units that must be found. ``head``: the layer whose loss can run in chunks, None where there is none.
    ``computes_in``: the narrowest dtype that the model's own code casts to, float64 as it is. ``not_traced``,
    ``not_split``, ``not_recomputed``: what the refusal must say, where the step cannot be followed, its rows cannot be
    split, or its blocks cannot run again.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss_fn: Callable[[Any, Any], Tensor]
    blocks: tuple[str, ...]
    forward: Callable[[nn.Module, Any], Any] = default_forward
    head: str | None = None
    computes_in: torch.dtype = torch.float64
    not_traced: str = ""
    not_split: str = ""
    not_recomputed: str = ""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().train()

    def declared(self, model: nn.Module) -> DeclaredStep:
        return declare(model, self.loss_fn, forward=self.forward, optimizer=torch.optim.AdamW(model.parameters()))

    def chain(self) -> UnitChain:
        return find_units(self.declared(self.model()), self.batch(ROWS))


def imported(name: str) -> Any:
    """The module ``name``; tests that need it are skipped, and say why, where it does not import beside this torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        # An extension built for another torch raises any of these.
        pytest.skip(f"{name} does not import: {type(error).__name__}: {error}", allow_module_level=True)


# What a step leaves, by name.
Left = dict[str, Tensor]


def left_by(case: Case, *, training: bool = True, moved: bool = False, **how: Any) -> Left:
    """What ``backward`` leaves on a new model in float64, from one seed. ``how``: of ``Step``; without it, plainly.

    ``moved``: on rows that are moved by one unit in the last place.
    """
    model, batch = case.model().double().train(training), in_float64(case.batch(ROWS))
    if moved:
        batch = trees.map_tensors(batch, lambda leaf: leaf.nextafter(leaf + 1) if leaf.is_floating_point() else leaf)
    seeded()
    if how:
        with sg.Step(model, case.loss_fn, forward=case.forward, **how) as step:
            loss = step.backward(batch)
    else:
        loss = case.loss_fn(case.forward(model, batch), batch)
        loss.backward()
    left = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    return left | buffers | {"loss": loss.detach(), "generator": torch.get_rng_state()}


def seeded() -> None:
    torch.manual_seed(3)
    np.random.seed(3)


def in_float64(batch: Batch) -> Batch:
    widened: Batch = trees.map_tensors(batch, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf)
    return widened


def reference(case: Case) -> tuple[Left, bool]:
    """What the plain step leaves, and whether in training mode.

    A model that draws is a plain step's equal where it draws nothing, out of training mode.
    """
    plain = left_by(case)
    seeded()
    draws = not torch.equal(plain["generator"], torch.get_rng_state())
    return (left_by(case, training=False), False) if draws else (plain, True)


def assert_same(case: Case, ours: Left, theirs: Left, *, training: bool = True) -> None:
    """Equal up to the rounding that the contract allows in the dtype that the model computes in.

    Where that is passed, as much as the contract allows a step that is worse conditioned: by what the plain step does
    on rows moved by one unit in the last place.
    """
    assert ours.keys() == theirs.keys()
    usual, moved = 8 * tolerance.entry_allowed(case.computes_in), None
    largest: dict[str, float] = {}
    for key, value in theirs.items():
        if value.is_floating_point():
            kind = key.partition(" ")[0]
            largest[kind] = max(largest.get(kind, 0.0), float(value.abs().max()))
    for key, expected in theirs.items():
        if not expected.is_floating_point():
            assert torch.equal(ours[key], expected), key
            continue
        scale = tolerance.entry_scale(float(expected.abs().max()), largest[key.partition(" ")[0]])
        apart = float((ours[key] - expected).abs().max())
        if apart <= usual * scale:
            continue
        moved = moved or left_by(case, training=training, moved=True)
        unrest = float((moved[key] - expected).abs().max()) / scale
        assert apart <= tolerance.allowed_with_unrest(usual, unrest) * scale, (key, apart, scale, unrest)


def assert_same_bits(ours: Left, theirs: Left) -> None:
    assert ours.keys() == theirs.keys()
    assert [key for key, value in theirs.items() if not torch.equal(ours[key], value)] == []


def plan(**levers: dict[str, Any]) -> sg.Plan:
    exactness = sg.Exactness.SAME_BITS if list(levers) == ["recompute"] else sg.Exactness.SAME_SUM
    return sg.Plan(levers=levers, exactness=exactness, batch_rows=ROWS)


def runs_of(case: Case) -> list[str | list[str]]:
    """Every unit of the model, in runs as long as can be."""
    return [[path for unit in run for path in unit.paths] for run in case.chain().runs()]


# The checks.


def the_blocks_are_units(case: Case) -> None:
    chain = case.chain()
    found = [path for unit in chain.units if unit.has_parts for path in unit.paths]
    assert set(case.blocks) <= set(found), (found, chain.left_out)


def followed_on_cuda_or_refused_by_name(case: Case) -> None:
    declared = case.declared(case.model())
    with left_alone(declared.network, optimizer=declared.optimizer):
        if case.not_traced:
            with pytest.raises(CannotTrace, match=case.not_traced):
                trace_step(declared, case.batch(ROWS))
            return
        trace = trace_step(declared, case.batch(ROWS))
    weights_bytes = sum(p.nbytes for p in declared.network.parameters())
    # AdamW holds two numbers for each weight from the first step on.
    assert trace.device == "cuda" and trace_reading.peak_bytes(trace, step=1) >= 3 * weights_bytes


def followed_to_the_byte(case: Case) -> None:
    declared, batch = case.declared(case.model()), case.batch(ROWS)
    if case.not_traced:
        with pytest.raises(CannotTrace, match=case.not_traced):
            trace_step(declared, batch, device="cpu")
        return
    trace = trace_step(declared, batch, device="cpu")
    traced = [trace_reading.peak_bytes(trace, step=step) for step in (0, 1)]
    assert traced == counted_peaks(declared, batch, plainly())


def ragged_chunks_are_the_plain_step(case: Case) -> None:
    if case.not_split:
        model = case.model()
        step = sg.Step(model, case.loss_fn, forward=case.forward, rows=SIZES)
        with left_alone(model), pytest.raises(CannotSplit, match=case.not_split):
            step.backward(case.batch(ROWS))
        return
    plain, training = reference(case)
    assert_same(case, left_by(case, training=training, rows=SIZES), plain, training=training)
    if not training:
        assert_same(case, left_by(case, rows=SIZES), left_by(case, rows=ROWS))


def recomputed_blocks_are_the_plain_step_bit_for_bit(case: Case) -> None:
    recomputed = plan(recompute={"blocks": runs_of(case)})
    if case.not_recomputed:
        with pytest.raises(CannotSplit, match=case.not_recomputed):
            left_by(case, plan=recomputed)
        return
    plain, training = reference(case)
    assert_same_bits(left_by(case, training=training, plan=recomputed), plain)
    if not training:
        assert_same_bits(left_by(case, plan=recomputed), left_by(case, rows=ROWS))


def levers_together_are_the_whole_step(case: Case) -> None:
    levers: dict[str, dict[str, Any]] = {} if case.not_recomputed else {"recompute": {"blocks": runs_of(case)}}
    if not case.not_split:
        with sg.Step(case.model().double(), case.loss_fn, forward=case.forward, rows=SIZES) as step:
            step.backward(in_float64(case.batch(ROWS)))
            assert step.plan is not None
            by_rows = "split_rows" in step.plan.levers
        if by_rows:
            levers["split_rows"] = {"rows": SIZES}
    if case.head is not None:
        levers["chunk_loss"] = {"head": case.head, "rows": 5}
    assert_same(case, left_by(case, plan=plan(**levers)), left_by(case, rows=ROWS))


def the_head_is_found_or_refused_by_name(case: Case) -> None:
    declared, batch = case.declared(case.model()), case.batch(ROWS)
    if case.head is not None:
        assert find_head(declared, batch, declared.layout(batch)).path == case.head
        return
    with pytest.raises(CannotSplit) as refused:
        find_head(declared, batch, declared.layout(batch))
    linear = [name for name, part in declared.network.named_modules() if isinstance(part, nn.Linear)]
    assert any(refused.value.found.startswith(f"layer {name}:") for name in linear)


def measuring_leaves_everything_as_it_was(case: Case) -> None:
    """Probes of the real step at a few rows, and a trace where there can be one; what forwards return included."""
    model, batch = case.model(), case.batch(ROWS)
    hooks = [len(part._forward_hooks) for part in model.modules()]
    outputs = case.forward(copy.deepcopy(model).eval(), batch)
    with sg.Step(model, case.loss_fn, forward=case.forward) as step, left_alone(model):
        footprint = sg.measure_step(step, batch)
        if not case.not_traced:
            trace_step(step.declared, batch, device="cpu")
    assert footprint.peak_allocated_bytes > sum(p.nbytes for p in model.parameters())
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
    again = trees.leaves_of(case.forward(model.eval(), batch))
    tensors = [leaf for leaf in trees.leaves_of(outputs) if isinstance(leaf, Tensor)]
    assert len(again) == len(trees.leaves_of(outputs))
    assert all(torch.equal(a, b) for a, b in zip(tensors, (leaf for leaf in again if isinstance(leaf, Tensor))))


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__.replace("_", " "): check
    for check in (
        the_blocks_are_units,
        followed_on_cuda_or_refused_by_name,
        followed_to_the_byte,
        ragged_chunks_are_the_plain_step,
        recomputed_blocks_are_the_plain_step_bit_for_bit,
        levers_together_are_the_whole_step,
        the_head_is_found_or_refused_by_name,
        measuring_leaves_everything_as_it_was,
    )
}
