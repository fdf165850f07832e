"""What is at fault where a planned step differs: which of the plan's levers, and which module.

Levers are left out one at a time; those whose absence makes the step pass are named, several where they are wrong
together only. One that leaves the plain call behind is tried last, since without it nothing else is tried. A module is
named by its output rows: the first, in call order, that gives a row something else in a chunk than in the whole batch.
Where no rows differ, the module that owns the worst parameter or buffer is named.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep
from samegrad.errors import SamegradError
from samegrad.exact import program
from samegrad.exact.first_pass import as_in_first_pass
from samegrad.exact.float64 import widened
from samegrad.exact.forward import StepForward
from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.exact.row_comparisons import close, same_rows
from samegrad.exact.split import SplitStep, under_draws
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import step_undisturbed
from samegrad.execute.apply import in_force
from samegrad.levers import Slot, levers_of
from samegrad.records import Check
from samegrad.verify.fewer import without
from samegrad.verify.kept import Kept
from samegrad.verify.sides import Planned, step_key
from samegrad.verify.tiers import SECOND_PASS
from samegrad.verify.twin import float64_twin

Recheck = Callable[[Planned, Any], Sequence[Check]]


def name_fault(planned: Planned, rows: Any, checks: Sequence[Check], recheck: Recheck) -> str:
    """The lever and the module at fault, in words; ``checks`` are those of a step that differs, ``recheck`` makes them.

    Takes a verification for each lever, and forwards.
    """
    failed = [check for check in checks if not check.passed]
    lever = _lever_at_fault(planned, rows, recheck)
    if any(not check.error < float("inf") for check in failed):
        # Nothing to look for modules with: what is not a number differs from itself.
        return "; ".join(filter(None, (lever, _owner(planned, failed[0].worst))))
    if any(check.name == SECOND_PASS for check in failed) and (place := _first_unrepeated(planned, rows)):
        return "; ".join(filter(None, (lever, f"{place}, the first whose second pass is not its first")))
    if place := _first_different_rows(planned, rows):
        return "; ".join(filter(None, (lever, f"{place}, the first whose rows are others in a chunk")))
    owner = next((found for check in failed if (found := _owner(planned, check.worst))), "")
    return "; ".join(filter(None, (lever, owner)))


def _lever_at_fault(planned: Planned, rows: Any, recheck: Recheck) -> str:
    if planned.split is None and not planned.plan.levers:
        return "" if planned.is_plain_call else "forward=, whose gradients are not those of plain_forward="
    left: list[tuple[str, Planned]] = []
    for lever in reversed(levers_of(planned.plan)):
        # A lever may need another: then leaving that one out shows nothing.
        with contextlib.suppress(SamegradError):
            left.append((lever.name, without(planned, lever.name)))
    for last in (False, True):
        names = [name for name, rest in left if _is_plain_call(rest) is last and _passes(rest, rows, recheck)]
        if len(names) == 1:
            return f"lever {names[0]}: without it the step passes"
        if names:
            return f"levers {' and '.join(names)} together: without one of them the step passes"
    return "no single lever: it differs whichever is left out"


def _is_plain_call(planned: Planned) -> bool:
    """Whether nothing is left that a gradient could see."""
    elsewhere = (Slot.DATA, Slot.STATE, Slot.ALLOCATOR)
    return planned.split is None and all(lever.slot in elsewhere for lever in levers_of(planned.plan))


def _passes(planned: Planned, rows: Any, recheck: Recheck) -> bool:
    try:
        return all(check.passed for check in recheck(planned, rows))
    except (SamegradError, RuntimeError) as error:
        if is_out_of_memory(error):
            # What runs whole is the plain call, which does not fit.
            return planned.split is None
        # A lever that is wrong may fail in other ways without another; the verdict is that it differs, whatever this.
        return False


def _first_different_rows(planned: Planned, rows: Any) -> str:
    """The first module whose output rows differ between the whole batch and the chunks, or ""."""
    if planned.split is None:
        return ""
    candidates = [(planned, rows)]
    with contextlib.suppress(RuntimeError, TypeError):
        # In float64 rounding hides nothing.
        candidates.insert(0, (float64_twin(planned), widened(rows)))
    for candidate, its_rows in candidates:
        with contextlib.suppress(RuntimeError, TypeError):
            if place := _different_in_chunks(candidate, its_rows):
                return place
    return ""


def _first_unrepeated(planned: Planned, rows: Any) -> str:
    """The first module whose output bits differ between the first pass over a chunk and the second, or ""."""
    declared, split = planned.declared, planned.split
    if not isinstance(split, SplitStep):
        return ""
    with step_undisturbed(declared):
        copies = trees.map_tensors(rows, Tensor.clone)
        forward = _chunk_forward(planned, split, declared)
        start = 0
        for size, chunk in zip(planned.parts, split.chunks(copies, planned.layout, planned.parts, declared.device)):
            ids = forward.ids(slice(start, start + size))
            first_pass = as_in_first_pass(declared.device.type, split.examination.first_pass)
            with _watched(declared.network) as first, first_pass:
                forward.again(chunk, ids)
            with _watched(declared.network) as second, torch.enable_grad():
                forward.again(chunk, ids)
            found = _first_of(first, second, (0, size, size), same_rows)
            if found is not None:
                return found[1]
            start += size
    return ""


def _chunk_forward(planned: Planned, split: SplitStep, declared: DeclaredStep) -> StepForward:
    """Runs chunks as the planned step does: its draws by row, and its state set aside."""
    draws = StepDraws(planned.sites, step_key())
    return StepForward.of(declared, planned.layout.rows, draws, split.examination.rules)


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a module: its first input and output tensor, on the host."""

    module: str
    kind: str
    input: Tensor | None
    output: Tensor | None


