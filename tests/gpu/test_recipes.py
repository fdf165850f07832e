"""Recipes that train on a card are judged and written there too."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import samegrad as sg
from samegrad.recipes import run_epochs
from samegrad.recipes.score_kernel.options import ScoreKernelOptions
from samegrad.recipes.score_kernel.recipe import build

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("data", ["8gaussians", "digits"])
def test_a_score_model_that_trained_on_a_card_is_judged_and_written(data: str, tmp_path: Path) -> None:
    options = ScoreKernelOptions(
        data=data, train_kernel_size=20, train_samples_size=60, test_samples_size=6, hiddenunits=8, depth=2, niters=4,
        batch_size=5, device="cuda",
    )  # fmt: skip
    program = build(options)
    list(run_epochs(program))
    assert all(math.isfinite(value) for value in program.evaluate().values())
    assert {path.name for path in program.write(tmp_path)} >= {"factornet.pt", "samples.png", "matching_loss.png"}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_centers_on_two_cards_are_verified_against_the_unsharded_step(dtype: str) -> None:
    options = ScoreKernelOptions(
        data="8gaussians", train_kernel_size=23, train_samples_size=60, test_samples_size=6, hiddenunits=8, depth=2,
        niters=4, batch_size=5, dtype=dtype, strategy="model_parallel", devices=("cuda:0", "cuda:1"), chunk_size=5,
    )  # fmt: skip
    program = build(options)
    verdict = sg.verify_step(program.step, next(program.batches(0)))
    assert verdict.same, verdict
    assert verdict.found is sg.Exactness.SAME_SUM
