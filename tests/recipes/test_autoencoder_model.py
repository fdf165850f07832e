"""The model is the document's, in plain PyTorch, and the default generator is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from samegrad.recipes.autoencoder.data import Principal
from samegrad.recipes.autoencoder.model import (
    Autoencoder,
    PenalisedReconstruction,
    TiedAutoencoder,
    hidden_width,
    orthogonality_penalty,
    reconstruction_loss,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_rows(rows: int = 11, width: int = 30) -> torch.Tensor:
    return torch.randn(rows, width, generator=seeded(1), dtype=torch.float64)


def test_the_model_is_the_documents_stack_of_layers() -> None:
    model = Autoencoder(30, 4, generator=seeded(), dtype=torch.float64)
    hidden = int((30 + 4) / 2)
    plain = nn.Sequential(
        nn.Linear(30, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 4),
        nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 30),
    ).double()  # fmt: skip
    plain.load_state_dict(dict(zip(plain.state_dict(), list(model.parameters()))))
    assert torch.equal(model(some_rows()), plain(some_rows()))


@pytest.mark.parametrize(("latent_dim", "width"), [(12, 1158), (50, 1177)])
def test_hidden_layers_are_halfway_between_row_and_latent(latent_dim: int, width: int) -> None:
    assert hidden_width(2304, latent_dim) == width


@pytest.mark.parametrize("kind", [Autoencoder, TiedAutoencoder])
def test_weights_come_from_the_given_generator_alone(kind: type[Autoencoder] | type[TiedAutoencoder]) -> None:
    before = torch.get_rng_state()
    first, again, other = (kind(30, 4, generator=seeded(seed)).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_layers_start_in_the_range_of_torchs_own() -> None:
    mine, theirs = Autoencoder(900, 100, generator=seeded()).encoder[0], nn.Linear(900, 500)
    for parameter, torchs in zip(mine.state_dict().values(), theirs.state_dict().values()):
        assert float(parameter.abs().max()) == pytest.approx(float(torchs.abs().max()), rel=0.02)
        assert float(parameter.std()) == pytest.approx(float(torchs.std()), rel=0.1)


def test_the_tied_decoder_is_the_encoder_transposed() -> None:
    tied = TiedAutoencoder(30, 4, generator=seeded(), dtype=torch.float64)
    assert all(not bias.any() for bias in (*tied.encoder_biases, *tied.decoder_biases))
    plain = Autoencoder(30, 4, dtype=torch.float64)
    layers = [layer for part in (plain.encoder, plain.decoder) for layer in part if isinstance(layer, nn.Linear)]
    generator = seeded(9)
    with torch.no_grad():
        for bias in (*tied.encoder_biases, *tied.decoder_biases):
            bias.normal_(generator=generator)
        matrices = [*tied.weights, *(weight.t() for weight in reversed(list(tied.weights)))]
        for layer, matrix, bias in zip(layers, matrices, [*tied.encoder_biases, *tied.decoder_biases]):
            layer.weight.copy_(matrix)
            layer.bias.copy_(bias)
    torch.testing.assert_close(tied(some_rows()), plain(some_rows()), rtol=1e-12, atol=1e-12)


def test_the_penalty_is_the_sum_of_frobenius_distances_to_orthonormal_columns() -> None:
    weights = [torch.randn(9, 5, generator=seeded(), dtype=torch.float64), torch.eye(4, 3, dtype=torch.float64)]
    by_hand = sum(np.linalg.norm(w.numpy().T @ w.numpy() - np.eye(w.shape[1])) for w in weights)
    assert float(orthogonality_penalty(weights)) == pytest.approx(by_hand, rel=1e-12)
    assert float(orthogonality_penalty(weights[1:])) == 0


def test_the_tied_loss_is_the_error_plus_the_weighted_penalty() -> None:
    tied = TiedAutoencoder(30, 4, generator=seeded(), dtype=torch.float64)
    rows = some_rows()
    loss = PenalisedReconstruction(tied.weights, 0.3)(tied(rows), rows)
    expected = ((tied(rows) - rows) ** 2).mean() + 0.3 * orthogonality_penalty(list(tied.weights))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert reconstruction_loss(tied(rows), rows) < loss


@pytest.mark.parametrize("kind", [Autoencoder, TiedAutoencoder])
def test_a_model_begun_at_components_is_their_projection(kind: type[Autoencoder] | type[TiedAutoencoder]) -> None:
    basis = torch.linalg.qr(torch.randn(30, 4, generator=seeded(2), dtype=torch.float64))[0]
    principal = Principal(mean_row=torch.linspace(-1, 1, 30, dtype=torch.float64), components=basis.t())
    model = kind(30, 4, generator=seeded(), dtype=torch.float64)
    model.begin_at_components(principal.mean_row, principal.components)
    torch.testing.assert_close(model(some_rows()), principal.reconstruct(some_rows()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Autoencoder, TiedAutoencoder])
def test_units_beyond_the_components_can_learn(kind: type[Autoencoder] | type[TiedAutoencoder]) -> None:
    basis = torch.linalg.qr(torch.randn(30, 4, generator=seeded(2), dtype=torch.float64))[0]
    model = kind(30, 4, generator=seeded(), dtype=torch.float64)
    model.begin_at_components(torch.zeros(30, dtype=torch.float64), basis.t())
    reconstruction_loss(model(some_rows()), some_rows()).backward()
    outgoing = model.weights[2] if isinstance(model, TiedAutoencoder) else model.encoder[4].weight
    assert outgoing.grad is not None and outgoing.grad[:, 8:].abs().max() > 0


def test_too_few_hidden_units_for_the_components_are_refused() -> None:
    with pytest.raises(ValueError, match="take 8 hidden units, the model has 7"):
        Autoencoder(30, 4, hidden=7).begin_at_components(torch.zeros(30), torch.zeros(4, 30))
