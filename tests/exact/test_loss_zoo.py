"""Losses of known truth through the engine: the passes that are right, and the plain gradients in ragged splits."""

from __future__ import annotations

import pytest
import torch

from samegrad.exact import examine_loss as examination
from samegrad.exact.audit import Residual

from . import zoo
from .loss_zoo import LOSSES

# Means over rows as well, which the graph does not show: two passes cost more and are no less exact.
UNRECOGNISED = {"label smoothing", "batch mean of kl", "reconstruction and prior"}
SPLITS = ([8, 8, 8, 5], [1, 27, 1], [13, 2, 14])


@pytest.mark.parametrize("name", LOSSES)
def test_the_form_is_the_known_one_and_every_split_is_exact(name: str) -> None:
    loss_fn, form = LOSSES[name]
    model, rows = zoo.mlp(), zoo.batch()
    _, reference = zoo.plain_gradients(model, loss_fn, rows)
    split, layout = zoo.split_step(model, loss_fn, rows)
    assert split.examination.form.name == form, split.examination.reason
    for sizes in SPLITS:
        assert zoo.worst_error(split, rows, layout, sizes, reference) <= 1


@pytest.mark.parametrize("name", [n for n, (_, form) in LOSSES.items() if form == "COUPLED" and n not in UNRECOGNISED])
def test_one_pass_would_be_wrong(name: str) -> None:
    """Each part's own loss, weighted by its rows: what these losses would get from ordinary accumulation."""
    model, rows, loss_fn = zoo.mlp(), zoo.batch(), LOSSES[name][0]
    parts = [slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 29)]
    for part in parts:
        few = {key: value[part] for key, value in rows.items()}
        loss = loss_fn(model(few["x"]), few) * (len(few["x"]) / zoo.ROWS)
        loss.backward()
    _, reference = zoo.plain_gradients(model, loss_fn, rows)
    largest = max(g.abs().max() for g in reference)
    # A part without a row that counts has no loss at all.
    assert not all((p.grad - g).abs().max() <= 1e-3 * largest for p, g in zip(model.parameters(), reference))


def test_losses_whose_graph_looks_like_a_mean_need_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: an audit that agrees to everything lets one pass through, and the gradient is wrong."""
    passed = Residual(gradient=0.0, loss=0.0, allowed=1.0)
    monkeypatch.setattr(examination, "audit", lambda *_: passed)
    # The code is followed as well, and shows how the constant is made.
    monkeypatch.setattr(examination, "taken_over_rows", lambda *_: None)
    model, rows, loss_fn = zoo.mlp(), zoo.batch(), LOSSES["centred constant"][0]
    _, reference = zoo.plain_gradients(model, loss_fn, rows)
    split, layout = zoo.split_step(model, loss_fn, rows)
    assert split.examination.form.name == "ROW_MEAN"
    assert zoo.worst_error(split, rows, layout, [8, 8, 8, 5], reference) > 1e3


def test_the_zoo_is_no_smaller_than_promised() -> None:
    assert len(LOSSES) >= 40
    assert torch.tensor([form == "COUPLED" for _, form in LOSSES.values()]).sum() >= 25
