"""The program: logical batches, stages, the challenge's scores, resumed runs, files and refusals."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import samegrad as sg
from samegrad.recipes import run_epochs
from samegrad.recipes.vq_spectrogram import data, pictures, results, scores, sources
from samegrad.recipes.vq_spectrogram import table as table_module
from samegrad.recipes.vq_spectrogram.model import Outputs
from samegrad.recipes.vq_spectrogram.options import VQSpectrogramOptions
from samegrad.recipes.vq_spectrogram.recipe import VQSpectrogramProgram, build, table
from samegrad.recipes.vq_spectrogram.schedule import stage_of
from samegrad.recipes.vq_spectrogram.sources import open_splits

from .resuming import assert_goes_on_within_an_epoch

TRAINED, PER_LABEL = 6, 3  # clips of each of two machine ids


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log-mels of a fan's layout: normal clips hum in one band, anomalous ones in another, too."""
    folder, draws = tmp_path_factory.mktemp("mels"), np.random.default_rng(0)

    def clip(id_: int, anomalous: bool) -> Any:
        made = draws.normal(0, 1, (data.BANDS, 40))
        made[10 + id_] += 6
        if anomalous:
            made[40:44, ::3] += 8
        return made.astype(np.float32)

    for split, counts in (("train", (("normal", TRAINED),)), ("test", (("normal", PER_LABEL), ("anomaly", PER_LABEL)))):
        names = [f"{label}_id_{id_:02d}_{n:08d}" for id_ in (0, 2) for label, count in counts for n in range(count)]
        clips = [data.clip_of(name, "fan") for name in names]
        held = data.HeldClips(clips, [clip(int(c.machine[-2:]), c.anomalous) for c in clips])
        data.save_clips(held, folder, "fan", split)
    return folder


@pytest.fixture
def options(root: Path) -> VQSpectrogramOptions:
    return VQSpectrogramOptions(
        data_root=root, machine_type="fan", channels=(2, 3, 4), latent_dim=4, num_codes=5, patch_len=16, stride=8,
        n_patches=2, batch_size=2, gradient_accumulation_steps=2, epochs=5, device="cpu", lr_warmup_epochs=2,
    )  # fmt: skip


def changed(options: VQSpectrogramOptions, **values: Any) -> VQSpectrogramOptions:
    return dataclasses.replace(options, **values)


def same_state(one: VQSpectrogramProgram, other: VQSpectrogramProgram) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values())
    return all(torch.equal(a, b) for a, b in pairs)


def test_accumulation_makes_logical_batches_and_pins_the_rows(options: VQSpectrogramOptions) -> None:
    program = build(options)
    batches = list(program.batches(0))
    # 12 clips less one of each id to validate with; the last group is short and divided by its own size.
    assert [len(batch["machine"]) for batch in batches] == [4, 4, 2]
    assert program.step.sizes_for(batches[0]) == (2, 2)
    assert program.step.plan is not None
    assert program.step.plan.levers == {"exact_batchnorm": {"rows": 2, "keep_every": 1}}
    assert program.step.plan.knob_origins["exact_batchnorm.rows"] is sg.KnobOrigin.PINNED


def test_three_epochs_of_short_and_long_groups_are_those_of_whole_batches(options: VQSpectrogramOptions) -> None:
    wanted = changed(options, dtype="float64", epochs=3)
    chunked = build(wanted)
    whole = build(changed(wanted, batch_size=4, gradient_accumulation_steps=1, use_gradient_checkpointing=True))
    losses = [[result.loss for result in _seeded(program)] for program in (chunked, whole)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-9)
    for name, tensor in chunked.model.state_dict().items():
        torch.testing.assert_close(tensor, whole.model.state_dict()[name], rtol=0, atol=1e-8)


def _seeded(program: VQSpectrogramProgram) -> list[Any]:
    torch.manual_seed(0)
    return list(run_epochs(program))


@pytest.mark.slow
def test_pinned_rows_hold_within_a_budget_or_are_refused_by_name(options: VQSpectrogramOptions) -> None:
    program = build(changed(options, budget="64MiB"))
    assert program.step.sizes_for(next(iter(program.batches(0)))) == (2, 2)
    with pytest.raises(sg.BudgetTooSmall, match="--gradient_accumulation_steps 2 within 100KiB") as refused:
        build(changed(options, budget="100KiB"))
    assert refused.value.option == "gradient_accumulation_steps"


