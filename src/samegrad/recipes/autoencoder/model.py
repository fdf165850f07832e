"""The autoencoder of the document, in plain PyTorch: nothing here knows that a budget exists.

    D → h → h → L → h → h → D,   h = int((D + L) / 2),   ReLU after the hidden layers, none after L and the output

Axes: B rows, D row width, L latent width, h hidden width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F


def hidden_width(width: int, latent_dim: int) -> int:
    """The document's hidden width: halfway between the row and the latent, rounded down."""
    return int((width + latent_dim) / 2)


class Autoencoder(nn.Module):
    """Rows reconstructed through a latent of ``latent_dim`` numbers.

    ``offset`` (D,) is taken off the rows before the encoder and added to the decoder's output: zeros (the document's
    model) unless ``centre`` stored the mean row there. It travels with the weights and is never trained.
    All weights are drawn from ``generator``; torch's default generator is neither read nor moved.
    """

    offset: Tensor

    def __init__(
        self,
        width: int,
        latent_dim: int,
        *,
        hidden: int | None = None,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.width, self.latent_dim = width, latent_dim
        self.hidden = hidden_width(width, latent_dim) if hidden is None else hidden
        draws = Generator().manual_seed(0) if generator is None else generator
        down = (width, self.hidden, self.hidden, latent_dim)
        self.encoder = _stack(down, draws, dtype)
        self.decoder = _stack(down[::-1], draws, dtype)
        self.register_buffer("offset", torch.zeros(width, dtype=dtype))

    def encode(self, rows: Tensor) -> Tensor:
        """Latents (B, L) of rows (B, D)."""
        return self.encoder(rows - self.offset)  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Rows (B, D) of latents (B, L)."""
        return self.decoder(latents) + self.offset  # type: ignore[no-any-return]

    def forward(self, rows: Tensor) -> Tensor:
        """Reconstructions (B, D) of rows (B, D), on the rows' device, in the weights' dtype."""
        return self.decode(self.encode(rows))

    @torch.no_grad()
    def centre(self, mean_row: Tensor) -> None:
        """Stores the mean row (D,) as ``offset``."""
        self.offset.copy_(mean_row)

    @torch.no_grad()
    def begin_at_components(self, mean_row: Tensor, components: Tensor) -> None:
        """Sets the weights so that the model *is* the projection on ``components`` (L, D) around ``mean_row`` (D,).

        Each coordinate takes two hidden units, since x = relu(x) − relu(−x). The other units keep their random
        weights towards the input and start with none towards the output. Raises ValueError when h < 2 L.
        """
        pairs = _pairs(self.latent_dim, self.hidden).to(components)
        encoder = [layer for layer in self.encoder if isinstance(layer, nn.Linear)]
        decoder = [layer for layer in self.decoder if isinstance(layer, nn.Linear)]
        _pass_through(encoder, enter=pairs @ components, leave=pairs.t())
        _pass_through(decoder, enter=pairs, leave=(pairs @ components).t())
        self.centre(mean_row)


class TiedAutoencoder(nn.Module):
    """The tied variant: the decoder uses the encoder's three matrices transposed, with biases of its own.

    Kaiming-uniform matrices, zero biases. ``orthogonality_penalty`` of ``weights`` belongs to its loss.
    """

    offset: Tensor

    def __init__(
        self,
        width: int,
        latent_dim: int,
        *,
        hidden: int | None = None,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.width, self.latent_dim = width, latent_dim
        self.hidden = hidden_width(width, latent_dim) if hidden is None else hidden
        draws = Generator().manual_seed(0) if generator is None else generator
        down = (width, self.hidden, self.hidden, latent_dim)
        self.weights = nn.ParameterList(
            nn.Parameter(_kaiming_uniform(wide_out, wide_in, draws, dtype, nonlinearity="relu"))
            for wide_in, wide_out in itertools.pairwise(down)
        )
        self.encoder_biases = nn.ParameterList(nn.Parameter(torch.zeros(n, dtype=dtype)) for n in down[1:])
        self.decoder_biases = nn.ParameterList(nn.Parameter(torch.zeros(n, dtype=dtype)) for n in down[-2::-1])
        self.register_buffer("offset", torch.zeros(width, dtype=dtype))

    def encode(self, rows: Tensor) -> Tensor:
        """Latents (B, L) of rows (B, D)."""
        first, second, last = self.weights
        bias_first, bias_second, bias_last = self.encoder_biases
        hidden = F.relu(F.linear(rows - self.offset, first, bias_first))
        return F.linear(F.relu(F.linear(hidden, second, bias_second)), last, bias_last)

    def decode(self, latents: Tensor) -> Tensor:
        """Rows (B, D) of latents (B, L)."""
        first, second, last = self.weights
        bias_first, bias_second, bias_last = self.decoder_biases
        hidden = F.relu(F.linear(latents, last.t(), bias_first))
        hidden = F.relu(F.linear(hidden, second.t(), bias_second))
        return F.linear(hidden, first.t(), bias_last) + self.offset

    def forward(self, rows: Tensor) -> Tensor:
        """Reconstructions (B, D) of rows (B, D), on the rows' device, in the weights' dtype."""
        return self.decode(self.encode(rows))

    @torch.no_grad()
    def centre(self, mean_row: Tensor) -> None:
        """Stores the mean row (D,) as ``offset``."""
        self.offset.copy_(mean_row)

    @torch.no_grad()
    def begin_at_components(self, mean_row: Tensor, components: Tensor) -> None:
        """As ``Autoencoder.begin_at_components``: one set of matrices serves both ways here as well."""
        pairs = _pairs(self.latent_dim, self.hidden).to(components)
        used = len(pairs)
        first, second, last = self.weights
        first[:used] = pairs @ components
        second[:used].zero_()
        second[:, :used].zero_()
        second[:used, :used].fill_diagonal_(1)
        last.zero_()
        last[:, :used] = pairs.t()
        for bias in (*self.encoder_biases, *self.decoder_biases):
            bias.zero_()
        self.centre(mean_row)


def orthogonality_penalty(weights: Sequence[Tensor]) -> Tensor:
    """How far the matrices are from having orthonormal columns, ``Σ_l ‖W_lᵀ W_l − I‖_F``: a scalar, differentiable.

    weights: (out, in) each. A matrix with fewer rows than columns cannot reach zero.
    """
    total = weights[0].new_zeros(())
    for weight in weights:
        gram = weight.t() @ weight
        total = total + torch.linalg.norm(gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device))
    return total


class PenalisedReconstruction(nn.Module):
    """The tied model's loss: ``reconstruction_loss`` plus ``penalty`` times ``orthogonality_penalty``.

    A module, because it owns parameters (the model's own matrices): they are found where modules are looked through.
    """

    def __init__(self, weights: nn.ParameterList, penalty: float) -> None:
        super().__init__()
        self.weights = weights
        self.penalty = penalty

    def forward(self, reconstructed: Tensor, rows: Tensor) -> Tensor:
        """The loss of (B, D) rows: a scalar."""
        return reconstruction_loss(reconstructed, rows) + self.penalty * orthogonality_penalty(list(self.weights))


def reconstruction_loss(reconstructed: Tensor, rows: Tensor) -> Tensor:
    """Mean squared error over all elements of (B, D): the document's loss."""
    return F.mse_loss(reconstructed, rows)


def _pairs(latent_dim: int, hidden: int) -> Tensor:
    """(2 L, L): every coordinate once and once negated."""
    if hidden < 2 * latent_dim:
        raise ValueError(f"{latent_dim} components take {2 * latent_dim} hidden units, the model has {hidden}")
    identity = torch.eye(latent_dim)
    return torch.cat([identity, -identity])


def _pass_through(layers: Sequence[nn.Linear], *, enter: Tensor, leave: Tensor) -> None:
    """Three layers that together are ``leave @ relu(enter @ x)`` on their first hidden units, for enter (2 L, in)."""
    used = len(enter)
    first, second, last = layers
    first.weight[:used] = enter
    second.weight[:used].zero_()
    second.weight[:used, :used].fill_diagonal_(1)
    last.weight.zero_()
    last.weight[:, :used] = leave
    first.bias[:used].zero_()
    second.bias[:used].zero_()
    last.bias.zero_()


def _stack(widths: Sequence[int], generator: Generator, dtype: torch.dtype) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide_in, wide_out in itertools.pairwise(widths):
        layers += [_linear(wide_in, wide_out, generator, dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _linear(wide_in: int, wide_out: int, generator: Generator, dtype: torch.dtype) -> nn.Linear:
    # By way of the meta device: on any other, nn.Linear's constructor draws from the default generator.
    linear = nn.Linear(wide_in, wide_out, device="meta", dtype=dtype).to_empty(device="cpu")
    bound = 1 / math.sqrt(wide_in)
    with torch.no_grad():
        linear.weight.copy_(_kaiming_uniform(wide_out, wide_in, generator, dtype, nonlinearity="linear"))
        linear.bias.uniform_(-bound, bound, generator=generator)
    return linear


def _kaiming_uniform(
    wide_out: int,
    wide_in: int,
    generator: Generator,
    dtype: torch.dtype,
    *,
    nonlinearity: Literal["relu", "linear"],
) -> Tensor:
    """A (out, in) matrix; "linear" is what nn.Linear draws by itself (slope √5), "relu" the wider one."""
    weight = torch.empty(wide_out, wide_in, dtype=dtype)
    slope = 0.0 if nonlinearity == "relu" else math.sqrt(5)
    return nn.init.kaiming_uniform_(weight, a=slope, nonlinearity="leaky_relu", generator=generator)
