"""What kind of work an operation is, by its name: kinds reach different fractions of a card's rates."""

from __future__ import annotations

import enum
import functools


class OperationClass(enum.Enum):
    """Kinds of operations that share how near they come to a card's peak."""

    MATMUL = "matmul"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"
    NORMALISATION = "normalisation"
    ELEMENTWISE = "elementwise"
    REDUCTION = "reduction"
    EMBEDDING = "embedding"
    COPY = "copy"
    OPTIMIZER = "optimizer"


# The first line that has words of the operation's bare name decides, read between its underscores: "norm" is no part
# of "normal". What no line knows is elementwise.
_WORDS: tuple[tuple[OperationClass, str], ...] = (
    (OperationClass.OPTIMIZER, "foreach fused_adam fused_adamw fused_sgd fused_adagrad"),
    # Before the products of matrices, of which "dot" is one, and the reductions, of which "min" is one.
    (OperationClass.ATTENTION, "scaled_dot_product attention"),
    (OperationClass.ELEMENTWISE, "clamp"),
    (OperationClass.MATMUL, "mm bmm addmm addbmm baddbmm mv dot linear matmul einsum cudnn_rnn lstm_cell gru_cell"),
    (OperationClass.CONVOLUTION, "convolution conv1d conv2d conv3d conv_transpose2d"),
    (OperationClass.NORMALISATION, "batch_norm layer_norm group_norm rms_norm instance_norm"),
    (OperationClass.EMBEDDING, "embedding index index_put index_select gather scatter take"),
    (OperationClass.REDUCTION,
     "softmax nll_loss nll_loss2d cross_entropy_loss sum mean max min amax amin argmax argmin logsumexp var std norm "
     "prod cumsum sort topk median max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d any all"),
    (OperationClass.COPY, "copy clone cat stack contiguous fill zero zeros ones full pad repeat roll"),
)  # fmt: skip
# After these the host knows a value of the device, so it has waited for all that came before.
_WAITED_FOR = frozenset(("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique"))


@functools.cache
def class_of(name: str) -> OperationClass:
    """The kind of the operation that torch names ``name``, as ``aten.addmm.default``."""
    bare = f"_{bare_name(name)}_"
    for kind, words in _WORDS:
        if any(f"_{word}_" in bare for word in words.split()):
            return kind
    return OperationClass.ELEMENTWISE


def host_waits_for(name: str) -> bool:
    """Whether the host goes on only when the operation has been computed."""
    return bare_name(name) in _WAITED_FOR


def bare_name(name: str) -> str:
    """``addmm`` of ``aten.addmm.default``, of ``aten::addmm`` and of ``addmm``; a trailing ``_`` of in-place goes."""
    parts = name.replace("::", ".").split(".")
    return (parts[1] if len(parts) > 1 else parts[0]).rstrip("_")
