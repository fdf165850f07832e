"""The document's vector-quantised autoencoder of log-mel patches, in plain PyTorch: no budget is known here.

    patch 1 × 64 × 64 → encoder → z: D × 8 × 8 → nearest code e → z + (e − z).detach() → decoder → patch
                                   └→ mean over the clip's patches and places → heads: machine id, transformation

Axes: B clips, N patches a clip, H mel bands, W frames of a patch, D latent width, h × w its places, K codes.
Source: van den Oord, Vinyals, Kavukcuoglu 2017, arXiv:1711.00937; the codebook as in its appendix A.1.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

LATENT_BOUND = 5.0
TRANSFORMS = 6
GROUPS = 8

Norm = Literal["batch", "group"]


class Outputs(NamedTuple):
    """What the model makes of patches (B, N, 1, H, W).

    ``reconstructed`` like the patches, ``latents`` and ``quantised`` (B, N, D, h, w), ``codes`` (B, N, h, w) int64,
    ``machine_logits`` (B, machines), ``transform_logits`` (B, 6), or (B, N, 6) with a head per patch.
    """

    reconstructed: Tensor
    latents: Tensor
    quantised: Tensor
    codes: Tensor
    machine_logits: Tensor
    transform_logits: Tensor


def _norm(kind: Norm, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(GROUPS, channels), channels)


class SeparableBlock(nn.Module):
    """3 × 3 depthwise and 1 × 1 convolution, norm, SiLU; added to its input where the shape stays."""

    def __init__(self, channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, width, 1)
        self.norm = _norm(norm, width)
        self.adds = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        made = F.silu(self.norm(self.pointwise(self.depthwise(x))))
        return x + made if self.adds else made


class BoundedTanh(nn.Module):
    """``bound · tanh(x)``: latents stay where the codes are."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        return self.bound * torch.tanh(x)


def encoder_of(channels: tuple[int, int, int], latent_dim: int, norm: Norm) -> nn.Sequential:
    """Patches (B·N, 1, H, W) to latents (B·N, D, H/8, W/8), each number in (−5, 5)."""
    first, second, third = channels
    stem = nn.Sequential(nn.Conv2d(1, first, 3, padding=1, bias=False), _norm(norm, first), nn.SiLU())
    return nn.Sequential(
        stem,
        SeparableBlock(first, second, 2, norm),
        SeparableBlock(second, third, 2, norm),
        SeparableBlock(third, latent_dim, 2, norm),
        SeparableBlock(latent_dim, latent_dim, 1, norm),
        nn.Conv2d(latent_dim, latent_dim, 1),
        BoundedTanh(LATENT_BOUND),
    )


def decoder_of(channels: tuple[int, int, int], latent_dim: int, norm: Norm) -> nn.Sequential:
    """Latents (B·N, D, h, w) to patches (B·N, 1, 8h, 8w)."""
    first, second, third = channels
    widths = (latent_dim, third, second, first)
    blocks = [
        nn.Sequential(nn.ConvTranspose2d(wide_in, wide_out, 4, 2, 1), _norm(norm, wide_out), nn.SiLU())
        for wide_in, wide_out in itertools.pairwise(widths)
    ]
    return nn.Sequential(*blocks, nn.Conv2d(first, 1, 3, padding=1))


class Codebook(nn.Module):
    """K codes of D numbers, each a moving mean of the latents that were nearest to it.

    ``counts`` (K,) and ``sums`` (K, D) are what is kept: size_k ← 0.99 size_k + 0.01 n_k, sum_k likewise, and
    code_k = sum_k / (max(size_k, 1) + 1e-5), in [−5, 5]. In training mode a forward updates both, after the look-up;
    in eval mode the codebook is frozen.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, width: int, *, decay: float = 0.99, generator: Generator | None = None) -> None:
        super().__init__()
        self.decay = decay
        start = torch.randn(codes, width, generator=generator)
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", start.clamp(-LATENT_BOUND, LATENT_BOUND))

    def codes(self) -> Tensor:
        """(K, D)."""
        means = self.sums / (self.counts.clamp(min=1) + 1e-5).unsqueeze(1)
        return means.clamp(-LATENT_BOUND, LATENT_BOUND)

    @torch.no_grad()
    def begin_at(self, latents: Tensor) -> None:
        """Sets the codes to ``latents`` (K, D), every one counted once."""
        self.counts.fill_(1)
        self.sums.copy_(latents)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For latents (B·N, D, h, w): those in value of their codes and with their own gradient; the codes (alike);
        and their numbers (B·N, h, w) int64. Distances and sums are never taken in half precision.
        """
        with torch.autocast(latents.device.type, enabled=False):
            wide = latents.to(self.sums.dtype)
            flat = wide.detach().movedim(1, -1).reshape(-1, wide.shape[1])
            numbers = _nearest(flat, self.codes())
            quantised = F.embedding(numbers, self.codes()).reshape(*_places(wide), -1).movedim(-1, 1)
            if self.training:
                self._update(flat, numbers)
            return wide + (quantised - wide).detach(), quantised, numbers.reshape(_places(wide))

    @torch.no_grad()
    def _update(self, flat: Tensor, numbers: Tensor) -> None:
        # Counted by index_add: a one-hot matrix would be (places, K) floats.
        ones = torch.ones_like(numbers, dtype=self.counts.dtype)
        self.counts.mul_(self.decay).index_add_(0, numbers, ones, alpha=1 - self.decay)
        self.sums.mul_(self.decay).index_add_(0, numbers, flat, alpha=1 - self.decay)


