"""Recipes that train on a card are judged and written there too."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

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
