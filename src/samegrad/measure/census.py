"""What a step holds between steps, counted exactly: parameters, gradients, optimizer state, buffers.

Optimizer state that does not exist yet is found by running the user's optimizer on shadow parameters that have no
data, so that no weight moves and no memory is taken.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.measure.counting import ByteCounter
from samegrad.measure.shadows import copied_optimizer
from samegrad.records import Category, Phase


@dataclasses.dataclass(frozen=True)
class Residents:
    """Bytes by category, and what the optimizer's step takes on top while it runs.

    ``missing_state_bytes``: optimizer state that the first step will create. ``note`` says what could not be known.
    """

    by_category: dict[Category, int]
    missing_state_bytes: int
    optimizer_temporary_bytes: int
    note: str = ""


def count_residents(declared: DeclaredStep) -> Residents:
    """The resident bytes of the step on its device, gradients counted as if they existed."""
    parameters = [p for module in declared.modules for p in module.parameters()]
    buffers = [b for module in declared.modules for b in module.buffers()]
    trainable = [p for p in parameters if p.requires_grad]
    existing = state_tensors(declared.optimizer)
    existing_bytes = trees.storage_bytes([t for t in existing if t.device.type == declared.device.type])
    state_bytes, temporary_bytes, note = existing_bytes, 0, ""
    if declared.optimizer is not None:
        shadow_bytes, temporary_bytes, note = _shadow_step(declared.optimizer, declared.device)
        # State may be there for some parameters only: a group was added, a layer was unfrozen.
        state_bytes = max(existing_bytes, shadow_bytes)
    return Residents(
        by_category={
            Category.PARAMETERS: trees.storage_bytes(parameters),
            Category.GRADIENTS: trees.storage_bytes(trainable),
            Category.OPTIMIZER_STATE: state_bytes,
            Category.BUFFERS: trees.storage_bytes(buffers),
        },
        missing_state_bytes=state_bytes - existing_bytes,
        optimizer_temporary_bytes=temporary_bytes,
        note=note,
    )


def state_tensors(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """The tensors of an optimizer's state, as they are now."""
    if optimizer is None:
        return []
    return [leaf for leaf in trees.leaves_of(list(optimizer.state.values())) if isinstance(leaf, Tensor)]


def _shadow_step(optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[int, int, str]:
    """State bytes after one step and the bytes that step takes besides, by running it on the meta device."""
    shadow = copied_optimizer(optimizer)
    shadow.param_groups = [_shadow_group(group) for group in optimizer.param_groups]
    parameters = [p for group in shadow.param_groups for p in group["params"]]
    # Some optimizers set up their state when they are made (Adagrad), and step only with it.
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    shadow.state.update(
        {own: _shadow_state(optimizer.state[p]) for own, p in zip(parameters, trained) if p in optimizer.state}
    )
    counter = ByteCounter(torch.device("meta"))
    counter.announce(Phase.OPTIMIZER)
    counter.claim(parameters, Category.PARAMETERS)
    counter.claim([p.grad for p in parameters], Category.GRADIENTS)
    counter.claim(state_tensors(shadow), Category.OPTIMIZER_STATE)
    note = ""
    try:
        with counter, torch.no_grad():
            shadow.step()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        # Steps that read values (LBFGS, line searches) cannot run without data; what they set up first is counted.
        note = f"{type(optimizer).__name__} reads values in its step, so its state may be more than foreseen ({error})"
    counter.claim(state_tensors(shadow), Category.OPTIMIZER_STATE)
    state = counter.live[Category.OPTIMIZER_STATE]
    held = counter.live[Category.PARAMETERS] + counter.live[Category.GRADIENTS] + state
    if device.type == "cpu":
        # Scalars such as Adam's step counter are created on the CPU and do not count on another device.
        state += trees.storage_bytes([t for t in state_tensors(shadow) if t.device.type == "cpu"])
    return state, max(0, counter.peak_bytes - held), note


def _shadow_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state of one parameter without its data; numbers that a step reads, such as its count, stay numbers."""
    return {
        key: torch.empty_like(value, device="meta")
        if isinstance(value, Tensor) and value.dim() > 0
        else copy.deepcopy(value)
        for key, value in state.items()
    }


def _shadow_group(group: dict[str, Any]) -> dict[str, Any]:
    shadows = []
    for parameter in group["params"]:
        if not parameter.requires_grad:
            continue
        shadow = torch.nn.Parameter(torch.empty_like(parameter, device="meta"))
        shadow.grad = torch.empty_like(shadow)
        shadows.append(shadow)
    device_type = group["params"][0].device.type if group["params"] else "cpu"
    # What torch chooses by device cannot be chosen by it on shadows.
    foreach = group.get("foreach")
    chosen = (device_type == "cuda" and not group.get("fused")) if foreach is None else foreach
    changed = {k: v for k, v in (("foreach", chosen), ("fused", False), ("capturable", False)) if k in group}
    return {**group, **changed, "params": shadows}
