"""Work of one kind each, at the sizes that training has, for ``calibrate_gpu.py`` to time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.measure.operation_classes import OperationClass

KINDS_OF_ARITHMETIC = (OperationClass.MATMUL, OperationClass.CONVOLUTION, OperationClass.ATTENTION)


class Place(NamedTuple):
    """Where the probes run and how much smaller than meant."""

    device: torch.device
    divide: int

    def size(self, rows: int) -> int:
        return max(rows // self.divide, 2)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype).requires_grad_(grad)


def both_ways(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward, the cotangent made once."""
    cotangent = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, cotangent)


def arithmetic_probes(place: Place, dtype: torch.dtype) -> dict[OperationClass, list[Callable[[], object]]]:
    """Products of matrices, convolutions and attention as training has them."""
    n = place.size
    products = []
    for rows, inner, outer in ((4096, 4096, 4096), (32768, 768, 3072), (32768, 3072, 768), (8192, 1024, 4096)):
        a, b = place.tensor(n(rows), n(inner), dtype=dtype), place.tensor(n(inner), n(outer), dtype=dtype)
        products.append(lambda a=a, b=b: a @ b)
    convolutions = []
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        x = place.tensor(n(64), channels, side, side, dtype=dtype, grad=True)
        weight = place.tensor(channels, channels, 3, 3, dtype=dtype, grad=True)
        forward = lambda x=x, weight=weight: F.conv2d(x, weight, padding=1)
        convolutions.append(both_ways(forward, [x, weight]))
    attentions = []
    if dtype is not torch.float64:
        for causal in (True, False):
            q, k, v = (place.tensor(n(16), 12, n(1024), 64, dtype=dtype, grad=True) for _ in range(3))
            forward = lambda q=q, k=k, v=v, causal=causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            attentions.append(both_ways(forward, [q, k, v]))
    return dict(zip(KINDS_OF_ARITHMETIC, (products, convolutions, attentions)))


def bandwidth_probes(place: Place, dtype: torch.dtype) -> dict[OperationClass, list[Callable[[], object]]]:
    """Work that moves bytes, on tensors beyond any cache."""
    n = place.size
    x, y = (place.tensor(n(32768), 3072, dtype=dtype, grad=True) for _ in range(2))
    plain, other = x.detach(), y.detach()
    pictures = place.tensor(n(64), 64, 112, 112, dtype=dtype, grad=True)
    weight, bias = place.tensor(3072, grad=True), place.tensor(3072, grad=True)
    channels = [place.tensor(64, grad=True) for _ in range(2)]
    running = [torch.zeros(64, device=place.device), torch.ones(64, device=place.device)]
    logits = place.tensor(n(2048), 50257, grad=True)
    words = torch.randint(50257, (n(2048),), device=place.device)
    floats = plain.float().requires_grad_()
    cast_dtype = torch.float16 if dtype is torch.float32 else torch.float32
    table = place.tensor(50257, 768, grad=True)
    normalised = lambda: F.layer_norm(floats, (3072,), weight, bias)
    batch_normalised = lambda: F.batch_norm(pictures, *running, *channels, training=True)
    return {
        OperationClass.ELEMENTWISE: [lambda: plain + other, lambda: plain * 2, both_ways(lambda: F.gelu(x), [x])],
        OperationClass.COPY: [lambda: plain.clone(), lambda: plain.to(cast_dtype), lambda: torch.zeros_like(plain)],
        OperationClass.NORMALISATION: [
            both_ways(normalised, [floats, weight, bias]), both_ways(batch_normalised, [pictures, *channels]),
        ],
        OperationClass.REDUCTION: [
            lambda: plain.sum(0), lambda: plain.sum(1), both_ways(lambda: F.cross_entropy(logits, words), [logits]),
        ],
        OperationClass.EMBEDDING: [both_ways(lambda: F.embedding(words, table), [table])],
        OperationClass.OPTIMIZER: [fused_step(place)],
    }  # fmt: skip


def fused_step(place: Place) -> Callable[[], object]:
    parameters = [nn.Parameter(place.tensor(n, 1024)) for n in (place.size(8192),) * 8]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return torch.optim.AdamW(parameters, fused=True).step
