"""Broken recordings, log-mels and statistics: refused by path before training, exit code 3; nothing half is written."""

from __future__ import annotations

import dataclasses
import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import samegrad as sg
from samegrad.cli.main import main
from samegrad.recipes.vq_spectrogram import audio
from samegrad.recipes.vq_spectrogram.options import VQSpectrogramOptions
from samegrad.recipes.vq_spectrogram.sources import open_splits

RATE, SECONDS = 16_000, 1
FRAMES = 40


def recordings(root: Path) -> Path:
    """A fan's recordings, one a split; the path of the one that tests spoil."""
    for split, label in (("test", "anomaly"), ("train", "normal")):
        folder = root / "fan" / split
        folder.mkdir(parents=True)
        path = folder / f"{label}_id_00_00000000.wav"
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, RATE * SECONDS), RATE, subtype="PCM_16")
    return path


def write_samples(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    soundfile.write(path, samples, rate, subtype="FLOAT")


def with_one(value: float) -> np.ndarray:
    samples = np.zeros(RATE, dtype=np.float32)
    samples[1234] = value
    return samples


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


WRONG_WAVS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:1000]), "32000 bytes of samples, and the file holds 956"),
    "one sample less": (
        lambda p: p.write_bytes(p.read_bytes()[:-2]),
        "32000 bytes of samples, and the file holds 31998",
    ),
    "header only": (lambda p: p.write_bytes(p.read_bytes()[:44]), "32000 bytes of samples, and the file holds 0"),
    "cut within the header": (lambda p: p.write_bytes(p.read_bytes()[:30]), "No 'data' chunk"),
    "zero bytes": (lambda p: p.write_bytes(b""), "Format not recognised"),
    "text": (lambda p: p.write_text("no sound" * 100), "Format not recognised"),
    "folder": (make_a_folder, "a folder"),
    "not a number": (lambda p: write_samples(p, with_one(np.nan)), "sample 1234 is nan"),
    "infinite": (lambda p: write_samples(p, with_one(-np.inf)), "sample 1234 is -inf"),
    "other rate": (lambda p: write_samples(p, np.zeros(44_100), 44_100), "44100 samples a second"),
    "no samples": (lambda p: write_samples(p, np.zeros(0)), "0 samples, fewer than the 1024"),
    "shorter than a window": (lambda p: write_samples(p, np.zeros(1000)), "1000 samples, fewer than the 1024"),
    "a name of another kind": (lambda p: p.rename(p.with_name("fan_00.wav")), "expected normal_id_XX"),
}


