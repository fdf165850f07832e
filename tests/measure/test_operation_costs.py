"""What operations cost: a backward convolution takes its forward once for each gradient, whatever the groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from samegrad.measure.operation_costs import Cost, cost_of, tensors_in


class Costs(TorchDispatchMode):
    """The costs of what is called inside, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Cost] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = tensors_in(result if isinstance(result, (list, tuple)) else [result])
        self.found[func._schema.name] = cost_of(func, args, kwargs or {}, result, tensors_in(args), made)
        return result


def flops(layer: nn.Module, x: Tensor) -> tuple[int, int]:
    """Of the forward and of the backward convolution."""
    with Costs() as costs:
        torch.autograd.backward(layer(x).sum())
    return costs.found["aten::convolution"].flops, costs.found["aten::convolution_backward"].flops


LAYERS = {
    "all channels": (lambda: nn.Conv2d(6, 4, 3, padding=1), 1),
    "two groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), 2),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), 6),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 4, stride=2), 1),
    "transposed in groups": (lambda: nn.ConvTranspose2d(6, 4, 4, stride=2, groups=2), 2),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("gradients", [1, 2])
def test_a_backward_convolution_takes_its_forward_once_for_each_gradient(name: str, gradients: int) -> None:
    make, groups = LAYERS[name]
    layer, x = make(), torch.randn(5, 6, 8, 8, requires_grad=gradients == 2)
    forward, backward = flops(layer, x)
    assert forward > 0 and backward == gradients * forward
    if groups == 1:
        # There torch's own count is right.
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(layer(x).sum())
        assert counter.get_total_flops() == forward + backward


def test_kernels_of_a_rows_own_cost_in_proportion_to_the_rows() -> None:
    def of(rows: int) -> int:
        kernels = torch.randn(rows * 6, 1, 3, 3, requires_grad=True)
        x = torch.randn(1, rows * 6, 8, 8, requires_grad=True)
        with Costs() as costs:
            torch.autograd.backward(nn.functional.conv2d(x, kernels, padding=1, groups=rows * 6).sum())
        return costs.found["aten::convolution_backward"].flops

    assert of(8) == 8 * of(1)
