"""Images and the weights of convolutions with channels last in memory (channels_last, channels_last_3d).

Saves: the transposed copies that convolutions make where their kernels want channels last; little memory, much time
on CUDA in bfloat16 and float16, and none or less than none elsewhere: taken by measurement, not by rule.
Costs: a copy of each chunk's images, but of those with so few channels that convolutions pad them, and so copy them,
anyway; strides of weights, of their gradients and of optimizer state while it stands.
Why the gradient is the same: every value is where its index says, only strides change; kernels add up in another
order, so it is the same sum and not the same bits. Strides are put back when the plan goes.
Refuses: models without a convolution over two or three dimensions.
Source: PyTorch tutorial "Channels Last Memory Format in PyTorch".
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from samegrad import trees
from samegrad.declared import Around, DeclaredStep, Forward
from samegrad.errors import UsageError
from samegrad.exact.dataless import is_torchs_own
from samegrad.levers._lever import Execution, Slot
from samegrad.module_walk import parts_of
from samegrad.records import Exactness, Footprint

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Of images that are left as they lie: colours, latents. A copy would be held as long as the forward, and where the
# first block runs again as long as the step.
_FEW_CHANNELS = 4
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NO_CONVOLUTION = "the model has no convolution over two or three dimensions whose weight has memory of its own"


@dataclasses.dataclass(frozen=True)
class Layout:
    """No knobs: (N, C, H, W) in channels_last, (N, C, D, H, W) in channels_last_3d."""

    name: ClassVar[str] = "layout"
    slot: ClassVar[Slot] = Slot.LAYOUT
    exactness: ClassVar[Exactness] = Exactness.SAME_SUM

    @classmethod
    def unsuited(cls, declared: DeclaredStep) -> str | None:
        return None if _weights_of(declared) else _NO_CONVOLUTION

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        declared = execution.declared
        self._check(declared)
        forward = functools.partial(_on_channels_last, declared.forward)
        yield dataclasses.replace(execution, declared=dataclasses.replace(declared, forward=forward))

    @contextlib.contextmanager
    def standing(self, declared: DeclaredStep) -> Iterator[Around]:
        """Weights of convolutions with channels last, and what the optimizer keeps of them with the same strides."""
        self._check(declared)
        optimizer = declared.optimizer
        with contextlib.ExitStack() as stack:
            if optimizer is not None:
                stack.callback(_align_state, optimizer)
            for weight in _weights_of(declared):
                if weight.grad is not None and not _is_alone(weight.grad):
                    # Part of a bucket, from which ranks reduce it, or of a flat buffer: it would be parted from that.
                    continue
                stack.callback(_restride, weight, weight.stride())
                _restride(weight, torch.empty_like(weight, memory_format=_FORMATS[weight.dim()]).stride())
            if optimizer is not None:
                # Fused kernels pair entries by their place in memory; state may be loaded, or first made, at any time,
                # and gradients may be put in place by others.
                stack.callback(optimizer.register_step_pre_hook(lambda *_: _align(optimizer)).remove)
            yield contextlib.nullcontext

    def knobs(self) -> dict[str, Any]:
        return {}

    def _check(self, declared: DeclaredStep) -> None:
        if not _weights_of(declared):
            raise UsageError(
                asked=f"the lever {self.name}", found=_NO_CONVOLUTION, do="leave it out of the plan, or plan again"
            )


def _on_channels_last(forward: Forward, network: nn.Module, batch: Any) -> Any:
    def laid_out(leaf: Tensor) -> Tensor:
        if leaf.dim() not in _FORMATS or leaf.layout is not torch.strided or not leaf.is_floating_point():
            return leaf
        if leaf.shape[1] <= _FEW_CHANNELS:
            return leaf
        return leaf.contiguous(memory_format=_FORMATS[leaf.dim()])

    return forward(network, trees.map_tensors(batch, laid_out))


def _weights_of(declared: DeclaredStep) -> list[nn.Parameter]:
    """The weights of convolutions, each once."""
    parts = [part for part in parts_of(declared.modules) if isinstance(part, _CONVOLUTIONS)]
    # A layer's own parameters and those that a parametrization makes its weight of.
    found = dict.fromkeys(p for part in parts for p in part.parameters() if p.dim() in _FORMATS)
    return [weight for weight in found if _has_memory_of_its_own(weight)]


def _has_memory_of_its_own(weight: nn.Parameter) -> bool:
    """Whether other strides would part it from nothing: no view of a flat buffer, no part of a sharded weight."""
    plain = is_torchs_own(weight) and is_torchs_own(weight.data)
    return plain and _is_alone(weight)


def _is_alone(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.untyped_storage().nbytes() == tensor.nbytes


def _restride(weight: Tensor, stride: tuple[int, ...]) -> None:
    """``weight``, and its gradient with it, of the same values at other places in memory."""
    if weight.stride() != stride:
        weight.data = _copied(weight.data, stride)
        if weight.grad is not None and weight.grad.layout is torch.strided:
            weight.grad = _copied(weight.grad, stride)


def _copied(values: Tensor, stride: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(values.shape, stride, dtype=values.dtype, device=values.device).copy_(values.detach())


def _align(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            gradient = weight.grad
            if weight.dim() not in _FORMATS or gradient is None or gradient.layout is not torch.strided:
                continue
            if is_torchs_own(gradient) and gradient.stride() != weight.stride():
                weight.grad = _copied(gradient, weight.stride())
    _align_state(optimizer)


def _align_state(optimizer: Optimizer) -> None:
    """Gives state that has an entry for each of a weight's the weight's strides, in the dtype and place it has."""
    for weight, state in optimizer.state.items():
        if not isinstance(weight, Tensor) or weight.dim() not in _FORMATS:
            continue
        for key, value in state.items():
            if not isinstance(value, Tensor) or not is_torchs_own(value):
                continue
            if value.shape == weight.shape and value.stride() != weight.stride():
                state[key] = _copied(value, weight.stride())
