"""The program: every strategy takes the plain steps, the printed bytes are the counted ones, a run can be judged."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

import samegrad as sg
from samegrad.cli.main import main
from samegrad.cli.planned import plan_step
from samegrad.cli.programs import RecipeTraining
from samegrad.recipes import run_epochs
from samegrad.recipes.score_kernel import parallel, pictures
from samegrad.recipes.score_kernel import program as score_program
from samegrad.recipes.score_kernel.model import score_implicit_matching_stable
from samegrad.recipes.score_kernel.options import ScoreKernelOptions
from samegrad.recipes.score_kernel.parallel import joined
from samegrad.recipes.score_kernel.recipe import RECIPE, ScoreKernelProgram, build, table
from samegrad.recipes.score_kernel.schedule import learning_rates
from samegrad.recipes.score_kernel.strategies import documents_choice, memory_estimate

from .resuming import assert_goes_on_within_an_epoch

CENTERS = 23


def options(**values: Any) -> ScoreKernelOptions:
    small = {
        "data": "8gaussians", "train_kernel_size": CENTERS, "train_samples_size": 60, "test_samples_size": 6,
        "hiddenunits": 8, "depth": 2, "niters": 4, "batch_size": 5, "dtype": "float64", "device": "cpu",
    }  # fmt: skip
    return ScoreKernelOptions(**(small | values))


def plain_losses(program: ScoreKernelProgram) -> list[float]:
    """An ordinary loop over the same batches, on the loss of all centers at once."""
    net, found = copy.deepcopy(program.model.factornet), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, weight_decay=program.options.weight_decay)
    for batch, rate in zip(program.batches(0), program.rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = score_implicit_matching_stable(
            net, batch["samples"], program.points.centers, program.options.stability, program.model.leave_one_out
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), program.options.max_grad_norm)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({"strategy": "single_gpu"}, (23,)),
        ({"strategy": "chunked", "chunk_size": 5}, (5, 5, 5, 5, 3)),
        ({"strategy": "gradient_accumulation", "accumulation_steps": 4}, (6, 6, 6, 5)),
        ({"accumulation_steps": 9}, (3, 3, 3, 3, 3, 2, 2, 2, 2)), ({"accumulation_steps": 1}, (CENTERS,)),
        ({"strategy": "model_parallel", "devices": ("cpu", "cpu"), "chunk_size": 5}, None),
        ({"strategy": "chunked", "chunk_size": 4, "centers": "leave_one_out"}, (4, 4, 4, 4, 4, 3)),
    ],
)
def test_every_strategy_takes_the_steps_of_the_plain_loop(asked: dict[str, Any], sizes: Any) -> None:
    program = build(options(**asked))
    expected = plain_losses(program)
    [epoch] = run_epochs(program)
    assert [step.loss for step in epoch.steps] == pytest.approx(expected, rel=1e-10)
    if sizes is not None:
        assert program.step.sizes_for(next(program.batches(0))) == sizes


def counted(program: ScoreKernelProgram) -> int:
    """The counted peak of the steps after the first, which makes the optimizer's state."""
    batches = [*program.batches(0)]
    results = list(sg.train(program.step, batches, counter=sg.count_bytes(program.step)))
    return max(result.peak_allocated_bytes or 0 for result in results[1:])


def planned(**asked: Any) -> tuple[ScoreKernelProgram, sg.Plan, sg.Footprint, list[str]]:
    program = build(options(dtype="float32", **asked))
    found = plan_step(RecipeTraining(RECIPE, program))
    return program, found.plan, found.footprint, found.told.splitlines()


WIDE = {"data": "digits", "batch_size": 16, "hiddenunits": 16, "train_samples_size": 200}