def _different_in_chunks(planned: Planned, rows: Any) -> str:
    declared, split = planned.declared, planned.split
    if not isinstance(split, SplitStep):
        # Parts of the model run in chunks; the plain forward of a chunk is not what runs.
        return ""
    with step_undisturbed(declared) as (generators, state), torch.no_grad():
        copies = trees.map_tensors(rows, Tensor.clone)
        with planned.rounding.applied(declared) as plain, _watched(declared.network) as whole:
            drawing = under_draws(plain, StepDraws(planned.sites, step_key()))
            drawing.forward(declared.network, trees.move(copies, declared.device))
        first: tuple[int, str] | None = None
        start = 0
        with Kept.under(planned.plan, declared), in_force(planned.plan, declared, planned.plan_rows) as execution:
            copies = trees.map_tensors(rows, Tensor.clone)
            forward = _chunk_forward(planned, split, execution.declared)
            for size, chunk in zip(planned.parts, split.chunks(copies, planned.layout, planned.parts, declared.device)):
                state.restore()
                generators.restore()
                with _watched(declared.network) as part:
                    forward.again(chunk, forward.ids(slice(start, start + size)))
                with planned.rounding.block(declared.device.type):
                    found = _first_of(whole, part, (start, start + size, planned.layout.rows))
                if found is not None and (first is None or found[0] < first[0]):
                    first = found
                start += size
    return first[1] if first is not None else ""


Alike = Callable[[Tensor, Tensor], bool]


def _first_of(
    whole: Sequence[_Call], part: Sequence[_Call], span: tuple[int, int, int], alike: Alike = close
) -> tuple[int, str] | None:
    """The place in call order and the name of the first call whose output rows ``span`` are not ``alike``."""
    for index, (all_rows, few) in enumerate(zip(whole, part)):
        if all_rows.module == few.module and _same_rows(all_rows.output, few.output, span, alike):
            continue
        name = f"module {all_rows.module or 'the model'} ({all_rows.kind})"
        if all_rows.module and not _same_rows(all_rows.input, few.input, span, alike):
            parent = all_rows.module.rpartition(".")[0] or "the model"
            name = f"code of {parent} before {all_rows.module} ({all_rows.kind})"
        return index, name
    return None


def _same_rows(whole: Tensor | None, part: Tensor | None, span: tuple[int, int, int], alike: Alike) -> bool:
    """Whether ``part`` is what ``whole`` holds for the rows ``span``; True where rows are not first."""
    start, stop, rows = span
    if whole is None or part is None or whole.dim() == 0 or whole.shape[0] % rows:
        return True
    each = whole.shape[0] // rows
    mine = whole[start * each : stop * each]
    if mine.shape != part.shape:
        return False
    return alike(mine, part) if mine.is_floating_point() else torch.equal(mine, part)


@contextlib.contextmanager
def _watched(network: nn.Module) -> Iterator[list[_Call]]:
    """The calls of all modules inside the block, inner ones before those that call them."""
    calls: list[_Call] = []
    kinds = {part: (name, type(part).__name__) for name, part in network.named_modules()}

    def note(part: nn.Module, inputs: Any, output: Any) -> None:
        name, kind = kinds[part]
        calls.append(_Call(name, kind, _first_tensor(inputs), _first_tensor(output)))

    handles = [part.register_forward_hook(note) for part in kinds]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(tree: Any) -> Tensor | None:
    # A copy, since what follows may write on it; on the host, since all modules' rows would not fit the device.
    return next((leaf.detach().to("cpu", copy=True) for leaf in program.tensors_in(tree)), None)


def _owner(planned: Planned, worst: str) -> str:
    """The module that holds the parameter, buffer or attribute ``worst`` (the first of a list), or ""."""
    name = worst.split(", ")[0]
    declared = planned.declared
    for root, module in (("loss_fn", declared.loss_module), ("", declared.network)):
        if module is None or not name.startswith(root):
            continue
        path, _, last = name.removeprefix(f"{root}." if root else "").rpartition(".")
        with contextlib.suppress(AttributeError):
            part = module.get_submodule(path)
            if last and hasattr(part, last):
                place = ".".join(filter(None, (root, path))) or "the model"
                return f"module {place} ({type(part).__name__}), which holds {name}"
    return ""
