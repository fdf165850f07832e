"""Any torch optimizer's state as tensors and JSON, and back bit for bit, without pickle."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from samegrad.store.plain_state import from_plain, to_plain
from samegrad.store.resume import mismatch


def optimizer_to_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of ``optimizer.state_dict()`` by place ("state.0.exp_avg"), and the rest as strict JSON.

    The tensors are the optimizer's own, not copies: save them before its next step.
    Raises UsageError naming a value that has no exact form (a function in a param group).
    """
    tensors: dict[str, Tensor] = {}
    content = to_plain(dict(optimizer.state_dict()), place="", tensors=tensors)
    description = {
        "optimizer": _class_name(optimizer),
        "groups": [[_described(p) for p in group["params"]] for group in optimizer.param_groups],
        "tensors": {name: _described(tensor) for name, tensor in tensors.items()},
        "content": content,
    }
    return tensors, description


def tensors_into_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """``optimizer`` as it was when ``optimizer_to_tensors`` gave ``tensors`` and ``state``, all or nothing.

    Hyperparameters (lr, betas, …) become the saved ones. Tensors are copied, keep their dtype also where it is not
    the parameter's, and take the parameter's strides and device ("step" stays where torch keeps it).
    Raises BadInput with the first five differences in class, groups, names, shapes and dtypes.
    """
    differences = _differences(optimizer, tensors, state)
    if differences:
        raise mismatch("load the optimizer's state", differences)
    params = list(itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups))
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    document = from_plain(state["content"], place="of the optimizer", tensors=copies)
    strangers = [
        f"state.{index} belongs to no parameter" for index in document["state"] if index not in range(len(params))
    ]
    if strangers:
        raise mismatch("load the optimizer's state", strangers)
    saved = {
        index: {key: _in_layout_of(params[index], value) for key, value in entry.items()}
        for index, entry in document["state"].items()
    }
    optimizer.load_state_dict({**document, "state": saved})
    for index, entry in saved.items():
        optimizer.state[params[index]] = _with_saved_dtypes(optimizer.state[params[index]], entry)


def _class_name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}


def _differences(optimizer: Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    try:
        name, groups, described = state["optimizer"], state["groups"], state["tensors"]
        names_there = [group.get("param_names", {}) for group in state["content"]["param_groups"]]
        sizes_there = [len(group) for group in groups]
    except (KeyError, TypeError, AttributeError) as error:
        return [f"the state is not what samegrad saves ({type(error).__name__}: {error})"]
    found = []
    if name != _class_name(optimizer):
        found.append(f"the optimizer is {_class_name(optimizer)} here, {name} in the checkpoint")
    sizes_here = [len(group["params"]) for group in optimizer.param_groups]
    if sizes_here != sizes_there:
        found.append(f"its groups hold {sizes_here} parameters here, {sizes_there} in the checkpoint")
    for g, (group, group_there) in enumerate(zip(optimizer.param_groups, groups)):
        names_here = group.get("param_names")
        if names_here and names_there[g] and names_here != names_there[g]:
            pairs = itertools.zip_longest(names_here, names_there[g], fillvalue="nothing")
            found += [f"group {g} has {a} here, {b} in the checkpoint" for a, b in pairs if a != b]
        for i, (param, there) in enumerate(zip(group["params"], group_there)):
            found += _differs(f"parameter {i} of group {g}", _described(param), there, "here")
    for place in sorted({*described, *tensors}):
        given = _described(tensors[place]) if place in tensors else None
        found += _differs(place, given, described.get(place), "among the tensors")
    return found


def _differs(what: str, here: Any, there: Any, where: str) -> list[str]:
    if here == there:
        return []
    shown = [f"{tuple(d['shape'])} {d['dtype']}" if d else "missing" for d in (here, there)]
    return [f"{what} is {shown[0]} {where}, {shown[1]} in the saved state"]


def _in_layout_of(param: Tensor, value: Any) -> Any:
    # Elementwise kernels may round differently on other strides; optimizers make their state in the parameter's.
    if not isinstance(value, Tensor) or value.shape != param.shape or value.stride() == param.stride():
        return value
    return torch.empty_like(param, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


def _with_saved_dtypes(loaded: Any, saved: Any) -> Any:
    # load_state_dict casts every floating state to its parameter's dtype; fp32 states of bf16 parameters must stay.
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, dict):
        return {key: _with_saved_dtypes(loaded[key], value) for key, value in saved.items()}
    if isinstance(saved, (list, tuple)):
        return type(saved)(_with_saved_dtypes(a, b) for a, b in zip(loaded, saved, strict=True))
    return loaded
