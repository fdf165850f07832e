"""Steps of two known models as lists of operations, counted on the meta device: nothing is computed.

For the roofline alone: what a trace follows beyond it (CUDA's autocast, fused attention, phases by module) is written
out by hand in the models here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from samegrad.measure.events import Operation
from samegrad.records import Phase

# Launches of a fused optimizer: torch hands at most this many tensors of four lists to one of them.
_TENSORS_PER_FUSED_LAUNCH = 36
# Kernels of the operations that take several: gradients of input and weight, statistics and elements.
_KERNELS = {
    "convolution_backward": 3, "native_layer_norm_backward": 2, "native_group_norm_backward": 3,
    "native_group_norm": 2, "_scaled_dot_product_flash_attention_backward": 3, "embedding_dense_backward": 4,
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Notes each operation that is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.phase = Phase.FORWARD

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = str(func)
        written = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        seen = {tensor.untyped_storage()._cdata for tensor in given}
        only_view = not written and made and all(tensor.untyped_storage()._cdata in seen for tensor in made)
        without_work = only_view or name.split(".")[1] in ("detach", "empty", "empty_like", "empty_strided")
        flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out) if (
            func.overloadpacket in flop_registry) else 0  # fmt: skip
        floats = [tensor for tensor in (*given, *made) if tensor.dtype.is_floating_point]
        widest = max(floats, key=lambda tensor: tensor.nbytes, default=None)
        decides = floats[0] if flops else widest
        self.operations.append(
            Operation(
                name=name,
                module="",
                phase=self.phase,
                step=0,
                flops=int(flops),
                moved_bytes=0 if without_work else _moved_bytes([*given, *made]),
                dtype="float32" if decides is None else str(decides.dtype).removeprefix("torch."),
                kernels=0 if without_work else _KERNELS.get(name.split(".")[1], 1),
            )
        )
        return out


def _moved_bytes(tensors: Iterable[Tensor]) -> int:
    """Each tensor once, whatever its views; an expanded one has no more bytes than its storage."""
    once = {(t.untyped_storage()._cdata, t.shape): min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors}
    return sum(once.values())


def count_step(
    model: nn.Module, loss: Callable[[int], Tensor], chunk_rows: int, batch_rows: int, optimizer: str
) -> list[Operation]:
    """Forward and backward of chunks of ``chunk_rows`` until ``batch_rows``, then a fused optimizer's step."""
    counted: list[Operation] = []
    for parameter in model.parameters():
        parameter.grad = None
    first, later = _count_chunk(loss, chunk_rows), []
    rest = batch_rows - chunk_rows
    if rest >= chunk_rows:
        later = _count_chunk(loss, chunk_rows)
    counted += first + later * (rest // chunk_rows)
    if ragged := rest % chunk_rows:
        counted += _count_chunk(loss, ragged)
    return counted + [_fused_step(list(model.parameters()), optimizer)]


def _count_chunk(loss: Callable[[int], Tensor], rows: int) -> list[Operation]:
    with Counter() as counter:
        value = loss(rows)
        counter.phase = Phase.BACKWARD
        value.backward()
    return counter.operations


def _fused_step(parameters: list[nn.Parameter], optimizer: str) -> Operation:
    """Parameter, gradient and moments, each counted once."""
    tensors = {"adamw": 4, "sgd with momentum": 3}[optimizer]
    return Operation(
        name={"adamw": "aten._fused_adamw_.default", "sgd with momentum": "aten._fused_sgd_.default"}[optimizer],
        module="",
        phase=Phase.OPTIMIZER,
        step=0,
        flops=0,
        moved_bytes=tensors * sum(p.nbytes for p in parameters),
        dtype="float32",
        kernels=math.ceil(len(parameters) / _TENSORS_PER_FUSED_LAUNCH),
    )


class _Convolution(nn.Conv2d):
    """Casts its input and its weight, as autocast does."""

    def __init__(self, inner: int, outer: int, size: int, stride: int, dtype: torch.dtype) -> None:
        super().__init__(inner, outer, size, stride, size // 2, bias=False)
        self.computing_dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x.to(self.computing_dtype), self.weight.to(self.computing_dtype), None)


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.first_norm = _Convolution(inner, outer, 3, stride, dtype), nn.BatchNorm2d(outer)
        self.second, self.second_norm = _Convolution(outer, outer, 3, 1, dtype), nn.BatchNorm2d(outer)
        self.shortcut = (
            nn.Sequential(_Convolution(inner, outer, 1, stride, dtype), nn.BatchNorm2d(outer))
            if stride > 1 or inner != outer
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)), inplace=True)
        return F.relu(self.second_norm(self.second(y)).add_(self.shortcut(x)), inplace=True)


