"""What a loss graph is: a mean over rows, a sum over rows, a counted mean, or coupled.

One pass over the chunks is exact only when the loss is a sum over rows divided by something known. That is read from
the graph of the loss on a few rows: the root must be a weighted sum of recognised reductions, and everything between
a reduction and the outputs must keep rows apart. Whatever is not recognised is COUPLED, and coupled losses take two
passes, exact for every loss. A constant that was computed from several rows does not show in a graph, so a
recognised form must also pass the audit (``audit.py``), which may reject it but never selects one, and the code is
followed for such constants (``across_rows.py``).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from samegrad.errors import CannotSplit


class Form(enum.Enum):
    """How the loss of the batch follows from the losses of its chunks."""

    ROW_MEAN = "mean over rows"
    ROW_SUM = "sum over rows"
    COUNTED = "sum over rows divided by a count of targets"
    COUPLED = "couples rows"


@dataclasses.dataclass(frozen=True)
class LossForm:
    """A form and the reason for it, in words for ``explain``."""

    form: Form
    reason: str


class _Coupled(Exception):
    """The walk met something that is not recognised; the text names it."""


_ELEMENTWISE = frozenset(
    f"{name}Backward0"
    for name in (
        "Abs Add Sub Mul Div Neg Exp Exp2 Expm1 Log Log1P Log2 Log10 Sqrt Rsqrt Reciprocal Square Sigmoid "
        "Tanh Relu Gelu Silu Elu Softplus LogSigmoid LeakyRelu Hardtanh Clamp ClampMin ClampMax Erf Sin Cos "
        "Atan Atan2 Sign Lerp Where MaskedFill Xlogy Maximum Minimum Clone ToCopy Alias Hypot Sinh Cosh"
    ).split()
) | frozenset(
    f"{name}Backward{variant}"
    for name in ["Add", "Sub", "Rsub", "Mul", "Div", "Pow", "Clamp", "Xlogy"]
    for variant in (0, 1, 2)
)
# Scalar arithmetic above the reductions.
_SUMS = frozenset({"AddBackward0", "AddBackward1", "SubBackward0", "SubBackward1", "RsubBackward0", "RsubBackward1"})
_SCALINGS = frozenset(
    {"MulBackward0", "MulBackward1", "DivBackward0", "DivBackward1", "NegBackward0", "ToCopyBackward0"}
)
_LOSSES = frozenset(
    f"{name}Backward0"
    for name in (
        "MseLoss SmoothL1Loss HuberLoss SoftMarginLoss BinaryCrossEntropy BinaryCrossEntropyWithLogits "
        "NllLoss NllLoss2D"
    ).split()
)
_NLL = frozenset({"NllLossBackward0", "NllLoss2DBackward0"})
# A likelihood that runs in chunks (``chunked_head.py``) stands in one node.
CHUNKED = "ChunkedLikelihoodBackward"
_RESHAPES = frozenset(
    {
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
        "SqueezeBackward0",
        "SqueezeBackward1",
        "SqueezeBackward2",
        "UnsqueezeBackward0",
    }
)
_OVER_DIMS = frozenset(
    {
        "SumBackward1",
        "MeanBackward1",
        "LogsumexpBackward0",
        "LinalgVectorNormBackward0",
        "AmaxBackward0",
        "AminBackward0",
        "LogSoftmaxBackward0",
        "SoftmaxBackward0",
        "SelectBackward0",
        "GatherBackward0",
        "SliceBackward0",
        "TransposeBackward0",
        "PermuteBackward0",
        "ExpandBackward0",
    }
)
# What takes one of many, or orders them.
_SELECTIONS = frozenset(
    "MaxBackward0 MaxBackward1 MinBackward0 MinBackward1 AmaxBackward0 AminBackward0 AminmaxBackward0 MedianBackward0 "
    "MedianBackward1 NanmedianBackward0 NanmedianBackward1 KthvalueBackward0 ModeBackward0 SortBackward0 SortBackward1 "
    "TopkBackward0 CummaxBackward0 CumminBackward0".split()
)
# Values of torch's reduction argument, as graph nodes save it.
_NONE, _MEAN, _SUM = 0, 1, 2


def recognise(loss: Tensor, outputs: Sequence[Tensor], rows: int) -> LossForm:
    """The form of ``loss``, a scalar computed from ``outputs``: leaves that require grad, ``rows`` rows each."""
    if loss.grad_fn is None:
        return LossForm(Form.COUPLED, "the loss is an output itself")
    allowed = {id(leaf) for leaf in outputs}
    try:
        kinds = []
        for reduction, below in _terms(loss.grad_fn):
            kinds.append(reduction)
            _check_rows_apart(below, allowed, rows)
    except _Coupled as found:
        return LossForm(Form.COUPLED, str(found))
    names = sorted({form.value for form in kinds})
    if len(names) > 1:
        return LossForm(Form.COUPLED, f"its terms differ in how they are normalised ({' and '.join(names)})")
    if kinds[0] is Form.COUNTED and len(kinds) > 1:
        return LossForm(Form.COUPLED, "several terms are divided by counts of their own")
    return LossForm(kinds[0], f"its graph is a {names[0]}")


def count_of(loss: Tensor) -> Tensor:
    """The denominator of a COUNTED loss on this chunk, () on its device: targets not ignored, or their weights."""
    assert loss.grad_fn is not None
    for node in _walk(loss.grad_fn):
        if node.name() in _NLL or node.name() == CHUNKED:
            return node._saved_total_weight  # type: ignore[no-any-return]
    raise AssertionError("a counted loss has a likelihood node")


def count_below(loss: Tensor) -> float | None:
    """What a likelihood in the graph of ``loss`` divides its mean by; None where there is none."""
    if loss.grad_fn is None:
        return None
    nodes = [node for node in _walk(loss.grad_fn) if node.name() in _NLL and node._saved_reduction == _MEAN]
    return float(nodes[0]._saved_total_weight) if nodes else None


def selected_over_rows(loss: Tensor, rows: int) -> str:
    """The first node that takes one of all the rows, a maximum say; "" where there is none."""
    for node in [] if loss.grad_fn is None else _walk(loss.grad_fn):
        name = node.name()
        below = [shape for shape in map(_shape, _below(node)) if shape and shape[0] % rows == 0]
        if not below or name not in _SELECTIONS:
            continue
        dims = getattr(node, "_saved_dim", ())
        listed = [dims] if isinstance(dims, int) else list(dims or ())
        if not listed or any(_dim(dim, len(below[0])) == 0 for dim in listed):
            return str(name)
    return ""


def ignored_by(loss: Tensor) -> set[int]:
    """The targets that the likelihoods in the graph of ``loss`` leave out (``ignore_index``)."""
    if loss.grad_fn is None:
        return set()
    # Graph nodes save negative numbers as unsigned ones of 64 bits.
    saved = [node._saved_ignore_index for node in _walk(loss.grad_fn) if node.name() in _NLL]
    return {index - 2**64 if index >= 2**63 else index for index in saved}


def leaves_under(loss: Tensor) -> list[Tensor]:
    """Every leaf tensor that requires grad and that ``loss`` depends on."""
    if loss.grad_fn is None:
        return [loss] if loss.requires_grad else []
    return [node.variable for node in _walk(loss.grad_fn) if node.name().endswith("AccumulateGrad")]


def gradients_apart_from(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of ``loss`` with respect to ``leaves``, and ``.grad`` of nothing changed.

    Raises CannotSplit where a part of the graph cannot be followed that way.
    """
    if loss.grad_fn is not None and any(node.name() == "CheckpointFunctionBackward" for node in _walk(loss.grad_fn)):
        raise CannotSplit(
            asked="the gradients of the plain step, to measure or to compare with",
            found="a part of the model is checkpointed with use_reentrant=True: it hands gradients to .grad alone",
            do="give torch.utils.checkpoint.checkpoint use_reentrant=False, or leave it out: where a budget asks for "
            "it, blocks run again without it",
        )
    return torch.autograd.grad(loss, list(leaves))


