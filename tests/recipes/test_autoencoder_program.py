"""The program is full-batch descent in partitions: same losses, exact validation, the best weights kept."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import samegrad as sg
from samegrad.recipes import run_epochs
from samegrad.recipes.autoencoder import pictures
from samegrad.recipes.autoencoder.model import Autoencoder, orthogonality_penalty, reconstruction_loss
from samegrad.recipes.autoencoder.options import PURE_HALF, AutoencoderOptions
from samegrad.recipes.autoencoder.recipe import AutoencoderProgram, build, partition_sizes, table
from samegrad.recipes.autoencoder.results import mean_squared_error, row_errors

WIDTH, ROWS = 12, 202
TRAIN_ROWS = 101  # prime, so that no partition count divides it


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    bent = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    mixing = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64)
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, (1 + torch.tanh(bent @ mixing) + bent.square() @ mixing.abs()).numpy())
    return path


@pytest.fixture
def options(rows_file: Path) -> AutoencoderOptions:
    return AutoencoderOptions(
        data_root=rows_file, latent_dim=2, dtype="float64", optimizer="sgd", learning_rate=0.05, num_epochs=3,
        start="random", device="cpu",
    )  # fmt: skip


def changed(options: AutoencoderOptions, **values: Any) -> AutoencoderOptions:
    return AutoencoderOptions(**{name: getattr(options, name) for name in options.__dataclass_fields__} | values)


def whole(rows: Any) -> torch.Tensor:
    return rows.read(0, len(rows))


def plain_losses(program: AutoencoderProgram, sizes: list[int] | None = None) -> Iterator[float]:
    """Three steps of an ordinary loop: the whole batch, or the document's equally weighted mean over partitions."""
    model = copy.deepcopy(program.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=program.options.learning_rate)
    rows = whole(program.splits.train)
    for _ in range(3):
        optimizer.zero_grad()
        parts = [rows] if sizes is None else rows.split(sizes)
        losses = [reconstruction_loss(model(part), part) / len(parts) for part in parts]
        for loss in losses:
            loss.backward()
        optimizer.step()
        yield sum(loss.item() for loss in losses)


def test_six_ragged_partitions_give_the_losses_of_plain_full_batch_descent(options: AutoencoderOptions) -> None:
    program = build(options)
    assert program.step.sizes_for(program.splits.train) == (17, 17, 17, 17, 17, 16)
    expected = list(plain_losses(program))
    found = [result.loss for result in run_epochs(program)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_the_documents_equal_weights_would_be_caught(options: AutoencoderOptions) -> None:
    program = build(options)
    # its partitions: a sixth each, and the rest with the last
    documents = list(plain_losses(program, [16, 16, 16, 16, 16, 21]))
    assert np.abs(np.array(documents) - list(plain_losses(program))).max() > 1e-6


def budget_for(options: AutoencoderOptions, rows: int) -> str:
    """Bytes that are predicted to suffice for ``rows`` at a time and not for all."""
    program = build(options)
    footprint = sg.measure_step(program.step, program.splits.train)
    needed_bytes = footprint.predicted_peak_bytes(rows=rows)
    assert 1.05 * needed_bytes < footprint.predicted_peak_bytes(rows=TRAIN_ROWS)
    return f"{int(1.05 * needed_bytes)}B"


def test_a_budget_gives_the_losses_of_plain_full_batch_descent(options: AutoencoderOptions) -> None:
    program = build(changed(options, budget=budget_for(options, rows=20)))
    assert len(program.step.sizes_for(program.splits.train)) > 1
    expected = list(plain_losses(program))
    np.testing.assert_allclose([r.loss for r in run_epochs(program)], expected, rtol=0, atol=1e-12)


def test_the_plan_is_verified_against_the_plain_step(options: AutoencoderOptions) -> None:
    program = build(options)
    assert sg.verify_step(program.step, program.splits.train).same


def test_the_tied_objective_counts_its_penalty_once(options: AutoencoderOptions) -> None:
    program = build(changed(options, tied=True, weight_penalty=0.1))
    rows = whole(program.splits.train)
    model = copy.deepcopy(program.model)
    expected = reconstruction_loss(model(rows), rows) + 0.1 * orthogonality_penalty(list(model.weights))
    expected.backward()
    loss = program.step.backward(program.splits.train)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    for mine, plain in zip(program.model.parameters(), model.parameters()):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("rows", "partitions"), [(101, 6), (7, 7), (12, 1), (5, 4)])
