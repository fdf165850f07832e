"""BatchNorm taken apart: statistics of all rows, the normalisation with given statistics, and the running buffers.

Statistics are merged from chunks as (count, mean, sum of squares about it), never as E[x²] − E[x]², in float64. The
normalisation knows its statistics as inputs, so that their gradients are summed over all chunks before they are passed
on to the rows:  dL/dx = dL/dx|statistics fixed + g_mean / M + 2 g_var (x − mean) / M,  M values a channel.

Sources: Ioffe, Szegedy 2015, arXiv:1502.03167; Chan, Golub, LeVeque 1983, "Algorithms for computing the sample
variance", The American Statistician 37(3), for the merge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from samegrad.errors import CannotSplit
from samegrad.exact.aliases import NARROW
from samegrad.exact.replaced_forward import forward_replaced, has_own_forward


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether ``module`` is a BatchNorm that normalises with the statistics of the rows it is given, as it is now."""
    if not isinstance(module, _BatchNorm) or isinstance(module, _InstanceNorm):
        return False
    return module.training or (module.running_mean is None and module.running_var is None)


def has_batchnorm(network: nn.Module) -> list[str]:
    """The names of the layers of ``network`` that couple rows by their statistics, in the modes they are in now."""
    return [name for name, part in network.named_modules() if uses_batch_statistics(part)]


def coupled_layers(network: nn.Module) -> dict[str, _BatchNorm]:
    """Those layers by name. Raises CannotSplit for one that computes something else than torch's."""
    if uses_batch_statistics(network):
        raise CannotSplit(
            asked="run BatchNorm exactly a few rows at a time",
            found="the model itself is a BatchNorm, with nothing around it",
            do="put it into an nn.Sequential",
        )
    found = {}
    for name, part in network.named_modules():
        if not uses_batch_statistics(part):
            continue
        if type(part).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or has_own_forward(part):
            raise CannotSplit(
                asked="run BatchNorm exactly a few rows at a time",
                found=f"{name or 'the model'} ({type(part).__name__}) has a forward of its own",
                do="run the step whole, or use torch's BatchNorm and compute what is added outside of it",
            )
        found[name] = cast(_BatchNorm, part)
    return found


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of the values of each channel: how many, their mean, and the sum of squares about it; (C,) float64.

    ``count`` is a () tensor where other ranks' counts came in, so that nothing waits for the device.
    """

    count: int | Tensor
    mean: Tensor
    squares: Tensor

    def merged(self, other: Moments) -> Moments:
        count = self.count + other.count
        apart = other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * (other.count / count),
            self.squares + other.squares + apart.square() * (self.count * other.count / count),
        )


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and biased variance of all rows, (C,), float32 where the rows are narrower, and the count M."""

    mean: Tensor
    variance: Tensor
    count: int | Tensor


def channel_axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in NARROW else x


def moments_of(x: Tensor) -> Moments:
    """``x``: (rows, C, ...)."""
    variance, mean = torch.var_mean(widened(x.detach()), channel_axes(x), correction=0)
    count = x.numel() // x.shape[1]
    return Moments(count, mean.double(), variance.double() * count)


class RunningMoments:
    """Moments of chunks as they come."""

    def __init__(self) -> None:
        self._moments: Moments | None = None
        self._dtype = torch.float32

    def add(self, x: Tensor) -> None:
        part = moments_of(x)
        self._dtype = torch.float32 if x.dtype in NARROW else x.dtype
        self._moments = part if self._moments is None else self._moments.merged(part)

    def statistics(self, layer: _BatchNorm) -> Statistics:
        """Of all chunks, and of all ranks of a SyncBatchNorm. Raises ValueError as torch does for a single value."""
        moments = self._moments
        assert moments is not None
        group = group_of(layer)
        if group is not None:
            moments = gathered(moments, group)
        elif moments.count == 1:
            raise ValueError("Expected more than 1 value per channel when training, got one row with one value")
        variance = moments.squares / moments.count
        return Statistics(moments.mean.to(self._dtype), variance.to(self._dtype), moments.count)


