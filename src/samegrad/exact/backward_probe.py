"""What in a model's backward forbids splitting its rows, found by experiment on a few rows and named by module.

alone  backward draws nothing and changes nothing: it runs once a chunk
sums   gradients of parts of the rows, each alone, add up to those of all rows, also far larger and of the other sign:
       backward hooks and functions of one's own need not be linear in the gradient that comes to them
across nothing without a gradient is taken over rows and computed with (``across_rows.py``)
jac    a gradient of some output rows is exactly zero on the input rows of others: rows can meet in backward only

Hooks of parameters are no part of this: they are handed the total of all chunks, once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad import trees
from samegrad.errors import CannotSplit
from samegrad.exact import program
from samegrad.exact.across_rows import Across, Followed
from samegrad.exact.aliases import NARROW, ParameterAliases
from samegrad.exact.backward_names import BackwardTrace, first_at_fault
from samegrad.exact.loss_rows import sources_of
from samegrad.exact.module_names import entered
from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.exact.probes import RowProbes
from samegrad.exact.rounding import eps_in_use
from samegrad.exact.row_comparisons import close, rounded_alike, row_pairs
from samegrad.exact.row_refusals import check_reach
from samegrad.exact.undisturbed import Generators, ModuleState
from samegrad.exact.varied_rows import pairs_of_other_rows

_WAYS_OUT = "run the step whole (a larger budget, or rows=<the batch's rows>)"
# Gradients are tried so many binary orders of magnitude below and above one: what clips or drops them shows there.
# Some backward functions (of a matrix exponential) are linear in a narrower range.
_ORDERS = 20
_ORDERS_IN_NARROW = 4
# Long sums of narrow numbers that nearly cancel; what is not linear is off by orders of magnitude.
_ROUNDING_IN_NARROW = 4.0
# Gradients that are zero by structure are rounding on their own scale.
_STRUCTURAL_FRACTION = 0.1

# forward(batch, rows): the outputs of a batch that holds these of the probe rows.
Forward = Callable[[Any, Sequence[int]], Any]


class BackwardProbe:
    """The experiments, on the rows of ``probes``; parameters are ``aliases``, which nothing else sees.

    Every backward has a graph of its own: some functions give up in backward what they saved.
    """

    def __init__(self, probes: RowProbes, aliases: ParameterAliases, forward: Forward) -> None:
        self._probes, self._aliases, self._forward = probes, aliases, forward
        self._network = probes.declared.network
        self._everything = range(probes.layout.rows)
        self._others = [row for row in self._everything if row not in probes.kept]
        # What the forward of all rows made of them.
        self._followed: Followed | None = None
        self._own_backward = False
        self._standing: Sequence[nn.Parameter] = ()

    def run(self) -> Any:
        """The outputs of all rows as a graph gives them, detached. Raises CannotSplit."""
        with self._aliases.swapped() as standing, torch.enable_grad():
            self._standing = standing
            try:
                outputs = self._forward_followed()
                check_reach(self._aliases, outputs, standing)
                found, numbers = trees.map_tensors(outputs, Tensor.detach), _Numbers.of(outputs)
                self._check_alone(outputs, numbers.factor)
                del outputs
                if self._others:
                    self._check_sums(standing, numbers)
                    self._check_jac(numbers.factor)
                    self._check_across()
            finally:
                # Stand-ins of shared leaves outlive this.
                for alias in standing:
                    alias.grad = None
        return found

    def _check_alone(self, outputs: Any, factor: float) -> None:
        generators, state = Generators(self._probes.declared.device), ModuleState([self._network])
        # Small, and of the other sign: what ``_check_sums`` adds the parts to.
        _backward(outputs, self._everything, -1 / factor)
        drew, changed = generators.advanced(), state.changed()
        self._probes.restored()
        if drew or changed:
            what = f"draws random numbers ({', '.join(drew)})" if drew else f"changes {', '.join(changed[:3])}"
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"the model's backward {what}, which would happen once a chunk",
                do=f"{_WAYS_OUT}, or take it out of hooks, and of parts that run again in backward",
            )

    def _check_sums(self, standing: Sequence[nn.Parameter], numbers: _Numbers) -> None:
        factor = numbers.factor
        for alias in standing:
            if alias.grad is not None:
                alias.grad.mul_(factor**2)
        largest = [_largest(alias.grad) for alias in standing]
        for part in (self._probes.kept, self._others):
            # Parts that cancel bring the rounding of their own size.
            largest = [max(size, _largest(alias.grad)) for size, alias in zip(largest, standing)]
            self._run(part, factor)
        least = _STRUCTURAL_FRACTION * max((size for size in largest if math.isfinite(size)), default=0.0)
        # What is no number tells nothing: narrow ones overflow.
        wrong = [
            name
            for name, alias, size in zip(self._aliases.names, standing, largest)
            if math.isfinite(size) and _largest(alias.grad) > max(size, least) * numbers.allowed
        ]
        if wrong:
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"the backward of {self._not_additive(factor, wrong)} is no sum over rows: gradients of parts of "
                f"the rows do not add up to those of all rows (of {wrong[-1]}, say); a hook or a function there is not "
                "linear in the gradient that comes to it, or sees how many rows there are",
                do=f"{_WAYS_OUT}, or hook parameters, which are handed the total once",
            )

    def _not_additive(self, factor: float, wrong: Sequence[str]) -> str:
        rows = [self._everything, self._probes.kept, self._others]
        traces = [BackwardTrace() for _ in rows]
        for trace, part, times in zip(traces, rows, (-1 / factor, factor, factor)):
            with trace.of(self._network):
                outputs = self._forward(self._part(part), part)
            _backward(outputs, part, times)
            self._probes.restored()

        def agree(gradients: Sequence[Tensor]) -> bool:
            whole, *parts = gradients
            if [len(g) if g.dim() else 0 for g in gradients] != [len(part) for part in rows]:
                # Not one entry a row; whatever is wrong there shows elsewhere.
                return True
            return all(close(whole[list(part)] * -(factor**2), g) for part, g in zip(rows[1:], parts))

        return first_at_fault(traces, agree, wrong)

    def _check_jac(self, factor: float) -> None:
        probes, tried = self._probes, []
        leaves = list(trees.leaves_of(probes.batch))
        for index, axis in enumerate(probes.layout.axes):
            if axis is not None and leaves[index].is_floating_point():
                leaves[index] = leaves[index].detach().requires_grad_()
                tried.append((probes.layout.paths[index], leaves[index], axis))
        batch = trees.unflatten(leaves, probes.layout.spec)
        if not tried or not self._run_on_leaves(batch, factor):
            return
        for path, leaf, axis in tried:
            if _any_reached(leaf.grad, axis, self._others):
                trace = BackwardTrace()
                with trace.of(self._network):
                    again = self._forward(batch, self._everything)
                _backward(again, self._everything, factor, probes.kept)
                probes.restored()
                place = first_at_fault([trace], lambda g: not _any_reached(g[0], 0, self._others))
                raise CannotSplit(
                    asked="split the rows of a step",
                    found=f"{place} mixes rows in its backward: outputs of rows {probes.kept} have gradients with "
                    f"respect to {path} of other rows",
                    do=f"{_WAYS_OUT}, or take the mixing out of the model and into loss_fn, which sees all rows",
                )

    def _run_on_leaves(self, batch: Any, factor: float) -> bool:
        """Whether the model runs on rows that require grad, and backward from the kept ones."""
        try:
            outputs = self._forward(batch, self._everything)
        except RuntimeError as error:
            if "requires grad" not in str(error):
                raise
            # It takes them to where there are no gradients (numpy), so none come back.
            self._probes.restored()
            return False
        _backward(outputs, self._everything, factor, self._probes.kept)
        self._probes.restored()
        return True

    def _run(self, rows: Sequence[int], factor: float) -> None:
        _backward(self._forward(self._part(rows), rows), rows, factor)
        self._probes.restored()

    def _forward_followed(self) -> Any:
        """The outputs of all rows; what is made of them is looked at."""
        batch, layout = self._probes.batch, self._probes.layout
        with (
            entered(self._network) as running,
            Followed(sources_of(batch, layout), layout.rows, running) as self._followed,
        ):
            outputs = self._forward(batch, self._everything)
        self._followed.returns(program.tensors_in(outputs))
        self._own_backward = any(map(_has_own_backward, program.tensors_in(outputs)))
        return outputs

    def _check_across(self) -> None:
        """Nothing is computed with a number taken over rows, as a mask's mean is, that these rows do not show."""
        assert self._followed is not None
        found, unknown = self._followed.taken, self._followed.unknown
        if unknown is None and self._own_backward:
            unknown = Across("a function", "its own backward", "")
        if found is None and unknown is not None and not self._same_beside_others():
            found = unknown
        if found is not None:
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"{found.module or 'code outside its modules'} uses in {found.used} what {found.made} takes over "
                "rows: a chunk would take it over its own",
                do=f"{_WAYS_OUT}, or compute it outside the model and pass it in the batch, for each row",
            )

    def _same_beside_others(self) -> bool:
        """Whether rows give the same beside rows with other masks and whole numbers: as they are, and changed."""
        probes = self._probes
        for batch, beside in pairs_of_other_rows(probes.batch, probes.layout, probes.kept):
            try:
                (mine, gradients), (theirs, others) = map(self._of_kept, (batch, beside))
            except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError) as error:
                if is_out_of_memory(error):
                    raise
                return False
            finally:
                probes.restored()
            pairs = [(x[probes.kept], y[probes.kept]) for _, x, y in row_pairs(mine, theirs)]
            if not all(rounded_alike(x, y) for x, y in pairs):
                return False
            for a, b in zip(gradients, others):
                if (a is None) is not (b is None) or (a is not None and b is not None and not close(a, b)):
                    return False
        return True

    def _of_kept(self, batch: Any) -> tuple[Any, list[Tensor | None]]:
        """The outputs of ``batch``, detached, and what the kept rows' give to the parameters."""
        for alias in self._standing:
            alias.grad = None
        outputs = self._forward(batch, self._everything)
        found = trees.map_tensors(outputs, Tensor.detach)
        _backward(outputs, self._everything, 1.0, self._probes.kept)
        self._probes.restored()
        return found, [alias.grad for alias in self._standing]

    def _part(self, rows: Sequence[int]) -> Any:
        if len(rows) == len(self._everything):
            return self._probes.batch
        return trees.take_rows(self._probes.batch, self._probes.layout, list(rows))


