"""Every experiment is needed: switched off, a module of the zoo is examined without a word and the step is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import samegrad as sg
from samegrad.exact import backward_probe, probes
from samegrad.exact.backward_probe import BackwardProbe
from samegrad.exact.dataless import has_data
from samegrad.exact.examine import examine
from samegrad.exact.probes import RowProbes
from samegrad.exact.state_probe import StateProbe
from samegrad.exact.undisturbed import ModuleState

from ..contract.plain import Tally
from . import zoo
from .module_zoo import BY_PARTS, BY_ROWS, REFUSED
from .test_module_zoo import Run, assert_same_run, batch, forward, loss_on, reference


def _silent(*_: Any, **__: Any) -> None:
    return None


def _only_backward(self: BackwardProbe, outputs: Any, factor: float) -> None:
    """What the sums are compared with, unchecked."""
    backward_probe._backward(outputs, self._everything, -1 / factor)
    self._probes.restored()


# Experiment: what is switched off, and the module that only it catches.
PLANTED: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "draws": (RowProbes, "draw_sites", _silent, "faint noise"),
    "state": (StateProbe, "rules", lambda self: [], "a count of calls"),
    "repeat": (RowProbes, "_check_repeat", _silent, "a cache of fewer digits"),
    "replace": (RowProbes, "_check_replace", _silent, "a faint mean"),
    "subset": (RowProbes, "_check_subset", _silent, "position in the batch"),
    "weights": (probes, "check_weights", _silent, "a scale from the first batch"),
    "reach": (backward_probe, "check_reach", _silent, "parameters past their place"),
    "alone": (BackwardProbe, "_check_alone", _only_backward, "a backward hook that counts"),
    "sums": (BackwardProbe, "_check_sums", _silent, "a clamp on what is made of a weight"),
    "jac": (BackwardProbe, "_check_jac", _silent, "a faint straight-through mean"),
}


def maker(name: str) -> Callable[[], nn.Module]:
    return BY_ROWS[name] if name in BY_ROWS else (BY_PARTS | REFUSED)[name].make


@pytest.mark.parametrize("experiment", PLANTED)
def test_without_it_a_module_of_the_zoo_goes_through_and_the_step_is_wrong(
    experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, attribute, instead, name = PLANTED[experiment]
    make = maker(name)
    plain = reference(make, "rmse")
    monkeypatch.setattr(owner, attribute, instead)
    # Code is followed as well, and tells the means by how they are made.
    monkeypatch.setattr(BackwardProbe, "_check_across", _silent)
    step = sg.Step(make(), loss_on("rmse"), forward=forward, rows=8)
    rows = batch()
    # No other experiment says anything.
    examine(step.declared, step._examined.aliases, rows, step.declared.layout(rows))
    with pytest.raises((AssertionError, sg.SamegradError)):
        assert_same_run(Run(make, "rmse", 8), plain)


@pytest.mark.parametrize("experiment", PLANTED)
def test_with_all_of_them_it_does_not(experiment: str) -> None:
    name = PLANTED[experiment][3]
    make = maker(name)
    step = sg.Step(make(), loss_on("rmse"), forward=forward, rows=8)
    rows = batch()
    if name in BY_ROWS:
        assert_same_run(Run(make, "rmse", 8), reference(make, "rmse"))
    else:
        with pytest.raises(sg.CannotSplit):
            examine(step.declared, step._examined.aliases, rows, step.declared.layout(rows))


def test_without_looking_at_inputs_another_experiment_gives_a_wrong_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, rows = REFUSED["writing on its input"], batch()
    step = sg.Step(truth.make(), loss_on("rmse"), forward=forward, rows=8)
    monkeypatch.setattr(probes, "check_untouched", _silent)
    with pytest.raises(sg.CannotSplit, match="gives other outputs when the same rows run again"):
        examine(step.declared, step._examined.aliases, rows, step.declared.layout(rows))


def test_without_looking_at_versions_a_converged_power_iteration_stops_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, zoo.CLASSES)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(zoo.CLASSES)[:, :6] * 0.5 ** torch.arange(6))
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=40))
    rows = zoo.batch(torch.float32)
    for _ in range(5):
        model(rows["x"])
    monkeypatch.setattr(ModuleState, "written_places", ModuleState.changed_places)
    split, layout = zoo.split_step(model, zoo.LOSSES["mse"][0], rows)
    with pytest.raises(sg.CannotSplit, match="buffers changed"):
        split.backward(rows, layout, [8, 8, 13])


@pytest.mark.parametrize("loss", ["mse", "rmse"])
def test_about_ten_forwards_of_few_rows_once_for_a_model_a_shape_and_a_mode(loss: str) -> None:
    tally = Tally()

    def counting(model: nn.Module, rows: Any) -> Any:
        # What is followed without data to see whether the code counts rows computes nothing.
        if has_data(rows["x"]):
            tally.seen.append(len(rows["x"]))
        return model(rows["x"])

    def taken() -> list[int]:
        seen, tally.seen = tally.seen, []
        return seen

    model, rows = zoo.mlp(), zoo.batch()
    step = sg.Step(model, zoo.LOSSES[loss][0], forward=counting, rows=8)
    step.prepare(rows)
    examined = taken()
    # Parts of the probe rows among them: as many rows as ten forwards of eight.
    assert len(examined) <= 11 and max(examined) == 8 and sum(examined) <= 80
    chunks = [8, 8, 8, 5] * {"mse": 1, "rmse": 2}[loss]
    for _ in range(2):
        step.backward(rows)
        assert taken() == chunks
    step.backward({key: value[:17] for key, value in rows.items()})
    assert len(taken()) == 3 * len(chunks) // 4
    model.eval()
    step.backward(rows)
    assert len(taken()) == len(examined) + len(chunks)
    step.backward(rows)
    assert taken() == chunks