def _nearest(flat: Tensor, codes: Tensor) -> Tensor:
    """(places,) int64: the code with the smallest squared distance, up to what is the same for all codes."""
    return torch.addmm(codes.square().sum(1), flat, codes.t(), alpha=-2).argmin(1)


def _places(latents: Tensor) -> tuple[int, int, int]:
    return latents.shape[0], latents.shape[2], latents.shape[3]


def head_of(latent_dim: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(latent_dim, 128), nn.SiLU(), nn.Dropout(0.3), nn.Linear(128, classes))


class VQSpectrogram(nn.Module):
    """The whole model. All weights are drawn from ``generator``; torch's default generator is not moved.

    ``norm`` "group" puts GroupNorm where the document has BatchNorm, which is another model.
    """

    def __init__(
        self,
        machines: int,
        *,
        latent_dim: int = 64,
        channels: tuple[int, int, int] = (32, 64, 96),
        num_codes: int = 128,
        norm: Norm = "batch",
        transform_head_per_patch: bool = False,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        draws = Generator().manual_seed(0) if generator is None else generator
        self.per_patch = transform_head_per_patch
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed every GPU's generator too.
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=draws)))
            self.encoder = encoder_of(channels, latent_dim, norm)
            self.codebook = Codebook(num_codes, latent_dim)
            self.decoder = decoder_of(channels, latent_dim, norm)
            self.machine_head = head_of(latent_dim, machines)
            self.transform_head = head_of(latent_dim, TRANSFORMS)
        self.to(dtype)

    def forward(self, patches: Tensor) -> Outputs:
        """``patches``: (B, N, 1, H, W), H and W multiples of 8."""
        clip = patches.shape[:2]
        latents = self.encoder(patches.flatten(0, 1))
        straight, quantised, codes = self.codebook(latents)
        latents = latents.unflatten(0, clip)
        pooled = latents.mean((3, 4))
        return Outputs(
            reconstructed=self.decoder(straight).unflatten(0, clip),
            latents=latents,
            quantised=quantised.unflatten(0, clip),
            codes=codes.unflatten(0, clip),
            machine_logits=self.machine_head(pooled.mean(1)),
            transform_logits=self.transform_head(pooled if self.per_patch else pooled.mean(1)),
        )


class Objective(nn.Module):
    """The document's loss of a batch: reconstruction, commitment, machine id and transformation.

    λ_recon · MSE + λ_vq · scale · 0.25 · MSE(z, sg[e]) + λ_machine · CE + λ_transform · CE, label smoothing 0.1. What
    the stage of training leaves out is multiplied by 0, so that the same parameters have gradients in every stage.
    A batch is a mapping: ``patches`` (B, N, 1, H, W), ``original`` (alike) where that is the target, ``machine`` and
    ``transform`` (B,) int64.
    """

    def __init__(self, recon: float, vq: float, machine_id: float, transform: float) -> None:
        super().__init__()
        self.recon, self.vq, self.machine_id, self.transform = recon, vq, machine_id, transform
        self.vq_scale, self.heads_scale = 1.0, 1.0

    def forward(self, outputs: Outputs, batch: dict[str, Tensor]) -> Tensor:
        """The loss, () in the patches' dtype."""
        target = batch.get("original", batch["patches"])
        latents = outputs.latents.to(target.dtype)
        commitment = 0.25 * F.mse_loss(latents, outputs.quantised.to(target.dtype).detach())
        machine = F.cross_entropy(outputs.machine_logits.to(target.dtype), batch["machine"], label_smoothing=0.1)
        return (
            self.recon * F.mse_loss(outputs.reconstructed.to(target.dtype), target)
            + self.vq * self.vq_scale * commitment
            + self.machine_id * self.heads_scale * machine
            + self.transform * self.heads_scale * self._transform_loss(outputs.transform_logits.to(target.dtype), batch)
        )

    def _transform_loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["transform"]
        if logits.dim() == 3:
            # Every patch answers for its clip.
            labels = labels.unsqueeze(1).expand(logits.shape[:2]).flatten()
        return F.cross_entropy(logits.flatten(0, -2), labels, label_smoothing=0.1)