@pytest.mark.slow
def test_checkpointing_is_pinned_within_a_budget_that_the_plain_step_fits(options: VQSpectrogramOptions) -> None:
    whole = changed(options, gradient_accumulation_steps=1, budget="64MiB", use_gradient_checkpointing=True)
    program = build(whole)
    assert program.step.plan is not None and "recompute" in program.step.plan.levers
    assert sg.verify_step(program.step, next(iter(program.batches(0)))).same


def test_stages_warm_ups_and_the_frozen_codebook(options: VQSpectrogramOptions) -> None:
    wanted = changed(options, epochs=10, commitment_warmup_epochs=4)
    stages = [stage_of(wanted, epoch) for epoch in range(10)]
    assert [s.heads_scale for s in stages] == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert [s.codebook_learns for s in stages] == [True] * 8 + [False] * 2
    assert [s.vq_scale for s in stages[:5]] == [0.25, 0.4375, 0.625, 0.8125, 1]
    assert [s.lr for s in stages[:3]] == [0.5e-3, 1e-3, 1e-3]
    one_stage = [stage_of(changed(wanted, no_staged_training=True), epoch) for epoch in range(10)]
    assert all(s.heads_scale == 1 and s.codebook_learns for s in one_stage)


def test_a_frozen_codebook_stays_while_the_rest_trains(options: VQSpectrogramOptions) -> None:
    program = build(changed(options, phase1_frac=0.0, phase2_frac=0.4, phase3_frac=0.6))
    seen = []
    for result in run_epochs(program):
        seen.append((result.epoch, copy.deepcopy(program.model.state_dict())))
    (_, learnt), (_, frozen), *_, (_, last) = seen[1:]
    assert torch.equal(frozen["codebook.sums"], learnt["codebook.sums"])
    assert torch.equal(last["codebook.sums"], learnt["codebook.sums"])
    assert not torch.equal(last["encoder.0.0.weight"], learnt["encoder.0.0.weight"])
    assert not torch.equal(seen[0][1]["codebook.sums"], learnt["codebook.sums"])


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(options: VQSpectrogramOptions) -> None:
    straight = build(options)
    torch.manual_seed(0)
    losses = [result.loss for result in run_epochs(straight)]
    first = build(options)
    torch.manual_seed(0)
    for result in run_epochs(first):
        if result.epoch == 1:
            break
    generator, state = torch.get_rng_state(), json.loads(json.dumps(first.state()))
    second = build(options)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_state(state, first.best.weights())
    torch.set_rng_state(generator)
    rest = list(run_epochs(second))
    assert [result.epoch for result in rest] == [2, 3, 4]
    assert [result.loss for result in rest] == losses[2:]
    assert same_state(second, straight)


@pytest.mark.slow
def test_a_run_that_stops_within_an_epoch_goes_on_there(options: VQSpectrogramOptions) -> None:
    assert_goes_on_within_an_epoch(lambda: build(options))


def test_validation_is_the_mean_over_clips_in_eval_mode_and_changes_nothing(options: VQSpectrogramOptions) -> None:
    program = build(options)
    before = copy.deepcopy(program.model.state_dict())
    value = program.validate()
    assert value == program.validate() and all(part.training for part in program.model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.model.state_dict().items())
    clips = program.splits.validation
    singly = []
    for index in range(len(clips.clips)):
        batch = program._batch(clips, [index], key=(program.options.random_seed, 1))
        with scores.judging(program.model):
            singly.append(float(program.objective.__class__(1, 1, 0.5, 0.5)(program.run(batch["patches"]), batch)))
    assert value == pytest.approx(np.mean(singly), rel=1e-5)


def held(machines: list[str], anomalous: list[bool]) -> data.HeldClips:
    clips = [data.Clip(f"clip {i}", machine, label) for i, (machine, label) in enumerate(zip(machines, anomalous))]
    return data.HeldClips(clips, [np.zeros((64, 40), np.float32)] * len(clips))


