"""Parts of a model that treat rows alone, run in chunks, while everything outside them sees the whole batch.

For models that couple rows inside: prototypes, codebooks, routers, a ``.loss``. What is between the segments is the
plain code on all rows; inside one, rows run a few at a time and are run again in backward.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import CannotSplit, UsageError
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.backward_probe import BackwardProbe
from samegrad.exact.few_rows import on_few_rows
from samegrad.exact.module_names import entered
from samegrad.exact.probes import RowProbes
from samegrad.exact.row_map import RowCall
from samegrad.exact.state import StateRule
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import Generators, ModuleState
from samegrad.trees import RowLayout


@dataclasses.dataclass(frozen=True)
class Segment:
    """The submodule at ``path``, whose arguments hold ``per_row`` rows for each row of the batch."""

    path: str
    per_row: int = 1


def find_segments(
    declared: DeclaredStep, few: Any, layout: RowLayout, named: Sequence[str] | None = None
) -> tuple[Segment, ...]:
    """The largest submodules with parameters that treat rows alone, or the ``named`` ones.

    ``few``: the probe rows, on the device. Raises CannotSplit naming a submodule that was named and does not,
    FailsOnFewRows where the model cannot take fewer rows, and UsageError for a name that is not there.
    """
    network = declared.network
    if named is not None:
        for path in named:
            if path not in dict(network.named_modules()):
                raise UsageError(
                    asked=f"segments={list(named)}", found=f"the model has no submodule {path!r}",
                    do="give names as model.named_modules() shows them",
                )  # fmt: skip
    calls = _row_calls(declared, few, layout)
    found: list[Segment] = []
    todo = [path for path, _ in network.named_children()] if named is None else list(named)
    while todo:
        path = todo.pop(0)
        part = network.get_submodule(path)
        try:
            found.append(_examined(path, part, calls.get(path), layout.rows))
        except CannotSplit as refusal:
            if named is not None:
                raise CannotSplit(
                    asked=f"{path} as a segment", found=refusal.found,
                    do="name smaller parts that treat rows alone, or leave segments= out",
                ) from None  # fmt: skip
            todo[:0] = [f"{path}.{name}" for name, child in part.named_children() if _has_parameters(child)]
    return tuple(found)


Call = tuple[Any, Any]
# Of each submodule; cells of recurrent loops are called once for every moment.
_MOST_CALLS = 8


def _row_calls(declared: DeclaredStep, few: Any, layout: RowLayout) -> dict[str, Call]:
    """For every submodule the arguments of its first call whose rows grow with the batch's, as a run of fewer shows."""
    at_rows = _calls(declared, few, layout.rows)
    if layout.rows < 3:
        return {path: calls[0] for path, calls in at_rows.items()}
    fewer = layout.rows - max(1, 3 * layout.rows // 8)
    at_fewer = _calls(declared, trees.take_rows(few, layout, list(range(fewer))), fewer)
    found = {}
    for path, calls in at_rows.items():
        for here, there in zip(calls, at_fewer.get(path, [])):
            rows, rows_of_fewer = _rows_of(here), _rows_of(there)
            if rows and not rows % layout.rows and rows_of_fewer == rows // layout.rows * fewer:
                found[path] = here
                break
    return found


def _rows_of(call: Call) -> int:
    return trees.find_rows(call).rows if _tensors(call) else 0


def _calls(declared: DeclaredStep, few: Any, rows: int) -> dict[str, list[Call]]:
    """The arguments of every submodule's calls, detached; nothing is left changed."""
    calls: dict[str, list[Call]] = {}
    handles = []

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if len(mine := calls.setdefault(path, [])) < _MOST_CALLS:
                mine.append(trees.map_tensors((args, kwargs), lambda leaf: leaf.detach().clone()))

        return hook

    generators, state = Generators(declared.device), ModuleState.of(declared)
    try:
        for path, part in declared.network.named_modules():
            if path:
                handles.append(part.register_forward_pre_hook(note(path), with_kwargs=True))
        with torch.no_grad(), entered(declared.network) as running, on_few_rows(rows, running):
            declared.forward(declared.network, few)
    finally:
        for handle in handles:
            handle.remove()
        state.restore()
        generators.restore()
    return calls


def _examined(path: str, part: nn.Module, call: tuple[Any, Any] | None, rows: int) -> Segment:
    """The segment that ``part`` is. Raises CannotSplit when it is none."""
    layout = None if call is None or not _tensors(call) else trees.find_rows(call)
    if call is None or layout is None or layout.rows % rows or not _has_parameters(part):
        called = call is not None and layout is not None and not layout.rows % rows
        raise CannotSplit(
            asked=f"{path} as a segment",
            found="it has no parameters, so nothing in it is worth running again"
            if called
            else "it is not called on rows of the batch",
            do="name another part of the model",
        )
    device = next(part.parameters()).device
    probed = DeclaredStep(model=part, loss_fn=_no_loss, forward=_called, device=device)
    generators, state = Generators(device), ModuleState([part])
    try:
        # Every second row is kept, so rows of one sample are tried against each other as well.
        others = trees.take_rows(call, layout, [(i + 1) % layout.rows for i in range(layout.rows)])
        probes = RowProbes(probed, call, layout, generators, state)
        found = probes.run(others)
        if found.rules:
            raise CannotSplit(
                asked=f"{path} as a segment",
                found=f"it changes {found.rules[0].name}, and backward runs rows again",
                do="leave it outside the segments",
            )
        BackwardProbe(probes, ParameterAliases({"": part}), probes.forward).run()
    finally:
        state.restore()
        generators.restore()
    return Segment(path, layout.rows // rows)


def _tensors(call: Any) -> list[Tensor]:
    return [leaf for leaf in trees.leaves_of(call) if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf)]


def _has_parameters(part: nn.Module) -> bool:
    return any(True for _ in part.parameters())


def _called(part: nn.Module, call: Any) -> Any:
    args, kwargs = call
    return part(*args, **kwargs)


def _no_loss(outputs: Any, batch: Any) -> Tensor:
    raise AssertionError("segments are examined without a loss")


@contextlib.contextmanager
def in_segments(
    network: nn.Module,
    *,
    segments: Sequence[Segment],
    sizes: Sequence[int],
    draws: StepDraws,
    rules: Sequence[StateRule] = (),
) -> Iterator[None]:
    """``network`` with its segments run in chunks of ``sizes`` rows of the batch; as before on every way out.

    ``rules`` make no difference: what changes state is no segment, and runs once on the whole batch.
    """
    with contextlib.ExitStack() as stack:
        for segment in segments:
            stack.enter_context(_patched(network.get_submodule(segment.path), segment, tuple(sizes), draws))
        yield


@contextlib.contextmanager
def _patched(part: nn.Module, segment: Segment, sizes: tuple[int, ...], draws: StepDraws) -> Iterator[None]:
    plain = part.forward
    own = vars(part).get("forward")
    mine = tuple(size * segment.per_row for size in sizes)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = (args, kwargs)
        layout = trees.find_rows(call) if _tensors(call) else None
        if layout is None or layout.rows != sum(mine):
            # Not the rows of the batch: prototypes, say. Those are shared, and few.
            return plain(*args, **kwargs)
        ids, drawing = None, draws.part()
        if draws.sites is not None:
            device = next(leaf.device for leaf in _tensors(call))
            ids = torch.arange(sum(sizes), device=device).repeat_interleave(segment.per_row)
        # Draws are keyed by the batch's rows, of which a segment may see several entries each.
        mapped = RowCall(
            plain, ParameterAliases({"": part}), [part], drawing=lambda rows: drawing(rows[:: segment.per_row])
        )
        return mapped.in_chunks(call, layout, mine, ids)

    part.forward = forward
    try:
        yield
    finally:
        if own is None:
            del part.forward
        else:
            part.forward = own
