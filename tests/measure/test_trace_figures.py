"""Traces of whole networks against peaks measured on a card; what is missing are the libraries' workspaces."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
try:
    import _trace_models
    import trace_speed
finally:
    sys.path.remove(BENCHMARKS)

# cuBLAS and cuBLASLt on Hopper hold 32 MiB each; convolutions take workspaces of their own.
WORKSPACE_BYTES = 2 * 32 * 2**20
ALLOWED = {"ResNet": 0.05, "GPT": 0.02}
QUICK = ("ResNet-34, 105 rows, blocks recomputed", "GPT 124M, 4 x 1024, bfloat16 autocast")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in trace_speed.REAL_PEAK_BYTES],
)
def test_a_trace_is_near_the_measured_peak_and_never_over_it(name: str) -> None:
    figures = trace_speed.traced(name)
    missing, real = figures["missing_bytes"], figures["real_peak_bytes"]
    assert missing >= 0 and abs(missing - WORKSPACE_BYTES) <= ALLOWED[name.split()[0].split("-")[0]] * real
    assert figures["followed"] == "cuda"


def test_a_network_whose_attention_is_spelled_out_is_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def spelled_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
        return torch.softmax(query @ key.transpose(-1, -2), -1) @ value

    monkeypatch.setattr(_trace_models.F, "scaled_dot_product_attention", spelled_out)
    figures = trace_speed.traced(QUICK[1])
    assert figures["missing_bytes"] < 0