@pytest.mark.parametrize(
    "asked",
    [
        {"strategy": "single_gpu"}, {"chunk_size": 7}, {"strategy": "model_parallel", "devices": ("cpu", "cpu")},
        {"strategy": "model_parallel", "devices": ("cpu", "cpu"), "chunk_size": 4},
    ],
)  # fmt: skip
def test_the_printed_total_is_the_counted_peak_within_five_percent(asked: dict[str, Any]) -> None:
    program, plan, _, told = planned(**(WIDE | asked))
    assert plan.predicted_peak_bytes == pytest.approx(counted(program), rel=0.05)
    assert f"  Total estimate: {sg.format_bytes(plan.predicted_peak_bytes or 0)}" in told


def test_the_printed_lines_are_the_documents_and_right() -> None:
    program, _, footprint, told = planned(**WIDE, chunk_size=7)
    at = told.index("Memory estimates:")
    names = [line.strip().partition(":")[0] for line in told[at + 1 :]]
    assert names == ["Centers", "Precision matrices", "Gradients", "Total estimate"]
    parameters = list(program.model.parameters())
    estimate = memory_estimate(
        footprint, rows=7, centers=CENTERS, dim=64, itemsize=4, parameter_bytes=sum(p.nbytes for p in parameters),
        total_bytes=0,
    )  # fmt: skip
    assert estimate.centers_bytes == program.points.centers.nbytes
    program.step.backward(next(program.batches(0)))
    assert estimate.gradients_bytes == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert estimate.dense_precision_bytes == torch.empty(CENTERS, 64, 64).nbytes
    few, many = (counted(build(options(**WIDE, dtype="float32", chunk_size=rows))) for rows in (7, 11))
    assert estimate.precision_bytes / 7 == pytest.approx((many - few) / (11 - 7), rel=0.05)


def test_a_budget_is_kept_by_fewer_centers_at_a_time() -> None:
    whole = planned(**WIDE)[0].step.footprint
    assert whole is not None
    budget = whole.predicted_peak_bytes(rows=CENTERS) * 6 // 10
    program, plan, _, told = planned(**WIDE, budget=f"{budget}B")
    assert "split_rows" in plan.levers
    assert counted(program) <= budget
    chunk = max(program.step.sizes_for(next(program.batches(0))))
    assert told[0].startswith(f"Strategy: chunked, {chunk} centers at a time")
    assert "rule on" in told[1] and told[1].endswith("gradient_accumulation.")


def test_the_plan_is_verified_against_the_plain_loss() -> None:
    program = build(options(chunk_size=5))
    assert sg.verify_step(program.step, next(program.batches(0))).same


def first_place_alone(parts: Any, device: torch.device) -> Any:
    return joined(parts[:1], device)


def mean_of_places(parts: Any, device: torch.device) -> Any:
    """As in the document: each place has a softmax of its own."""
    names = ("force", "curvature")
    means = {name: torch.stack([found[name] for _, found in parts]).mean(0) for name in names}
    return joined(parts, device)[0], means


def last_place_twice_in_the_gradient(parts: Any, device: torch.device) -> Any:
    """The values are right, so that no loss shows it."""
    lse, means = parts[-1]
    return joined([*parts[:-1], (lse, {name: 2 * value - value.detach() for name, value in means.items()})], device)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fault", [None, first_place_alone, mean_of_places, last_place_twice_in_the_gradient])
