"""The zoo through ``Step``: what is known of every module is what happens, against the plain step under one seed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad import trees
from samegrad.exact.attributes import can_hold_state
from samegrad.exact.undisturbed import undisturbed
from samegrad.verify import tolerance

from ..crossed import crossed
from . import zoo
from .module_zoo import BY_PARTS, BY_ROWS, REFUSED
from .zoo_modules import Output

LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "mse": zoo.LOSSES["mse"][0],
    "rmse": zoo.LOSSES["rmse"][0],
    "spread": lambda z, rows: z.pow(2).mean().sqrt(),
}
RAGGED = [1, 13, 2, 13]
STEPS = 2


def batch() -> dict[str, Tensor]:
    return zoo.batch() | {"tokens": torch.randint(0, 11, (zoo.ROWS, 5), generator=torch.Generator().manual_seed(5))}


def forward(model: nn.Module, rows: dict[str, Tensor]) -> Any:
    return model(rows[getattr(model, "takes", "x")])


def loss_on(name: str) -> Callable[[Any, Any], Tensor]:
    """The loss of this name on the first rows among the outputs; a model's own loss where it has one."""

    def loss_fn(outputs: Any, rows: Any) -> Tensor:
        if isinstance(outputs, Output) and "loss" in outputs:
            return outputs["loss"]
        tensors = [leaf for leaf in trees.leaves_of(outputs) if isinstance(leaf, Tensor)]
        return LOSSES[name](next((leaf for leaf in tensors if leaf.dim() > 1), tensors[0]), rows)

    return loss_fn


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class Run:
    """Two steps of a new model from one seed: losses, gradients, state and generators after them.

    ``rows`` None: the plain step, written out.
    """

    def __init__(self, make: Callable[[], nn.Module], loss: str, rows: int | Sequence[int] | None) -> None:
        seeded(0)
        self.model, loss_fn, self.batch = make(), loss_on(loss), batch()
        self.step = sg.Step(self.model, loss_fn, forward=forward, rows=zoo.ROWS if rows is None else rows)
        seeded(7)
        self.losses, self.gradients = [], []
        for _ in range(STEPS):
            self.model.zero_grad()
            if rows is None:
                value = loss_fn(forward(self.model, self.batch), self.batch)
                value.backward()
                self.losses.append(value.detach())
            else:
                self.losses.append(self.step.backward(self.batch))
            self.gradients.append([None if p.grad is None else dense(p.grad).clone() for p in self.model.parameters()])
        self.generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        self.state = state_of(self.model)

    def scales(self) -> list[float]:
        """What each parameter's differences are measured on, by the contract."""
        layout = self.step.declared.layout(self.batch)
        with undisturbed([self.model], torch.device("cpu")):
            split = self.step.split_for(self.batch, layout).keeping_magnitudes()
            totals = split.totals(self.batch, layout, self.step.sizes_for(self.batch))
        sizes = dict(zip(map(id, totals.parameters), totals.magnitudes or []))
        found = [sizes.get(id(p)) for p in self.model.parameters()]
        largest = [0.0 if size is None else dense(size).max().item() for size in found]
        return [tolerance.entry_scale(mine, max(largest)) for mine in largest]


def reference(make: Callable[[], nn.Module], loss: str) -> Run:
    """The plain step; of a model that draws through torch, the step that runs whole, whose draws are known."""
    plain = Run(make, loss, None)
    seeded(7)
    return plain if torch.equal(plain.generators[0], torch.get_rng_state()) else Run(make, loss, zoo.ROWS)


def dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def state_of(model: nn.Module) -> dict[str, Any]:
    own = vars(nn.Module())
    state: dict[str, Any] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for path, part in model.named_modules():
        for key, value in vars(part).items():
            if key not in own and can_hold_state(value) and not isinstance(part, nn.RNNBase):
                state[f"{path}.{key}"] = value
    return state


def assert_same_run(mine: Run, theirs: Run) -> None:
    scales = mine.scales()
    for a, b in zip(mine.losses, theirs.losses):
        assert abs(a - b) <= tolerance.loss_allowed(a.dtype) * abs(b)
    for ours, plain in zip(mine.gradients, theirs.gradients):
        for a, b, scale in zip(ours, plain, scales, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert (a - b).abs().max() <= tolerance.entry_allowed(torch.float64) * scale
    assert torch.equal(mine.generators[0], theirs.generators[0]) and mine.generators[1:] == theirs.generators[1:]
    assert_same_state(mine.state, theirs.state)


def assert_same_state(mine: Any, theirs: Any) -> None:
    assert type(mine) is type(theirs)
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-13, atol=1e-14)
    elif isinstance(theirs, dict):
        assert mine.keys() == theirs.keys()
        for key in theirs:
            assert_same_state(mine[key], theirs[key])
    elif isinstance(theirs, (list, tuple)) or hasattr(theirs, "maxlen"):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs):
            assert_same_state(a, b)
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=1e-13)
    else:
        assert mine == theirs or not can_hold_state(theirs)


@pytest.mark.parametrize(("name", "loss"), crossed(BY_ROWS, ["mse", "rmse"]))
def test_what_treats_rows_alone_is_split_by_rows_exactly(name: str, loss: str) -> None:
    plain = reference(BY_ROWS[name], loss)
    for rows in (8, RAGGED):
        mine = Run(BY_ROWS[name], loss, rows)
        assert list(mine.step.plan.levers) == ["host_rows", "split_rows"]
        assert ways(mine).by_rows.passes == {"mse": 1, "rmse": 2}[loss]
        assert_same_run(mine, plain)


@pytest.mark.parametrize(("loss", "rows"), [("mse", RAGGED), ("rmse", 8)], ids=["mse", "rmse"])
@pytest.mark.parametrize("name", BY_PARTS)
def test_what_couples_rows_is_named_and_runs_in_parts_exactly(name: str, loss: str, rows: Any) -> None:
    truth = BY_PARTS[name]
    mine = Run(truth.make, loss, rows)
    assert list(mine.step.plan.levers) == [truth.lever]
    assert re.search(truth.named, ways(mine).refusal.found), ways(mine).refusal.found
    assert_same_run(mine, reference(truth.make, loss))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_in_chunks_is_refused_by_name_and_left_as_it_was(name: str) -> None:
    seeded(0)
    truth, rows = REFUSED[name], batch()
    model = truth.make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    given = {key: value.clone() for key, value in rows.items()}
    generators = torch.get_rng_state(), random.getstate()
    with pytest.raises(sg.CannotSplit, match=truth.named):
        sg.Step(model, loss_on("spread"), forward=forward, rows=8).backward(rows)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(torch.equal(value, given[key]) for key, value in rows.items())


def test_the_zoo_is_no_smaller_than_promised() -> None:
    assert len({*BY_ROWS, *BY_PARTS, *REFUSED}) == len(BY_ROWS) + len(BY_PARTS) + len(REFUSED) >= 90


def ways(run: Run) -> Any:
    [found] = run.step._examined.ways.values()
    return found
