"""Parameters that ``fully_shard`` keeps in parts on several ranks: what is known of them, and what is refused.

Their hooks gather them for every forward and reduce their gradients after every backward, so a chunk must go through
the modules themselves. torch has no public view of the policy and the switches that are read here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from samegrad.errors import CannotSplit
from samegrad.exact.ranks import Ranks
from samegrad.module_walk import parameters_of, parts_of

_WHOLE = "run the step whole (rows=<the batch's rows>)"


def is_sharded(tensor: Tensor) -> bool:
    # A class that is not imported unless it is used, and asked for often: a module that never was has no instances.
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, detached; any other tensor detached."""
    part: Any = tensor
    detached: Tensor = part.to_local().detach() if is_sharded(tensor) else tensor.detach()
    return detached


def _has_ranks() -> bool:
    """Whether this process is one of several, or at least of a group: without one nothing is sharded."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()


def sharding_modules(modules: Sequence[nn.Module]) -> list[Any]:
    """The parts that ``fully_shard`` was applied to, outer ones first."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None or not _has_ranks():
        return []
    return [part for part in parts_of(modules) if isinstance(part, loaded.FSDPModule)]


def reshard(modules: Sequence[nn.Module]) -> None:
    """Parameters as this rank's parts again. After a forward without backward the outermost ones stand gathered."""
    for part in sharding_modules(modules):
        part.reshard()


def ranks_of(modules: Sequence[nn.Module]) -> Ranks | None:
    """The ranks that hold parts of the parameters of ``modules``, or None where each rank holds all of them."""
    if "torch.distributed.tensor" not in sys.modules or not _has_ranks():
        # Asked in every step: what was never imported has no instances.
        return None
    reshard(modules)
    parameters: list[Any] = parameters_of(modules)
    meshes = dict.fromkeys(p.device_mesh for p in parameters if is_sharded(p))
    if not meshes:
        return None
    groups = dict.fromkeys(mesh.get_group(axis) for mesh in meshes for axis in range(mesh.ndim))
    kind = next(iter(meshes)).device_type
    # A bare "cuda" is this process's current card, as fully_shard takes it.
    return Ranks(tuple(groups), torch.device(kind))


def refuse_sharded(modules: Sequence[nn.Module], asked: str, do: str) -> None:
    """Raises CannotSplit, with the parameter named, when some are sharded."""
    reshard(modules)
    for module in modules:
        for name, parameter in module.named_parameters():
            if is_sharded(parameter):
                raise CannotSplit(asked=asked, found=f"{name} is sharded over ranks (fully_shard, DTensor)", do=do)


def refuse_unsafe(modules: Sequence[nn.Module], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises CannotSplit for settings under which sums of the chunks' reductions are not the plain step's gradient.

    ``parameters``: the trainable ones by name.
    """
    parts = sharding_modules(modules)
    managed = {id(p) for part in parts for p in part.parameters()}
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            _check_placement(name, parameter, id(parameter) in managed)
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            _refuse(
                f"{name} is sharded, or stands beside sharded parameters, and has a hook, which would see every "
                "chunk's gradient and not the total",
                f"remove the hook and do its work after backward(), or {_WHOLE}",
            )
    names = {id(part): name for module in modules for name, part in module.named_modules()}
    for part in parts:
        state = part._get_fsdp_state()
        for group in _groups(state):
            _check_group(names[id(part)] or "the model", state, group)


def _check_placement(name: str, parameter: Any, managed: bool) -> None:
    *outer, inner = parameter.placements
    if not managed or not inner.is_shard() or not all(placement.is_replicate() for placement in outer):
        _refuse(
            f"{name} is a DTensor placed {tuple(parameter.placements)}: not by fully_shard alone",
            f"{_WHOLE}; sharding along one axis, with or without replicas, is what chunks are known to work with",
        )


def _check_group(name: str, state: Any, group: Any) -> None:
    if not (group.reduce_grads and group.all_reduce_grads and state._state_ctx.is_last_backward):
        _refuse(
            f"the reduction of {name}'s gradients is switched off (set_requires_gradient_sync, "
            "set_requires_all_reduce or set_is_last_backward)",
            "switch it on for the whole step: it accumulates over chunks by itself",
        )
    policy = state._mp_policy
    for parameter in (p.sharded_param for p in group.fsdp_params):
        if not (parameter.requires_grad and parameter.is_floating_point()):
            continue
        reduced = policy.reduce_dtype or policy.param_dtype or parameter.dtype
        # What a chunk gives is rounded to the parameter's own dtype on one rank as well.
        kept = max(torch.finfo(parameter.dtype).eps, torch.finfo(torch.float32).eps)
        if torch.finfo(reduced).eps > kept:
            kind = str(reduced).removeprefix("torch.")
            _refuse(
                f"{name} reduces gradients in {kind}, once a chunk, while the plain step rounds to it once",
                "fully_shard(..., mp_policy=MixedPrecisionPolicy(..., reduce_dtype=torch.float32))",
            )


def _refuse(found: str, do: str) -> NoReturn:
    raise CannotSplit(asked="split the rows of a step whose parameters are sharded", found=found, do=do)


def _groups(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


@contextlib.contextmanager
def gradients_set_aside(modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """A block in which the parameters start without gradients; afterwards they have those from before it again.

    An exception inside may come between a forward and its backward; what the hooks hold for that is given up.
    """
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    except BaseException:
        give_up(modules)
        raise
    finally:
        for parameter, gradient in zip(parameters, before):
            parameter.grad = gradient


def refuse_in_loss(leaves: Sequence[Tensor], network: nn.Module, sharded: Container[str]) -> None:
    """Raises CannotSplit when ``leaves`` of a loss's graph hold a sharded parameter: it is reduced with its chunk only.

    ``sharded``: names of sharded parameters. Right after a forward the outermost ones stand gathered under their names.
    """
    standing = {id(p): name for name, p in network.named_parameters() if name in sharded}
    for leaf in leaves:
        if id(leaf) in standing or is_sharded(leaf):
            _refuse(
                f"the loss uses {standing.get(id(leaf), 'a parameter')}, which is sharded over ranks",
                "compute what needs it in the model's forward, keep that parameter out of fully_shard "
                f"(ignored_params=), or {_WHOLE}",
            )


def give_up(modules: Sequence[nn.Module]) -> None:
    """Ends a forward or backward that an exception cut short; gradients on their way are dropped."""
    for part in sharding_modules(modules):
        state = part._get_fsdp_state()
        for group in _groups(state):
            for parameter in group.fsdp_params:
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None
                    parameter.unsharded_accumulated_grad = None
        # Since torch 2.13; before that only what stands gathered is given back.
        if state._is_root and hasattr(part, "reset_iter_state"):
            part.reset_iter_state()
        else:
            part.reshard()
