"""Clips: the layout of the files, patches and transformations by (seed, epoch, clip), log-mels of our own."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import samegrad as sg
from samegrad.recipes.vq_spectrogram import audio, data
from samegrad.recipes.vq_spectrogram.clip_files import FolderClips
from samegrad.recipes.vq_spectrogram.faces import face_clips
from samegrad.recipes.vq_spectrogram.generated import FAULTS, generated_clips

FRAMES = 50


def some_clips(per_id: int = 5) -> data.HeldClips:
    draws = np.random.default_rng(0)
    names = [f"normal_id_{id_:02d}_{n:08d}" for id_ in (0, 2) for n in range(per_id)]
    clips = [data.clip_of(name, "fan") for name in names]
    return data.HeldClips(clips, [draws.normal(3, 2, (data.BANDS, FRAMES)).astype(np.float32) for _ in names])


def patching(clips: data.Clips, **values: object) -> data.Patching:
    settings = {"patch_len": 16, "stride": 8, "n_patches": 3, "normalisation": data.Normalisation.of(clips)}
    return data.Patching(**(settings | values))


def test_labels_and_ids_are_those_of_the_file_names() -> None:
    clip = data.clip_of("anomaly_id_04_00000007", "fan")
    assert clip.anomalous and clip.machine == "fan 04"
    assert not data.clip_of("normal_id_04_00000007", "fan").anomalous
    with pytest.raises(ValueError, match="expected normal_id_XX"):
        data.clip_of("abnormal_04", "fan")


def test_what_was_saved_in_the_layout_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    clips = some_clips()
    data.save_clips(clips, tmp_path, "fan", "train")
    read = FolderClips(tmp_path, ["fan"], "train")
    assert [clip.name for clip in read.clips] == sorted(clip.name for clip in clips.clips)
    for index, clip in enumerate(read.clips):
        source = [c.name for c in clips.clips].index(clip.name)
        np.testing.assert_array_equal(read.read(index), clips.read(source))


@pytest.mark.parametrize(
    "turn",
    [lambda x: x.T, lambda x: x[None], lambda x: x[..., None], lambda x: x.T[..., None], lambda x: x.T[None]],
    ids=["T x 64", "1, 64, T", "64, T, 1", "T, 64, 1", "1, T, 64"],
)
@pytest.mark.parametrize("frames", [FRAMES, 100])
def test_other_orders_of_axes_are_turned_round(tmp_path: Path, turn: object, frames: int) -> None:
    spectrogram = np.random.default_rng(0).normal(3, 2, (data.BANDS, frames)).astype(np.float32)
    (tmp_path / "fan" / "train").mkdir(parents=True)
    np.save(tmp_path / "fan" / "train" / "normal_id_00_00000000.npy", turn(spectrogram))
    np.testing.assert_array_equal(FolderClips(tmp_path, ["fan"], "train").read(0), spectrogram)


def test_a_file_that_is_no_log_mel_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "fan" / "train").mkdir(parents=True)
    np.save(tmp_path / "fan" / "train" / "normal_id_00_00000000.npy", np.zeros((30, 31)))
    with pytest.raises(sg.BadInput, match=r"(?s)normal_id_00_00000000\.npy.*shape \(30, 31\)"):
        FolderClips(tmp_path, ["fan"], "train").read(0)
    with pytest.raises(sg.BadInput, match="pump"):
        FolderClips(tmp_path, ["pump"], "train")


def test_ten_seconds_make_sixteen_patches_or_eight() -> None:
    assert len(data.patch_starts(313, 64, 16)) == 16 and len(data.patch_starts(313, 64, 32)) == 8
    assert len(data.patch_starts(344, 64, 16)) == 18
    with pytest.raises(ValueError, match="holds no patch"):
        data.patch_starts(60, 64, 16)


def test_patches_are_drawn_repeated_or_spread_to_their_number() -> None:
    starts = list(range(0, 80, 8))
    drawn = data.chosen_starts(starts, 4, np.random.default_rng(1))
    assert len(set(drawn)) == 4 and drawn == sorted(drawn) and set(drawn) <= set(starts)
    assert data.chosen_starts(starts, 10, np.random.default_rng(1)) == starts
    assert data.chosen_starts([0, 8], 5, np.random.default_rng(1)) == [0, 0, 0, 8, 8]
    assert data.chosen_starts(starts, 3, None) == [0, 32, 72]


def test_a_batch_is_a_function_of_seed_epoch_and_clip_and_changes_with_the_epoch() -> None:
    clips = some_clips()
    cut = patching(clips)
    machines = data.machines_of(clips)
    one, again, other = (cut.batch(clips, [4, 1, 7], machines, key=(5, epoch)) for epoch in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["patches"], other["patches"])
    # A clip's row does not depend on its neighbours.
    alone = cut.batch(clips, [7], machines, key=(5, 0))
    assert torch.equal(alone["patches"][0], one["patches"][2]) and alone["transform"][0] == one["transform"][2]
    assert one["patches"].shape == (3, 3, 1, data.BANDS, 16) and one["machine"].tolist() == [0, 0, 1]


def test_every_transformation_comes_up_and_all_patches_of_a_clip_have_the_same() -> None:
    clips = some_clips(40)
    cut = patching(clips, keeps_original=True)
    batch = cut.batch(clips, range(80), data.machines_of(clips), key=(0,))
    assert set(batch["transform"].tolist()) == set(range(len(data.TRANSFORMS)))
    untouched = batch["transform"] == 0
    assert torch.equal(batch["patches"][untouched], batch["original"][untouched])
    for row in torch.nonzero(batch["transform"] == 2).flatten().tolist():
        silent = (batch["patches"][row] == 0).all(-1).squeeze(1)
        assert silent.any() and bool((silent == silent[0]).all())


@pytest.mark.parametrize(
    ("transform", "holds"),
    [
        (0, lambda before, after: np.array_equal(before, after)),
        (1, lambda before, after: 4 <= int((after == 0).all(axis=(0, 1)).sum()) <= 12),
        (2, lambda before, after: 4 <= int((after == 0).all(axis=(0, 2)).sum()) <= 12),
        (3, lambda before, after: 0.005 < float((after - before).std()) < 0.06),
        (4, lambda before, after: 0.9 <= float((after / before).mean()) <= 1.1 and np.ptp(after / before) < 1e-5),
        (5, lambda before, after: any(np.array_equal(np.roll(before, k, 2), after) for k in range(-8, 9))),
    ],
    ids=data.TRANSFORMS,
)
def test_transformations_are_what_they_are_called(transform: int, holds: object) -> None:
    draws = np.random.default_rng(transform)
    before = draws.normal(5, 1, (3, data.BANDS, 32)).astype(np.float32)
    kept = before.copy()
    assert holds(before, data.transformed(before, transform, draws))
    np.testing.assert_array_equal(before, kept)


def test_patches_to_judge_by_are_not_transformed() -> None:
    clips = some_clips()
    cut = patching(clips)
    scaled = cut.normalisation.applied(clips.read(2))
    plain = cut.plain(clips, [2])[0, :, 0].numpy()
    np.testing.assert_array_equal(plain, np.stack([scaled[:, s : s + 16] for s in (0, 16, 32)]))


def test_the_bands_mean_and_deviation_are_those_of_all_frames() -> None:
    clips = some_clips()
    everything = np.concatenate([clips.read(i) for i in range(len(clips.clips))], axis=1).astype(np.float64)
    found = data.Normalisation.of(clips)
    np.testing.assert_allclose(found.mean, everything.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.std, everything.std(axis=1), rtol=1e-12)


def test_validation_takes_its_share_of_every_id_and_no_clip_is_on_both_sides() -> None:
    clips = some_clips(20)
    train, validation = data.split_validation(clips, 0.1, seed=3)
    assert sorted(train.places + validation.places) == list(range(40))
    assert [sum(c.machine == m for c in validation.clips) for m in data.machines_of(clips)] == [2, 2]
    few = data.subset(clips, 0.25, seed=0)
    assert [sum(c.machine == m for c in few.clips) for m in data.machines_of(clips)] == [5, 5]


def test_an_epoch_is_every_clip_once_and_the_last_batch_is_the_rest() -> None:
    batches = list(data.shuffled_batches(11, 4, seed=1, epoch=2))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert sorted(index for batch in batches for index in batch) == list(range(11))
    assert batches == list(data.shuffled_batches(11, 4, seed=1, epoch=2))
    assert batches != list(data.shuffled_batches(11, 4, seed=1, epoch=3))


def test_mel_filters_are_triangles_of_unit_area_on_slaneys_scale() -> None:
    np.testing.assert_allclose(audio.hz_to_mel([0, 200 / 3, 1000, 6400]), [0, 1, 15, 42], rtol=1e-12)
    np.testing.assert_allclose(audio.mel_to_hz(audio.hz_to_mel([30.0, 999, 1001, 7777])), [30, 999, 1001, 7777])
    # On a fine grid the area is 1; on the transform's own the lowest triangles are narrower than two bins.
    fine = audio.mel_filters(window=1 << 16)
    np.testing.assert_allclose(fine.sum(axis=1) * 16_000 / (1 << 16), 1, rtol=1e-3)
    assert (audio.mel_filters() >= 0).all() and audio.mel_filters().shape == (64, 513)


def test_a_tone_is_loudest_in_its_own_band_and_a_tenth_of_it_twenty_decibels_softer() -> None:
    time = torch.arange(16_000) / 16_000
    tone = torch.sin(2 * torch.pi * 1500 * time)
    found = audio.log_mel(tone)
    assert found.shape == (64, 1 + 16_000 // 512) and found.dtype == torch.float32
    centres = audio.mel_to_hz(np.linspace(0, audio.hz_to_mel(8000), 66))[1:-1]
    assert int(found[:, 10].argmax()) == int(np.abs(centres - 1500).argmin())
    softer = audio.log_mel(tone / 10)
    np.testing.assert_allclose((found - softer)[:, 10][found[:, 10] > -60], 20, atol=1e-3)


def test_log_mels_are_librosas() -> None:
    librosa = pytest.importorskip("librosa")
    samples = np.random.default_rng(0).normal(size=20_000)
    theirs = librosa.feature.melspectrogram(
        y=samples, sr=16_000, n_fft=1024, hop_length=512, n_mels=64, power=2.0, pad_mode="reflect"
    )
    ours = audio.log_mel(torch.from_numpy(samples)).numpy()
    np.testing.assert_allclose(ours, 10 * np.log10(np.maximum(theirs, 1e-10)), atol=1e-3)


def test_wav_folders_become_log_mel_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    for split, name in (("train", "normal_id_00_00000000"), ("test", "anomaly_id_00_00000000")):
        (tmp_path / "audio" / "fan" / split).mkdir(parents=True)
        soundfile.write(tmp_path / "audio" / "fan" / split / f"{name}.wav", samples, 16_000, subtype="FLOAT")
    line = [str(tmp_path / "audio"), str(tmp_path / "mels"), "--machine_type", "fan"]
    assert audio.main(line) == 0
    assert "2 log-mels of fan" in capsys.readouterr().out
    clips = FolderClips(tmp_path / "mels", ["fan"], "test")
    assert clips.clips[0].anomalous
    np.testing.assert_allclose(clips.read(0), audio.log_mel(torch.from_numpy(samples)).numpy(), atol=1e-4)
    assert not list((tmp_path / "mels").rglob("*.part"))


def test_wavs_that_are_not_the_challenges_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "audio" / "fan" / "train").mkdir(parents=True)
    assert audio.main([str(tmp_path / "audio"), str(tmp_path / "mels")]) == 3
    assert "no .wav files" in capsys.readouterr().err
    soundfile.write(tmp_path / "audio" / "fan" / "train" / "normal_id_00_0.wav", np.zeros(100), 44_100)
    assert audio.main([str(tmp_path / "audio"), str(tmp_path / "mels")]) == 3
    assert "44100 samples a second" in capsys.readouterr().err


def test_made_up_clips_are_the_same_for_a_seed_and_labelled_by_name() -> None:
    one, again = (generated_clips("test", seed=4, normal_per_id=1, anomalous_per_id=4, ids=("02",)) for _ in range(2))
    assert [clip.anomalous for clip in one.clips] == [False] + [True] * len(FAULTS)
    assert all(np.array_equal(a, b) for a, b in zip(one.spectrograms, again.spectrograms))
    assert one.read(0).shape == (64, 313)
    other = generated_clips("train", seed=4, normal_per_id=1, ids=("02",))
    assert not np.array_equal(one.read(0), other.read(0))


def test_faces_are_real_pictures_that_no_network_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("somebody asks the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    train, test = face_clips("train"), face_clips("test")
    assert len(train.clips) == 70 and not any(clip.anomalous for clip in train.clips)
    assert [clip.anomalous for clip in test.clips] == [False] * 30 + [True] * 100
    assert test.read(0).shape == (64, 64) and len(np.unique(test.read(0))) > 500
