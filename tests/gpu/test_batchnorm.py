"""BatchNorm a few rows at a time on one GPU: the fused kernels, layouts, autocast, and saved tensors on the host."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.exact.batchnorm import normalised
from samegrad.exact.lockstep import lockstep
from samegrad.exact.recomputed import recomputed_blocks
from samegrad.exact.rendezvous import rendezvous
from samegrad.verify import tolerance

from ..exact.batchnorm_zoo import NETWORKS, ResNet, coupled_loss, left_by, made, row_loss, worst_share

pytestmark = pytest.mark.gpu

SIZES = [9, 10, 4]
SCHEMES: dict[str, Callable[[nn.Module], Any]] = {
    "lockstep": lambda network: lockstep(network, sizes=SIZES),
    "every second cut": lambda network: lockstep(network, sizes=SIZES, keep_every=2),
    "rendezvous": lambda network: rendezvous(network, sizes=SIZES),
}


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "many views"])
def test_float64_steps_are_the_plain_ones(name: str, scheme: str, channels_last: bool) -> None:
    network, x = made(name)
    network, x = network.cuda(), x.cuda()
    if channels_last:
        if x.dim() != 4:
            pytest.skip("no images")
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    for loss_fn in (_row_loss, _coupled_loss):
        ours = left_by(network, x, loss_fn, SCHEMES[scheme])
        assert worst_share(ours, left_by(network, x, loss_fn)) <= 1


def _row_loss(z: Tensor) -> Tensor:
    return row_loss(z.cpu())


def _coupled_loss(z: Tensor) -> Tensor:
    return coupled_loss(z.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
def test_the_normalisation_and_all_its_gradients(dtype: torch.dtype, affine: bool) -> None:
    """Against float64 operations, in the dtypes autocast meets: narrow rows, float32 statistics and weights."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(5, affine=affine).cuda()
    x = torch.randn(7, 5, 6, 6, device="cuda").to(dtype)
    mean, variance = torch.randn(5, device="cuda"), torch.rand(5, device="cuda") + 0.5
    g = torch.randn_like(x)
    found = []
    for wide in (False, True):
        inputs = [t.detach().double() if wide else t.detach() for t in (x, mean, variance)]
        inputs = [t.requires_grad_() for t in inputs]
        if wide:
            shaped = [t.view(1, -1, 1, 1) for t in inputs[1:]]
            y = (inputs[0] - shaped[0]) * (shaped[1] + layer.eps).rsqrt()
        else:
            y = normalised(layer, *inputs)
            assert y.dtype is dtype
        found.append([y.detach(), *torch.autograd.grad(y, inputs, g.to(y.dtype))])
    for mine, reference in zip(*found):
        scale = reference.abs().max() * (20 if mine.dim() == 1 else 1)
        assert (mine.double() - reference).abs().max() <= 4 * tolerance.unit_roundoff(dtype) * scale


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_in_channels_last_keeps_dtypes_layout_and_noise(scheme: str) -> None:
    torch.manual_seed(0)
    network = ResNet((1, 1), (32, 64), 10).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(23, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)

    def step(within: Callable[[nn.Module], Any], dtype: torch.dtype | None) -> list[Tensor]:
        twin = copy.deepcopy(network)
        with within(twin):
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                z = twin(x)
            F.cross_entropy(z.float(), torch.arange(23, device="cuda") % 10).backward()
        return [p.grad.double() for p in twin.parameters() if p.grad is not None] + [
            b.double() for b in twin.buffers()
        ]

    plain = step(lambda _: contextlib.nullcontext(), torch.bfloat16)
    ours, exact = step(SCHEMES[scheme], torch.bfloat16), step(lambda _: contextlib.nullcontext(), None)
    for mine, theirs, reference in zip(ours, plain, exact):
        noise = (theirs - reference).norm()
        assert (mine - reference).norm() <= tolerance.NOISE_RATIO * noise + 1e-2 * reference.norm()


def test_peaks_on_the_device() -> None:
    torch.manual_seed(0)
    network = ResNet((3, 3), (64, 128), 10).cuda()
    x = torch.randn(256, 3, 64, 64, device="cuda")
    sizes = [16] * 16
    peaks = {}
    for name, within in {
        "plain": contextlib.nullcontext(),
        "blocks": recomputed_blocks(network),
        "lockstep": lockstep(network, sizes=sizes),
        "every fourth cut": lockstep(network, sizes=sizes, keep_every=4),
        "rendezvous": rendezvous(network, sizes=sizes),
    }.items():
        network.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        with within:
            F.cross_entropy(network(x), torch.arange(256, device="cuda") % 10).backward()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    print(peaks)
    assert peaks["blocks"] < 0.9 * peaks["plain"]
    assert peaks["lockstep"] < 0.8 * peaks["plain"]
    assert peaks["every fourth cut"] < 0.75 * peaks["plain"]
    assert peaks["rendezvous"] < 0.6 * peaks["plain"]