def test_scores_are_averaged_over_machine_ids_and_not_pooled() -> None:
    draws = np.random.default_rng(1)
    machines, labels = ["fan 00"] * 20 + ["fan 02"] * 20, ([False] * 10 + [True] * 10) * 2
    values = draws.normal(size=40) + np.array(labels) + 5 * np.array([m == "fan 02" for m in machines])
    judged = scores.score_machines(held(machines, labels), values)
    expected = [
        (roc_auc_score(labels[s], values[s]), roc_auc_score(labels[s], values[s], max_fpr=0.1))
        for s in (slice(0, 20), slice(20, 40))
    ]
    assert [(m.auc, m.pauc) for m in judged] == expected
    assert scores.mean_scores(judged) == pytest.approx(np.mean(expected, axis=0))
    assert roc_auc_score(labels, values) != pytest.approx(scores.mean_scores(judged)[0], abs=0.02)
    with pytest.raises(ValueError, match="all test clips of fan 00 are normal"):
        scores.score_machines(held(["fan 00"], [False]), np.zeros(1))


def judged_codes(codes: list[Any]) -> scores.Judged:
    """Clips of two patches with two places each."""
    kept = np.array(codes, dtype=np.int16).reshape(len(codes), 2, 2, 1)
    return scores.Judged(errors=np.zeros(len(codes)), codes=kept, levels=np.zeros(len(codes)))


def test_code_scores_are_negative_log_likelihoods_at_the_place_under_the_machines_own_histogram() -> None:
    train, test = held(["a 0", "a 0", "a 1"], [False] * 3), held(["a 0", "a 1"], [False, True])
    trained = judged_codes([[[0, 1], [0, 1]], [[0, 2], [2, 1]], [[2, 2], [2, 2]]])
    judged = judged_codes([[[0, 1], [1, 1]], [[0, 2], [2, 1]]])
    found = scores.code_scores(test, judged, train, trained, 3)
    # Of machine 0, first place: codes 0, 0, 0, 2; second place: 1, 1, 2, 1. Each counts once more than seen.
    first, second, other = np.array([4, 1, 2]) / 7, np.array([1, 4, 2]) / 7, np.array([1, 1, 3]) / 5
    expected = [[first[0], second[1], first[1], second[1]], [other[0], other[2], other[2], other[1]]]
    np.testing.assert_allclose(found, -np.log(expected).mean(axis=1))


def test_perplexity_is_of_all_clips_together() -> None:
    usage = scores.code_usage(judged_codes([[[0, 0], [0, 0]], [[1, 1], [1, 1]]]).codes, 4)
    assert usage.tolist() == [4, 4, 0, 0] and scores.perplexity(usage) == pytest.approx(2)
    assert scores.perplexity(np.full(8, 5)) == pytest.approx(8)


def test_clips_are_judged_by_their_own_error_whatever_runs_beside_them() -> None:
    clips = held(["a 0"] * 5, [False] * 5)
    clips.spectrograms = [np.random.default_rng(i).normal(size=(64, 40)).astype(np.float32) for i in range(5)]
    cut = data.Patching(16, 8, 2, data.Normalisation.of(clips))

    def run(patches: torch.Tensor) -> Outputs:
        codes = torch.arange(patches.shape[0] * 4).reshape(-1, 2, 2, 1) % 3
        return Outputs(patches * 0.5, patches, patches, codes, patches, patches)

    one, all_ = (scores.judge_clips(run, cut, clips, rows=rows) for rows in (2, 5))
    np.testing.assert_array_equal(one.errors, all_.errors)
    expected = [(cut.plain(clips, [i]).double() / 2).square().mean().item() for i in range(5)]
    np.testing.assert_allclose(one.errors, expected, rtol=1e-6)
    assert all_.codes.shape == (5, 2, 2, 1)
    np.testing.assert_allclose(one.levels, [s.mean() for s in clips.spectrograms], rtol=1e-4, atol=1e-6)


