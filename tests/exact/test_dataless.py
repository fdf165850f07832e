"""What has values to be read, and whether operations compute now."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from samegrad.exact.attributes import same_tensor
from samegrad.exact.dataless import computing, has_data
from samegrad.exact.undisturbed import Generators


def test_real_tensors_have_data_and_others_have_not() -> None:
    real = torch.ones(3)
    assert has_data(real) and has_data(real[1:]) and has_data(torch.empty(0))
    assert not has_data(torch.ones(3, device="meta"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not has_data(torch.ones(3)) and has_data(real)


def test_nothing_computes_while_a_trace_follows() -> None:
    assert computing()
    with torch.device("meta"):
        assert computing(), "a default device is not a trace"
    with FakeTensorMode():
        assert not computing()
        assert "torch" not in Generators(torch.device("cuda")).states
    assert computing() and "torch" in Generators(torch.device("cpu")).states


def test_tensors_without_data_differ_by_shape_alone() -> None:
    assert same_tensor(torch.ones(3, device="meta"), torch.zeros(3, device="meta"))
    assert not same_tensor(torch.ones(3, device="meta"), torch.ones(4, device="meta"))
    assert not same_tensor(torch.ones(3), torch.zeros(3))