def test_centers_over_places_are_verified_against_the_unsharded_step(
    fault: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = build(options(strategy="model_parallel", devices=("cpu", "cpu"), chunk_size=5, dtype=dtype))
    if fault is not None:
        # After the places themselves were checked, which would have stopped it.
        monkeypatch.setattr(parallel, "joined", fault)
    verdict = sg.verify_step(program.step, next(program.batches(0)))
    assert verdict.same == (fault is None)
    assert verdict.fault.startswith("forward=") == (fault is not None)
    # Places add up in another order.
    assert verdict.asked is sg.Exactness.SAME_SUM
    assert verdict.found is (sg.Exactness.SAME_SUM if fault is None else None)


def test_the_documents_rule_is_its_own() -> None:
    names = [documents_choice(need, 100, devices) for need, devices in ((80, 1), (110, 2), (110, 1), (160, 1))]
    assert names == ["single_gpu", "model_parallel", "chunked", "gradient_accumulation"]


@pytest.mark.parametrize("visible", [1, 2])
def test_devices_that_auto_leaves_unused_are_named(monkeypatch: pytest.MonkeyPatch, visible: int) -> None:
    monkeypatch.setattr(score_program, "visible_devices", lambda *_: (torch.device("cpu"),) * visible)
    told = "\n".join(planned(strategy="auto", budget="1GiB")[3])
    assert "Strategy: single_gpu" in told
    assert ("--strategy model_parallel shares the centers out over all 2" in told) is (visible == 2)


@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_as_many_chunks_run_as_accumulation_steps_say(budget: str | None) -> None:
    program, plan, _, told = planned(strategy="gradient_accumulation", accumulation_steps=9, budget=budget)
    assert program.step.sizes_for(next(program.batches(0))) == (3,) * 5 + (2,) * 4
    assert told[0].startswith("Strategy: gradient_accumulation, 3 centers at a time in 9 chunks")
    assert plan.knob_origins["split_rows.rows"] is sg.KnobOrigin.PINNED


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({"strategy": "chunked"}, (50, 50, 20)), ({"strategy": "gradient_accumulation"}, (30,) * 4),
        ({"strategy": "gradient_accumulation", "train_kernel_size": 3}, (1,) * 3),
    ],
)  # fmt: skip
def test_a_strategy_without_a_number_or_a_budget_goes_by_the_documents(asked: dict[str, Any], sizes: Any) -> None:
    program = build(options(**{"train_kernel_size": 120} | asked))
    batch = next(program.batches(0))
    assert program.step.sizes_for(batch) == sizes
    plan = program.step.prepare(batch)
    assert plan.knob_origins == {"split_rows.rows": sg.KnobOrigin.DEFAULT}
    assert program.strategy(plan).reason == f"--strategy {asked['strategy']}, by the document's default"


@pytest.mark.parametrize("asked", [{"budget": "1GiB"}, {"chunk_size": 0}])
def test_a_strategy_with_a_budget_or_a_chunk_size_of_0_goes_by_what_fits(asked: dict[str, Any]) -> None:
    program = build(options(strategy="chunked", train_kernel_size=60, **asked))
    assert program.step.sizes_for(next(program.batches(0))) == (60,)


@pytest.mark.parametrize(("rows", "name"), [(None, "single_gpu"), (9, "chunked")])
def test_model_parallel_on_one_device_is_named_as_what_runs(rows: int | None, name: str) -> None:
    *_, told = planned(strategy="model_parallel", devices=("cpu",), chunk_size=rows)
    assert told[0].startswith(f"Strategy: {name}, {rows or CENTERS} centers at a time")
    assert told[0].endswith("--strategy model_parallel has one device here.")


def test_a_pin_that_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(sg.BudgetTooSmall, match="23 of 23 centers at a time within 200KiB"):
        build(options(**WIDE, strategy="single_gpu", budget="200KiB"))


def test_model_parallel_with_one_device_says_so(caplog: pytest.LogCaptureFixture) -> None:
    program = build(options(strategy="model_parallel", devices=("cpu",)))
    assert program.across is None
    assert "has one device here" in caplog.text


def test_the_table_has_the_documents_strategies_and_how_far_its_gradients_are() -> None:
    lines = table(options(dtype="float32"))
    assert [line["strategy"] for line in lines] == [
        "single_gpu", "model_parallel", "chunked", "gradient_accumulation"
    ]  # fmt: skip
    peaks = [line["predicted_peak_bytes"] for line in lines]
    assert peaks[0] == max(peaks)  # type: ignore[type-var]
    assert lines[1]["crossing_bytes"] == 5 * (2 + 2) * 4
    assert lines[0]["document_gradient_error"] == 0
    assert all(line["document_gradient_error"] > 0.01 for line in lines[1:])  # type: ignore[operator]


