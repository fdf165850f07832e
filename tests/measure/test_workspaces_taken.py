"""What cuBLAS keeps is taken by a product, and by none where torch would refuse that product."""

from __future__ import annotations

import pytest
import torch

from samegrad.measure import counters


@pytest.mark.parametrize(
    ("deterministic", "warn_only", "configured", "multiplies"),
    [
        (False, False, False, True),
        (True, False, False, False),
        (True, True, False, True),
        (True, False, True, True),
    ],
)
def test_no_product_where_torch_would_refuse_it(
    deterministic: bool, warn_only: bool, configured: bool, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    ones = torch.ones

    def seen(*sizes: int, **_: object) -> torch.Tensor:
        made.append(sizes)
        return ones(*sizes, requires_grad=True)

    monkeypatch.setattr(counters, "release_cached", lambda device: 0)
    monkeypatch.setattr(counters, "_has_captured", lambda device: True)
    monkeypatch.setattr(torch, "ones", seen)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if configured:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        counters.take_workspaces(torch.device("cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(made) is multiplies
