"""Models that draw: every split makes the draws of the unsplit step, and one number is taken from the generator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact import step_draws
from samegrad.exact.randomness import keyed

from . import zoo

D = torch.float64


class Noisy(nn.Module):
    """Dropout, noise and a second dropout, so that one lucky order of draws does not pass for all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 15, dtype=D), nn.Linear(15, zoo.CLASSES, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        z = F.dropout(self.first(x).tanh(), 0.3, self.training)
        return F.dropout(self.second(z + 0.1 * torch.randn_like(z)), 0.2, self.training)


class Attending(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.2, batch_first=batch_first, dtype=D)
        self.head = nn.Linear(6, zoo.CLASSES, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, None].expand(-1, 5, -1) if self.batch_first else x[None].expand(5, -1, -1)
        return self.head(self.layer(tokens).mean(1 if self.batch_first else 0))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, 5, 2, dropout=0.3, batch_first=True, dtype=D)
        self.head = nn.Linear(5, zoo.CLASSES, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.reshape(len(x), 3, 2))[0][:, -1])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dropout and noise": Noisy,
    "transformer layer": lambda: Attending(True),
    "transformer layer, time first": lambda: Attending(False),
    "lstm": Recurrent,
    "gumbel": lambda: nn.Sequential(nn.Linear(6, zoo.CLASSES, dtype=D), Gumbel()),
}


class Gumbel(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return F.gumbel_softmax(z, dim=1)


def gradients(model: nn.Module, loss: str, batch: Any, **how: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients and loss of a step from one seed, and the generator's state after it."""
    model = copy.deepcopy(model)
    step = sg.Step(model, zoo.LOSSES[loss][0], forward=zoo.forward, **how)
    torch.manual_seed(7)
    value = step.backward(batch)
    return [p.grad for p in model.parameters() if p.grad is not None], value, torch.get_rng_state()


@pytest.mark.parametrize("loss", ["mse", "rmse"])
@pytest.mark.parametrize("name", MODELS)
def test_every_split_makes_the_draws_of_the_whole_step(name: str, loss: str) -> None:
    torch.manual_seed(0)
    model, rows = MODELS[name](), zoo.batch()
    whole, value, state = gradients(model, loss, rows, rows=zoo.ROWS)
    for sizes in ([8, 8, 13], [1, 27, 1]):
        split, mine, after = gradients(model, loss, rows, rows=sizes)
        assert torch.equal(after, state)
        torch.testing.assert_close(mine, value, rtol=1e-13, atol=0)
        for a, b in zip(split, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_one_number_is_taken_from_the_generator_a_step_and_none_where_nothing_is_drawn() -> None:
    rows = zoo.batch()
    for sizes in ([8, 8, 13], [zoo.ROWS]):
        _, _, after = gradients(Noisy(), "mse", rows, rows=sizes)
        torch.manual_seed(7)
        torch.empty((), dtype=torch.int64).random_()
        assert torch.equal(after, torch.get_rng_state())
        _, _, after = gradients(zoo.mlp(), "mse", rows, rows=sizes)
        torch.manual_seed(7)
        assert torch.equal(after, torch.get_rng_state())


def test_the_next_step_draws_anew() -> None:
    model, rows = Noisy(), zoo.batch()
    step = sg.Step(model, zoo.LOSSES["mse"][0], forward=zoo.forward, rows=8)
    assert step.backward(rows) != step.backward(rows)


def test_a_step_that_draws_nothing_is_the_plain_call_bit_for_bit() -> None:
    model, rows = zoo.mlp(), zoo.batch()
    plain_loss, plain = zoo.plain_gradients(model, zoo.LOSSES["mse"][0], rows)
    whole, value, _ = gradients(model, "mse", rows, rows=zoo.ROWS)
    assert torch.equal(value, plain_loss) and all(torch.equal(a, b) for a, b in zip(whole, plain))


@pytest.mark.parametrize("planted", ["every chunk counts its rows from zero", "backward draws anew"])
def test_the_usual_mistakes_are_seen(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, rows = Noisy(), zoo.batch()
    runs: Iterator[int] = iter(range(1000))

    def wrong(key: Any, ids: Tensor, **rest: Any) -> Any:
        if planted == "every chunk counts its rows from zero":
            return keyed(key, torch.arange(len(ids)), **rest)
        return keyed(torch.tensor(next(runs)), ids, **rest)

    for loss in ("mse", "rmse"):
        mine = copy.deepcopy(model)
        step = sg.Step(mine, zoo.LOSSES[loss][0], forward=zoo.forward, rows=8)
        # Examined before the fault, since the experiments would see it and refuse.
        step.prepare(rows)
        torch.manual_seed(7)
        with monkeypatch.context() as patch:
            patch.setattr(step_draws, "keyed", wrong)
            if (planted, loss) == ("backward draws anew", "rmse"):
                with pytest.raises(sg.SamegradError, match="not the same function twice"):
                    step.backward(rows)
                continue
            step.backward(rows)
        whole, _, _ = gradients(model, loss, rows, rows=zoo.ROWS)
        assert max((p.grad - g).abs().max() for p, g in zip(mine.parameters(), whole)) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_rowwise_draws_in_chunks_and_in_backward_what_the_whole_call_draws(name: str) -> None:
    torch.manual_seed(0)
    found = []
    model, rows = MODELS[name](), zoo.batch()
    for at_a_time in (zoo.ROWS, 8):
        torch.manual_seed(7)
        loss = zoo.LOSSES["info nce"][0](sg.rowwise(model, rows=at_a_time)(rows["x"]), rows)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