def _has_own_backward(output: Tensor) -> bool:
    """Whether a function of the user's is in the graph of ``output``: what it does in backward is in no graph."""
    seen: set[Any] = set()
    stack: list[Any] = [output.grad_fn] if output.grad_fn is not None else []
    while stack:
        node = stack.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            module = str(getattr(node, "_forward_cls", type(node)).__module__)
            if not module.startswith(("torch.", "samegrad.")):
                return True
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
    return False


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """``factor``: how far above one gradients are tried, and below. ``allowed``: what rounding may explain of a sum."""

    factor: float
    allowed: float

    @classmethod
    def of(cls, outputs: Any) -> _Numbers:
        """For the narrowest numbers that the graph of ``outputs`` computes with."""
        dtypes = {torch.float64}
        leaves = program.tensors_in(outputs)
        dtypes |= {torch.get_autocast_dtype(d) for d in _device_types(leaves) if torch.is_autocast_enabled(d)}
        seen: set[Any] = set()
        stack = [leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None]
        while stack:
            node: Any = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            dtypes |= {result.dtype for result in getattr(node, "_input_metadata", ())}
            stack += [below for below, _ in node.next_functions if below is not None]
        narrowest = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex)
        if dtypes.isdisjoint(NARROW):
            # Products in TF32 have few bits too, and sums of them cancel as well.
            coarsest = max((eps_in_use(leaf) for leaf in leaves if leaf.grad_fn is not None), default=0.0)
            if coarsest > narrowest:
                return cls(2.0**_ORDERS, _ROUNDING_IN_NARROW * coarsest**0.5)
            return cls(2.0**_ORDERS, narrowest**0.5)
        # What is small in float16 has few bits left.
        orders = 1 if torch.float16 in dtypes else _ORDERS_IN_NARROW
        return cls(2.0**orders, _ROUNDING_IN_NARROW * narrowest**0.5)