def group_of(layer: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that ``layer`` shares its statistics with; None for this rank alone, as for every plain BatchNorm."""
    if not isinstance(layer, nn.SyncBatchNorm) or not layer.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = layer.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def shared_over_ranks(network: nn.Module) -> list[str]:
    """The names of layers of ``network`` whose forward waits for other ranks."""
    return [name for name, part in network.named_modules() if group_of(part) is not None]


@contextlib.contextmanager
def by_rows(network: nn.Module) -> Iterator[None]:
    """A block in which BatchNorm layers normalise each row by fixed numbers, so that all else can be looked at."""
    with contextlib.ExitStack() as stack:
        for part in network.modules():
            if uses_batch_statistics(part):
                stack.enter_context(forward_replaced(part, functools.partial(_by_fixed_numbers, part)))
        yield


def _by_fixed_numbers(layer: Any, x: Tensor) -> Tensor:
    mean = torch.zeros(x.shape[1], dtype=widened(x).dtype, device=x.device)
    return normalised(layer, x, mean, torch.ones_like(mean))


def gathered(moments: Moments, group: dist.ProcessGroup) -> Moments:
    """The moments over all ranks of ``group``, whose counts may differ, by one collective."""
    count = torch.as_tensor(moments.count, dtype=moments.mean.dtype, device=moments.mean.device)
    mine = torch.cat([moments.mean, moments.squares, count.reshape(1)])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group)
    channels = moments.mean.shape[0]
    parts = [Moments(part[-1], part[:channels], part[channels:-1]) for part in everyone]
    whole = parts[0]
    # In the order of ranks, so that all of them end with the same bits.
    for part in parts[1:]:
        whole = whole.merged(part)
    return whole


def summed_over_ranks(gradients: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """``gradients`` (C,) of the statistics summed over ``group`` by one collective, as torch's SyncBatchNorm does.

    A sum, not a mean: each rank's rows move the statistics of all. What averages over ranks comes later (DDP).
    """
    if group is None:
        return list(gradients)
    joined = torch.cat(list(gradients))
    dist.all_reduce(joined, dist.ReduceOp.SUM, group)
    return list(torch.split(joined, [g.shape[0] for g in gradients]))


def normalised(layer: _BatchNorm, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """``layer`` applied to ``x`` (rows, C, ...) with the given statistics (C,). Gradients reach all of them."""
    cast(Any, layer)._check_input_dim(x)
    weight = torch.ones_like(mean) if layer.weight is None else layer.weight.to(mean.dtype)
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.to(mean.dtype)
    # autograd.Function.apply carries no types.
    apply: Callable[..., Tensor] = cast(Any, _Normalise).apply
    return apply(x, mean, variance, weight, bias, layer.eps)


class _Normalise(torch.autograd.Function):
    """torch's own kernels for fixed statistics; the gradients of those follow from the ones of weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, mean, variance, weight)
        ctx.eps = eps
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, variance, weight = ctx.saved_tensors
        invstd = (variance + ctx.eps).rsqrt()
        if torch.is_grad_enabled() or _kernel_rounds_sums(g, x):
            # The kernel itself has no derivative with respect to the statistics.
            axes, wide = channel_axes(x), widened(g)
            g_bias = wide.sum(axes)
            g_weight = (wide * (widened(x) - along_channels(mean, x))).sum(axes) * invstd
        else:
            # Kernels differ in which of the two pairs they read; without the second, some of CUDA's fail.
            _, g_weight, g_bias = torch.ops.aten.native_batch_norm_backward(
                g, x, weight, mean, variance, mean, invstd, False, ctx.eps, [False, True, True]
            )
        # Not by the kernel, which gives channels-last rows a gradient in another layout.
        g_x = (widened(g) * along_channels(weight * invstd, x)).to(x.dtype)
        g_mean = -(weight * invstd * g_bias)
        g_variance = -0.5 * weight * invstd.square() * g_weight
        return g_x, g_mean, g_variance, g_weight, g_bias, None


def _kernel_rounds_sums(g: Tensor, x: Tensor) -> bool:
    """On CUDA the sums over narrow rows come out rounded to their dtype, in every layout but channels last."""
    if not x.is_cuda or x.dtype not in NARROW or x.dim() == 2:
        return False
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return layout is None or not all(t.is_contiguous(memory_format=layout) for t in (g, x))


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (C,) shaped to go with ``x`` (rows, C, ...)."""
    return values.view(1, -1, *(1 for _ in range(x.dim() - 2)))


@torch.no_grad()
def commit(layer: _BatchNorm, statistics: Statistics) -> None:
    """The update of ``layer``'s running statistics that a forward of all rows makes."""
    if not layer.training or not layer.track_running_stats:
        return
    momentum = 0.0 if layer.momentum is None else layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    unbiased = statistics.variance * (statistics.count / (statistics.count - 1))
    for buffer, value in ((layer.running_mean, statistics.mean), (layer.running_var, unbiased)):
        if buffer is not None:
            buffer.mul_(1 - momentum).add_(value.to(buffer.dtype), alpha=momentum)