@pytest.mark.parametrize("fault", WRONG_WAVS)
def test_a_wrong_recording_is_refused_by_its_path_and_nothing_half_is_left(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, told = WRONG_WAVS[fault]
    path = recordings(tmp_path / "audio")
    spoil(path)
    named = next(path.parent.iterdir())
    assert audio.main([str(tmp_path / "audio"), str(tmp_path / "mels")]) == 3
    said = capsys.readouterr().err
    assert told in said and str(named) in said and "do:" in said
    assert not list((tmp_path / "mels").rglob("*.part")) and not list((tmp_path / "mels" / "fan").glob("train/*.npy"))


def test_a_recording_of_unknown_length_is_read_to_its_end(tmp_path: Path) -> None:
    path = recordings(tmp_path)
    whole = path.read_bytes()
    # What a program writes that could not go back to the header.
    path.write_bytes(whole[:40] + struct.pack("<I", 0xFFFFFFFF) + whole[44:])
    assert audio.read_wav(path).shape == (RATE,)


def test_chunks_before_and_after_the_samples_are_passed_over(tmp_path: Path) -> None:
    path = recordings(tmp_path)
    whole = path.read_bytes()
    extra = b"note" + struct.pack("<I", 3) + b"abc\0"
    size = struct.pack("<I", len(whole) - 8 + 2 * len(extra))
    path.write_bytes(whole[:4] + size + whole[8:36] + extra + whole[36:] + extra)
    assert audio.read_wav(path).shape == (RATE,)


def test_recordings_with_changed_bytes_are_read_or_refused_by_path(tmp_path: Path) -> None:
    path = recordings(tmp_path)
    sound, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        content = bytearray(sound[: random.integers(1, len(sound) + 1)] if random.integers(3) == 0 else sound)
        for at in random.integers(0, min(len(content), 48), size=random.integers(1, 4)):
            content[at] = random.integers(256)
        path.write_bytes(bytes(content))
        try:
            assert bool(audio.read_wav(path).isfinite().all())
        except sg.BadInput as error:
            assert error.file == str(path)
            refused += 1
    assert refused > 100


def log_mels(root: Path) -> Path:
    """A fan's log-mels, as few as training takes; the path of the one that tests spoil, of ``test``."""
    draws = np.random.default_rng(0)
    for split, labels in (("train", ("normal",)), ("test", ("normal", "anomaly"))):
        folder = root / "fan" / split
        folder.mkdir(parents=True)
        for label in labels:
            for number in range(4):
                path = folder / f"{label}_id_00_{number:08d}.npy"
                np.save(path, draws.normal(0, 1, (64, FRAMES)).astype(np.float32))
    return path


def options(root: Path) -> VQSpectrogramOptions:
    return VQSpectrogramOptions(data_root=root, machine_type="fan", patch_len=16, stride=8, n_patches=2, device="cpu")


def put(path: Path, value: float, dtype: type = np.float32) -> None:
    clip = np.zeros((64, FRAMES), dtype=dtype)
    clip[3, 17] = value
    np.save(path, clip)


class Canary:
    def __reduce__(self) -> object:
        return (os.mkdir, ("canary",))


def claim_more(path: Path) -> None:
    """A header of 728 TiB before nothing."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (64, 3_000_000_000_000)}
    )
    path.write_bytes(header.getvalue())


WRONG_NPYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "could only read"),
    "bytes too many": (lambda p: p.write_bytes(p.read_bytes() + b"1234"), "bytes beyond the 10240"),
    "more than there is": (claim_more, "Unable to allocate"),
    "cut within the header": (lambda p: p.write_bytes(p.read_bytes()[:50]), "array header"),
    "zero bytes": (lambda p: p.write_bytes(b""), "magic string"),
    "text": (lambda p: p.write_text("no array" * 50), "magic string is not correct"),
    "an archive": (lambda p: np.savez(p.open("wb"), a=1), "magic string is not correct"),
    "folder": (make_a_folder, "a folder"),
    "objects": (lambda p: np.save(p, np.array([Canary()] * 64, dtype=object), allow_pickle=True), "Object arrays"),
    "words": (lambda p: np.save(p, np.full((64, FRAMES), "a")), "no real numbers"),
    "complex": (lambda p: np.save(p, np.zeros((64, FRAMES), dtype=np.complex64)), "no real numbers"),
    "not a number": (lambda p: put(p, np.nan), r"nan at \(3, 17\)"),
    "infinite": (lambda p: put(p, np.inf), r"inf at \(3, 17\)"),
    "too large": (lambda p: put(p, 1e300, np.float64), r"1e\+300 at \(3, 17\)"),
    "other bands": (lambda p: np.save(p, np.zeros((128, FRAMES))), r"shape \(128, 40\), not \(64, frames\)"),
    "one axis": (lambda p: np.save(p, np.zeros(64)), r"shape \(64,\), not \(64, frames\)"),
    "four axes": (lambda p: np.save(p, np.zeros((1, 1, 64, FRAMES))), r"not \(64, frames\)"),
    "no frames": (lambda p: np.save(p, np.zeros((64, 0))), "no patch of 16"),
    "shorter than a patch": (lambda p: np.save(p, np.zeros((64, 15))), "15 frames hold no patch of 16"),
    "a name of another kind": (lambda p: p.rename(p.with_name("abnormal_04.npy")), "expected normal_id_XX_XXXXXXXX"),
}


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize("fault", WRONG_NPYS)
def test_a_wrong_log_mel_is_refused_by_its_path_before_training(
    fault: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, told = WRONG_NPYS[fault]
    path = log_mels(tmp_path / "mels")
    if split == "train":
        path = tmp_path / "mels" / "fan" / "train" / "normal_id_00_00000002.npy"
    before = set(path.parent.iterdir())
    spoil(path)
    named = next(iter(set(path.parent.iterdir()) - before), path)
    with pytest.raises(sg.BadInput, match=told) as refused:
        open_splits(options(tmp_path / "mels"))
    assert refused.value.file == str(named) and str(named) in str(refused.value) and refused.value.exit_code == 3
    assert not (tmp_path / "canary").exists()


def test_a_log_mel_that_goes_while_it_is_used_is_refused_by_its_path(tmp_path: Path) -> None:
    path = log_mels(tmp_path)
    splits = open_splits(options(tmp_path))
    index = [clip.name for clip in splits.test.clips].index(path.stem)
    path.unlink()
    with pytest.raises(sg.BadInput, match="no such file") as refused:
        splits.test.read(index)
    assert refused.value.file == str(path)


def test_a_wrong_log_mel_ends_the_command_with_code_3_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log_mels(tmp_path / "mels")
    path.write_bytes(b"")
    line = f"run vq_spectrogram --data_root {tmp_path / 'mels'} --machine_type fan --patch_len 16 --device cpu"
    assert main([*line.split(), "--output", str(tmp_path / "run")]) == 3
    told = capsys.readouterr().err
    assert str(path) in told and "do:" in told and "Traceback" not in told


def keep(path: Path, **arrays: object) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


ONES = np.ones(64)
WRONG_STATISTICS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: None, "no such file"),
    "zero bytes": (lambda p: p.write_bytes(b""), "no .npz archive"),
    "text": (lambda p: p.write_text("no archive"), "no .npz archive"),
    "folder": (lambda p: p.mkdir(), "a folder"),
    "one array": (lambda p: np.save(p.open("wb"), ONES), "no .npz archive"),
    "no deviation": (lambda p: keep(p, mean=ONES), "no std"),
    "other bands": (lambda p: keep(p, mean=np.ones(128), std=ONES), r"mean has shape \(128,\), not \(64,\)"),
    "not a number": (lambda p: keep(p, mean=ONES, std=ONES * np.nan), r"std: nan at"),
    "below zero": (lambda p: keep(p, mean=ONES, std=-ONES), "std is below 0"),
    "words": (lambda p: keep(p, mean=np.full(64, "a"), std=ONES), "mean: .* no real numbers"),
    "objects": (lambda p: keep(p, mean=np.array([Canary()] * 64, dtype=object), std=ONES), "mean"),
}


def cut_off(path: Path) -> None:
    keep(path, mean=ONES, std=ONES)
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(path: Path) -> None:
    keep(path, mean=ONES, std=ONES)
    content = bytearray(path.read_bytes())
    content[content.index(b"\xf0\x3f") + 8] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("fault", [*WRONG_STATISTICS, "cut off", "a changed byte"])
def test_wrong_statistics_are_refused_by_their_path(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log_mels(tmp_path / "mels")
    path = tmp_path / "norm_stats.npz"
    others = {"cut off": (cut_off, "no .npz archive"), "a changed byte": (flip_a_byte, "CRC")}
    spoil, told = (WRONG_STATISTICS | others)[fault]
    spoil(path)
    with pytest.raises(sg.BadInput, match=told) as refused:
        open_splits(dataclasses.replace(options(tmp_path / "mels"), norm_stats_path=path))
    assert refused.value.file == str(path) and str(path) in str(refused.value)
    assert not (tmp_path / "canary").exists()


def test_log_mels_with_changed_bytes_are_read_or_refused_by_path(tmp_path: Path) -> None:
    path = log_mels(tmp_path)
    sound, random = path.read_bytes(), np.random.default_rng(0)
    splits = open_splits(options(tmp_path))
    index, refused = [clip.name for clip in splits.test.clips].index(path.stem), 0
    for _ in range(300):
        content = bytearray(sound[: random.integers(1, len(sound) + 1)] if random.integers(3) == 0 else sound)
        for at in random.integers(0, min(len(content), 128), size=random.integers(1, 6)):
            content[at] = random.integers(256)
        path.write_bytes(bytes(content))
        try:
            assert bool(np.isfinite(splits.test.read(index)).all())
        except sg.BadInput as error:
            assert error.file == str(path)
            refused += 1
    assert refused > 100