def test_a_run_is_judged_and_written(tmp_path: Path) -> None:
    program = build(options(niters=60, save=tmp_path / "kept"))
    list(run_epochs(program))
    metrics = program.evaluate()
    assert set(metrics) >= {"ism", "energy_distance", "memorisation_ratio", "ism_of_true_score", "score_error"}
    assert len(program.history) == 2 and program.iterations_done == [50, 60]
    written = program.write(tmp_path)
    assert {path.name for path in written} >= {"matching_loss.png", "samples.png", "density.png"}
    for path in written:
        if path.suffix == ".png":
            assert min(Image.open(path).size) > 200
    weights = torch.load(tmp_path / "factornet.pt", weights_only=True)
    kept = safetensors.torch.load_file(tmp_path / "kept" / "factornet.safetensors")
    assert all(torch.equal(weights[name], kept[name]) for name in weights)


def test_written_weights_and_centers_start_another_run(tmp_path: Path) -> None:
    first = build(options())
    list(run_epochs(first))
    first.write(tmp_path)
    again = build(
        options(load_model_path=tmp_path / "factornet.safetensors", load_centers_path=tmp_path / "centers.pt")
    )
    assert torch.equal(again.points.centers, first.points.centers)
    for mine, theirs in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(sg.BadInput, match="another network"):
        build(options(depth=3, load_model_path=tmp_path / "factornet.pt"))


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({"strategy": "single_gpu"}, (150,)), ({"accumulation_steps": 4}, (38, 38, 37, 37)),
        ({"accumulation_steps": 150}, (1,) * 150), ({"train_kernel_size": 150, "chunk_size": 120}, (120, 30)),
    ],
)  # fmt: skip
def test_chunks_are_those_of_the_centers_in_the_file(asked: dict[str, Any], sizes: Any, tmp_path: Path) -> None:
    path = tmp_path / "centers.pt"
    torch.save(torch.randn(150, 2, dtype=torch.float64), path)
    program = build(options(**{"train_kernel_size": 100, "load_centers_path": path} | asked))
    assert program.step.sizes_for(next(program.batches(0))) == sizes


@pytest.mark.parametrize(
    ("asked", "option"),
    [({"train_kernel_size": 149}, "train_kernel_size"), ({"accumulation_steps": 151}, "accumulation_steps")],
)
def test_what_does_not_go_with_the_centers_in_the_file_is_refused(
    asked: dict[str, Any], option: str, tmp_path: Path
) -> None:
    path = tmp_path / "centers.pt"
    torch.save(torch.randn(150, 2, dtype=torch.float64), path)
    with pytest.raises(sg.UsageError, match="there are 150 centers") as refused:
        build(options(**{"train_kernel_size": 100, "load_centers_path": path} | asked))
    assert refused.value.option == option


def test_a_resumed_program_goes_on_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_program, "EPOCH_ITERATIONS", 2)
    whole = build(options(niters=6))
    losses = [step.loss for epoch in run_epochs(whole) for step in epoch.steps]
    first = build(options(niters=6))
    early = next(run_epochs(first))
    second = build(options(niters=6))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_state(first.state(), first.best.weights())
    late = [step.loss for epoch in run_epochs(second) for step in epoch.steps]
    assert [*(step.loss for step in early.steps), *late] == losses
    assert second.history == whole.history


def test_a_run_that_stops_within_an_epoch_goes_on_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_program, "EPOCH_ITERATIONS", 3)
    assert_goes_on_within_an_epoch(lambda: build(options(niters=6)))


def test_training_samples_get_new_noise_and_batches_are_the_epochs_own() -> None:
    program = build(options(data="digits", train_samples_size=60))

    def samples(epoch: int) -> Tensor:
        return torch.stack([batch["samples"] for batch in program.batches(epoch)])

    assert torch.equal(samples(0), samples(0))
    assert len(samples(0).reshape(-1, 64).unique(dim=0)) == 4 * 5