def test_the_program_finds_the_anomalies_of_its_clips_by_their_names(
    options: VQSpectrogramOptions, tmp_path: Path
) -> None:
    program = build(options)
    list(run_epochs(program))
    metrics = program.evaluate()
    assert metrics["auc"] == metrics["auc_reconstruction"] and metrics["test_clips"] == 4 * PER_LABEL
    assert metrics["auc"] > 0.9 and {"auc fan 00", "auc fan 02", "pauc", "auc_codes", "auc_mean_energy"} <= set(metrics)
    files = {path.name: path for path in program.write(tmp_path)}
    weights = torch.load(files["vq_spectrogram.pt"], weights_only=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in program.model.state_dict().items())
    assert weights.keys() == safetensors.torch.load_file(files["vq_spectrogram.safetensors"]).keys()
    with files["scores.csv"].open() as file:
        lines = list(csv.DictReader(file))
    labels, values = [int(line["anomalous"]) for line in lines], [float(line["reconstruction"]) for line in lines]
    mine = [[i for i, line in enumerate(lines) if line["machine"] == machine] for machine in ("fan 00", "fan 02")]
    per_id = [roc_auc_score([labels[i] for i in places], [values[i] for i in places]) for places in mine]
    assert np.mean(per_id) == pytest.approx(metrics["auc"])
    assert all(line["clip"].startswith("anomaly") == bool(int(line["anomalous"])) for line in lines)
    assert files["anomaly_score_fan_id_02.csv"].read_text().splitlines()[0].startswith("anomaly_id_02_00000000.wav,")
    for name in ("spectrograms", "score_histograms", "roc", "codebook_usage"):
        with Image.open(files[f"{name}.png"]) as picture:
            assert picture.width > 400 and picture.height > 300
    again = changed(options, norm_stats_path=files["norm_stats.npz"])
    found, expected = (made.splits.patching.normalisation for made in (build(again), program))
    np.testing.assert_array_equal([found.mean, found.std], [expected.mean, expected.std])


@pytest.mark.parametrize(
    ("machine", "upwards", "along"), [("fan", "mel band", "time in the clip, s"), ("faces", "pixel", "pixel")]
)
def test_pictures_name_their_axes(options: VQSpectrogramOptions, machine: str, upwards: str, along: str) -> None:
    chosen = options if machine == "fan" else VQSpectrogramOptions(machine_type=machine)
    scales = open_splits(chosen).scales
    assert (scales.upwards, scales.along) == (upwards, along)
    blank, spans = np.zeros((4, 8)), ["0–4", "6–10"]
    shown = pictures.Shown(
        title=machine, upwards=upwards, along=along, spans=spans, patches=blank, reconstructed=blank
    )
    axes = pictures.draw_spectrograms([shown]).axes[0]
    assert axes.get_ylabel() == f"{machine}\n{upwards}" and axes.get_xlabel() == along
    assert [label.get_text() for label in axes.get_xticklabels()] == spans
    # Between two patches that lie side by side time jumps.
    assert [line.get_xdata()[0] for line in axes.lines] == [3.5]


def test_patches_that_are_shown_are_spread_over_the_clip_and_told_by_their_times() -> None:
    assert results.shown_places(range(0, 256, 16)) == [0, 5, 10, 15]
    # A clip with fewer patches than are asked for brings some of them twice.
    assert results.shown_places([0, 0, 32, 32]) == [0, 2]
    assert results.span_in_words(80, 64, sources.OF_SOUND) == "2.6–4.6"
    assert results.span_in_words(0, 64, sources.OF_PICTURES) == "0–63"


def test_curves_and_bars_show_the_numbers_they_are_of() -> None:
    values, labels = np.array([0.0, 1.0, 2.0, 3.0]), [False, True, False, True]
    judged = [scores.MachineScore("fan 00", 0.75, 0.6)]
    machines = [machine for machine in ("fan 00", "fan 02") for _ in values]
    judged.append(scores.MachineScore("fan 02", 1.0, 1.0))
    both = np.concatenate([values, [0.0, 1.0, 0.5, 2.0]])
    roc, other = pictures.draw_roc(both, labels * 2, machines, judged, "reconstruction").axes
    # A panel each: curves of several machines lie on each other.
    np.testing.assert_array_equal(other.lines[1].get_xydata()[-2:], [[0, 1], [1, 1]])
    np.testing.assert_array_equal(roc.lines[1].get_xydata(), [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]])
    assert roc.get_title(loc="left") == "fan 00\nAUC 0.750, pAUC 0.600"
    histogram = pictures.draw_histograms({"reconstruction": values}, labels).axes[0]
    counts = [patch.get_data().values for patch in histogram.patches]
    assert [np.nansum(bars) for bars in counts] == [2, 2] and {len(bars) for bars in counts} == {pictures.BINS}
    usage = pictures.draw_codebook(np.array([1, 3, 0]), np.array([2, 0, 2])).axes[0]
    np.testing.assert_allclose([patch.get_data().values for patch in usage.patches], [[75, 25, 0], [np.nan, 50, 50]])


