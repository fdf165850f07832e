"""What cuBLAS keeps is taken by a product, and by none where torch would refuse that product or nothing was kept."""

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


@pytest.mark.parametrize(
    ("kept_bytes", "captured", "device", "retaken"),
    [(32 << 20, False, "cuda", True), (0, False, "cuda", False), (32 << 20, True, "cuda", False),
     (32 << 20, False, "cpu", False)],
)  # fmt: skip
def test_they_are_taken_anew_only_where_there_were_some(
    kept_bytes: int, captured: bool, device: str, retaken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, taken = [kept_bytes], list[torch.device]()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 7 + held[-1])
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: held.append(0), raising=False)
    monkeypatch.setattr(counters, "_has_captured", lambda _: captured)
    monkeypatch.setattr(counters, "take_workspaces", taken.append)
    counters.retake_workspaces(torch.device(device))
    assert taken == ([torch.device(device)] if retaken else [])
    # A captured graph may know their address.
    assert (held[-1] == 0) == (kept_bytes == 0 or retaken)