def test_partitions_are_even_complete_and_never_empty(rows: int, partitions: int) -> None:
    sizes = partition_sizes(rows, partitions)
    assert len(sizes) == partitions and sum(sizes) == rows and 1 <= min(sizes) >= max(sizes) - 1


def test_more_partitions_than_rows_are_refused_by_the_options_name() -> None:
    with pytest.raises(sg.UsageError, match="--num_partitions 6") as refused:
        partition_sizes(5, 6)
    assert refused.value.option == "num_partitions"


def test_an_epochs_batch_is_all_training_rows_in_the_epochs_own_order(options: AutoencoderOptions) -> None:
    program = build(options)
    (first,), (again,), (other,) = (list(program.batches(epoch)) for epoch in (0, 0, 1))
    assert torch.equal(whole(first), whole(again)) and not torch.equal(whole(first), whole(other))
    in_order = whole(program.splits.train)
    assert torch.equal(whole(first).sort(dim=0).values, in_order.sort(dim=0).values)


def test_train_validation_and_test_are_disjoint_and_complete(options: AutoencoderOptions) -> None:
    splits = build(options).splits
    parts = [whole(part) for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in parts] == [101, 40, 61]
    assert len(torch.unique(torch.cat(parts), dim=0)) == ROWS


def test_validation_over_ragged_partitions_is_the_plain_mean(options: AutoencoderOptions) -> None:
    program = build(options)
    rows = whole(program.splits.validation)
    plain = float(((program.model(rows) - rows) ** 2).mean().detach())
    assert len(rows) % program.partition_rows
    assert program.validate() == pytest.approx(plain, rel=1e-13)


def test_a_mean_of_partition_means_would_be_caught(options: AutoencoderOptions) -> None:
    program = build(options)
    rows = whole(program.splits.validation)
    errors = row_errors(program.reconstruct, program.splits.validation, program.partition_rows)
    of_means = float(torch.stack([part.mean() for part in errors.split(program.partition_rows)]).mean())
    plain = float(((program.model(rows) - rows) ** 2).mean().detach())
    assert of_means != pytest.approx(plain, rel=1e-6)


class Scripted(AutoencoderProgram):
    """The program with validation values written down beforehand; remembers the weights behind each."""

    def __init__(self, program: AutoencoderProgram, values: list[float]) -> None:
        super().__init__(**{field.name: getattr(program, field.name) for field in dataclasses.fields(program)})
        self.values, self.seen = values, []

    def validate(self) -> float:
        self.seen.append(copy.deepcopy(self.model.state_dict()))
        return self.values[len(self.seen) - 1]


def same_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("values", "epochs_run", "best"),
    [
        ([3.0, 2.0, 5.0, 4.0], 4, 1),
        ([3.0, 2.0, 5.0, 6.0, 7.0, 1.0], 5, 1),
        ([3.0, math.nan, 2.0, math.nan, math.inf], 5, 2),
    ],
    ids=["the epochs run out", "early stopping fires", "not-a-number is never the best"],
)
def test_the_best_weights_are_back_when(
    options: AutoencoderOptions, values: list[float], epochs_run: int, best: int
) -> None:
    program = Scripted(build(changed(options, num_epochs=len(values), patience=3)), values)
    results = list(run_epochs(program))
    assert len(results) == epochs_run and program.best.best_index == best
    assert results[-1].stopped == (epochs_run < len(values))
    assert [r.improved for r in results][best] and not any(r.improved for r in results[best + 1 :])
    assert same_weights(program.model, program.seen[best])
    assert not same_weights(program.model, program.seen[-1])


def test_a_validation_that_is_never_finite_stops_and_keeps_the_last_weights(options: AutoencoderOptions) -> None:
    program = Scripted(build(changed(options, num_epochs=9, patience=2)), [math.nan] * 9)
    assert len(list(run_epochs(program))) == 2
    assert same_weights(program.model, program.seen[-1])


def test_leaving_the_loop_keeps_the_weights_where_training_stands(options: AutoencoderOptions) -> None:
    program = Scripted(build(options), [1.0, 2.0, 3.0])
    for result in run_epochs(program):
        if result.epoch == 1:
            break
    assert same_weights(program.model, program.seen[1])


