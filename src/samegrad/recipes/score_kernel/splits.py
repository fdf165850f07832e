"""Which points are centers, and which are trained, stopped and judged on.

**Disjoint.** No two of them share a point: a sample that is a center makes the loss unbounded below, since its own
kernel may become as narrow as it likes. ``--centers leave_one_out`` takes the first training samples instead, each
without weight at itself.

**Noise.** Pixels take few values, and some of them only one; such points have no density, and Gaussian noise of a small
deviation gives them one. Validation and test points have theirs once; training samples get new noise in every batch
(``noised``), and centers none: the kernels are as wide as the noise at least.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe import INSTALL
from samegrad.recipes._recipe.precision import weight_dtype
from samegrad.recipes._recipe.tensor_files import read_tensors

from . import data
from .options import TEST_BATCHES, VALIDATION_BATCHES, ScoreKernelOptions
from .toys import TOYS, draw_toy


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointSets:
    """Points (N, D), and what they are in words. ``image_shape``: how a point is looked at, where it is a picture."""

    centers: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    described: str
    image_shape: tuple[int, ...] | None = None

    @property
    def dim(self) -> int:
        return self.centers.shape[1]


def open_points(options: ScoreKernelOptions) -> PointSets:
    """The points that ``options`` ask for, a function of its seed. Raises BadInput, UsageError, EnvironmentProblem."""
    centers = None if options.load_centers_path is None else _read_centers(options.load_centers_path)
    own_centers = options.centers == "disjoint" and centers is None
    counts = [
        options.train_kernel_size if own_centers else 0,
        options.training_samples,
        VALIDATION_BATCHES * options.test_samples_size,
        TEST_BATCHES * options.test_samples_size,
    ]
    points, image_shape, described = _read(options, sum(counts))
    if sum(counts) > len(points):
        raise sg.UsageError(
            asked=f"{counts[0]} centers, {counts[1]} training, {counts[2]} validation and {counts[3]} test samples",
            found=f"--data {options.data} has {len(points)} points, and none may be used twice",
            do="lower --train_samples_size, --train_kernel_size or --test_samples_size",
            option="train_samples_size",
        )
    draws = np.random.default_rng(options.random_seed)
    chosen = points[draws.permutation(len(points))[: sum(counts)]]
    dtype = weight_dtype(options.dtype)
    if options.noise_deviation:
        described += f", with noise of deviation {options.noise_deviation:g}"
    noise = torch.from_numpy(options.noise_deviation * draws.standard_normal(chosen.shape)).to(dtype)
    fresh, train, validation, test = torch.split(torch.from_numpy(chosen).to(dtype), counts)
    _, _, of_validation, of_test = torch.split(noise, counts)
    if centers is None:
        centers = fresh if own_centers else _first(train, options)
    centers = _checked(centers.to(dtype), train, options)
    options.check_centers(len(centers))
    return PointSets(
        centers=centers, train=train, validation=validation + of_validation,
        test=test + of_test,
        described=described, image_shape=image_shape,
    )  # fmt: skip


def noised(samples: Tensor, deviation: float, draws: np.random.Generator) -> Tensor:
    """``samples`` (B, D) with noise of ``draws``; themselves where it is 0."""
    if not deviation:
        return samples
    noise = torch.from_numpy(deviation * draws.standard_normal(tuple(samples.shape)))
    return samples + noise.to(samples)


def _read(options: ScoreKernelOptions, wanted: int) -> tuple[Any, tuple[int, ...] | None, str]:
    """All points there are (as many as wanted of what is endless), how they are looked at, and what they are."""
    try:
        if options.data == "digits":
            return data.read_digits(), (data.DIGIT_SIDE, data.DIGIT_SIDE), "scikit-learn's digits, pixels in [-1, 1]"
        if options.data in TOYS:
            return draw_toy(options.data, wanted, seed=options.random_seed), None, f"{options.data}, drawn"
        assert options.data_root is not None
        told = f"CIFAR-10 in {options.data_root}, standardised per channel"
        return data.read_cifar10(options.data_root), data.CIFAR_SHAPE, told
    except ModuleNotFoundError as error:
        raise sg.EnvironmentProblem(asked=f"--data {options.data}", found=str(error), do=INSTALL) from None
    except (FileNotFoundError, ValueError) as error:
        raise sg.BadInput(
            asked=f"--data {options.data} --data_root {options.data_root}",
            found=str(error),
            do=f"give a folder with {data.CIFAR_LAYOUT}, or take --data digits, which is shipped",
            file=str(options.data_root),
        ) from None


def _first(train: Tensor, options: ScoreKernelOptions) -> Tensor:
    if options.train_kernel_size > len(train):
        raise sg.UsageError(
            asked=f"--centers leave_one_out with {options.train_kernel_size} centers",
            found=f"they are training samples, of which there are {len(train)}",
            do="lower --train_kernel_size or raise --train_samples_size",
            option="train_kernel_size",
        )
    return train[: options.train_kernel_size]


def _checked(centers: Tensor, train: Tensor, options: ScoreKernelOptions) -> Tensor:
    """``centers`` of the samples' width, none of which is a sample unless it is left out there."""
    if centers.dim() != 2 or centers.shape[1] != train.shape[1] or len(centers) == 0:
        raise sg.BadInput(
            asked=f"centers for --data {options.data} in {options.load_centers_path}",
            found=f"a tensor of shape {tuple(centers.shape)}; the samples have {train.shape[1]} numbers",
            do="give centers (K, D) of the same data set",
            file=str(options.load_centers_path),
        )
    # The products that cdist may take instead of differences leave a rest where there is none.
    apart = torch.cdist(train, centers, compute_mode="donot_use_mm_for_euclid_dist")
    if options.centers == "disjoint" and bool((apart == 0).any()):
        raise sg.BadInput(
            asked="centers that are none of the training samples",
            found="some are, and there the loss has no lower bound",
            do="give --centers leave_one_out, or another --random_seed",
            file=str(options.load_centers_path),
        )
    return centers


def _read_centers(path: Path) -> Tensor:
    """The one tensor in a ``.pt`` or ``.safetensors`` file, called centers. Raises BadInput."""
    found = read_tensors(path, what="centers")
    if set(found) != {"centers"}:
        raise sg.BadInput(
            asked=f"centers in {path}", found=f"it holds {', '.join(sorted(found)[:4]) or 'nothing'}",
            do="give the centers.pt or centers.safetensors that a run wrote", file=str(path),
        )  # fmt: skip
    return found["centers"]