@pytest.mark.parametrize(
    ("values", "name", "found"),
    [
        ({"batch_size": 0}, "batch_size", "at least 1"),
        ({"patch_len": 20}, "patch_len", "halves it three times"),
        ({"phase1_frac": 0.5}, "phase1_frac", "1.3 of the epochs"),
        ({"lr": float("nan")}, "lr", "positive"),
        ({"subset_fraction": 0.0}, "subset_fraction", "between 0 and 1"),
        ({"dtype": "float65"}, "dtype", "did you mean 'float64'"),
        ({"dtype": "float64", "use_amp": True}, "dtype", "half precision"),
        ({"machine_type": "fann"}, "machine_type", "did you mean 'fan'"),
    ],
)
def test_a_wrong_value_is_refused_by_its_options_name(values: dict[str, Any], name: str, found: str) -> None:
    with pytest.raises(sg.UsageError, match=found) as refused:
        VQSpectrogramOptions(**values)
    assert refused.value.option == name


def test_a_real_machine_without_recordings_is_refused_with_the_layout_and_the_offline_name() -> None:
    with pytest.raises(sg.UsageError, match=r"(?s)nothing is put in their place.*fan/\{train,test\}.*generated_fan"):
        VQSpectrogramOptions(machine_type="fan")


def test_folders_that_are_not_of_the_layout_are_refused(options: VQSpectrogramOptions, tmp_path: Path) -> None:
    with pytest.raises(sg.BadInput, match=r"(?s)no such folder.*normal,anomaly"):
        build(changed(options, data_root=tmp_path))
    with pytest.raises(sg.BadInput, match="hold no patch of 64"):
        build(changed(options, patch_len=64))


def test_defaults_are_the_documents_with_recordings_and_smaller_without(root: Path) -> None:
    real, offline = VQSpectrogramOptions(data_root=root), VQSpectrogramOptions()
    assert (real.batch_clips, real.clip_patches, real.patch_stride, real.total_epochs) == (32, 16, 16, 50)
    assert (offline.batch_clips, offline.clip_patches, offline.patch_stride, offline.total_epochs) == (12, 4, 32, 12)
    assert VQSpectrogramOptions(memory_saver=True).narrow and VQSpectrogramOptions(memory_saver=True).checkpoints


def test_the_documents_table_is_measured_line_by_line(
    options: VQSpectrogramOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        table_module.COMPARED: {"batch_size": 2},
        "accumulation": {"batch_size": 1, "gradient_accumulation_steps": 2},
        "checkpointing": {"batch_size": 2, "use_gradient_checkpointing": True},
    }
    monkeypatch.setattr(table_module, "SETTINGS", tuple((name, settings[name], "its words") for name in settings))
    monkeypatch.setattr(table_module, "_PLAIN", {"n_patches": 2, "stride": 8})
    measured = table(options)
    lines = list(measured)
    assert len(measured) == len(lines) == 3
    assert [line["setting"] for line in lines] == [*settings] and lines[0]["bytes_x"] == lines[0]["time_x"] == 1
    assert lines[1]["document"] == "its words"
    assert all(int(line["peak_bytes"]) < int(lines[0]["peak_bytes"]) for line in lines[1:])


def test_every_line_of_the_documents_table_and_every_option_of_its_list_is_there() -> None:
    names = " ".join(name for name, _, _ in table_module.SETTINGS)
    for word in ("comfortable", "tight", "minimal", "1.", "2.", "3.", "4.", "example"):
        assert word in names
    for option in (
        "data_root", "device", "machine_type", "batch_size", "stride", "n_patches", "gradient_accumulation_steps",
        "use_amp", "use_gradient_checkpointing", "memory_saver", "empty_cache", "patch_len", "subset_fraction",
        "norm_stats_path", "recon_target", "transform_head_per_patch", "epochs", "lr", "lambda_recon", "lambda_vq",
        "lambda_machine_id", "lambda_transform", "grad_clip", "no_staged_training", "phase1_frac", "phase2_frac",
        "phase3_frac", "commitment_warmup_epochs", "commitment_warmup_start", "lr_warmup_epochs", "latent_dim",
        "channels", "num_codes", "norm", "budget",
    ):  # fmt: skip
        assert option in VQSpectrogramOptions.__dataclass_fields__
