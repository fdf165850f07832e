"""Styling latents with a trained flow: guided Euler-Maruyama steps from the source's noised or inverted latents.

    x <- x + v dt + sigma(t) sqrt(dt) xi        v = v_mean + w (v_style - v_mean)

sigma is 0 before t = 0.5 and ``temperature`` from there on; the guidance w falls in a line from ``guidance`` to 1.
Classifier-free guidance: Ho and Salimans 2021, arXiv:2207.12598. Starting from a noised source: Meng et al. 2021,
arXiv:2108.01073; from an inverted one, the document. Plain PyTorch.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Generator, Tensor

from .model import LGTUNet, noised

_NOISY_FROM = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """``steps`` from ``start_time`` to 1; ``guidance`` 1 and ``temperature`` 0 leave the plain flow."""

    steps: int = 20
    start_time: float = 0.7
    guidance: float = 2.0
    temperature: float = 0.1

    @torch.no_grad()
    def style(self, network: LGTUNet, source: Tensor, style_ids: Tensor, generator: Generator) -> Tensor:
        """Latents (B, 4, H, W) of ``source`` in the styles (B,), begun from the source noised to ``start_time``.

        ``generator`` is on the host, so that every device styles alike.
        """
        noise = _noise(source, generator)
        time = torch.full((len(source),), self.start_time, dtype=source.dtype, device=source.device)
        return self._run(network, noised(source, noise, time), style_ids, self.start_time, generator)

    @torch.no_grad()
    def restyle(
        self, network: LGTUNet, source: Tensor, source_ids: Tensor, style_ids: Tensor, generator: Generator
    ) -> Tensor:
        """The same by the document's way: back to time 0 under the source's own styles (B,), and on from there."""
        x, style = source, network.condition.style_of(source_ids)
        for step in range(self.steps):
            time = torch.full((len(x),), 1 - step / self.steps, dtype=x.dtype, device=x.device)
            x = x - network(x, time, style) / self.steps
        return self._run(network, x, style_ids, 0.0, generator)

    def _run(self, network: LGTUNet, x: Tensor, style_ids: Tensor, start: float, generator: Generator) -> Tensor:
        styled = network.condition.style_of(style_ids)
        unstyled = network.condition.style_of(style_ids, torch.ones_like(style_ids, dtype=torch.bool))
        step_size = (1 - start) / self.steps
        for step in range(self.steps):
            now = start + step * step_size
            time = torch.full((len(x),), now, dtype=x.dtype, device=x.device)
            velocity = network(x, time, styled)
            if self.guidance != 1:
                weight = self.guidance + (1 - self.guidance) * step / self.steps
                mean = network(x, time, unstyled)
                velocity = mean + weight * (velocity - mean)
            x = x + step_size * velocity
            if now >= _NOISY_FROM and self.temperature:
                x = x + self.temperature * math.sqrt(step_size) * _noise(x, generator)
        return x


def _noise(like: Tensor, generator: Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
