"""The document's function, class, snippet and programs: the same numbers, exact."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import samegrad as sg
from samegrad.recipes.autoencoder.documented import (
    History,
    MemoryEfficientAutoencoder,
    train_with_gradient_accumulation,
)
from samegrad.recipes.autoencoder.model import Autoencoder

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
WIDTH = 10

# From the document, "How Gradient Accumulation Works in PyTorch"; sizes and data are the test's.
DOCUMENT_SNIPPET = """
optimizer.zero_grad()  # Clear gradients at start of epoch

for partition in partitions:
    output = model(partition)
    loss = criterion(output, partition)
    loss = loss / num_partitions  # Scale loss
    loss.backward()  # Gradients accumulate in parameter.grad
    # DON'T call optimizer.zero_grad() here!

optimizer.step()  # Update weights using accumulated gradients
"""


def some_rows(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(kind: type[Autoencoder] = Autoencoder) -> Autoencoder:
    return kind(WIDTH, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def run_snippet(rows: torch.Tensor, sizes: list[int]) -> Autoencoder:
    model = fresh()
    names: dict[str, Any] = {
        "model": model,
        "criterion": nn.MSELoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "partitions": rows.split(sizes),
        "num_partitions": len(sizes),
    }
    exec(DOCUMENT_SNIPPET, names)
    return model


def distance(mine: nn.Module, other: nn.Module) -> float:
    return max(float((a - b).abs().max().detach()) for a, b in zip(mine.parameters(), other.parameters()))


def trained(rows: torch.Tensor) -> Autoencoder:
    model = fresh()
    train_with_gradient_accumulation(model, rows, rows, num_epochs=1, learning_rate=0.1, optimizer="sgd")
    return model


def test_the_documents_snippet_and_its_function_agree_on_equal_partitions() -> None:
    rows = some_rows(60)
    assert distance(trained(rows), run_snippet(rows, [10] * 6)) <= 1e-14


def test_on_a_ragged_last_partition_the_function_is_exact_and_the_snippet_is_not() -> None:
    rows = some_rows(65)
    plain = run_snippet(rows, [65])
    assert distance(trained(rows), plain) <= 1e-14
    assert distance(run_snippet(rows, [10] * 5 + [15]), plain) > 1e-6


def test_function_and_method_give_the_same_history_and_weights_bit_for_bit() -> None:
    rows, validation = some_rows(67), some_rows(31, seed=2)
    one, other = fresh(), fresh(MemoryEfficientAutoencoder)
    assert isinstance(other, MemoryEfficientAutoencoder)
    first = train_with_gradient_accumulation(one, rows, validation, num_epochs=6, learning_rate=1e-2)
    second = other.train_with_accumulation(rows, validation, num_epochs=6, learning_rate=1e-2)
    assert first == second and isinstance(first, History) and len(first.train_losses) == 6
    assert distance(one, other) == 0


def test_the_best_weights_are_left_in_the_model_when_the_epochs_run_out() -> None:
    rows, validation = some_rows(67), some_rows(31, seed=2)
    model = fresh()
    history = train_with_gradient_accumulation(model, rows, validation, num_epochs=4, learning_rate=3.0)
    assert history.validation_losses[-1] > min(history.validation_losses) and not history.stopped_early
    kept = float(((model(validation) - validation) ** 2).mean().detach())
    assert kept == pytest.approx(min(history.validation_losses), rel=1e-12)
    assert history.best_epoch == int(np.argmin(history.validation_losses))


def test_data_may_be_arrays_tensors_rows_or_a_path(tmp_path: Path) -> None:
    rows, validation = some_rows(67), some_rows(31, seed=2)
    np.save(tmp_path / "rows.npy", rows.numpy())
    histories = [
        train_with_gradient_accumulation(fresh(), given, validation, num_epochs=2)
        for given in (rows, rows.numpy(), sg.Rows(rows), tmp_path / "rows.npy", str(tmp_path / "rows.npy"))
    ]
    assert all(history == histories[0] for history in histories)


def test_a_budget_alone_decides_the_partitions_and_nothing_else() -> None:
    rows, validation = some_rows(67), some_rows(31, seed=2)
    pinned = train_with_gradient_accumulation(fresh(), rows, validation, num_epochs=3)
    planned = train_with_gradient_accumulation(
        fresh(), rows, validation, num_epochs=3, num_partitions=None, budget="1MiB"
    )
    np.testing.assert_allclose(planned.train_losses, pinned.train_losses, rtol=1e-12)


def test_a_model_with_float16_weights_is_refused() -> None:
    rows = some_rows(20).half()
    with pytest.raises(sg.UsageError, match="float16"):
        train_with_gradient_accumulation(fresh().half(), rows, rows)


class Watched:
    """Rows that remember the largest range asked for."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.shape, self.dtype, self.largest = rows, tuple(rows.shape), rows.dtype, 0

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        self.largest = max(self.largest, stop - start)
        return self.rows[start:stop]


def test_prediction_in_batches_is_the_plain_forward_on_the_host() -> None:
    rows = some_rows(53)
    model = fresh(MemoryEfficientAutoencoder)
    assert isinstance(model, MemoryEfficientAutoencoder)
    watched = Watched(rows)
    predicted = model.predict_in_batches(watched, batch_size=8)
    assert predicted.device.type == "cpu" and not predicted.requires_grad and watched.largest == 8
    torch.testing.assert_close(predicted, model(rows).detach(), rtol=1e-13, atol=1e-14)
    assert torch.equal(predicted, torch.cat([model(part) for part in rows.split(8)]))
    assert torch.equal(model.predict_in_batches(rows, batch_size=100), model(rows))


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_both_programs_of_the_document_write_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--patch_rows", "150", "--latent_dim", "3", "--hidden", "8", "--device", "cpu")
    run_example(
        "train_autoencoder_gradient_accumulation.py", monkeypatch, *small,
        "--num_epochs", "2", "--learning_rate", "1e-2", "--num_partitions", "4", "--output", str(tmp_path / "one"),
    )  # fmt: skip
    run_example(
        "train_autoencoder_native.py", monkeypatch, *small,
        "--epochs", "2", "--lr", "1e-2", "--accumulation_steps", "4", "--output", str(tmp_path / "two"),
    )  # fmt: skip
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("one", "two")
    )
    assert len(one) == 4 and one == two


@pytest.mark.parametrize("name", ["train_autoencoder_gradient_accumulation.py", "train_autoencoder_native.py"])
def test_the_programs_explain_themselves(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_example(name, monkeypatch, "--help")
    assert ended.value.code == 0 and "--patience" in capsys.readouterr().out
