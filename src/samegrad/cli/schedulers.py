"""The learning-rate schedulers of a user's own program: found by their optimizer, saved and set as they were.

A function returns its step and its batches; a scheduler that a hook or a generator of batches drives is in neither.
Unsaved it would begin anew in a resumed run, and the weights would be others.
"""

from __future__ import annotations

import gc
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from samegrad.errors import BadInput


def schedulers_of(optimizer: Optimizer | None) -> list[LRScheduler]:
    """Those that set the learning rates of ``optimizer``; not the parts of one that is made of others."""
    if optimizer is None:
        return []
    # By type first: other objects may answer anything when they are asked for an attribute.
    found = [one for one in gc.get_objects() if issubclass(type(one), LRScheduler) and one.optimizer is optimizer]
    parts = {id(part) for one in found for part in getattr(one, "_schedulers", ())}
    return sorted((one for one in found if id(one) not in parts), key=lambda one: type(one).__name__)


def scheduler_states(optimizer: Optimizer | None) -> list[dict[str, Any]]:
    """What each of them is at, by the name of its class."""
    return [{"kind": type(one).__name__, "state": one.state_dict()} for one in schedulers_of(optimizer)]


def set_schedulers(optimizer: Optimizer | None, states: list[dict[str, Any]], *, title: str) -> None:
    """Puts the schedulers where they were. Raises BadInput where they are others than were saved."""
    here = schedulers_of(optimizer)
    saved, found = [state["kind"] for state in states], [type(one).__name__ for one in here]
    if saved != found:
        raise BadInput(
            asked=f"continue {title} with its learning-rate schedulers",
            found=f"{', '.join(saved) or 'none'} when it was saved, {', '.join(found) or 'none'} now",
            do="make the same schedulers of the optimizer as the run that saved it",
        )
    for one, state in zip(here, states):
        one.load_state_dict(state["state"])
