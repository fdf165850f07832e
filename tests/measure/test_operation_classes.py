"""Operations are sorted by their name into the kinds that calibrations speak of."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from samegrad.measure.operation_classes import OperationClass, bare_name, class_of, host_waits_for

KINDS = {
    OperationClass.MATMUL: "mm addmm bmm baddbmm _scaled_mm _cudnn_rnn_backward _thnn_fused_lstm_cell",
    OperationClass.CONVOLUTION: "convolution convolution_backward cudnn_convolution miopen_convolution_transpose",
    OperationClass.ATTENTION: "_scaled_dot_product_flash_attention_backward _efficient_attention_forward "
    "_scaled_dot_product_cudnn_attention",
    OperationClass.NORMALISATION: "native_batch_norm cudnn_batch_norm_backward native_layer_norm _fused_rms_norm "
    "native_group_norm_backward",
    OperationClass.ELEMENTWISE: "add mul_ gelu_backward threshold_backward native_dropout normal_ bernoulli maximum "
    "_fused_dropout clamp_min where addcmul an_operation_of_mine",
    OperationClass.REDUCTION: "sum mean _log_softmax nll_loss_backward linalg_vector_norm max_pool2d_with_indices max",
    OperationClass.EMBEDDING: "embedding embedding_dense_backward index_put_ scatter_add gather index_select",
    OperationClass.COPY: "copy_ clone _to_copy cat zeros_like fill_ constant_pad_nd",
    OperationClass.OPTIMIZER: "_foreach_add_ _foreach_addcdiv_ _fused_adamw_ _fused_sgd_",
}
NAMES = [
    (f"aten.{name}.default", kind)
    for kind, names in KINDS.items()
    for name in names.split()
]


@pytest.mark.parametrize(("name", "kind"), NAMES, ids=lambda value: getattr(value, "value", value))
def test_the_kind_of_an_operation(name: str, kind: OperationClass) -> None:
    assert class_of(name) is kind


def test_names_come_in_several_spellings() -> None:
    assert bare_name("aten.addmm.default") == bare_name("aten::addmm") == bare_name("addmm") == "addmm"
    assert bare_name(str(torch.ops.aten.add_.Tensor)) == "add"


def test_whatever_torch_counts_arithmetic_of_is_a_kind_that_has_a_rate() -> None:
    arithmetic = {OperationClass.MATMUL, OperationClass.CONVOLUTION, OperationClass.ATTENTION}
    strangers = {str(packet) for packet in flop_registry if class_of(str(packet)) not in arithmetic}
    assert strangers == set()


def test_the_host_waits_for_values_it_reads() -> None:
    assert host_waits_for("aten._local_scalar_dense.default") and host_waits_for("aten.nonzero.default")
    assert not host_waits_for("aten.mm.default")
