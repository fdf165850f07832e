"""The loss of a chunk, forward and all, in one compiled function; its backward is compiled with it.

The function is compiled, never the model: nothing is wrapped and names of state stay. Shapes are static, since chunks
of a step have one size, or two. What it was compiled for is guarded by the compiler itself: a value that changed, a
layer that was replaced or frozen compiles again, up to ``recompile_limit``; beyond that Python runs it.

1. Draws are keyed inside the function, by operations that the compiler does not look into (``keyed_ops.py``).
2. A compiled loss has no graph to read its count from; it is taken from the call of the likelihood, and compared with
   that graph once, before anything is compiled.
3. Blocks that run again in backward are told to the compiler, node by node, by the module that each came from: only
   what enters a run of blocks is kept. Draws are the same again by their keys.
4. Each function has code of its own: compilers keep what they made by the code object, and count against its limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from samegrad import trees
from samegrad.declared import checked_loss
from samegrad.errors import CannotSplit
from samegrad.exact.losses import Form
from samegrad.exact.pass_programs import ChunkWork, eager_loss
from samegrad.exact.phases import announce
from samegrad.exact.program import LossOfChunk
from samegrad.exact.randomness import keyed
from samegrad.exact.undisturbed import Generators
from samegrad.records import Phase

_CHECKED_ROWS = 2
_ASKED = "compile the loss of a chunk"


@dataclasses.dataclass(frozen=True)
class CompilerSettings:
    """``mode`` and ``fullgraph`` as in torch.compile, ``backend`` likewise; ``recompile_limit`` of this function.

    ``again``: runs of submodules, each of which keeps only what enters it and runs again in backward.
    """

    mode: str = "default"
    fullgraph: bool = False
    recompile_limit: int = 8
    backend: str = "inductor"
    again: tuple[tuple[str, ...], ...] = ()


class CompiledLoss:
    """Makes the compiled loss of a chunk, and keeps it from step to step."""

    def __init__(self, settings: CompilerSettings) -> None:
        self._settings = settings
        self._network: Any = None
        self._device = torch.device("cpu")
        self._compiled: Callable[..., Any] | None = None
        self.graph_breaks = 0
        self.compilations = 0

    def __call__(self, work: ChunkWork) -> LossOfChunk:
        if work.forward.state.kept:
            names = ", ".join(work.forward.state.names[:3])
            raise CannotSplit(
                asked=_ASKED,
                found=f"the forward changes state ({names}), which is put aside for each chunk",
                do="leave the lever compile out of the plan",
            )
        if self._network is not work.declared.network:
            self._network, self._compiled = work.declared.network, None
        draws, device = work.forward.draws, work.declared.device
        self._device = device
        key = None if draws.sites is None else draws.key_on(device)

        def loss_of(chunk: Any, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
            announce(Phase.FORWARD)
            if self._compiled is None:
                if work.form is Form.COUNTED:
                    _check_count(work, chunk, ids, key)
                self._compiled = torch.compile(
                    _own_code(_loss_of(work)), mode=self._settings.mode, fullgraph=self._settings.fullgraph,
                    backend=self._settings.backend, dynamic=False,
                )  # fmt: skip
            return self._compiled_loss(chunk, ids if key is not None else None, key)

        return loss_of

    def _compiled_loss(self, chunk: Any, ids: Tensor | None, key: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert self._compiled is not None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # Compiled by now, on the run before.
            return cast(tuple[Tensor, "Tensor | None"], self._compiled(chunk, ids, key))
        generators, made = Generators(self._device), self.compilations
        with self._counting():
            loss, count = self._compiled(chunk, ids, key)
        if self.compilations != made:
            # Compilers draw numbers to try kernels on.
            generators.restore()
        return loss, count

    def notes(self) -> list[str]:
        """How often it was compiled and where it broke, in words."""
        if not self.compilations:
            return []
        return [f"compile: {self.compilations} graphs compiled, {self.graph_breaks} graph breaks"]

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        from torch._dynamo import config
        from torch._dynamo.utils import counters

        breaks, made = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
        with config.patch(recompile_limit=self._settings.recompile_limit), _running_again(self._settings.again):
            yield
        self.graph_breaks += sum(counters["graph_break"].values()) - breaks
        self.compilations += counters["stats"]["unique_graphs"] - made


@contextlib.contextmanager
def _running_again(runs: tuple[tuple[str, ...], ...]) -> Iterator[None]:
    """rule 3, for what is compiled inside the block."""
    if not runs:
        yield
        return
    from torch._inductor import config

    from samegrad.exact.compiled_runs import RunAgain

    with config.patch(joint_custom_pre_pass=RunAgain(runs)):
        yield


def _loss_of(work: ChunkWork) -> Callable[[Any, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]:
    declared, network, sites = work.declared, work.declared.network, work.forward.draws.sites
    counted = work.form is Form.COUNTED

    # The network is handed on: where a compiled function knows a module from is how rule 3 finds its blocks.
    def loss_and_count(network: nn.Module, chunk: Any) -> tuple[Tensor, Tensor | None]:
        outputs = declared.forward(network, chunk)
        if not counted:
            return checked_loss(declared.loss_fn(outputs, chunk)).reshape(()), None
        counts: list[Tensor] = []
        with _Counting(counts):
            loss = checked_loss(declared.loss_fn(outputs, chunk)).reshape(())
        return loss, counts[-1] if counts else None

    def loss_of(chunk: Any, ids: Tensor | None, key: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if sites is None or ids is None or key is None:
            return loss_and_count(network, chunk)
        # rule 1
        with keyed(key, ids, sites=sites):
            return loss_and_count(network, chunk)

    return loss_of


def _own_code(function: Any) -> Any:
    # rule 4
    function.__code__ = function.__code__.replace()
    return function


class _Counting(TorchFunctionMode):
    """Appends the denominator of a likelihood to ``counts``: targets that are not ignored, or their weights."""

    def __init__(self, counts: list[Tensor]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is F.cross_entropy or func is F.nll_loss:
            self._counts.append(_count(*args, **options))
        return func(*args, **options)


def _count(input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None,
           ignore_index: int = -100, *_: Any, **__: Any) -> Tensor:  # fmt: skip
    valid = target != ignore_index
    if weight is None:
        return valid.sum().to(input.dtype)
    return torch.where(valid, weight[torch.where(valid, target, 0)], 0).sum()


def _check_count(work: ChunkWork, chunk: Any, ids: Tensor | None, key: Tensor | None) -> None:
    """rule 2, on a few rows, since Python keeps more of a chunk than the compiler. Raises CannotSplit."""
    layout = work.declared.layout(chunk)
    rows = min(_CHECKED_ROWS, layout.rows)
    chunk, ids = trees.slice_rows(chunk, layout, 0, rows), None if ids is None else ids[:rows]
    with torch.enable_grad():
        _, expected = eager_loss(work)(chunk, ids)
        _, found = _loss_of(work)(chunk, ids if key is not None else None, key)
    assert expected is not None
    if found is None or not bool(torch.isclose(found.double(), expected.double(), rtol=1e-6, atol=0)):
        raise CannotSplit(
            asked=_ASKED,
            found="what the loss is divided by is not that of a call of torch.nn.functional.cross_entropy or nll_loss",
            do="declare normalise=lambda batch: the count, or leave the lever compile out of the plan",
        )
