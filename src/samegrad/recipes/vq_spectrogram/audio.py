"""From WAV files to the ``.npy`` log-mels that ``data.py`` reads, by a short-time Fourier transform and mel bands.

    python -m samegrad.recipes.vq_spectrogram.audio DCASE_AUDIO_ROOT LOG_MEL_ROOT --machine_type fan

reads ``<DCASE_AUDIO_ROOT>/<machine>/{train,test}/*.wav`` as the challenge's archives unpack, and writes
``<LOG_MEL_ROOT>/<machine>/{train,test}/*.npy``, (64, frames) float32 in dB.

Mel scale and triangles of unit area as in Slaney's Auditory Toolbox (Technical Report 1998-010), which is what librosa
computes by default; 64 bands, 1024 samples a window, 512 from one to the next, 16 kHz, as in the document.
"""

from __future__ import annotations

import argparse
import functools
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe import INSTALL
from samegrad.recipes._recipe.refused_files import open_file, refused_file

from .clip_files import clip_paths

SAMPLE_RATE, BANDS, WINDOW, HOP = 16_000, 64, 1024, 512
SPLITS = ("train", "test")
_LAYOUT = "<root>/<machine>/{train,test}/{normal,anomaly}_id_XX_XXXXXXXX.wav, as the challenge's archives unpack"
_WHAT, _DO = "a recording", "write or fetch the file anew, or take it out of the data"
# Linear up to here, with so many mel a Hz; then 27 mel for each factor of 6.4.
_BREAK_HZ, _MEL_PER_HZ, _LOG_STEP = 1000.0, 3 / 200, np.log(6.4) / 27


def hz_to_mel(hz: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Slaney's mel scale."""
    given = np.asarray(hz, dtype=np.float64)
    above = _BREAK_HZ * _MEL_PER_HZ + np.log(np.maximum(given, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
    return np.where(given < _BREAK_HZ, given * _MEL_PER_HZ, above)


def mel_to_hz(mel: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The inverse of ``hz_to_mel``."""
    given = np.asarray(mel, dtype=np.float64)
    start = _BREAK_HZ * _MEL_PER_HZ
    return np.where(given < start, given / _MEL_PER_HZ, _BREAK_HZ * np.exp(_LOG_STEP * (given - start)))


def mel_filters(
    *, bands: int = BANDS, window: int = WINDOW, sample_rate: int = SAMPLE_RATE
) -> npt.NDArray[np.float64]:
    """(bands, window // 2 + 1): triangles evenly spaced in mel from 0 to half the sample rate, each of unit area."""
    edges = mel_to_hz(np.linspace(0, hz_to_mel(sample_rate / 2), bands + 2))
    bins = np.linspace(0, sample_rate / 2, window // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return np.asarray(triangles * (2 / (edges[2:] - edges[:-2]))[:, None])


def log_mel(samples: Tensor, *, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """(BANDS, 1 + len // HOP) float32: 10 log10 of the mel power of (samples,), at least −100 dB.

    Windows are Hann, centred, and the ends are mirrored.
    """
    spectrum = torch.stft(
        samples.double(), WINDOW, HOP, window=torch.hann_window(WINDOW, dtype=torch.float64), center=True,
        pad_mode="reflect", return_complex=True,
    )  # fmt: skip
    power = _filters(sample_rate) @ spectrum.abs().square()
    return (10 * power.clamp(min=1e-10).log10()).float()


@functools.cache
def _filters(sample_rate: int) -> Tensor:
    return torch.from_numpy(mel_filters(sample_rate=sample_rate))


def read_wav(path: Path) -> Tensor:
    """(samples,) float32 in [−1, 1], the first channel.

    Raises BadInput for a file that is no sound one, is cut off, has another sample rate than 16 kHz, fewer samples than
    a window, or any that is not finite.
    """
    import soundfile

    try:
        # Opened here: libsndfile calls a missing file a system error.
        with open_file(path) as file:
            claimed_bytes, there_bytes = _sample_bytes(file)
            file.seek(0)
            read, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise refused_file(path, what=_WHAT, found=error, do=_DO) from None
    samples = torch.from_numpy(read[:, 0].copy())
    wrong = samples.isfinite().logical_not().nonzero()
    found = None
    if there_bytes < claimed_bytes:
        found = f"the header says {claimed_bytes} bytes of samples, and the file holds {there_bytes}"
    elif rate != SAMPLE_RATE:
        found = f"{rate} samples a second; DCASE 2020 task 2 has {SAMPLE_RATE}"
    elif len(samples) < WINDOW:
        found = f"{len(samples)} samples, fewer than the {WINDOW} of a window"
    elif len(wrong):
        first = int(wrong[0])
        found = f"sample {first} is {float(samples[first])}"
    if found is not None:
        raise refused_file(path, what=_WHAT, found=found, do=_DO)
    return samples


def _sample_bytes(file: BinaryIO) -> tuple[int, int]:
    """How long the samples of a RIFF file are by its header, and how much of them is there; (0, 0) of another file.

    libsndfile takes what there is and says nothing. 0xFFFFFFFF stands where the length was not known.
    """
    if file.read(4) != b"RIFF":
        return 0, 0
    file.seek(12)
    while len(head := file.read(8)) == 8:
        name, size_bytes = struct.unpack("<4sI", head)
        if name == b"data":
            return 0 if size_bytes == 0xFFFFFFFF else size_bytes, os.fstat(file.fileno()).st_size - file.tell()
        # Chunks begin at even bytes.
        file.seek(size_bytes + size_bytes % 2, os.SEEK_CUR)
    return 0, 0


def write_log_mels(audio_root: Path, log_mel_root: Path, machines: Sequence[str]) -> Iterator[Path]:
    """Writes the log-mel of every WAV of ``machines`` and yields its file. One that is there already is not made again.

    Raises BadInput for a folder that is missing or has no WAV files, and for files that are none or not named so.
    """
    for machine in machines:
        for split in SPLITS:
            found = clip_paths(audio_root / machine / split, ".wav", layout=_LAYOUT)
            target = log_mel_root / machine / split
            target.mkdir(parents=True, exist_ok=True)
            for path in found:
                written = target / f"{path.stem}.npy"
                if not written.exists():
                    made = log_mel(read_wav(path)).numpy()
                    # Under another name until it is whole: a command that was stopped leaves no half file behind.
                    part = written.with_suffix(".part")
                    with part.open("wb") as file:
                        np.save(file, made)
                    part.replace(written)
                yield written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("audio_root", type=Path)
    parser.add_argument("log_mel_root", type=Path)
    parser.add_argument("--machine_type", action="append", help="default: every folder of audio_root; may be repeated")
    asked = parser.parse_args(argv)
    machines = asked.machine_type or sorted(p.name for p in asked.audio_root.glob("*") if (p / "train").is_dir())
    try:
        if not machines:
            raise sg.BadInput(
                asked=f"recordings in {asked.audio_root}", found="no <machine>/train folders", do=f"give {_LAYOUT}",
                file=str(asked.audio_root),
            )  # fmt: skip
        count = sum(1 for _ in write_log_mels(asked.audio_root, asked.log_mel_root, machines))
    except ModuleNotFoundError as error:
        missing = sg.EnvironmentProblem(asked="WAV files", found=str(error), do=INSTALL)
        sys.stderr.write(f"{missing}\n")
        return int(missing.exit_code)
    except sg.SamegradError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    sys.stdout.write(f"{count} log-mels of {', '.join(machines)} in {asked.log_mel_root}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
