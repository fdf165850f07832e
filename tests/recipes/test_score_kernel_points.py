"""Points: toy distributions, digits, CIFAR-10 in both layouts; centers, training and test points share none."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import samegrad as sg
from samegrad.recipes.score_kernel import data, toys
from samegrad.recipes.score_kernel.options import ScoreKernelOptions
from samegrad.recipes.score_kernel.splits import open_points


def options(**values: Any) -> ScoreKernelOptions:
    small = {"train_kernel_size": 6, "train_samples_size": 11, "test_samples_size": 2, "dtype": "float64"}
    return ScoreKernelOptions(**(small | values))


@pytest.mark.parametrize("name", toys.TOYS)
def test_every_toy_is_drawn_for_a_seed_and_stays_near(name: str) -> None:
    drawn = toys.draw_toy(name, 500, seed=1)
    assert drawn.shape == (500, 6 if name == "swissroll_6D_xy1" else 2)
    assert np.array_equal(drawn, toys.draw_toy(name, 500, seed=1))
    assert not np.array_equal(drawn, toys.draw_toy(name, 500, seed=2))
    assert 0.2 < drawn.std() < 3 and np.abs(drawn).max() < 8


def test_the_true_score_of_eight_gaussians_is_the_gradient_of_their_log_density() -> None:
    means = torch.from_numpy(toys.gaussian_means())
    x = torch.from_numpy(toys.draw_toy("8gaussians", 7, seed=0)).requires_grad_()
    away = x[:, None] - means
    density = (-away.square().sum(-1) / (2 * toys.GAUSSIAN_DEVIATION**2)).logsumexp(1)
    (score,) = torch.autograd.grad(density.sum(), x)
    np.testing.assert_allclose(toys.eight_gaussians_score(x.detach().numpy()), score, rtol=1e-12, atol=1e-12)


def test_the_optimum_is_minus_the_mean_square_of_the_true_score() -> None:
    drawn = toys.draw_toy("8gaussians", 100_000, seed=0)
    of_score = -(toys.eight_gaussians_score(drawn) ** 2).sum(1).mean()
    assert toys.eight_gaussians_optimum(drawn) == pytest.approx(of_score, rel=0.02)


@pytest.mark.parametrize("name", ["digits", "8gaussians"])
def test_centers_training_validation_and_test_points_share_none(name: str) -> None:
    found = open_points(options(data=name, noise=0.0))
    parts = (found.centers, found.train, found.validation, found.test)
    assert [len(part) for part in parts] == [6, 11, 10, 20]
    everything = torch.cat(parts)
    assert len(everything.unique(dim=0)) == len(everything)
    assert torch.equal(open_points(options(data=name, noise=0.0)).train, found.train)


def test_left_out_centers_are_the_first_training_samples() -> None:
    found = open_points(options(centers="leave_one_out"))
    assert torch.equal(found.centers, found.train[:6])


def test_centers_that_are_training_samples_are_refused_otherwise(tmp_path: Path) -> None:
    found = open_points(options())
    torch.save(found.train[:3], tmp_path / "centers.pt")
    with pytest.raises(sg.BadInput, match="no lower bound"):
        open_points(options(load_centers_path=tmp_path / "centers.pt"))


def test_more_points_than_there_are_are_refused() -> None:
    with pytest.raises(sg.UsageError, match="has 1797 points"):
        open_points(options(train_samples_size=1797))


def python_batch(path: Path, rows: int) -> np.ndarray[Any, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, size=(rows, 3072), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({b"data": pixels, b"labels": [0] * rows, b"batch_label": b"one"}, protocol=2))
    return pixels


def test_both_layouts_of_cifar_are_the_same_points(tmp_path: Path) -> None:
    pixels = python_batch(tmp_path / "py" / "cifar-10-batches-py" / "data_batch_1", 12)
    labelled = np.concatenate([np.zeros((12, 1), dtype=np.uint8), pixels], axis=1)
    (tmp_path / "bin").mkdir()
    labelled.tofile(tmp_path / "bin" / "data_batch_1.bin")
    found = [data.read_cifar10(tmp_path / layout) for layout in ("py", "bin")]
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].shape == (12, 3072)
    channels = found[0].reshape(12, 3, 1024)
    np.testing.assert_allclose(channels.mean((0, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(channels.std((0, 2)), 1, rtol=1e-12)


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (pickle.dumps({b"data": Harmful()}), "which no batch of CIFAR-10 needs"),
        (b"no pickle", "not a batch"),
        (pickle.dumps({b"data": np.zeros((2, 3), dtype=np.uint8)}), "data of shape"),
    ],
)
def test_what_is_no_batch_is_refused_and_not_run(
    tmp_path: Path, content: bytes, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(sg.BadInput, match=found):
        open_points(options(data="cifar10", data_root=tmp_path))
    assert not (tmp_path / "harm").exists()


def test_a_binary_file_of_another_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(b"x" * 100)
    with pytest.raises(sg.BadInput, match="no whole number of pictures"):
        open_points(options(data="cifar10", data_root=tmp_path))


def test_an_empty_folder_is_answered_with_the_layout(tmp_path: Path) -> None:
    with pytest.raises(sg.BadInput, match=r"data_batch_1 .* digits"):
        open_points(options(data="cifar10", data_root=tmp_path))


def test_cifar_without_a_folder_is_answered_with_the_layout_and_the_offline_default() -> None:
    with pytest.raises(sg.UsageError, match=r"cifar-10-batches-py.* --data digits"):
        options(data="cifar10")


@pytest.mark.parametrize(
    "values",
    [
        {"niters": 0}, {"lr": 0.0}, {"stability": 0.0}, {"noise": -1.0}, {"dtype": "float16"}, {"chunk_size": -1},
        {"chunk_size": 3, "accumulation_steps": 2}, {"accumulation_steps": 7}, {"weight_decay": -1.0},
        {"strategy": "single_gpu", "chunk_size": 3}, {"strategy": "chunked", "devices": ("cpu",)},
        {"train_samples_size": 0}, {"data": "moons", "data_root": Path("somewhere")}, {"data_root": Path("somewhere")},
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(sg.UsageError) as refused:
        options(**values)
    assert refused.value.option in values


def test_data_that_is_drawn_or_shipped_is_read_from_no_folder() -> None:
    with pytest.raises(sg.UsageError, match="moons is drawn") as refused:
        options(data="moons", data_root=Path("somewhere"))
    assert refused.value.option == "data_root"


def test_devices_are_told_as_they_are_given() -> None:
    with pytest.raises(sg.UsageError, match="--devices cuda:0 cuda:1\n"):
        options(strategy="chunked", devices=("cuda:0", "cuda:1"))
