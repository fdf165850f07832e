"""Where the images come from: a real data set under ``--data_root`` in its own layout, or what packages ship.

A split is found as the first of

    base.json  (val.json, novel.json)     label_names, image_names, image_labels
    train.csv  (val.csv, test.csv)        filename,label; the images in images/
    train.txt  (val.txt, test.txt)        one class folder a line; the folders in data/, images/, images_background/ …

in the root itself, in ``split``, ``splits``, or one folder below those (``splits/bertinetto``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import samegrad as sg
from samegrad.recipes._recipe import INSTALL

from . import data, offline
from .image_files import ImageFiles
from .options import OFFLINE, FewShotOptions
from .split_files import listed_classes

# What each split is for, in an error.
_PURPOSES = {"base": "train on", "val": "validate on", "novel": "judge by"}
_ALIASES = {"base": ("base", "train"), "val": ("val", "valid", "validation"), "novel": ("novel", "test")}

EXPECTED = {
    "miniImagenet": "base.json, val.json, novel.json; or images/*.jpg with train.csv, val.csv, test.csv",
    "CIFAR": "CIFAR-FS: data/<class>/*.png with splits/bertinetto/train.txt, val.txt, test.txt; or the JSON files",
    "CUB": "base.json, val.json, novel.json; or images/<class>/*.jpg with split/train.txt, val.txt, test.txt",
    "Omniglot": "images_background/<alphabet>/<character>/*.png, images_evaluation/…, with splits/…/train.txt, "
    "val.txt, test.txt of <alphabet>/<character> lines; or the JSON files",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """Classes to train on, to validate on and to judge by, no class in two of them; and what they are, in words."""

    base: data.ImageClasses
    val: data.ImageClasses
    novel: data.ImageClasses
    described: str

    def named(self, split: str) -> data.ImageClasses:
        classes: data.ImageClasses = getattr(self, split)
        return classes


def open_splits(options: FewShotOptions) -> Splits:
    """The classes of ``--dataset``; files are found, not read.

    Raises UsageError for a real data set's name without ``--data_root``, BadInput for files that are not as expected,
    EnvironmentProblem for packages that are not installed.
    """
    if options.dataset in OFFLINE:
        try:
            if options.dataset == "glyphs":
                found = offline.glyph_splits(options.random_seed, options.image_side)
            else:
                found = offline.digit_splits(options.image_side)
        except ModuleNotFoundError as error:
            raise sg.EnvironmentProblem(
                asked=f"the data set {options.dataset}", found=str(error), do=INSTALL
            ) from None
        words = "letters in sixteen fonts that matplotlib ships" if options.dataset == "glyphs" else "digits"
        counts = ", ".join(str(len(found[split].names)) for split in data.SPLITS)
        return Splits(**found, described=f"{words}; classes of base, val, novel: {counts}")
    root = options.data_root
    if root is None:
        raise sg.UsageError(
            asked=f"--dataset {options.dataset}",
            found="no --data_root; nothing is downloaded, and nothing is put in its place",
            do=f"--data_root FOLDER with {EXPECTED[options.dataset]}; offline: --dataset glyphs",
            option="data_root",
        )
    opened = {split: _open_split(root, split, options) for split in data.SPLITS}
    _refuse_shared(opened, root)
    counts = ", ".join(str(len(opened[split].names)) for split in data.SPLITS)
    return Splits(**opened, described=f"{options.dataset} in {root}; classes of base, val, novel: {counts}")


def check_episodes(splits: Splits, options: FewShotOptions) -> None:
    """Raises UsageError where a split has fewer classes than an episode takes, or too few with enough images."""
    per_class = options.k_shot + options.n_query
    classes = {split: len(splits.named(split).names) for split in data.SPLITS}
    usable = {split: len(data.enough_classes(splits.named(split), per_class)) for split in data.SPLITS}
    most = min(usable.values())
    if most >= options.n_way:
        return
    counts = [
        f"{classes[split]} to {_PURPOSES[split]} ({split})"
        + ("" if usable[split] == classes[split] else f", of which {usable[split]} have {per_class} images or more")
        for split in data.SPLITS
    ]
    is_short_of_classes = min(classes.values()) < options.n_way
    fewer = f"ask for at most --n_way {most}" if most > 1 else "take another --dataset, with more classes"
    raise sg.UsageError(
        asked=f"episodes of {options.n_way} classes with {per_class} images each (--n_way {options.n_way}, "
        f"--k_shot {options.k_shot}, --n_query {options.n_query})",
        found=f"{options.dataset} has classes: {'; '.join(counts)}. All classes of an episode come from one of these",
        do=fewer if is_short_of_classes else f"lower --k_shot or --n_query, or {fewer}",
        option="n_way" if is_short_of_classes else "n_query",
    )


def _open_split(root: Path, split: str, options: FewShotOptions) -> ImageFiles:
    path = next(_split_files(root, split), None)
    if path is None:
        raise sg.BadInput(
            asked=f"the {split} classes of {options.dataset} in {root}",
            found="no such folder" if not root.is_dir() else f"no {split}.json, and no .csv or .txt of that split",
            do=f"put there {EXPECTED[options.dataset]}",
            file=str(root),
        )
    try:
        classes = listed_classes(path, root)
    except (ValueError, OSError) as error:
        raise sg.BadInput(
            asked=f"the {split} classes of {options.dataset}",
            found=f"{path}: {error}",
            do=f"put right that file; expected: {EXPECTED[options.dataset]}",
            file=str(path),
        ) from None
    return ImageFiles(
        names=tuple(name for name, _ in classes),
        files=tuple(files for _, files in classes),
        side=options.image_side,
        channels=options.channels,
    )


def _split_files(root: Path, split: str) -> Iterator[Path]:
    below = [root / name for name in ("split", "splits") if (root / name).is_dir()]
    folders = [root, *below, *(path for folder in below for path in sorted(folder.iterdir()) if path.is_dir())]
    for suffix in (".json", ".csv", ".txt"):
        for folder in folders:
            for name in _ALIASES[split]:
                if (folder / f"{name}{suffix}").is_file():
                    yield folder / f"{name}{suffix}"


def _refuse_shared(opened: dict[str, ImageFiles], root: Path) -> None:
    for split, others in (("base", ("val", "novel")), ("val", ("novel",))):
        for other in others:
            # By folder or file as well: names may count from 0 in each split.
            shared = {files[0] for files in opened[split].files} & {files[0] for files in opened[other].files}
            if shared:
                raise sg.BadInput(
                    asked=f"base, val and novel classes in {root}",
                    found=f"{min(shared)} is in {split} and in {other}",
                    do="keep their classes apart; accuracy on classes that were trained on says nothing",
                    file=str(root),
                )
