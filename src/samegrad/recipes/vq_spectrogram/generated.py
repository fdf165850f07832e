"""Clips made up to sound like fans, with labelled anomalies: the offline stand-in for recordings. No torch model here.

A fan is a blade frequency with harmonics, amplitude-modulated by the rotation, over noise that falls with frequency;
every machine id has its own blade count, speed and room. Speed and loudness differ from clip to clip, so that loudness
alone tells little. An anomaly is one of: a stronger modulation (imbalance), clicks at the rotation (a loose part),
harmonics that are shifted (a damaged blade), a whistling band (friction); loudness is evened out afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from .audio import SAMPLE_RATE, log_mel
from .data import HeldClips, clip_of

MACHINE_TYPE = "generated_fan"
IDS = ("00", "02", "04", "06")
SECONDS = 10.0
FAULTS = ("imbalance", "loose part", "shifted harmonics", "whistle")

Samples = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Fan:
    """One machine: rotations a second, blades, level of the harmonics over the noise, slope of the noise, resonance."""

    rotation_hz: float
    blades: int
    harmonics: float
    slope: float
    resonance_hz: float


FANS = {
    "00": Fan(17.0, 7, 0.9, 1.0, 900.0),
    "02": Fan(23.0, 5, 1.1, 0.8, 1700.0),
    "04": Fan(29.0, 9, 0.7, 1.2, 600.0),
    "06": Fan(13.0, 11, 1.0, 0.9, 2600.0),
}


def fan_sound(fan: Fan, draws: np.random.Generator, *, fault: str | None = None, seconds: float = SECONDS) -> Samples:
    """(samples,) at 16 kHz with a root mean square of about 0.05, louder or softer by chance; ``fault`` of FAULTS."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    speed = fan.rotation_hz * draws.uniform(0.97, 1.03)
    wobble = 0.004 * np.sin(2 * np.pi * draws.uniform(0.1, 0.4) * time + draws.uniform(0, 2 * np.pi))
    turns = 2 * np.pi * speed * (time + wobble)
    depth = 0.75 if fault == "imbalance" else 0.12
    shift = 1 + 0.045 if fault == "shifted harmonics" else 1.0
    tone = _harmonics(shift * fan.blades * turns, draws)
    sound = (1 + depth * np.sin(turns)) * (fan.harmonics * tone + 1.5 * _noise(len(time), fan, draws))
    if fault == "loose part":
        sound = sound + _clicks(len(time), speed, draws)
    if fault == "whistle":
        at = draws.uniform(3200, 5200)
        sound = sound + 0.5 * np.sin(2 * np.pi * (at * time + 12 * np.sin(2 * np.pi * 1.3 * time)))
    loudness = 0.05 * 10 ** (draws.uniform(-4, 4) / 20)
    return np.asarray(loudness * sound / np.sqrt(np.mean(sound**2)))


def _harmonics(angle: Samples, draws: np.random.Generator) -> Samples:
    """Σ_n sin(n · angle + φ_n) / n for twelve n, as powers of one exponential: twelve sines would take longer."""
    first = np.exp(1j * angle)
    power, tone = np.ones_like(first), np.zeros_like(angle)
    for number in range(1, 13):
        power = power * first
        phase = draws.uniform(0, 2 * np.pi)
        tone += (np.cos(phase) * power.imag + np.sin(phase) * power.real) / number
    return tone


def _noise(samples: int, fan: Fan, draws: np.random.Generator) -> Samples:
    """Noise of unit power that falls as 1 / f^slope, with a broad resonance."""
    spectrum = np.fft.rfft(draws.normal(size=samples))
    frequency = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    shape = (1 + frequency / 200) ** -fan.slope + 0.15 * np.exp(-(((frequency - fan.resonance_hz) / 300) ** 2))
    shaped = np.fft.irfft(spectrum * shape, samples)
    return np.asarray(shaped / np.sqrt(np.mean(shaped**2)))


def _clicks(samples: int, speed: float, draws: np.random.Generator) -> Samples:
    """A decaying burst of noise every other rotation."""
    length = int(0.02 * SAMPLE_RATE)
    burst = np.exp(-np.arange(length) / (0.004 * SAMPLE_RATE))
    made = np.zeros(samples)
    for at in np.arange(draws.uniform(0, 0.1), samples / SAMPLE_RATE, 2 / speed):
        start = int(at * SAMPLE_RATE)
        part = made[start : start + length]
        part += 4 * (burst * draws.normal(size=length))[: len(part)]
    return made


def generated_clips(
    split: str, *, seed: int, normal_per_id: int, anomalous_per_id: int = 0, ids: Sequence[str] = IDS
) -> HeldClips:
    """Log-mels of made-up clips, named as recordings are. A pure function; the two splits share no clip."""
    clips, spectrograms = [], []
    for place, id_ in enumerate(ids):
        counts = {"normal": normal_per_id, "anomaly": anomalous_per_id}
        for label, count in counts.items():
            for number in range(count):
                draws = np.random.default_rng([seed, split == "test", place, label == "anomaly", number])
                fault = FAULTS[number % len(FAULTS)] if label == "anomaly" else None
                sound = fan_sound(FANS[id_], draws, fault=fault)
                clips.append(clip_of(f"{label}_id_{id_}_{number:08d}", MACHINE_TYPE))
                spectrograms.append(log_mel(torch.from_numpy(sound)).numpy())
    return HeldClips(clips, spectrograms)