def resnet34(dtype: torch.dtype) -> nn.Module:
    blocks: list[nn.Module] = []
    inner = 64
    for outer, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(depth):
            blocks.append(_Residual(inner, outer, 2 if index == 0 and outer > 64 else 1, dtype))
            inner = outer
    return nn.Sequential(
        _Convolution(3, 64, 7, 2, dtype), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), _Float(), nn.Linear(512, 64),
    )  # fmt: skip


class _Float(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def pictures_loss(model: nn.Module) -> Callable[[int], Tensor]:
    def loss(rows: int) -> Tensor:
        pictures = torch.empty(rows, 3, 224, 224, device="meta")
        return F.cross_entropy(model(pictures), torch.empty(rows, dtype=torch.int64, device="meta"))

    return loss


class Blocks(nn.Module):
    """Twelve transformer blocks, the casts of CUDA's autocast written out."""

    def __init__(self, dtype: torch.dtype, *, causal: bool, width: int = 768) -> None:
        super().__init__()
        self.heads, self.dtype, self.causal = 12, dtype, causal
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
                "norm2": nn.LayerNorm(width), "up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width),
            })
            for _ in range(12)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self._attend(block["norm1"](x), block)
            x = x + self.linear(F.gelu(self.linear(block["norm2"](x), block["up"])), block["down"])
        return self.norm(x)

    def _attend(self, x: Tensor, block: Any) -> Tensor:
        rows, places, width = x.shape
        q, k, v = self.linear(x, block["qkv"]).split(width, dim=2)
        q, k, v = (part.view(rows, places, self.heads, -1).transpose(1, 2) for part in (q, k, v))
        out = self._attention(q, k, v)
        return self.linear(out.transpose(1, 2).reshape(rows, places, width), block["out"])

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_meta:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        # Without a device torch would take the way that spells out the square of the places.
        if self.dtype is torch.float32:
            attend = torch.ops.aten._scaled_dot_product_efficient_attention
            return attend(q, k, v, None, True, is_causal=self.causal)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=self.causal)[0]

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x.to(self.dtype), layer.weight.to(self.dtype), layer.bias.to(self.dtype))


class Gpt(nn.Module):
    """GPT-2 124M with its head tied to its words."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        self.body = Blocks(dtype, causal=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device)))
        return F.linear(x.to(self.body.dtype), self.words.weight.to(self.body.dtype))


class Vit(nn.Module):
    """ViT-B/16 on 224 x 224."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 768, 16, 16), nn.Linear(768, 1000)
        self.body = Blocks(dtype, causal=False)
        self.first, self.places = nn.Parameter(torch.empty(1, 1, 768)), nn.Parameter(torch.empty(1, 197, 768))

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.body.dtype
        patches = F.conv2d(x.to(dtype), self.patches.weight.to(dtype), self.patches.bias.to(dtype), stride=16)
        first = self.first.expand(len(x), -1, -1).to(dtype)
        x = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1)
        return self.body.linear(self.body(x + self.places)[:, 0], self.head).float()


def gpt_loss(model: nn.Module) -> Callable[[int], Tensor]:
    def loss(rows: int) -> Tensor:
        tokens = torch.empty(rows, 1024, dtype=torch.int64, device="meta")
        logits = model(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())

    return loss
