"""BatchNorm exactly with the full batch: blocks that keep no inner activations and run again in backward.

    with recomputed_blocks(network):
        loss_fn(network(x), batch).backward()

A block that runs twice must be the same function twice and leave its buffers as after one run. torch.utils.checkpoint
alone updates running statistics again when it recomputes (pytorch#96136), and a layer whose buffers enter its result
(spectral norm) would compute another result. Here the second run starts from copies of the buffers as they stood
before the first, and the buffers themselves are not touched by it. Keyed draws are made again as they were, others
are replayed by torch.utils.checkpoint.

A model that calls torch.utils.checkpoint itself is left alone: its plain step updates the statistics under it twice,
and so does this one.

2 forwards and a backward; memory: the blocks' inputs and one block, of all rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samegrad.errors import UsageError
from samegrad.exact.batchnorm import has_batchnorm, uses_batch_statistics
from samegrad.exact.replaced_forward import forward_replaced
from samegrad.exact.step_draws import StepDraws


@contextlib.contextmanager
def recomputed_blocks(
    network: nn.Module,
    blocks: Sequence[str] | None = None,
    *,
    sizes: Sequence[int] = (),
    draws: StepDraws | None = None,
) -> Iterator[None]:
    """Calls of the submodules ``blocks`` of ``network`` run again in backward instead of keeping what they compute.

    Without ``blocks``: those of ``find_blocks``. ``draws``: of the step, if it has keyed ones. ``sizes`` make no
    difference: blocks see all rows. Raises UsageError for names that are none, or where one block is part
    of another.
    """
    names = find_blocks(network) if blocks is None else list(blocks)
    modules = dict(network.named_modules())
    _check(names, modules)
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(forward_replaced(modules[name], _recomputing(modules[name], draws or StepDraws())))
        yield


def find_blocks(network: nn.Module) -> list[str]:
    """The outermost members of a Sequential or ModuleList that contain a BatchNorm in training mode and more."""
    found: list[str] = []
    for name, part in network.named_modules():
        if not isinstance(part, (nn.Sequential, nn.ModuleList)):
            continue
        for key, child in part.named_children():
            path = f"{name}.{key}" if name else key
            is_list = isinstance(child, (nn.Sequential, nn.ModuleList)) and bool(_lists_in(child))
            if has_batchnorm(child) and not uses_batch_statistics(child) and not is_list:
                found.append(path)
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _lists_in(part: nn.Module) -> list[nn.Module]:
    """Blocks that ``part`` itself is a list of."""
    return [child for child in part.children() if has_batchnorm(child) and not uses_batch_statistics(child)]


def _check(names: Sequence[str], modules: dict[str, nn.Module]) -> None:
    asked = f"recompute the blocks {', '.join(names) or '(none)'}"
    if not names:
        raise UsageError(asked=asked, found="no block with a BatchNorm in training mode", do="name the blocks")
    for name in names:
        if name not in modules or not name:
            raise UsageError(asked=asked, found=f"the model has no part {name!r}", do="use names of named_modules()")
        inside = [other for other in names if other.startswith(f"{name}.")]
        if inside:
            raise UsageError(asked=asked, found=f"{inside[0]} is part of {name}", do="name one of them")


def _recomputing(block: nn.Module, draws: StepDraws) -> Callable[..., Any]:
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        before, drawing = _Buffers(block), draws.part_again()

        def drawn(*args: Any, **kwargs: Any) -> Any:
            with drawing() as mine:
                result = plain(*args, **kwargs)
            draws.passed(mine)
            return result

        def contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
            return contextlib.nullcontext(), before.standing()

        result = checkpoint(drawn, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        before.keep_changed()
        return result

    return forward


class _Buffers:
    """Copies of a block's buffers as they stood, of those that a run changes."""

    def __init__(self, block: nn.Module) -> None:
        self._kept = [
            (part, name, buffer, buffer._version, buffer.detach().clone())
            for part in block.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]

    def keep_changed(self) -> None:
        # torch's batch_norm writes into running statistics without counting a version.
        self._kept = [
            kept for kept in self._kept if kept[2]._version != kept[3] or uses_batch_statistics(kept[0])
        ]

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """The copies in the buffers' places: a run computes with them, changes them, and leaves the buffers alone."""
        now: list[tuple[nn.Module, str, Tensor | None]] = []
        try:
            for part, name, _, _, copy in self._kept:
                now.append((part, name, part._buffers[name]))
                # A clone again, for a graph that is kept and recomputed once more.
                part._buffers[name] = copy.clone()
            yield
        finally:
            for part, name, buffer in now:
                part._buffers[name] = buffer
