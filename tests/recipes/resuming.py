"""A run that stops between two steps of an epoch and goes on there, against one that does not stop."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import torch

from samegrad.recipes import Program, run_epochs


def assert_goes_on_within_an_epoch(build: Callable[[], Program]) -> None:
    """``build``: the same program each time, with two steps or more in its first epoch."""
    straight, first, second = build(), build(), build()
    torch.manual_seed(0)
    expected = [step.loss for epoch in run_epochs(straight) for step in epoch.steps]
    torch.manual_seed(0)
    paused = next(run_epochs(first, pause_seconds=0.0))
    assert not paused.is_over and paused.validation is None
    assert (first.next_epoch, first.steps_in_epoch, first.steps_done) == (0, 1, 1)
    generator, state = torch.get_rng_state(), json.loads(json.dumps(first.state()))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_state(state, first.best.weights())
    torch.set_rng_state(generator)
    rest = list(run_epochs(second))
    steps = [*paused.steps, *(step for epoch in rest for step in epoch.steps)]
    assert [step.loss for step in steps] == expected
    assert [step.index for step in steps] == list(range(len(expected)))
    for mine, theirs in zip(second.model.state_dict().values(), straight.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
