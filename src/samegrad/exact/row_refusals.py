"""What a model is refused for where it is to run a few rows at a time, and what its user can do then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from samegrad.errors import CannotSplit
from samegrad.exact import losses, program
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.batchnorm import uses_batch_statistics
from samegrad.exact.replaced_forward import has_own_forward
from samegrad.exact.row_comparisons import same_bits
from samegrad.exact.sharded import local
from samegrad.exact.undisturbed import ModuleState, NotToBeTried

WAYS_OUT = "run the step whole (a larger budget, or rows=<the batch's rows>)"


def refuse_known_layers(module: nn.Module) -> None:
    """Raises CannotSplit for layers whose kind alone forbids splitting in the mode they are in."""
    refuse_data_parallel(module)
    for name, part in module.named_modules():
        kind = type(part).__name__
        if kind == "FullyShardedDataParallel":
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"{name or 'the model'} is a FullyShardedDataParallel, with parts of one flat parameter",
                do=f"{WAYS_OUT}, or shard with torch.distributed.fsdp.fully_shard",
            )
        if uses_batch_statistics(part) and not has_own_forward(part):
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"{name or 'the model'} ({kind} in training mode) normalises with the statistics of all rows",
                do=f"{WAYS_OUT}, put that layer in eval mode, or use GroupNorm (another model)",
            )


def refuse_data_parallel(module: nn.Module) -> None:
    """Raises CannotSplit for ``nn.DataParallel``, wherever it is."""
    for name, part in module.named_modules():
        if isinstance(part, nn.DataParallel):
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"{name or 'the model'} is an nn.DataParallel, which scatters each chunk again and copies its "
                "module on every forward",
                do="use the module that it wraps, or one process per device with DistributedDataParallel and torchrun",
            )


def refuse_held(state: ModuleState) -> None:
    """Raises CannotSplit naming what the function holds outside modules and has changed."""
    if changed := state.held_changed():
        raise CannotSplit(
            asked="split the rows of a step",
            found=f"the forward changes {', '.join(changed[:3])}, which would happen once a chunk and not once a step",
            do=f"{WAYS_OUT}, or update that outside the forward",
        )


def check_reach(aliases: ParameterAliases, outputs: Any, standing: Sequence[nn.Parameter]) -> None:
    """Raises CannotSplit when ``outputs``, computed on the aliases ``standing``, depend on any other leaf."""
    known = {id(alias) for alias in standing}
    named = {id(p): name for name, p in zip(aliases.names, aliases.parameters)}
    for output in program.tensors_in(outputs):
        for leaf in losses.leaves_under(output):
            if id(leaf) in known:
                continue
            what = named.get(id(leaf))
            raise CannotSplit(
                asked="gradients of every parameter",
                found=f"{what} is reached past its place in the module (through a list or a closure)"
                if what
                else f"the forward uses a tensor of shape {tuple(leaf.shape)} that requires grad and is not a "
                "registered parameter",
                do="register it (nn.Parameter, nn.ParameterList, nn.ModuleList) and use it from there, "
                "or " + WAYS_OUT,
            )


def check_weights(weights: Sequence[tuple[str, Tensor, Tensor]]) -> None:
    """Raises CannotSplit, the weights as they were, when a forward changed some: set from its first batch, say."""
    changed = []
    for name, now, before in weights:
        if not same_bits(local(now), before):
            changed.append(name)
            local(now).copy_(before)
    if changed:
        raise NotToBeTried(
            asked="split the rows of a step",
            found=f"the forward changes its parameters {', '.join(changed[:3])}: from a chunk, not from the batch",
            do=f"{WAYS_OUT}, or run one forward on a whole batch before the first step",
        )


def check_untouched(versions: Sequence[tuple[str, Tensor, int]]) -> None:
    """Raises CannotSplit naming what a forward wrote on: by name a tensor of the batch, and its version before."""
    for path, leaf, version in versions:
        if leaf._version != version:
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"the forward writes on its input {path}: a second forward would see other values",
                do=f"{WAYS_OUT}, or use the operation that is not in place",
            )