def _walk(root: Any) -> Iterator[Any]:
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)


def _below(node: Any) -> list[Any]:
    return [below for below, _ in node.next_functions if below is not None]


def _terms(node: Any) -> list[tuple[Form, list[Any]]]:
    """The reductions that the scalar ``node`` is a weighted sum of, each with the nodes under it."""
    name, below = node.name(), _below(node)
    if name in _LOSSES and node._saved_reduction in (_MEAN, _SUM):
        if len(below) > 1:
            raise _Coupled(f"the target of {name.removesuffix('Backward0')} is computed from the outputs as well")
        if node._saved_reduction == _SUM:
            return [(Form.ROW_SUM, below)]
        return [(Form.COUNTED if name in _NLL else Form.ROW_MEAN, below)]
    if name == "MeanBackward0":
        return [(Form.ROW_MEAN, below)]
    if name == "SumBackward0":
        return [(Form.ROW_SUM, below)]
    if name in _SUMS:
        return [term for part in below for term in _terms(part)]
    if name in _SCALINGS or name in _RESHAPES:
        # A quotient whose numerator is constant has a gradient only below the line: not linear in its terms.
        if len(below) != 1 or (node.next_functions[0][0] is None and name.startswith("Div")):
            raise _Coupled(f"{name[:3]} joins two results that both depend on the outputs")
        if name.startswith(("Mul", "Div")) and not _scaled_by_python_number(node):
            raise _Coupled("it is scaled by a number that is computed, perhaps from the whole batch")
        return _terms(below[0])
    raise _Coupled(f"{name} is not a mean or sum over rows that samegrad recognises")


