"""Shapes of convolutions as kernels see them, against the layers' own results; copies where slices are read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from samegrad.measure.cuda_dispatch import CUDA, CudaDispatch
from samegrad.measure.events import Convolution
from samegrad.measure.recorder import Recorder
from samegrad.measure.shadows import Twins

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "strides and dilation": (lambda: nn.Conv2d(6, 4, (3, 2), stride=2, padding=1, dilation=(2, 1)), (5, 6, 11, 9)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (5, 6, 11, 9)),
    "pointwise": (lambda: nn.Conv2d(6, 4, 1), (5, 6, 7, 3)),
    "one place of four": (lambda: nn.Conv2d(6, 4, 1, stride=2), (5, 6, 7, 3)),
    "one axis": (lambda: nn.Conv1d(6, 4, 5, padding="same"), (5, 6, 13)),
    "three axes": (lambda: nn.Conv3d(2, 3, 3, padding=(0, 1, 2)), (2, 2, 5, 6, 7)),
}


def recorded(layer: nn.Module, rows: Tensor) -> Recorder:
    """The layer forward and backward."""
    dispatch = CudaDispatch()
    with dispatch.followed(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        recorder = Recorder(dispatch, Twins(CUDA, CUDA), {})
        twin = torch.empty(rows.shape, device=CUDA, requires_grad=True)
        with torch.device(CUDA), recorder, fake:
            made = layer(twin)
            torch.autograd.backward(made, torch.empty_like(made))
    return recorder


@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_has_the_shape_of_its_layer(name: str) -> None:
    make, shape = LAYERS[name]
    rows = torch.zeros(shape)
    plain = make()
    made = plain(rows)
    with torch.device("meta"):
        twin = make()
    expected = Convolution(
        rows=shape[0], inputs=shape[1], outputs=plain.out_channels, input_pixels=math.prod(shape[2:]),
        output_pixels=math.prod(made.shape[2:]), kernel_pixels=math.prod(plain.kernel_size), groups=plain.groups,
        pointwise=name == "pointwise",
    )  # fmt: skip
    found = [o.shape for o in recorded(twin, rows).operations if o.name.startswith("aten.convolution")]
    assert found == [expected, expected]


def test_a_transposed_convolution_has_none() -> None:
    with torch.device("meta"):
        layer = nn.ConvTranspose2d(3, 4, 3)
    found = [o.shape for o in recorded(layer, torch.zeros(2, 3, 5, 5)).operations if "convolution" in o.name]
    assert found == [None, None]


@pytest.mark.parametrize("sliced", [True, False])
def test_a_gradient_that_is_a_slice_is_copied_before_it_is_read(sliced: bool) -> None:
    class Carried(nn.Module):
        """Doubled in size, and put beside another tensor or not."""

        def forward(self, rows: Tensor) -> Tensor:
            larger = nn.functional.interpolate(rows, scale_factor=2.0)
            return torch.cat([larger, rows.repeat(1, 1, 2, 2)], 1) if sliced else larger * 2

    recorder = recorded(Carried(), torch.zeros(2, 3, 4, 4))
    [at] = [k for k, o in enumerate(recorder.operations) if "upsample_nearest2d_backward" in o.name]
    taken = [event.change_bytes for event in recorder.events() if event.operation == at and event.change_bytes > 0]
    gradient, copied = 2 * 3 * 4 * 4 * 4, 2 * 3 * 8 * 8 * 4
    assert taken == ([gradient, copied] if sliced else [gradient])
