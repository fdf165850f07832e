"""The document's checklist and tuning guide: each line by a figure, each caught when the figure is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samegrad.cli.config_files import read_config
from samegrad.cli.options import parse_call
from samegrad.cli.run_health import examine_run
from samegrad.errors import UsageError
from samegrad.recipes import Answer, find_health
from samegrad.recipes.flow_style.health import advise, examine
from samegrad.recipes.flow_style.options import FlowStyleOptions
from samegrad.records import Exactness, Plan

EPOCHS, STEPS = 10, 2
# The document's own file, comments and all.
DOCUMENT_CONFIG = """{
  "training": {
    "batch_size": 32,
    "accumulation_steps": 2,              // NEW: Simulate batch size 64
    "ode_integration_steps": 10,          // Increased from 5 for better quality
    "use_compile": false,                 // Keep false until ready (overhead on cold start)
    "use_gradient_checkpointing": false   // Disabled: Compute > Memory on 4070
  }
}
"""


def write_run(folder: Path, **changed: Any) -> Path:
    """A run in which all is well, but for what is ``changed``: lists by step or epoch, or documents."""
    given = {
        "loss": [1.0 - 0.03 * i for i in range(EPOCHS * STEPS)],
        "norm": [0.5] * (EPOCHS * STEPS),
        "seconds": [1.0] * (EPOCHS * STEPS),
        "peak": [1000] * (EPOCHS * STEPS),
        "swd": [0.4 - 0.03 * i for i in range(EPOCHS)],
        "ssm": [0.3] * EPOCHS,
        "config": {},
        "plan": {"predicted_seconds": 1.0},
        "metrics": {},
        "footprint": {},
    } | changed
    lines = []
    for i, (loss, norm, seconds, peak) in enumerate(
        zip(given["loss"], given["norm"], given["seconds"], given["peak"])
    ):
        step = {"loss": loss, "grad_norm": norm, "seconds": seconds, "peak_allocated_bytes": peak, "batch_rows": 6}
        lines.append({"kind": "step", "step": i, "index": i, **step})
        if i % STEPS == STEPS - 1 and i // STEPS < len(given["swd"]):
            parts = {"swd_loss": given["swd"][i // STEPS], "ssm_loss": given["ssm"][i // STEPS]}
            lines.append({"kind": "validation", "step": i, "loss": sum(parts.values()), "parts": parts})
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"max_grad_norm": 1.0, "use_compile": False} | given["config"]))
    (folder / "summary.json").write_text(json.dumps({"metrics": given["metrics"]}))
    for name in ("plan", "footprint"):
        (folder / f"{name}.json").write_text(json.dumps(given[name]))
    return folder


def answers(folder: Path) -> dict[str, Answer]:
    return {finding.name: finding.answer for finding in examine(folder)}


def test_a_good_run_passes_every_line_with_its_figure(tmp_path: Path) -> None:
    findings = examine(write_run(tmp_path))
    assert [finding.answer for finding in findings] == [Answer.OK] * 6
    assert all(any(c.isdigit() for c in finding.detail) for finding in findings[:-1])
    assert advise(tmp_path) == ()


RISING = [0.1 * i for i in range(1, EPOCHS * STEPS + 1)]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("loss falls over the first 10 epochs", {"loss": RISING}),
        ("SWD loss falling (validation)", {"swd": RISING[:EPOCHS]}),
        ("SSM loss stable (validation)", {"ssm": RISING[:EPOCHS]}),
        ("epoch time as planned", {"seconds": [3.0] * EPOCHS * STEPS}),
        ("share of clipped steps", {"norm": [2.0] * EPOCHS * STEPS}),
        ("torch.compile logs", {"config": {"use_compile": True}, "metrics": {"compiled_graphs": 17}}),
    ],
)
def test_a_figure_that_is_wrong_fails_its_line_alone(tmp_path: Path, name: str, changed: dict[str, Any]) -> None:
    found = answers(write_run(tmp_path, **changed))
    assert {line for line, answer in found.items() if answer is Answer.FAILS} == {name}


TRENDS = ("loss falls over the first 10 epochs", "SWD loss falling (validation)", "SSM loss stable (validation)")


def write_short_run(folder: Path, epochs: int) -> Path:
    short = {name: [0.5] * STEPS * epochs for name in ("loss", "norm", "seconds", "peak")}
    return write_run(folder, **short, swd=[0.4] * epochs, ssm=[0.3] * epochs)


@pytest.mark.parametrize(("epochs", "told"), [(1, "1 epoch, needs 10"), (3, "3 epochs, needs 10"), (9, "9 epochs")])
def test_too_short_a_run_is_not_judged_and_says_how_long_it_must_be(tmp_path: Path, epochs: int, told: str) -> None:
    found = {finding.name: finding for finding in examine(write_short_run(tmp_path, epochs))}
    for name in TRENDS:
        assert found[name].answer is Answer.UNKNOWN
        assert found[name].detail.startswith(f"not judged, not enough epochs: {told}")


def test_one_epoch_has_neither_a_time_nor_a_share(tmp_path: Path) -> None:
    found = {finding.name: finding for finding in examine(write_short_run(tmp_path, 1))}
    assert found["epoch time as planned"].detail.endswith("1 epoch, needs 2")
    assert found["share of clipped steps"].detail.endswith("2 gradient norms, needs 6")


@pytest.mark.parametrize(
    ("step_seconds", "planned_seconds"), [(0.012, 0.004), (1.4, 1.0), (1.6, 1.0), (0.05, 0.02)]
)
def test_an_epoch_is_too_long_where_its_steps_are(tmp_path: Path, step_seconds: float, planned_seconds: float) -> None:
    """One step of a run that waited once, or was counted, is no step's time and no epoch's."""
    waited = [step_seconds] * (EPOCHS * STEPS - 1) + [400 * step_seconds]
    run = write_run(tmp_path, seconds=waited, plan={"predicted_seconds": planned_seconds})
    too_long = answers(run)["epoch time as planned"] is Answer.FAILS
    plan = Plan(levers={}, exactness=Exactness.SAME_BITS, batch_rows=6, predicted_seconds=planned_seconds)
    (run / "plan.json").write_text(plan.to_json())
    (run / "status.json").write_text(json.dumps({"state": "done"}))
    of_steps = next(found for found in examine_run(run) if found.name == "step time as planned")
    assert (of_steps.answer is Answer.FAILS) == too_long
    assert too_long == (step_seconds / planned_seconds > 1.5 and step_seconds > 0.02)


@pytest.mark.parametrize(
    ("says", "changed"),
    [
        ("Over the budget", {"plan": {"budget": {"total_bytes": 900}}}),
        ("--max_grad_norm 0.5", {"norm": [0.5] * 19 + [9.0]}),
        ("--use_velocity_reg", {"norm": [0.5] * 19 + [9.0]}),
        ("--epsilon_warmup_epochs 20", {"norm": [0.5] * 19 + [9.0]}),
        ("Launch-bound (50 %", {"plan": {"levers": {"split_rows": {"rows": 4}}},
                               "footprint": {"seconds_per_chunk": 0.4, "seconds_per_row": 0.1}}),
        ("--ode_integration_steps 7", {"seconds": [2.0] * 20}),
        ("The SWD loss does not fall", {"swd": RISING[:EPOCHS]}),
    ],
)  # fmt: skip
def test_each_line_of_advice_needs_its_measurement(tmp_path: Path, says: str, changed: dict[str, Any]) -> None:
    told = advise(write_run(tmp_path, **changed))
    assert [line for line in told if says.replace(" %", "%") in line], told
    if "norm" not in changed:
        assert len(told) == 1


def test_velocity_regularisation_is_not_advised_where_it_is_on(tmp_path: Path) -> None:
    told = advise(write_run(tmp_path, norm=[0.5] * 19 + [9.0], config={"use_velocity_reg": True}))
    assert told and not any("--use_velocity_reg" in line for line in told)


def test_the_doctor_adds_the_recipes_lines_to_its_own(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "plan.json").unlink()
    (tmp_path / "status.json").write_text(json.dumps({"name": "flow_style", "state": "done", "exit_code": 0}))
    names = [finding.name for finding in examine_run(tmp_path)]
    assert {"no out-of-memory", "memory stable", "SWD loss falling (validation)", "torch.compile logs"} <= set(names)
    (tmp_path / "status.json").write_text(json.dumps({"name": "steps.py:train", "state": "done", "exit_code": 0}))
    assert "SWD loss falling (validation)" not in [finding.name for finding in examine_run(tmp_path)]
    assert find_health("autoencoder") is None


def parsed(path: Path) -> FlowStyleOptions:
    return parse_call("samegrad run flow_style", (FlowStyleOptions,), ["--config", str(path)]).part(FlowStyleOptions)


def test_the_documents_config_loads_verbatim(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(DOCUMENT_CONFIG)
    options = parsed(path)
    assert options.logical_rows == 64 and options.ode_integration_steps == 10
    assert (options.use_compile, options.use_gradient_checkpointing) == (False, False)
    assert options.pinned_checkpoint == 0


def test_an_unknown_key_is_refused_with_the_nearest_and_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(DOCUMENT_CONFIG.replace("accumulation_steps", "acumulation_steps"))
    with pytest.raises(UsageError, match=r"config\.json:4: unknown option 'acumulation_steps'; did you mean 'accum"):
        parsed(path)


def test_a_key_may_stand_once_with_and_without_its_section(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"batch_size": 3,\n"training": {"batch_size": 4}}')
    with pytest.raises(UsageError, match=r"config\.json:2: 'batch_size' stands here and at .*config\.json:1"):
        parsed(path)
    path.write_text('{"optimizer": {"batch_size": 4}}')
    with pytest.raises(UsageError, match="unknown option"):
        parsed(path)


def test_what_looks_like_a_comment_in_a_string_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"x": "http://a // b \\" //", // a comment with "quotes"\n"y": 1} // the end')
    found = read_config(path)
    assert found["x"].text == 'http://a // b " //' and found["y"].where == f"{path}:2"