def _scaled_by_python_number(node: Any) -> bool:
    """Whether the constant factor was written as a number; a computed one, such as a mask's sum, may know all rows."""
    if not hasattr(node, "_saved_other"):
        # Multiplication by a scalar argument: only a number can stand there.
        return True
    factor = node._saved_other if node.next_functions[0][0] is not None else node._saved_self
    if not isinstance(factor, Tensor):
        return True
    # Type promotion tells them apart: a Python number yields to any tensor of its kind, a tensor does not.
    narrow = torch.float16 if factor.is_floating_point() else torch.int8
    return factor.dim() == 0 and torch.result_type(factor, torch.zeros((), dtype=narrow)) is narrow


def _check_rows_apart(starts: list[Any], outputs: set[int], rows: int) -> None:
    """Raises _Coupled unless every node between a reduction and the outputs keeps rows apart."""
    seen: set[Any] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        name = node.name()
        if name.endswith("AccumulateGrad"):
            if id(node.variable) not in outputs:
                raise _Coupled("it depends on parameters directly, not only on the outputs")
            continue
        _check_node(node, name, rows)
        stack.extend(_below(node))


def _check_node(node: Any, name: str, rows: int) -> None:
    shape = _shape(node)
    below = [_shape(part) for part in _below(node)]
    if not shape or shape[0] % rows:
        raise _Coupled(f"{name} does not keep the rows on the first axis")
    if name in _LOSSES and node._saved_reduction == _NONE and len(below) == 1:
        return
    if name in _ELEMENTWISE:
        # A broadcast that moves the row axis would pass for elementwise: (N,) + (N, 1) pairs every two rows.
        if any(len(part) != len(shape) or part[0] != shape[0] for part in below):
            raise _Coupled(f"{name} broadcasts the row axis")
        return
    if name in _RESHAPES:
        if any(not part or part[0] % rows for part in below):
            raise _Coupled(f"{name} does not keep the rows on the first axis")
        return
    if name in _OVER_DIMS:
        _check_dims(node, name, shape, below[0])
        return
    raise _Coupled(f"{name} is not known to keep rows apart")


def _check_dims(node: Any, name: str, shape: tuple[int, ...], before: tuple[int, ...]) -> None:
    ndim = len(before)
    if name == "TransposeBackward0":
        kept = _dim(node._saved_dim0, ndim) != 0 and _dim(node._saved_dim1, ndim) != 0
    elif name == "PermuteBackward0":
        kept = _dim(node._saved_dims[0], ndim) == 0
    elif name == "ExpandBackward0":
        kept = len(shape) == ndim and shape[0] == before[0]
    elif name == "SliceBackward0":
        kept = _dim(node._saved_dim, ndim) != 0 or shape[0] == before[0]
    else:
        dims = node._saved_dim
        listed = [dims] if isinstance(dims, int) else list(dims or ())
        # An empty list of dims means all of them.
        kept = bool(listed) and all(_dim(dim, ndim) != 0 for dim in listed)
    if not kept:
        raise _Coupled(f"{name} works across the row axis")


def _dim(dim: int, ndim: int) -> int:
    # Graph nodes save negative dims as unsigned 64-bit numbers.
    return (dim - 2**64 if dim >= 2**63 else dim) % ndim


def _shape(node: Any) -> tuple[int, ...]:
    """Shape of the forward result that ``node`` is the gradient of."""
    if node.name().endswith("AccumulateGrad"):
        return tuple(node.variable.shape)
    return tuple(node._input_metadata[0].shape)