@pytest.mark.parametrize("kind", ["one_cycle", "cosine", "constant"])
@pytest.mark.parametrize("niters", [1, 2, 40])
def test_the_rate_of_every_step_is_known_ahead(kind: Any, niters: int) -> None:
    rates = learning_rates(options(niters=niters, scheduler_type=kind, lr=0.5))
    assert len(rates) == niters
    assert min(rates) >= 0 and max(rates) == pytest.approx(0.5, rel=0.02)


def test_every_option_of_the_document_is_there() -> None:
    document = (
        "data depth niters batch_size hiddenunits lr save train_kernel_size train_samples_size test_samples_size "
        "stability weight_decay scheduler_type load_model_path load_centers_path strategy chunk_size accumulation_steps"
    ).split()
    assert set(document) <= {field.name for field in dataclasses.fields(ScoreKernelOptions)}


def test_a_run_counts_in_the_iterations_that_its_options_speak_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        "run score_kernel --data 8gaussians --train_kernel_size 9 --train_samples_size 60 --test_samples_size 6 "
        f"--hiddenunits 8 --depth 2 --batch_size 5 --device cpu --niters 120 --output {tmp_path / 'run'}"
    ).split()
    assert main([*line, "--steps", "70", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["iterations"] == 100
    assert "--steps 70 becomes 100: training can stop after iteration 100 first" in told.err
    assert main([*line[:2], "--output", line[-1], "--resume", "--steps", "120"]) == 0
    told = capsys.readouterr()
    assert "becomes" not in told.err
    assert "resuming after iteration 100" in told.err and "iteration 120: loss" in told.err
    assert "after 120 iterations" in told.out
    for text in (told.out, told.err, (tmp_path / "run" / "report.md").read_text()):
        assert "epoch" not in text


def test_training_stops_after_the_fifty_iterations_that_hold_the_last_one_asked_for() -> None:
    training = RecipeTraining(RECIPE, build(options(niters=170)))
    assert (training.unit, training.total, training.done) == ("iteration", 170, 0)
    for asked, stops in ((400, 170), (101, 150), (100, 100), (1, 50)):
        training.limit(asked)
        assert training.total == stops


@pytest.mark.parametrize(("count", "marked"), [(1, True), (5, True), (200, False)])
def test_a_curve_of_few_points_marks_them(count: int, marked: bool) -> None:
    figure = pictures.draw_losses([50 * (n + 1) for n in range(count)], [(-1.0, -2.0)] * count)
    assert [line.get_marker() == "o" for line in figure.axes[0].lines[:2]] == [marked, marked]


def test_no_chart_hides_data_under_its_legend_or_leaves_an_axis_without_a_name() -> None:
    draws = np.random.default_rng(0)
    points = {count: draws.normal(size=(30, count)) for count in (2, 6)}
    far = np.concatenate([points[2], [[50.0, 0.0]]])
    figures = [
        pictures.draw_losses([50, 100], [(-1.0, -2.0), (-3.0, -2.5)], optimum=-4.0),
        pictures.draw_samples(far, points[2], points[2][:3]),
        pictures.draw_samples(points[6], points[6], points[6][:3]),
        pictures.draw_density(draws.normal(size=(20, 20)), 3.0, points[2], points[2][:3]),
    ]
    for figure in figures:
        assert len(figure.legends) == 1 and not any(axes.get_legend() for axes in figure.axes)
        assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)
    # What lies outside is counted, and that there are more coordinates is said.
    assert figures[1].axes[1].get_title(loc="left").endswith("1 outside")
    assert "first 2 of 6" in figures[2].get_suptitle()
    _, validation, optimum = figures[0].axes[0].lines[:3]
    assert validation.get_ydata()[1] == -2.5 and optimum.get_ydata()[0] == -4.0
