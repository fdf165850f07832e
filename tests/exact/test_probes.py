"""A zoo of modules with known truth: what mixes rows or draws is refused by name, the rest is not."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samegrad.errors import CannotSplit

from . import zoo

D = torch.float64


class Applied(nn.Module):
    """A linear layer, then ``function(hidden)``."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(6, zoo.CLASSES, dtype=D)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


class Alone(nn.Module):
    """``function`` alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


HEAD = nn.Linear(8, zoo.CLASSES, dtype=D)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, zoo.CLASSES, dtype=D)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


class Averaging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, zoo.CLASSES, dtype=D)
        self.register_buffer("running", torch.zeros(zoo.CLASSES, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        self.running.mul_(0.9).add_(0.1 * z.detach().mean(0))
        return z


class Listed(nn.Module):
    """Parameters held where a swap cannot reach them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, zoo.CLASSES, dtype=D)
        self.held = [self.inner.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.held[0].T


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(2, 5, batch_first=True, dtype=D)
        self.head = nn.Linear(5, zoo.CLASSES, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.reshape(len(x), 3, 2))[0][:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True, dtype=D)
        self.head = nn.Linear(6, zoo.CLASSES, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x[:, None].expand(-1, 3, -1)).mean(1))


class Images(nn.Module):
    """x (B, 6) seen as (B, 2, 3) signals through a convolution and ``norm``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        # Three positions are left: normalised over two, every signal would be plus and minus one, its gradient nothing.
        self.convolution = nn.Conv1d(2, 4, 1, dtype=D)
        self.norm = norm.to(D)
        self.head = nn.Linear(12, zoo.CLASSES, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.convolution(x.reshape(len(x), 2, 3))).flatten(1))


def _layers(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, zoo.CLASSES)).to(D)


SAFE: dict[str, Callable[[], nn.Module]] = {
    "mlp": zoo.mlp,
    "layer norm": lambda: _layers(nn.LayerNorm(8)),
    "group norm": lambda: Images(nn.GroupNorm(2, 4)),
    "instance norm": lambda: Images(nn.InstanceNorm1d(4)),
    "batch norm in eval mode": lambda: _layers(nn.BatchNorm1d(8)).eval(),
    "dropout in eval mode": lambda: _layers(nn.Dropout(0.5)).eval(),
    "dropout of zero": lambda: _layers(nn.Dropout(0.0)),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, zoo.CLASSES, dtype=D))),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attending,
    "softmax over features": lambda: Applied(lambda z: z.softmax(1)),
    "sort over features": lambda: Applied(lambda z: z.sort(1).values),
    "instance norm with running statistics": lambda: Images(nn.InstanceNorm1d(4, track_running_stats=True)),
    "counter": Counting,
    "moving average": Averaging,
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, zoo.CLASSES, dtype=D))
    ),
    "tied weights": lambda: _tied(),
    "frozen layer": lambda: _frozen(),
}

UNSAFE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: _layers(nn.BatchNorm1d(8)), r"1 \(BatchNorm1d in training mode\)"),
    "batch norm without running statistics in eval mode": (
        lambda: _layers(nn.BatchNorm1d(8, track_running_stats=False)).eval(),
        "BatchNorm1d",
    ),
    "one draw for the batch": (
        lambda: nn.Sequential(nn.Linear(6, 8, dtype=D), Alone(lambda z: z * torch.rand(8, dtype=D)), HEAD),
        r"1 \(Alone\) draws random numbers: torch.rand draws \(8,\): no axis follows the rows",
    ),
    "a permutation of rows": (
        lambda: Applied(lambda z: z[torch.randperm(len(z))]), "the model .* draws random numbers"
    ),
    "numpy noise": (lambda: Applied(lambda z: z + float(np.random.rand())), "generator: numpy"),
    "python noise": (lambda: Applied(lambda z: z + random.random()), "generator: python"),
    "batch mean": (lambda: Applied(lambda z: z - z.mean(0)), "mixes rows"),
    "detached batch statistic": (lambda: Applied(lambda z: z / z.detach().abs().max()), "mixes rows"),
    "softmax over the batch": (lambda: Applied(lambda z: z.softmax(0)), "mixes rows"),
    "similarity to all": (lambda: Applied(lambda z: (z @ z.T).softmax(1) @ z), "mixes rows"),
    "mixup by rolling": (lambda: Applied(lambda z: 0.5 * z + 0.5 * z.roll(1, 0)), "mixes rows"),
    "divided by the batch's length": (lambda: Applied(lambda z: z / len(z)), "how many rows"),
    "position in the batch": (lambda: Applied(lambda z: z + torch.arange(len(z))[:, None]), "position"),
    "parameters in a list": (Listed, "reached past its place"),
    "mean output": (lambda: Applied(lambda z: z.mean(0)), "not one entry a row"),
    "scalar output": (lambda: Applied(lambda z: z.sum()), "not one entry a row"),
}


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, zoo.CLASSES)).to(D)
    model[2].weight = model[0].weight
    return model


def _frozen() -> nn.Module:
    model = zoo.mlp()
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("name", SAFE)
def test_what_treats_rows_alone_is_split_exactly(name: str) -> None:
    torch.manual_seed(0)
    model, rows = SAFE[name](), zoo.batch()
    loss_fn = zoo.LOSSES["mse"][0]
    split, layout = zoo.split_step(model, loss_fn, rows)
    _, reference = zoo.plain_gradients(model, loss_fn, rows)
    trainable = [g for g, p in zip(reference, model.parameters()) if p.requires_grad]
    assert zoo.worst_error(split, rows, layout, [8, 8, 8, 5], trainable) <= 1
    assert zoo.worst_error(split, rows, layout, [1] * zoo.ROWS, trainable) <= 1


@pytest.mark.parametrize("name", UNSAFE)
def test_what_does_not_is_refused_by_name_and_left_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    make, named = UNSAFE[name]
    model, rows = make(), zoo.batch()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    modes = [m.training for m in model.modules()]
    with pytest.raises(CannotSplit, match=named):
        zoo.split_step(model, zoo.LOSSES["rmse"][0], rows)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])
    assert random.getstate() == generators[2]
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("draw", [torch.randn_like, lambda z: float(np.random.rand())], ids=["torch", "numpy"])
def test_a_draw_that_starts_after_the_first_rows_is_refused_before_hand_over(draw: Callable[[Tensor], Tensor]) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, zoo.CLASSES, dtype=D)
            self.noisy = [False]

        def forward(self, x: Tensor) -> Tensor:
            z = self.inner(x)
            return z + draw(z) if self.noisy[0] else z

    model, rows = Late(), zoo.batch()
    split, layout = zoo.split_step(model, zoo.LOSSES["mse"][0], rows)
    model.noisy[0] = True
    before = torch.get_rng_state()
    with pytest.raises(CannotSplit, match="drew random numbers"):
        split.backward(rows, layout, [8, 8, 8, 5])
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_leaf_that_requires_grad_is_refused() -> None:
    rows = zoo.batch()
    rows["x"].requires_grad_()
    with pytest.raises(CannotSplit, match=r"batch\['x'\] carries rows and requires grad"):
        zoo.split_step(zoo.mlp(), zoo.LOSSES["mse"][0], rows)
