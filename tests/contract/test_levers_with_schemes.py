"""Levers that leave the chunks as they are, with those that put parts of a model in chunks: each as without the other.

BatchNorm couples the rows, so nothing is split through the whole model here.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.levers import _saved_tensors
from samegrad.levers.offload_saved import _Keeping

from .lever_zoo import ROWS, forced, normalised
from .plain import cross_entropy, spread

SCHEMES: dict[str, dict[str, dict[str, Any]]] = {
    "whole": {},
    "recompute": {"recompute": {"blocks": ["0", "1"]}},
    "lockstep": {"exact_batchnorm": {"rows": 5}},
    "rendezvous": {"exact_batchnorm": {"rows": 5, "scheme_name": "rendezvous"}},
    "segments": {"segments": {"rows": 5, "paths": {"2": 1}}},
}
LEVERS: dict[str, dict[str, dict[str, Any]]] = {
    "everything offloaded": {"offload_saved": {"smallest_bytes": 0}},
    "layers offloaded": {"offload_saved": {"smallest_bytes": 0, "modules": ["0.0", "1.2", "2.2"]}},
    "state on the host": {"optimizer_state": {}},
    "channels last": {"layout": {}},
    "all of them": {"offload_saved": {"smallest_bytes": 0}, "optimizer_state": {}, "layout": {}},
}
DROPS = pytest.mark.parametrize("drop", [0.0, 0.3], ids=["no draws", "dropout"])
PASSES = pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["a sum over rows", "coupled"])
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES)


def after_a_step(
    loss_fn: Any, dtype: torch.dtype, drop: float, **levers: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and buffers."""
    model, batch = normalised(dtype, drop)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(3)
    with forced(model, loss_fn, optimizer=optimizer, **levers) as step:
        step.backward(batch)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, dict(model.named_buffers())


def assert_equal(ours: Any, expected: Any, *, bitwise: bool) -> None:
    largest = max(float(g.abs().max()) for g in expected[0].values())
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if bitwise:
                assert torch.equal(mine[name], value), name
            else:
                torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-13 * largest, msg=name)


@EVERY_SCHEME
@PASSES
@DROPS
@pytest.mark.parametrize("name", LEVERS)
def test_a_lever_changes_nothing_of_what_a_scheme_computes(scheme: str, loss_fn: Any, drop: float, name: str) -> None:
    expected = after_a_step(loss_fn, torch.float64, drop, **SCHEMES[scheme])
    ours = after_a_step(loss_fn, torch.float64, drop, **SCHEMES[scheme], **LEVERS[name])
    assert_equal(ours, expected, bitwise="layout" not in LEVERS[name])


@EVERY_SCHEME
@PASSES
@pytest.mark.parametrize("full_precision", [[], ["1.0", "2.2"]], ids=str)
def test_under_autocast_a_scheme_is_the_plain_step_under_autocast(
    scheme: str, loss_fn: Any, full_precision: list[str]
) -> None:
    model, batch = normalised(torch.float32, 0.0)
    plain = copy.deepcopy(model)
    for path in full_precision:
        plain.get_submodule(path).register_forward_pre_hook(lambda part, given: given[0].float())
        forward = plain.get_submodule(path).forward
        plain.get_submodule(path).forward = torch.autocast("cpu", enabled=False)(forward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_fn(plain(batch[0]), batch)
    loss.backward()
    ours, buffers = after_a_step(
        loss_fn, torch.float32, 0.0, **SCHEMES[scheme], autocast={"full_precision": full_precision}
    )
    largest = max(float(p.grad.abs().max()) for p in plain.parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=0, atol=0.04 * largest, msg=name)
        if scheme in ("whole", "recompute"):
            assert torch.equal(ours[name], parameter.grad), name
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-2, atol=1e-3, msg=name)


class Weighted(nn.Module):
    """A loss with a parameter and a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, batch: Any) -> Tensor:
        self.calls += 1
        return F.cross_entropy(outputs * self.log_scale.exp(), batch[1]) + outputs.std(0).sum()


@pytest.mark.parametrize("rows", [None, 5], ids=["whole", "split"])
def test_a_loss_that_is_a_module_keeps_its_parameters_and_its_state(rows: int | None) -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(6, 3), Weighted()
    batch = torch.randn(ROWS, 6), torch.randint(0, 3, (ROWS,))
    plain, plain_loss = copy.deepcopy((model, loss_fn))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = plain_loss(plain(batch[0]), batch)
    loss.backward()
    split = {} if rows is None else {"split_rows": {"rows": rows}}
    with forced(model, loss_fn, autocast={}, **split) as step:
        step.backward(batch)
    assert float(loss_fn.calls) == 1
    torch.testing.assert_close(loss_fn.log_scale.grad, plain_loss.log_scale.grad, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(model.weight.grad, plain.weight.grad, rtol=0.02, atol=5e-3)


def test_planted_hooks_that_are_gone_when_a_block_runs_again_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._saved is None:
            return forward(*args, **kwargs)
        with self._saved.hooked():
            return forward(*args, **kwargs)

    monkeypatch.setattr(_Keeping, "call", forgetful)
    with pytest.raises(sg.CannotSplit, match="tensor 0 that it saved"):
        test_a_lever_changes_nothing_of_what_a_scheme_computes("recompute", cross_entropy, 0.0, "layers offloaded")


def test_planted_zeros_from_the_host_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_saved_tensors.HostCopy, "_send", lambda self, there: self._bytes.zero_())
    for scheme in SCHEMES:
        with pytest.raises(AssertionError):
            test_a_lever_changes_nothing_of_what_a_scheme_computes(scheme, spread, 0.0, "everything offloaded")


def test_a_planned_step_that_is_verified_passes_with_levers_of_the_same_bits() -> None:
    for scheme in ("whole", "recompute", "lockstep"):
        model, batch = normalised(torch.float64, 0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        levers = SCHEMES[scheme] | LEVERS["layers offloaded"] | LEVERS["state on the host"]
        assert sg.verify_step(forced(model, spread, optimizer=optimizer, **levers), batch).same
