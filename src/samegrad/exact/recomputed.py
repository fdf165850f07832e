"""Blocks of the model that keep no inner activations and run again in backward: on the whole batch, or in a chunk.

    with recomputed_blocks(network, ["stem", ["layers.0", "layers.1"]]):
        loss_fn(network(x), batch).backward()

A block that runs twice must be the same function twice and leave everything as after one run. torch.utils.checkpoint
alone updates running statistics again when it recomputes (pytorch#96136), and a layer whose buffers enter its result
(spectral norm) would compute another result. Here the second run starts from the state as it stood before the first,
under the same autocast blocks, makes the same draws and leaves no trace (``part_state.py``).

A run of blocks, given as a list, runs again as one (``regions.py``): it keeps what enters its first block and what the
model's own code brings in between, and nothing that one block hands to the next.

Hooks on a block run once. Hooks on modules inside it run again with it, since some of them compute (spectral norm as a
hook, pruning). A model that calls torch.utils.checkpoint itself is left alone: its plain step updates the statistics
under it twice, and so does this one.

2 forwards and a backward; memory: what enters the blocks, and the inside of one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.errors import UsageError
from samegrad.exact.batchnorm import has_batchnorm, uses_batch_statistics
from samegrad.exact.chunk_map import Autocast
from samegrad.exact.part_state import PartPlaces, PartState
from samegrad.exact.regions import Region, RegionCall
from samegrad.exact.replaced_forward import forward_replaced
from samegrad.exact.state import StateRule
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import Generators

# A block, or a run of blocks that are called one after another.
Blocks = Sequence[str | Sequence[str]]


@contextlib.contextmanager
def recomputed_blocks(
    network: nn.Module,
    blocks: Blocks | None = None,
    *,
    sizes: Sequence[int] = (),
    draws: StepDraws | None = None,
    rules: Sequence[StateRule] = (),
) -> Iterator[None]:
    """Calls of the submodules ``blocks`` of ``network`` run again in backward instead of keeping what they compute.

    Without ``blocks``: those of ``find_blocks``. ``draws``: of the step, if it has keyed ones. ``sizes`` make no
    difference: blocks see what rows they are called on; nor do ``rules``: a second run leaves no state behind. Raises
    UsageError for names that are none, or where one block
    is part of another.
    """
    runs = as_runs(find_blocks(network) if blocks is None else blocks)
    modules = dict(network.named_modules())
    _check([name for run in runs for name in run], modules)
    device = next((t.device for t in itertools.chain(network.parameters(), network.buffers())), torch.device("cpu"))
    with contextlib.ExitStack() as stack:
        for run in runs:
            stretch = _Stretch(run, [modules[name] for name in run], StepDraws() if draws is None else draws, device)
            for place, name in enumerate(run):
                stack.enter_context(forward_replaced(modules[name], stretch.forward_at(place)))
        yield


def as_runs(blocks: Blocks) -> list[list[str]]:
    """Every entry of ``blocks`` as a run."""
    return [[entry] if isinstance(entry, str) else list(entry) for entry in blocks]


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
    for index, name in enumerate(names):
        if name not in modules or not name:
            raise UsageError(asked=asked, found=f"the model has no part {name!r}", do="use names of named_modules()")
        if name in names[:index]:
            raise UsageError(asked=asked, found=f"{name} is named twice", do="name it once")
        inside = [other for other in names if other.startswith(f"{name}.")]
        if inside:
            raise UsageError(asked=asked, found=f"{inside[0]} is part of {name}", do="name one of them")


class _Stretch:
    """A run of blocks. Its region begins with a call of the first block and takes in those that follow in order."""

    def __init__(
        self, names: Sequence[str], blocks: Sequence[nn.Module], draws: StepDraws, device: torch.device
    ) -> None:
        self._names, self._blocks, self._draws, self._device = names, blocks, draws, device
        self._region: Region | None = None
        self._next = 0
        # What the last call returned, by number and version: held here, not by the region, which it would keep alive.
        self._returned: list[tuple[Tensor, int, int]] = []

    def forward_at(self, place: int) -> Callable[..., Any]:
        """What stands in the place of the forward of block ``place``."""
        plain, name, places = self._blocks[place].forward, self._names[place], PartPlaces(self._blocks[place])

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            region, handed = self._continued(place)
            past = _Past(places, self._draws, self._device)
            call = RegionCall(name, plain, past.standing, self._draws.again())
            result = region.run(call, args, kwargs, handed)
            past.keep_changed()
            self._note(place, region, result)
            return result

        return forward

    def _continued(self, place: int) -> tuple[Region, dict[int, int]]:
        """The region of this call, and which outputs of the call before are as that left them."""
        region, returned = self._region, self._returned
        # Until this call is through: whatever raises in it ends the run.
        self._region, self._returned = None, []
        if region is None or place == 0 or place != self._next:
            return Region(), {}
        return region, {id(leaf): index for leaf, index, version in returned if leaf._version == version}

    def _note(self, place: int, region: Region, result: Any) -> None:
        if place + 1 == len(self._blocks):
            return
        self._region, self._next = region, place + 1
        leaves = enumerate(trees.leaves_of(result))
        self._returned = [(leaf, index, leaf._version) for index, leaf in leaves if isinstance(leaf, Tensor)]


class _Past:
    """All that a block reads beside its arguments and weights, as it is before it runs."""

    def __init__(self, places: PartPlaces, draws: StepDraws, device: torch.device) -> None:
        self._state = PartState(places)
        self._autocast = Autocast.now((device.type, "cpu"))
        self._generators = None if draws.are_all else Generators(device)

    def keep_changed(self) -> None:
        """Forgets what the block's first run left as it was."""
        self._state.keep_changed()
        if self._generators is not None and not self._generators.advanced():
            self._generators = None

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """All of it as it was; as it is now again on every way out."""
        with self._state.standing(), self._autocast.entered(), self._replayed():
            yield

    @contextlib.contextmanager
    def _replayed(self) -> Iterator[None]:
        if self._generators is None:
            yield
            return
        now = Generators(self._generators.device)
        try:
            self._generators.restore()
            yield
        finally:
            now.restore()
