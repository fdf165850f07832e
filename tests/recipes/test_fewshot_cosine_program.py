"""The program: options, plans, episodes, judging, pictures, resuming; what it refuses it refuses by name."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import rich.console
import safetensors.torch
import torch
from PIL import Image

import samegrad as sg
from samegrad.cli.tables import DrawnTable
from samegrad.measure import counters
from samegrad.recipes import run_epochs
from samegrad.recipes.fewshot_cosine import pictures
from samegrad.recipes.fewshot_cosine.backbones import make_backbone
from samegrad.recipes.fewshot_cosine.data import Episodes, HeldImages
from samegrad.recipes.fewshot_cosine.judging import Judged, accuracies, judged_episodes
from samegrad.recipes.fewshot_cosine.model import EpisodeShape, FewShotTransformer, Head
from samegrad.recipes.fewshot_cosine.options import FewShotOptions
from samegrad.recipes.fewshot_cosine.recipe import FewShotProgram, build, table
from samegrad.recipes.fewshot_cosine.stepping import amp_dtype, chunk_sizes

from .resuming import assert_goes_on_within_an_epoch

SMALL = FewShotOptions(
    dataset="digits", n_way=3, k_shot=2, n_query=3, n_episode=3, num_epoch=2, test_iter=4, image_size=16, device="cpu",
    dtype="float64", lambda_V=0.5, lambda_C=0.1, dynamic_accumulation=False,
)  # fmt: skip


def changed(**values: Any) -> FewShotOptions:
    return dataclasses.replace(SMALL, **values)


def levers(program: FewShotProgram) -> dict[str, dict[str, Any]]:
    assert program.step.plan is not None
    return program.step.plan.levers


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, 2), ({"backbone": "ResNet18"}, 4), ({"gradient_accumulation_steps": 3}, 3),
        ({"gradient_accumulation_steps": 1}, 1), ({"use_gradient_checkpointing": True}, 1),
    ],
)  # fmt: skip
def test_chunks_are_the_documents_unless_somebody_asks(given: dict[str, Any], steps: int) -> None:
    assert FewShotOptions(**given).steps == steps


def test_the_documents_chunks_are_had_by_name_and_said() -> None:
    program = build(SMALL)
    assert levers(program) == {"exact_batchnorm": {"rows": [8, 7]}}
    assert any("as the document has them for Conv4" in line for line in program.describe())
    assert build(changed(gradient_accumulation_steps=4)).step.plan.levers["exact_batchnorm"]["rows"] == [4, 4, 4, 3]  # type: ignore[union-attr]


def test_amp_is_on_by_default_and_off_where_somebody_says_so() -> None:
    cpu = torch.device("cpu")
    assert amp_dtype(FewShotOptions(), cpu) == "bfloat16"
    assert amp_dtype(FewShotOptions(dtype="float16"), cpu) == "float16"
    for given in ({"use_amp": False}, {"dtype": "float32"}, {"dtype": "float64"}):
        assert amp_dtype(FewShotOptions(**given), cpu) is None  # type: ignore[arg-type]
    program = build(changed(dtype="float16"))
    assert levers(program)["autocast"]["dtype"] == "float16" and program.scaler is not None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_amp_trains(dtype: str) -> None:
    results = list(run_epochs(build(changed(dtype=dtype))))
    assert len(results) == 2 and math.isfinite(results[-1].loss)


def test_a_budget_decides_the_chunks_and_says_so_in_the_plan() -> None:
    program = build(changed(budget="14MiB"))
    assert set(levers(program)) & {"exact_batchnorm", "recompute"}
    plan = program.step.plan
    assert plan is not None and plan.budget is not None and plan.signature


@pytest.mark.slow
def test_a_budget_that_all_images_fit_needs_no_lever_and_pins_that_do_not_fit_are_refused() -> None:
    assert levers(build(changed(budget="64MiB"))) == {}
    pinned = levers(build(changed(budget="64MiB", gradient_accumulation_steps=3)))
    assert pinned["exact_batchnorm"]["rows"] == [5, 5, 5]
    with pytest.raises(sg.BudgetTooSmall, match="--gradient_accumulation_steps 1 within"):
        build(changed(budget="14MiB", gradient_accumulation_steps=1))


@pytest.mark.parametrize(("free_bytes", "dtype"), [(2**30, "float64"), (2**30, "bfloat16"), (14 * 2**20, "float64")])
def test_without_a_budget_free_memory_decides(
    free_bytes: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "free_now", lambda device: (free_bytes, "as the test has it"))
    program = build(changed(dynamic_accumulation=True, dtype=dtype))
    plan = program.step.plan
    assert plan is not None and plan.budget is not None and "free now" in plan.budget.source
    # Where all images fit, chunks would only cost their second forward.
    saving = levers(program).keys() - {"autocast"}
    assert bool(saving) is (free_bytes < 2**30)


def test_what_somebody_asks_for_is_not_measured_and_not_left() -> None:
    for given in ({"gradient_accumulation_steps": 3}, {"use_gradient_checkpointing": True}):
        options = changed(dynamic_accumulation=True, **given)
        assert not options.plan_is_chosen and options.for_card_elsewhere() == dataclasses.replace(
            options, dynamic_accumulation=False
        )
    assert changed(dynamic_accumulation=True).plan_is_chosen and changed(budget="1GiB").plan_is_chosen
    assert not changed(budget="1GiB").for_card_elsewhere().plan_is_chosen


def test_training_is_the_plain_loop() -> None:
    program = build(changed(optimization="SGD", learning_rate=0.05))
    twin = copy.deepcopy(program.model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-5)
    from samegrad.recipes.fewshot_cosine.objective import EpisodeLoss

    loss_fn, losses = EpisodeLoss(twin.head, twin.shape, weights=(1.0, 0.5, 0.1)), []
    for epoch in range(2):
        for images in program.batches(epoch):
            loss = loss_fn(twin.backbone(images), images)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    found = [step.loss for epoch in run_epochs(program) for step in epoch.steps]
    assert found == pytest.approx(losses, rel=1e-9)


def test_images_have_the_size_that_is_asked_for() -> None:
    program = build(changed(image_size=36))
    assert next(iter(program.batches(0))).shape == (15, 1, 36, 36)
    assert program.model.head.attention.leave.out_features == 64 * 2 * 2


def test_an_epochs_episodes_are_its_own_and_the_same_again() -> None:
    program = build(SMALL)
    first, again, other = (torch.stack(list(program.batches(epoch))) for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    moved = torch.stack(list(build(changed(train_aug=True)).batches(0)))
    assert moved.shape == first.shape and not torch.equal(moved, first)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one() -> None:
    straight = build(SMALL)
    losses = [result.loss for result in run_epochs(straight)]
    first = build(SMALL)
    next(run_epochs(first))
    state = json.loads(json.dumps(first.state()))
    second = build(SMALL)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_state(state, first.best.weights())
    assert [result.loss for result in run_epochs(second)] == losses[1:]
    assert second.validations == straight.validations and len(second.validations) == 2
    for one, other in zip(second.model.state_dict().values(), straight.model.state_dict().values()):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_run_that_stops_within_an_epoch_goes_on_there() -> None:
    assert_goes_on_within_an_epoch(lambda: build(SMALL))


@pytest.mark.slow
def test_several_episodes_a_step_are_fewer_steps() -> None:
    program = build(changed(episodes_per_step=2, num_epoch=1))
    [result] = run_epochs(program)
    assert [step.batch_rows for step in result.steps] == [30, 15]


def told_apart_by_brightness() -> tuple[FewShotTransformer, Episodes]:
    shape = EpisodeShape(n_way=2, k_shot=2, n_query=3)
    torch.manual_seed(0)
    model = FewShotTransformer(make_backbone("Conv4", channels=1), Head(shape, 64, method="FSCT_cosine"), shape)
    shades = tuple(torch.full((6, 1, 16, 16), shade, dtype=torch.uint8) for shade in (20, 120, 250))
    classes = HeldImages(names=("dark", "grey", "light"), pictures=shades, side=16)
    return model, Episodes(classes=classes, n_way=2, per_class=5, seed=(0,))


def test_judging_leaves_statistics_and_mode_and_does_not_depend_on_the_rows_at_a_time() -> None:
    model, episodes = told_apart_by_brightness()
    before = copy.deepcopy(model.state_dict())
    whole, single = (
        list(judged_episodes(model, episodes, 3, rows_at_a_time=rows, amp=None)) for rows in (10, 3)
    )  # fmt: skip
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for one, other in zip(whole, single):
        assert torch.equal(one.of_model, other.of_model)
        # Shades are told apart by the nearest mean, whatever the model has learnt.
        assert one.of_pixels.tolist() == [[0] * 3, [1] * 3]
    assert accuracies(whole)["prototype_accuracy"] == 1.0


def test_accuracies_come_with_the_interval_of_the_field() -> None:
    def judged(right: int) -> Judged:
        predicted = torch.tensor([[0, 0], [1, 1]])
        predicted.view(-1)[right:] = 1 - predicted.view(-1)[right:]
        return Judged(
            images=torch.zeros(2, 3, 1, 1, 1), names=["a", "b"], of_model=predicted, of_pixels=predicted,
            of_embeddings=predicted,
        )  # fmt: skip

    metrics = accuracies([judged(4), judged(2), judged(3)])
    assert metrics["accuracy"] == pytest.approx(0.75)
    deviation = torch.tensor([1.0, 0.5, 0.75], dtype=torch.float64).std(correction=1)
    assert metrics["accuracy_ci95"] == pytest.approx(1.96 * float(deviation) / math.sqrt(3))
    assert metrics["episodes"] == 3


def test_weights_and_pictures_are_written_and_nothing_is_changed_by_it(tmp_path: Path) -> None:
    program = build(changed(num_epoch=1))
    list(run_epochs(program))
    before = copy.deepcopy(program.model.state_dict())
    files = {path.name: path for path in program.write(tmp_path)}
    assert set(files) == {
        "fewshot_cosine.safetensors", "fewshot_cosine.pt", "episode.png", "accuracy.png", "memory_before_and_after.png"
    }  # fmt: skip
    after = program.model.state_dict()
    for weights in (
        after, torch.load(files["fewshot_cosine.pt"], weights_only=True),
        safetensors.torch.load_file(files["fewshot_cosine.safetensors"]),
    ):  # fmt: skip
        assert weights.keys() == before.keys() and all(torch.equal(weights[name], before[name]) for name in before)
    for name in ("episode.png", "accuracy.png", "memory_before_and_after.png"):
        with Image.open(files[name]) as picture:
            assert min(picture.size) > 150
    metrics = program.evaluate()
    assert metrics["episodes"] == 4 and 0 <= metrics["accuracy"] <= 1
    assert all(p.grad is None for p in program.model.parameters())


def test_before_and_after_are_real_steps_and_the_document_holds_more() -> None:
    program = build(changed(gradient_accumulation_steps=5, use_amp=False))
    as_written, one_forward, as_planned = program.courses()
    assert as_written.peak_bytes > 1.3 * one_forward.peak_bytes > as_planned.peak_bytes
    assert max(live for _, _, live in as_planned.points) == as_planned.peak_bytes
    figure = pictures.draw_courses([as_written, one_forward, as_planned])
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [
        len(course.points) for course in (as_written, one_forward, as_planned)
    ]


@pytest.mark.parametrize("validation", [[0.4], [0.4, 0.5, 0.6]])
def test_the_accuracies_are_told_beside_their_picture_not_over_it(validation: list[float]) -> None:
    names = ("accuracy", "prototype_accuracy", "embedding_prototype_accuracy")
    metrics = {name: 0.7 + 0.1 * place for place, name in enumerate(names)} | {f"{name}_ci95": 0.01 for name in names}
    figure = pictures.draw_accuracy(validation, metrics=metrics, ways=3, split="val")
    [axes], [legend] = figure.axes, figure.legends
    figure.draw_without_rendering()
    assert axes.get_title(loc="left") == "3-way accuracy on validation classes"
    assert axes.get_legend() is None and not legend.get_window_extent().overlaps(axes.get_window_extent())
    told = [text.get_text() for text in legend.get_texts()]
    assert "test classes 0.700 ± 0.010" in told and "nearest prototype of embeddings 0.900 ± 0.010" in told
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [*range(1, len(validation) + 1)]


def test_the_title_of_the_smallest_episode_is_not_cut() -> None:
    predicted = torch.tensor([[0], [0]])
    judged = Judged(
        images=torch.rand(2, 2, 1, 8, 8), names=["a", "b"], of_model=predicted, of_pixels=predicted,
        of_embeddings=predicted,
    )  # fmt: skip
    figure = pictures.draw_episode(judged, 1, split="novel")
    figure.draw_without_rendering()
    [title] = figure.texts
    told = title.get_window_extent()
    assert figure.bbox.x0 <= told.x0 and told.x1 <= figure.bbox.x1 and "50% of 2 queries" in title.get_text()


def test_the_table_has_the_documents_figures_beside_measured_ones() -> None:
    rows = table(changed(lambda_V=0.0, lambda_C=0.0, gradient_accumulation_steps=3))
    lines = list(rows)
    assert len(rows) == len(lines)
    assert [line["peak_bytes"] for line in lines if line["origin"] == "stated"] == [14e9, 6e9]
    measured = {line["formulation"]: line for line in lines if line["origin"] == "measured"}
    assert list(measured) == ["the document", "one forward, Gram", "and 2 chunks", "as run"]
    peaks: list[Any] = [line["peak_bytes"] for line in measured.values()]
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3]
    assert all(line["step_seconds"] for line in measured.values())


def test_the_table_fits_a_terminal_and_no_word_of_it_is_cut() -> None:
    figures = {"forward_bytes": 2**30 - 1, "backward_bytes": 2**30 - 1, "peak_bytes": 2**30 - 1}
    told = {**figures, "step_seconds": 0.0999, "reserved_bytes": 2**30 - 1}
    lines: list[dict[str, Any]] = [
        {"formulation": "one forward, Gram, out of memory", "origin": "measured", **told},
        {"formulation": "AMP and 4 chunks", "origin": "predicted, NVIDIA H100 80GB HBM3", **figures},
    ]
    screen = io.StringIO()
    rich.console.Console(width=80, file=screen).print(DrawnTable(lines))
    drawn = screen.getvalue()
    for word in " ".join([*told, *(f"{line['formulation']} {line['origin']}" for line in lines)]).split():
        assert word.removesuffix("_bytes").removesuffix("_seconds") in drawn
    assert "…" not in drawn and drawn.count("GiB") == 7


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"n_way": 1}, "n_way"), ({"k_shot": 0}, "k_shot"), ({"learning_rate": math.nan}, "learning_rate"),
        ({"lambda_C": -1.0}, "lambda_C"), ({"lambda_I": 0.0}, "lambda_I"), ({"dtype": "bfloat"}, "dtype"),
        ({"gradient_accumulation_steps": 106}, "gradient_accumulation_steps"),
        ({"gradient_accumulation_steps": 2, "use_gradient_checkpointing": True}, "gradient_accumulation_steps"),
        ({"precision": "backbone.layer4"}, "precision"), ({"precision": "head.nose=float32"}, "precision"),
        ({"precision": "backbone.layer4=float16"}, "precision"), ({"num_epoch": 0}, "num_epoch"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_its_options_name(given: dict[str, Any], option: str) -> None:
    with pytest.raises(sg.UsageError) as refused:
        FewShotOptions(**given)
    assert refused.value.option == option


def test_what_the_data_cannot_give_is_refused_before_training() -> None:
    with pytest.raises(sg.UsageError, match=r"4 to train on \(base\); 3 to validate on \(val\); 3 to judge") as refused:
        build(changed(n_way=4))
    assert "--n_way 4" in refused.value.asked and refused.value.do == "ask for at most --n_way 3"
    assert refused.value.option == "n_way"
    with pytest.raises(sg.UsageError, match=r"of which \d have 180 images or more") as refused:
        build(changed(k_shot=170, n_query=10))
    assert "lower --k_shot or --n_query" in refused.value.do
    with pytest.raises(sg.UsageError, match="do not pass the backbone"):
        build(changed(image_size=8))


def test_weights_of_an_extractor_are_loaded_and_others_refused(tmp_path: Path) -> None:
    torch.manual_seed(5)
    backbone = make_backbone("Conv4", channels=1)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pt")
    loaded = build(changed(FETI=tmp_path / "backbone.pt")).model.backbone
    assert torch.equal(loaded.layer2[0].weight, backbone.layer2[0].weight.double())
    torch.save(make_backbone("Conv6", channels=1).state_dict(), tmp_path / "other.pt")
    with pytest.raises(sg.BadInput, match="--FETI"):
        build(changed(FETI=tmp_path / "other.pt"))


def test_chunks_are_even_and_complete() -> None:
    assert chunk_sizes(105, 4) == [27, 26, 26, 26] and chunk_sizes(3, 3) == [1, 1, 1]


def test_the_defaults_of_packaged_and_of_real_data() -> None:
    offline = FewShotOptions()
    real = FewShotOptions(dataset="miniImagenet", backbone="ResNet34")
    assert (real.epochs, real.episodes, real.image_side, real.channels) == (50, 200, 224, 3)
    assert (offline.image_side, offline.channels, offline.episode_images) == (28, 1, 105)
    assert FewShotOptions(dataset="CIFAR").image_side == 64
