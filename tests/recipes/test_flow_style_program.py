"""The program: logical batches, plans by pin and budget, what is judged and written, and the two commands beside it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import samegrad as sg
from samegrad.cli.options import parse_call
from samegrad.cli.planned import plan_step
from samegrad.cli.programs import RecipeTraining
from samegrad.errors import IN_THE_DECLARATION
from samegrad.recipes import run_epochs
from samegrad.recipes.flow_style import inference, plans, preprocess
from samegrad.recipes.flow_style.checkpoint import load_flow
from samegrad.recipes.flow_style.history import History
from samegrad.recipes.flow_style.judging import judge_styled
from samegrad.recipes.flow_style.options import SIZES, FlowStyleOptions
from samegrad.recipes.flow_style.pictures import draw_curves
from samegrad.recipes.flow_style.recipe import RECIPE, FlowStyleProgram, build, table

from .resuming import assert_goes_on_within_an_epoch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, generator = tmp_path_factory.mktemp("latents"), torch.Generator().manual_seed(0)
    for name, count in (("monet", 6), ("photo", 7)):
        (root / name).mkdir()
        for i in range(count):
            torch.save(torch.randn(4, 8, 8, generator=generator), root / name / f"{i}.pt")
    return root


@pytest.fixture
def options(root: Path) -> FlowStyleOptions:
    return FlowStyleOptions(
        data_root=root, batch_size=3, accumulation_steps=2, ode_integration_steps=2, base_channels=4, num_epochs=3,
        steps_per_epoch=2, learning_rate=1e-3, max_samples=100, num_projections=8, num_inference_steps=2,
        dtype="float64", device="cpu", epsilon_warmup_epochs=2,
    )  # fmt: skip


def changed(options: FlowStyleOptions, **values: Any) -> FlowStyleOptions:
    return dataclasses.replace(options, **values)


def plain_losses(program: FlowStyleProgram) -> Iterator[float]:
    """An ordinary loop on the whole logical batches, clipped once a step."""
    options = program.options
    model = build(options).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=options.weight_decay)
    for epoch in range(options.size("num_epochs")):
        for batch in program.batches(epoch):
            optimizer.param_groups[0]["lr"] = program.optimizer.param_groups[0]["lr"]
            loss = program.energy(program.calling(model, batch), batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.01])
def test_two_chunks_give_the_losses_of_an_ordinary_loop(options: FlowStyleOptions, max_grad_norm: float) -> None:
    program = build(changed(options, max_grad_norm=max_grad_norm))
    results = [step for epoch in run_epochs(program) for step in epoch.steps]
    assert [step.batch_rows for step in results] == [6] * 6
    np.testing.assert_allclose([step.loss for step in results], list(plain_losses(program)), rtol=1e-10)
    # Clipped once, on the whole gradient; what is written down is its norm before.
    assert (max(step.grad_norm or 0 for step in results) > max_grad_norm) == (max_grad_norm == 0.01)


def test_the_documents_defaults_hold_for_real_latents(root: Path) -> None:
    real, bundled = FlowStyleOptions(data_root=root), FlowStyleOptions()
    assert real.logical_rows == 64 and real.size("base_channels") == 128 and real.size("learning_rate") == 1e-4
    assert [bundled.size(name) for name in SIZES] == [second for _, second in SIZES.values()]
    # The largest style times the styles squared, over the logical batch.
    assert changed(real, batch_size=7).epoch_steps(7, 2) == 2 and real.epoch_steps(7, 2) == 1


def test_without_a_budget_batch_size_rows_run_at_a_time(options: FlowStyleOptions) -> None:
    plan = plans.document_plan(options)
    assert plan.levers["split_rows"] == {"rows": 3} and plan.batch_rows == 6
    assert plan.knob_origins == {"split_rows.rows": sg.KnobOrigin.PINNED}
    assert not plans.document_plan(changed(options, accumulation_steps=1)).levers


@pytest.mark.parametrize(
    ("every", "blocks"), [(1, ["steps.0", "steps.1", "steps.2"]), (2, [["steps.0", "steps.1"], "steps.2"])]
)
def test_steps_run_again_in_runs_of_every(options: FlowStyleOptions, every: int, blocks: list[Any]) -> None:
    model = build(changed(options, ode_integration_steps=3)).model
    assert plans.step_blocks(model, every) == blocks


def test_pinned_checkpointing_is_the_models_own_option(options: FlowStyleOptions) -> None:
    pinned = build(changed(options, use_gradient_checkpointing=True))
    assert pinned.model.checkpoint_every == 1 and "run again in backward 1 at a time" in "\n".join(pinned.describe())
    assert build(changed(options, checkpoint_every=2)).model.checkpoint_every == 2
    assert build(options).model.checkpoint_every == 0
    with pytest.raises(sg.UsageError, match="turned off") as refused:
        changed(options, checkpoint_every=2, use_gradient_checkpointing=False)
    assert refused.value.option == "checkpoint_every"


@pytest.mark.parametrize(
    ("flag", "pinned"), [("--use_gradient_checkpointing", 1), ("--no_use_gradient_checkpointing", 0)]
)
def test_the_flags_that_the_texts_name_pin_checkpointing(flag: str, pinned: int) -> None:
    asked = parse_call("samegrad run flow_style", (FlowStyleOptions,), [flag, "--dtype", "float64"])
    assert asked.part(FlowStyleOptions).pinned_checkpoint == pinned
    readme = Path(plans.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert f"`{flag}`" in readme


def counted_peak(program: FlowStyleProgram, batch: Any) -> int:
    # The first one is examined, on rows of its own.
    program.step.backward(batch)
    with sg.count_bytes(program.step) as counter:
        program.step.backward(batch)
    return int(counter.peak_bytes)


@pytest.mark.slow
def test_a_budget_below_single_rows_runs_steps_again(options: FlowStyleOptions) -> None:
    """Where no split fits, ODE steps run again; the peak that is counted is within the budget, the gradient plain."""
    wanted = changed(options, ode_integration_steps=12, base_channels=8)
    plain = build(wanted)
    batch = next(plain.batches(0))
    with plain.step as step:
        footprint = sg.measure_step(step, batch)
    budget = f"{int(0.8 * footprint.predicted_peak_bytes(rows=1))}B"
    program = build(changed(wanted, budget=budget))
    with program.step as step:
        plan = step.prepare(batch)
        assert "recompute" in plan.levers
        assert plan.budget is not None and counted_peak(program, batch) <= plan.budget.total_bytes
        program.model.zero_grad()
        assert sg.verify_step(step, batch).same
    with pytest.raises(sg.BudgetTooSmall):
        build(changed(wanted, budget=budget, use_gradient_checkpointing=False))


@pytest.mark.parametrize("pinned", [None, False])
def test_steps_that_are_pinned_to_be_kept_are_kept_in_plans_for_a_card_elsewhere(
    pinned: bool | None, options: FlowStyleOptions
) -> None:
    program = build(changed(options, use_gradient_checkpointing=pinned))
    refusals = sg.measure_step(program.step, next(program.batches(0)), device="H200").refusals
    assert ("no part of the model can run again" in refusals.get("recompute", "")) is (pinned is False)


def test_the_plan_gives_no_advice_that_only_a_steps_author_could_follow(options: FlowStyleOptions) -> None:
    program = build(options)
    planned = plan_step(RecipeTraining(RECIPE, program))
    assert "two passes" in planned.explanation and "normalise" not in planned.explanation
    assert IN_THE_DECLARATION not in planned.footprint.facts | planned.predicted.facts
    # Who has the step itself in hand is told.
    assert "normalise='mean'" in sg.measure_step(program.step, next(program.batches(0))).facts[IN_THE_DECLARATION]


def test_validation_is_what_its_parts_add_up_to(options: FlowStyleOptions) -> None:
    program = build(changed(options, w_style=3.0, w_content=0.5))
    value = program.validate()
    parts = program.validation_parts()
    assert value == pytest.approx(3 * parts["swd_loss"] + 0.5 * parts["ssm_loss"], rel=1e-12)
    assert program.validate() == value


def test_metrics_stand_between_their_anchors(options: FlowStyleOptions) -> None:
    program = build(options)
    held_out, training = program.splits.held_out, program.splits.training
    identity = judge_styled(lambda source, *_: source, held_out, training, (3,))
    assert identity.ssm == 0 and identity.swd == identity.identity_swd > 0
    shuffled = judge_styled(
        lambda source, _, target: training.of_style(int(target[0]))[: len(source)], held_out, training, (3,)
    )
    assert (shuffled.swd, shuffled.ssm) == (shuffled.shuffled_swd, shuffled.shuffled_ssm)
    metrics = program.evaluate()
    program.validate()
    # Two kinds of figures, and no name for both.
    assert metrics.keys().isdisjoint(program.validation_parts()) and not {"swd", "ssm"} & metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values()) and metrics["held_out_ssm_identity"] == 0


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(options: FlowStyleOptions) -> None:
    straight = build(options)
    losses = [result.loss for result in run_epochs(straight)]
    first = build(options)
    for _ in run_epochs(first):
        break
    second = build(options)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state(json.loads(json.dumps(first.state())), first.best.weights())
    assert [result.loss for result in run_epochs(second)] == losses[1:]
    found, expected = second.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_that_stops_within_an_epoch_goes_on_there(options: FlowStyleOptions) -> None:
    assert_goes_on_within_an_epoch(lambda: build(options))


def test_what_is_written_is_read_back(options: FlowStyleOptions, tmp_path: Path) -> None:
    program = build(options)
    names = {path.name for path in program.write(tmp_path)}
    assert names == {
        "flow_style.pt", "flow_style.safetensors", "style_grid.png", "monet_as_photo.png", "photo_as_monet.png"
    }  # fmt: skip
    saved = load_flow(tmp_path / "flow_style.pt")
    assert saved.names == ("monet", "photo") and saved.sampler.steps == 2 and saved.codec is None
    for name, value in program.model.network.state_dict().items():
        assert torch.equal(saved.network.state_dict()[name], value.float())
    with pytest.raises(sg.BadInput, match=r"checkpoint of a style flow in .*style_grid\.png"):
        load_flow(tmp_path / "style_grid.png")


def test_curves_show_what_was_written_down() -> None:
    history = History(
        tuple({"step": i, "loss": 1 / (i + 1)} for i in range(4)),
        tuple({"step": i, "loss": 0.5 / i, "parts": {"swd_loss": 0.1 * i, "ssm_loss": 0.2}} for i in (1, 3)),
    )
    left, middle, right = draw_curves(history).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    np.testing.assert_allclose(middle.lines[0].get_xydata(), [[1, 0.1], [3, 0.3]], atol=1e-12)
    np.testing.assert_allclose(right.lines[0].get_ydata(), [0.2, 0.2])
    np.testing.assert_allclose(left.lines[1].get_xydata(), [[1, 0.5], [3, 0.5 / 3]])
    # The weights of the lowest validation energy are kept, and each panel marks where that was.
    assert [axes.lines[-1].get_xdata()[0] for axes in (left, middle, right)] == [3, 3, 3]
    for axes in (left, middle, right):
        assert axes.get_xlabel() == "optimizer step" and axes.get_ylabel()
        assert axes.get_ylim()[1] > max(line.get_ydata().max() for line in axes.lines)


@pytest.mark.slow
def test_the_tables_rows_are_the_documents(options: FlowStyleOptions) -> None:
    lines = list(table(options))
    by_part: dict[Any, list[Any]] = {}
    for line in lines:
        by_part.setdefault(line["part"], []).append(line)
    old, new = by_part["old"], by_part["new"]
    assert [(line["rows"], line["document"]) for line in old] == [(240, "6.8GB"), (240, "OOM")]
    # Twice the steps hold about twice as much; what is held falls down the table.
    assert 1.6 < old[1]["peak_bytes"] / old[0]["peak_bytes"] < 2.1
    peaks = [line["peak_bytes"] for line in new]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 3 * peaks[2]
    noise = [line["noise"] for line in by_part["quality"]]
    assert noise[0] > noise[1] > noise[2] and noise[2] < 1e-9


@pytest.mark.slow
def test_a_compiled_step_is_the_same_and_is_counted(options: FlowStyleOptions) -> None:
    program = build(changed(options, use_compile=True))
    limit, batch = torch._dynamo.config.recompile_limit, next(program.batches(0))
    program.step.backward(batch)
    assert torch._dynamo.config.recompile_limit == limit
    found = {name: p.grad.clone() for name, p in program.model.named_parameters() if p.grad is not None}
    program.model.zero_grad()
    plain = build(options)
    plain.energy(plain.calling(plain.model, batch), batch).backward()
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
    counts = program.calling.counts()
    # By rows, with and without a graph, on weights and on their aliases.
    assert 1 <= counts["compiled_graphs"] <= options.cache_size_limit and counts["graph_breaks"] == 0


def test_cudnn_flags_are_put_back_however_an_epoch_ends(options: FlowStyleOptions) -> None:
    program = build(changed(options, use_cudnn_benchmark=True))
    batches = program.batches(0)
    next(batches)
    assert torch.backends.cudnn.benchmark
    batches.close()
    assert not torch.backends.cudnn.benchmark


def test_cudnn_trials_without_cuda_are_said_to_have_no_effect(
    options: FlowStyleOptions, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = changed(options, use_cudnn_benchmark=True)
    build(wanted)
    assert caplog.text.count("--use_cudnn_benchmark has no effect here (cpu)") == 1
    caplog.clear()
    build(options)
    # For a card that is elsewhere the host only stands in.
    build(wanted.for_card_elsewhere())
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0), ("patch_size", 4), ("label_drop_prob", 1.0), ("learning_rate", math.nan), ("epsilon", -0.1),
        ("base_channels", 6), ("dtype", "float16"), ("swd_scale_weights", (1.0,)), ("max_samples", -1),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_its_options_name(name: str, value: Any) -> None:
    with pytest.raises(sg.UsageError) as refused:
        FlowStyleOptions(**{name: value})
    assert refused.value.option == name


@pytest.mark.parametrize(
    ("name", "value"), [("compile_mode", "reduce-overhead"), ("fullgraph", True), ("cache_size_limit", 8)]
)
def test_what_only_compiling_heeds_is_refused_without_it(name: str, value: Any) -> None:
    with pytest.raises(sg.UsageError, match="add --use_compile") as refused:
        FlowStyleOptions(**{name: value})
    assert refused.value.option == name
    assert getattr(FlowStyleOptions(use_compile=True, **{name: value}), name) == value
    # A file may name the defaults.
    assert not FlowStyleOptions(use_compile=False, **{name: getattr(FlowStyleOptions(), name)}).use_compile


def test_wrong_data_is_refused_with_the_layout(options: FlowStyleOptions, tmp_path: Path) -> None:
    with pytest.raises(sg.BadInput, match="bundled pictures are used"):
        build(changed(options, data_root=tmp_path / "none"))
    with pytest.raises(sg.UsageError, match="monet, photo"):
        build(changed(options, style_weights=(1.0,)))


# Pictures to latents, and one picture styled.


def picture_folders(root: Path, side: int = 48) -> Path:
    random = np.random.default_rng(0)
    for style in ("dark", "light"):
        (root / style).mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(0, 128, (side, side + 8, 3)) + (0 if style == "dark" else 127)
            Image.fromarray(pixels.astype(np.uint8)).save(root / style / f"{i}.png")
    return root


def test_pictures_go_to_latents_train_and_come_back_styled(
    options: FlowStyleOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, latents, out = picture_folders(tmp_path / "raw"), tmp_path / "latents", tmp_path / "out"
    asked = ["--raw_data_root", str(raw), "--output_root", str(latents), "--target_size", "64"]
    assert preprocess.main(asked) == 0 and "6 latents" in capsys.readouterr().out
    assert torch.load(latents / "dark" / "0.pt", weights_only=True).shape == (4, 8, 8)
    assert preprocess.main(asked) == 2 and "holds files already" in capsys.readouterr().err
    out.mkdir()
    build(changed(options, data_root=latents, dtype="float32")).write(out)
    checkpoint = str(out / "flow_style.pt")
    styled = tmp_path / "styled.png"
    source = str(raw / "dark" / "0.png")
    assert inference.main([checkpoint, source, str(styled), "--target_style_id", "1", "--target_size", "64"]) == 0
    with Image.open(styled) as picture:
        assert picture.size == (64, 64)
    again = tmp_path / "again.pt"
    latent = str(latents / "dark" / "0.pt")
    assert inference.main([checkpoint, latent, str(again), "--source_style_id", "0", "--steps", "3"]) == 0
    assert torch.load(again, weights_only=True).shape == (4, 8, 8)
    capsys.readouterr()
    assert inference.main([checkpoint, source, str(styled), "--target_style_id", "2"]) == 2
    assert "0 dark, 1 light" in capsys.readouterr().err
    for setting, value in (("steps", "0"), ("start_time", "1.5"), ("guidance", "-1"), ("temperature", "nan")):
        assert inference.main([checkpoint, source, str(styled), f"--{setting}", value]) == 2
        assert f"--{setting} {value}" in capsys.readouterr().err


def test_pictures_that_are_none_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    raw = picture_folders(tmp_path / "raw")
    (raw / "dark" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(sg.BadInput, match=r"broken\.png"):
        preprocess.preprocess(raw, tmp_path / "latents", 64)
    with pytest.raises(sg.UsageError, match="multiple of 32"):
        preprocess.preprocess(raw, tmp_path / "latents", 60)
    with pytest.raises(sg.BadInput, match="0 folders with pictures"):
        preprocess.preprocess(tmp_path, tmp_path / "latents", 64)
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"checkpoint_every": 2}, "Pinned by --checkpoint_every 2: the plain step runs its 2 ODE steps again"),
        ({"use_gradient_checkpointing": True}, "Pinned by --use_gradient_checkpointing: .* in backward, one by one"),
        ({"use_gradient_checkpointing": False}, "Pinned by --no_use_gradient_checkpointing: .* runs no ODE step again"),
        ({}, None),
    ],
)
def test_what_is_pinned_in_the_step_is_told_with_its_plan(
    options: FlowStyleOptions, asked: dict[str, Any], told: str | None
) -> None:
    training = RecipeTraining(RECIPE, build(changed(options, **asked)))
    planned = plan_step(training)
    assert ("Pinned by" in planned.told) is (told is not None)
    assert told is None or (re.search(told, planned.told) and planned.told in planned.explanation)
    # 6 rows of 8 x 8 latents have more patches than are compared here.
    assert "Gradient noise: the style loss compares 100 of " in planned.told
    training.program = build(changed(options, max_samples=0))
    assert not training.told_of_pins()