@pytest.mark.parametrize("start", ["random", "centred", "principal"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(options: AutoencoderOptions, start: str) -> None:
    wanted = changed(options, optimizer="adam", num_epochs=5, start=start, learning_rate=1e-3)
    straight = build(wanted)
    losses = [result.loss for result in run_epochs(straight)]
    first = build(wanted)
    for result in run_epochs(first):
        if result.epoch == 1:
            break
    state = json.loads(json.dumps(first.state()))
    second = build(wanted)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_state(state, first.best.weights())
    rest = list(run_epochs(second))
    assert [result.epoch for result in rest] == [2, 3, 4]
    assert [step.index for result in rest for step in result.steps] == [2, 3, 4]
    assert [result.loss for result in rest] == losses[2:]
    assert same_weights(second.model, straight.model.state_dict())


def test_the_principal_start_is_the_pca_of_the_training_rows(options: AutoencoderOptions) -> None:
    program = build(changed(options, start="principal"))
    program.start()
    metrics = program.evaluate()
    assert metrics["test_mse"] == pytest.approx(metrics["pca_test_mse"], rel=1e-9)


def test_from_the_principal_start_nothing_worse_than_the_pca_is_kept(options: AutoencoderOptions) -> None:
    program = build(changed(options, start="principal", optimizer="adam", learning_rate=0.5))
    results = list(run_epochs(program))
    components = program.principal.reconstruct(whole(program.splits.validation))
    pca = float(((components - whole(program.splits.validation)) ** 2).mean())
    assert all(result.validation > pca for result in results)
    assert program.validate() == pytest.approx(pca, rel=1e-9)


def test_metrics_are_the_mean_and_spread_of_the_test_rows_errors(options: AutoencoderOptions) -> None:
    program = build(options)
    rows = whole(program.splits.test)
    errors = ((program.model(rows) - rows) ** 2).mean(dim=1).detach().numpy()
    metrics = program.evaluate()
    assert metrics["test_mse"] == pytest.approx(errors.mean(), rel=1e-12)
    assert metrics["test_mse_std"] == pytest.approx(errors.std(), rel=1e-12)
    assert metrics["test_rows"] == len(rows)


def test_pinned_partitions_hold_within_a_budget(options: AutoencoderOptions) -> None:
    program = build(changed(options, budget="1MiB", num_partitions=4))
    assert program.step.sizes_for(program.splits.train) == (26, 25, 25, 25)


def test_pinned_partitions_that_cannot_fit_are_refused_by_name(options: AutoencoderOptions) -> None:
    with pytest.raises(sg.BudgetTooSmall, match="--num_partitions 1 within") as refused:
        build(changed(options, budget=budget_for(options, rows=20), num_partitions=1))
    assert refused.value.option == "num_partitions"


def test_both_names_for_partitions_must_agree() -> None:
    with pytest.raises(sg.UsageError, match="both mean"):
        AutoencoderOptions(num_partitions=6, accumulation_steps=4)
    assert AutoencoderOptions(accumulation_steps=4).pinned_partitions == 4
    assert AutoencoderOptions(num_partitions=4, accumulation_steps=4).pinned_partitions == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_epochs", 0), ("learning_rate", math.nan), ("train_fraction", 1.0), ("hidden", 0), ("weight_penalty", 0.1)],
)
def test_a_wrong_value_is_refused_by_its_options_name(name: str, value: float) -> None:
    with pytest.raises(sg.UsageError) as refused:
        AutoencoderOptions(**{name: value})
    assert refused.value.option == name


@pytest.mark.parametrize("dtype", PURE_HALF)
def test_float16_weights_are_refused_with_the_reason(dtype: str) -> None:
    with pytest.raises(sg.UsageError, match=r"1e-8 is 0 there.*overflow above 65504"):
        AutoencoderOptions(dtype=dtype)


def test_the_reason_given_against_float16_weights_is_true() -> None:
    assert torch.tensor(1e-8, dtype=torch.float16) == 0
    assert float(torch.tensor(6e-8, dtype=torch.float16)) > 0
    assert torch.finfo(torch.float16).max == 65504
    assert torch.tensor(256.0, dtype=torch.float16).square().isinf()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_formats_train_float32_weights_under_autocast(options: AutoencoderOptions, dtype: str) -> None:
    narrow = build(changed(options, dtype=dtype, num_epochs=12))
    full = build(changed(options, dtype="float32", num_epochs=12))
    assert {p.dtype for p in narrow.model.parameters()} == {torch.float32}
    assert (narrow.scaler is not None) == (dtype == "float16")
    found, expected = ([r.loss for r in run_epochs(program)] for program in (narrow, full))
    assert found != expected
    np.testing.assert_allclose(found, expected, rtol=0.02)
    assert found[-1] < found[0]


def test_the_tables_rows_are_the_documents_partitions(options: AutoencoderOptions) -> None:
    lines = table(options)
    assert [line["partitions"] for line in lines] == [1, 2, 3, 6, 12]
    peaks = [line["predicted_peak_bytes"] for line in lines[1:]]
    assert peaks == sorted(peaks, reverse=True)
    assert [line["document_times_smaller"] for line in lines] == [1.0, None, None, 6.0, None]


def test_written_weights_are_the_models_in_both_formats(options: AutoencoderOptions, tmp_path: Path) -> None:
    program = build(options)
    files = {path.name: path for path in program.write(tmp_path)}
    assert same_weights(program.model, torch.load(files["autoencoder.pt"], weights_only=True))
    assert same_weights(program.model, safetensors.torch.load_file(files["autoencoder.safetensors"]))
    # rows of 12 numbers are no square picture
    assert "reconstructions.png" not in files


def test_the_histogram_file_is_a_png_of_fifty_bins_over_the_rows_errors(
    options: AutoencoderOptions, tmp_path: Path
) -> None:
    program = build(options)
    errors = row_errors(program.reconstruct, program.splits.test, 7).numpy()
    figure = pictures.draw_histogram(errors, pca_mse=0.1)
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    np.testing.assert_array_equal(heights, np.histogram(errors, bins=50)[0])
    (path,) = (p for p in program.write(tmp_path) if p.name == "reconstruction_error_histogram.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as picture:
        assert picture.width > picture.height > 200


def test_sample_reconstructions_stand_under_their_rows() -> None:
    originals = np.random.default_rng(0).random((3, 16))
    figure = pictures.draw_reconstructions(originals, originals / 2)
    shown = [axes.images[0].get_array() for axes in figure.axes]
    np.testing.assert_array_equal(shown[1], originals[1].reshape(4, 4))
    np.testing.assert_array_equal(shown[4], originals[1].reshape(4, 4) / 2)


def test_patches_train_verify_and_write_all_four_files(tmp_path: Path) -> None:
    program = build(AutoencoderOptions(patch_rows=120, latent_dim=4, hidden=16, num_epochs=2, device="cpu"))
    assert [result.epoch for result in run_epochs(program)] == [0, 1]
    names = {path.name for path in program.write(tmp_path)}
    assert names == {
        "autoencoder.pt", "autoencoder.safetensors", "reconstruction_error_histogram.png", "reconstructions.png"
    }  # fmt: skip


def test_the_real_data_sets_layout_is_read_by_its_layer(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    for part in (1, 2):
        columns = {
            "prompt": [f"prompt {number}" for number in range(20)],
            "activation_layer_6": [[0.0] * 6] * 20,
            "activation_layer_18": rows[20 * part - 20 : 20 * part].tolist(),
        }
        parquet.write_table(pyarrow.table(columns), tmp_path / f"activations_part_0{part}_of_10.parquet")
    wanted = AutoencoderOptions(data_root=tmp_path, latent_dim=1, start="random", device="cpu")
    splits = build(wanted).splits
    read = torch.cat([whole(part) for part in (splits.train, splits.validation, splits.test)])
    assert torch.equal(read.sort(dim=0).values, rows.sort(dim=0).values)
    with pytest.raises(sg.BadInput, match="activation_layer_7"):
        build(changed(wanted, layer_for_activation=7))


def test_too_few_rows_for_three_parts_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((2, 4), dtype=np.float32))
    with pytest.raises(sg.BadInput, match="each of the three parts"):
        build(AutoencoderOptions(data_root=tmp_path / "rows.npy"))


def test_a_mean_over_rows_does_not_depend_on_the_partition(options: AutoencoderOptions) -> None:
    program = build(options)
    values = [mean_squared_error(program.reconstruct, program.splits.test, rows) for rows in (1, 7, 61)]
    np.testing.assert_allclose(values, values[0], rtol=1e-13)


def test_the_default_model_is_the_documents_unless_told_otherwise(options: AutoencoderOptions) -> None:
    model = build(options).model
    assert type(model) is Autoencoder and model.hidden == int((WIDTH + 2) / 2)