def _device_types(leaves: Sequence[Tensor]) -> set[str]:
    return {leaf.device.type for leaf in leaves}


def _backward(outputs: Any, rows: Sequence[int], factor: float, only: Sequence[int] | None = None) -> None:
    """With fixed gradients of the outputs of ``rows``, times ``factor``; zero for rows that are not in ``only``."""
    live = [leaf for leaf in program.tensors_in(outputs) if leaf.requires_grad]
    weights = [math.cos(1 + row) * factor * (only is None or row in only) for row in rows]
    if live:
        program.backward_outside_autocast(live, [_cotangent(leaf, weights) for leaf in live])


def _cotangent(leaf: Tensor, weights: Sequence[float]) -> Tensor:
    """Like ``leaf`` (rows, ...): the same for a row whatever runs with it, from a generator of its own.

    Random, since a wave sums to almost nothing over many positions, and in narrow numbers its rounding does not.
    """
    generator = torch.Generator(leaf.device).manual_seed(0)
    each = torch.rand(leaf[0].numel(), generator=generator, device=leaf.device, dtype=torch.float32) * 2 - 1
    rows = torch.tensor(weights, device=leaf.device, dtype=torch.float32)
    return (rows[:, None] * each).view(leaf.shape).to(leaf.dtype)


def _largest(gradient: Tensor | None) -> float:
    if gradient is None or not gradient.numel():
        return 0.0
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return float(values.abs().max()) if values.numel() else 0.0


def _any_reached(gradient: Tensor | None, axis: int, rows: Sequence[int]) -> bool:
    """Whether ``gradient`` is anything but zero on ``rows``; no numbers, from zeros times infinities, tell nothing."""
    if gradient is None or gradient.dim() <= axis or gradient.shape[axis] <= max(rows):
        return False
    there = gradient.index_select(axis, torch.tensor(list(rows), device=gradient.device))
    return bool(((there != 0) & (there == there)).any())
