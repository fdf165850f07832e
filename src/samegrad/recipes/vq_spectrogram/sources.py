"""Where the clips come from: recordings under ``--data_root``, made-up fans, or pictures of faces."""

from __future__ import annotations

import dataclasses

import samegrad as sg
from samegrad.recipes._recipe import INSTALL
from samegrad.recipes._recipe.array_files import read_archive
from samegrad.recipes._recipe.refused_files import refused_file

from . import faces
from .audio import HOP, SAMPLE_RATE
from .clip_files import LAYOUT, FolderClips
from .data import BANDS, Clips, Normalisation, Patching, machines_of, split_validation, subset
from .generated import generated_clips
from .options import VQSpectrogramOptions

VALIDATION_FRACTION = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales:
    """What pictures say of a clip's axes.

    ``upwards``: what a row is, from below. ``along``: what columns run along and its unit, of which each column is
    ``column`` long. ``level``: what the mean of a clip is.
    """

    upwards: str
    along: str
    column: float
    level: str


OF_SOUND = Scales(upwards="mel band", along="time in the clip, s", column=HOP / SAMPLE_RATE, level="mean log-mel, dB")
OF_PICTURES = Scales(upwards="pixel", along="pixel", column=1, level="mean brightness")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """Clips to train on, to choose the best weights by and to judge by; the classes of the machine head."""

    train: Clips
    validation: Clips
    test: Clips
    machines: list[str]
    patching: Patching
    described: str
    scales: Scales


def open_splits(options: VQSpectrogramOptions) -> Splits:
    """The clips that ``options`` ask for, each read once. Raises BadInput for files that are not of the layout."""
    try:
        known, test, described = _opened(options)
        if options.subset_fraction is not None:
            known = subset(known, options.subset_fraction, seed=options.random_seed)
            test = subset(test, options.subset_fraction, seed=options.random_seed)
        train, validation = split_validation(known, VALIDATION_FRACTION, seed=options.random_seed)
        patching = Patching(
            patch_len=options.patch_len,
            stride=options.patch_stride,
            n_patches=options.clip_patches,
            normalisation=_normalisation(options, train),
            keeps_original=options.recon_target == "original",
        )
        _check_clips(options, train, validation, test)
    except ValueError as error:
        raise sg.BadInput(
            asked=f"clips of {', '.join(options.machine_types)}", found=str(error), do=f"give {LAYOUT}",
            file=None if options.data_root is None else str(options.data_root),
        ) from None  # fmt: skip
    return Splits(
        train=train, validation=validation, test=test, machines=machines_of(known), patching=patching,
        described=described, scales=OF_PICTURES if options.offline == faces.MACHINE_TYPE else OF_SOUND,
    )  # fmt: skip


def _opened(options: VQSpectrogramOptions) -> tuple[Clips, Clips, str]:
    if (root := options.data_root) is not None:
        types = options.machine_types
        described = f"recordings of {', '.join(types)} under {root}"
        known, test = (FolderClips(root, types, split, least_frames=options.patch_len) for split in ("train", "test"))
        return known, test, described
    if options.offline == faces.MACHINE_TYPE:
        try:
            return faces.face_clips("train"), faces.face_clips("test"), "pictures of scikit-image: faces are normal"
        except (ModuleNotFoundError, FileNotFoundError) as error:
            raise sg.EnvironmentProblem(asked="the pictures of faces", found=str(error), do=INSTALL) from None
    seed, each = options.random_seed, max(1, round(options.clips_per_id / 3))
    made = generated_clips("train", seed=seed, normal_per_id=options.clips_per_id)
    judged = generated_clips("test", seed=seed, normal_per_id=each, anomalous_per_id=each)
    return made, judged, "made-up fans, four machines with four kinds of fault"


def _normalisation(options: VQSpectrogramOptions, train: Clips) -> Normalisation:
    if options.norm_stats_path is None:
        return Normalisation.of(train)
    what, do = "mean and std of the bands", "give the norm_stats.npz of a run of the same bands"
    mean, std = read_archive(options.norm_stats_path, ("mean", "std"), what=what)
    named = {"mean": mean, "std": std}
    wrong = [f"{name} has shape {a.shape}, not ({BANDS},)" for name, a in named.items() if a.shape != (BANDS,)]
    if (std < 0).any():
        wrong.append("std is below 0")
    if wrong:
        raise refused_file(options.norm_stats_path, what=what, found="; ".join(wrong), do=do)
    return Normalisation(mean, std)


def _check_clips(options: VQSpectrogramOptions, train: Clips, validation: Clips, test: Clips) -> None:
    """Raises ValueError for what would only fail in training or after it, BadInput for a file that cannot be read."""
    if not train.clips:
        raise ValueError("no clip is left to train on")
    known, frames = set(machines_of(train)), train.read(0).shape[1]
    if frames < options.patch_len:
        raise ValueError(f"a clip of {frames} frames holds no patch of {options.patch_len}")
    for clips in (train, validation, test):
        for index in range(len(clips.clips)):
            clips.read(index)
    for machine in machines_of(test):
        labels = {clip.anomalous for clip in test.clips if clip.machine == machine}
        if len(labels) < 2:
            raise ValueError(f"the test clips of {machine} are all {'anomalous' if True in labels else 'normal'}")
        if machine not in known:
            raise ValueError(f"there are test clips of {machine} and none to train on")
    wrong = [clip.name for clip in train.clips if clip.anomalous]
    if wrong:
        raise ValueError(f"{wrong[0]} is anomalous and among the clips to train on")
