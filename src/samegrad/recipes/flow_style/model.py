"""The document's flow in plain PyTorch: a velocity network, Euler steps that reach time 1, and the styled latents.

    StyleFlow:  x_t ──step── … ──step── x_1        dx/ds = v(x, s, style), from s = t to 1 in n equal steps

Every layer treats rows alone (GroupNorm, no batch statistics). The Euler steps are modules of their own, without
weights, so that each can be named: a plan may run steps 0 to 4 again in backward and keep the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LATENT_CHANNELS = 4
# A time of [0, 1] spread over as many periods as the sinusoids of a transformer's positions.
_TIME_SCALE = 1000.0
_LONGEST_PERIOD = 10_000.0


class Styled(NamedTuple):
    """What a flow gives: latents (B, 4, H, W) at time 1, and each row's mean squared velocity on the way, (B,)."""

    latents: Tensor
    velocity_energy: Tensor


def _norm(channels: int) -> nn.GroupNorm:
    # 32 groups as in the document from 128 channels on; four channels a group below.
    return nn.GroupNorm(min(32, max(1, channels // 4)), channels)


class ResidualBlock(nn.Module):
    """conv – GroupNorm – SiLU – conv – GroupNorm, added to its input, SiLU; (B, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), _norm(channels), nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1), _norm(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.body(x)
        return F.silu(x + changed)


class StyleBlock(nn.Module):
    """Depthwise 3 x 3 convolution with kernels made from the condition, GroupNorm, SiLU, 1 x 1; added to its input.

    The kernels begin as deltas whatever the condition. (The document's begin as zeros, which hands GroupNorm an input
    without variance: its gradient is then 1/sqrt(eps), 316 times too large, on the first step.)
    """

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.kernels = nn.Linear(condition_dim, channels * 9)
        self.norm = _norm(channels)
        self.mix = nn.Conv2d(channels, channels, 1)
        delta = torch.zeros(channels, 3, 3)
        delta[:, 1, 1] = 1
        with torch.no_grad():
            self.kernels.weight.zero_()
            self.kernels.bias.copy_(delta.flatten())

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: (B, C, H, W); condition: (B, D)."""
        kernels = self.kernels(condition).view(*x.shape[:2], 3, 3)
        return F.silu(x + self.mix(F.silu(self.norm(_depthwise(x, kernels)))))


def _depthwise(x: Tensor, kernels: Tensor) -> Tensor:
    """Each plane of x (B, C, H, W) convolved with its own kernel of (B, C, 3, 3), zeros outside."""
    planes = x.shape[0] * x.shape[1]
    convolved = F.conv2d(x.reshape(1, planes, *x.shape[2:]), kernels.reshape(planes, 1, 3, 3), padding=1, groups=planes)
    return convolved.view(x.shape)


class Condition(nn.Module):
    """Time and style as one vector (B, D): sinusoids through an MLP, an embedding, and both through another MLP."""

    def __init__(self, num_styles: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.time = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.style = nn.Embedding(num_styles, dim)
        self.join = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def style_of(self, style_ids: Tensor, dropped: Tensor | None = None) -> Tensor:
        """The styles' vectors (B, D); where ``dropped`` (B,) is true, the mean of all styles: the unconditional one."""
        chosen: Tensor = self.style(style_ids)
        if dropped is None:
            return chosen
        return torch.where(dropped[:, None], self.style.weight.mean(dim=0), chosen)

    def forward(self, time: Tensor, style: Tensor) -> Tensor:
        """time: (B,) in [0, 1]; style: (B, D) as ``style_of`` gives it."""
        half = self.dim // 2
        exponents = torch.arange(half, device=time.device, dtype=time.dtype) / half
        phases = _TIME_SCALE * time[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) * exponents)
        waves = torch.cat([phases.cos(), phases.sin()], dim=1)
        joined: Tensor = self.join(torch.cat([self.time(waves), style], dim=1))
        return joined


class LGTUNet(nn.Module):
    """The document's velocity network: a U-Net of residual blocks whose decoder is styled; (B, 4, H, W) to the same.

    With ``base_channels=128`` and 2 styles, 20.34 M parameters, the document's. Its last layer begins at zero, so the
    flow begins as the identity.
    """

    def __init__(self, num_styles: int, base_channels: int = 128, latent_channels: int = LATENT_CHANNELS) -> None:
        super().__init__()
        one, two, four = base_channels, 2 * base_channels, 4 * base_channels
        self.condition = Condition(num_styles, two)
        self.enter = nn.Conv2d(latent_channels, one, 3, padding=1)
        self.fine = nn.Sequential(ResidualBlock(one), ResidualBlock(one))
        self.halve = nn.Conv2d(one, two, 3, stride=2, padding=1)
        self.middle = nn.Sequential(ResidualBlock(two), ResidualBlock(two))
        self.quarter = nn.Conv2d(two, four, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(ResidualBlock(four), ResidualBlock(four))
        self.to_middle = nn.ConvTranspose2d(four, two, 4, stride=2, padding=1)
        self.style_middle = nn.ModuleList(StyleBlock(two, two) for _ in range(3))
        self.to_fine = nn.ConvTranspose2d(two, one, 4, stride=2, padding=1)
        self.style_fine = nn.ModuleList(StyleBlock(one, two) for _ in range(3))
        last = nn.Conv2d(one, latent_channels, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.leave = nn.Sequential(_norm(one), nn.SiLU(), last)

    def forward(self, x: Tensor, time: Tensor, style: Tensor) -> Tensor:
        """The velocity at x (B, 4, H, W), time (B,) and style (B, D); H and W are multiples of 4."""
        condition = self.condition(time, style)
        fine = self.fine(self.enter(x))
        middle = self.middle(self.halve(fine))
        x = self.to_middle(self.coarse(self.quarter(middle))) + middle
        for block in self.style_middle:
            x = block(x, condition)
        x = self.to_fine(x) + fine
        for block in self.style_fine:
            x = block(x, condition)
        velocity: Tensor = self.leave(x)
        return velocity


class EulerStep(nn.Module):
    """Step number ``index`` of the integration. It has no weights: the network is handed to it."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(
        self,
        network: Callable[..., Tensor],
        x: Tensor,
        energy: Tensor,
        start: Tensor,
        step_size: Tensor,
        style: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x and the summed mean squared velocity (B,) one step on; start and step_size: (B,)."""
        velocity = network(x, start + self.index * step_size, style)
        # Under autocast the state stays as wide as it came.
        x = x + step_size[:, None, None, None] * velocity
        return x, energy + velocity.float().square().mean(dim=(1, 2, 3)).to(energy.dtype)


class StyleFlow(nn.Module):
    """Latents carried from their own time to 1 by ``ode_steps`` Euler steps of one fixed size a row.

    The step is (1 - t) / n, fixed: the last one ends at time 1. (The document divides what remains by n again at every
    step and ends at 1 - (1 - 1/n)^n of the way, 0.651 for ten steps.)

    ``checkpoint_every``: 0 keeps every activation; k keeps what enters every k-th step and runs the k steps between
    again in backward (torch.utils.checkpoint). ``may_run_again``: whether a plan may let steps run again.
    """

    def __init__(
        self,
        num_styles: int,
        *,
        base_channels: int = 128,
        ode_steps: int = 10,
        checkpoint_every: int = 0,
    ) -> None:
        super().__init__()
        self.network = LGTUNet(num_styles, base_channels)
        self.steps = nn.ModuleList(EulerStep(index) for index in range(ode_steps))
        self.checkpoint_every = checkpoint_every
        self.may_run_again = True

    def forward(
        self,
        x: Tensor,
        start: Tensor,
        style_ids: Tensor,
        dropped: Tensor | None = None,
        network: Callable[..., Tensor] | None = None,
    ) -> Styled:
        """x: (B, 4, H, W) at time start (B,); style_ids (B,) int64; dropped (B,) bool: rows that lose their style.

        ``network``: what gives the velocity in the place of the model's own, such as the same one compiled.
        """
        network = self.network if network is None else network
        style = self.network.condition.style_of(style_ids, dropped)
        step_size = (1 - start) / len(self.steps)
        state = (x, torch.zeros_like(start))
        every = self.checkpoint_every
        for first in range(0, len(self.steps), every or 1):
            steps = self.steps[first : first + (every or 1)]
            if every and torch.is_grad_enabled():
                # Nothing is drawn in a step, so no generator's state need be kept.
                state = checkpoint(
                    self._through, network, steps, *state, start, step_size, style,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                state = self._through(network, steps, *state, start, step_size, style)
        x, energy = state
        return Styled(x, energy / len(self.steps))

    def _through(
        self,
        network: Callable[..., Tensor],
        steps: nn.ModuleList,
        x: Tensor,
        energy: Tensor,
        start: Tensor,
        step_size: Tensor,
        style: Tensor,
    ) -> tuple[Tensor, Tensor]:
        for step in steps:
            # Inside a checkpoint of its own a step is no block that another one may take in: it is not announced.
            run = step if self.may_run_again and not self.checkpoint_every else step.forward
            x, energy = run(network, x, energy, start, step_size, style)
        return x, energy


def make_flow(
    num_styles: int, *, base_channels: int, ode_steps: int, seed: int, dtype: torch.dtype = torch.float32
) -> StyleFlow:
    """A StyleFlow with weights drawn from ``seed``; torch's default generator is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StyleFlow(num_styles, base_channels=base_channels, ode_steps=ode_steps).to(dtype)


def noised(latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Latents (B, 4, H, W) on the straight path from noise (the same shape, time 0) to themselves (time 1)."""
    time = time[:, None, None, None]
    return (1 - time) * noise + time * latents
