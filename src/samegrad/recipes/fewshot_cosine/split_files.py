"""The three kinds of file that say which pictures a split's classes have: JSON, CSV, and folders a line.

Each reader gives the classes in order, each with its pictures. Text is UTF-8, with or without a byte-order mark, and
lines end either way. No name leads out of the root: what a data set from elsewhere lists is not to be trusted with
other files. Raises ValueError saying what is wrong; ``layouts.py`` adds the file.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from pathlib import Path
from typing import Any

_IMAGE_FOLDERS = ("", "data", "images", "images_background", "images_evaluation")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_ROTATION = re.compile(r"/rot\d+$")

Classes = list[tuple[str, tuple[Path, ...]]]


def listed_classes(path: Path, root: Path) -> Classes:
    """Names and pictures of the classes in a ``.json``, ``.csv`` or ``.txt`` file; all pictures are files."""
    read = {".json": _from_json, ".csv": _from_csv, ".txt": _from_folders}[path.suffix]
    try:
        # utf-8-sig: what spreadsheets write begins with a mark that would become part of the first name.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"no text in UTF-8, from byte {error.start} on") from None
    classes = read(text, root)
    if not classes:
        raise ValueError("it names no class")
    missing = next((file for _, files in classes for file in files if not file.is_file()), None)
    if missing is not None:
        raise ValueError(f"it names {missing}, which is no file")
    return classes


def _below(root: Path, *, folder: str = "", name: str, place: str) -> Path:
    """``root/folder/name``, or ``name`` itself where it is absolute. Raises ValueError where that is outside.

    Links in the root are the user's own and may lead anywhere.
    """
    absolute = Path(name).is_absolute()
    tops = (os.path.abspath(root), root.resolve()) if absolute else ()
    if ".." in Path(name).parts or (absolute and not any(Path(name).is_relative_to(top) for top in tops)):
        raise ValueError(f"{place} names {name}, which leads outside {root}")
    return root / folder / name


def _from_json(text: str, root: Path) -> Classes:
    """Classes of an object with ``label_names``, ``image_names`` and ``image_labels``.

    ``image_labels`` count through all splits in some files and through one in others: classes without an image here
    are left out.
    """
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"no JSON that can be read: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"a {type(document).__name__}, not an object with label_names, image_names, image_labels")
    names, images = (_list_of(str, document, key, "texts") for key in ("label_names", "image_names"))
    labels = _list_of(int, document, "image_labels", "whole numbers")
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} image_names, but {len(labels)} image_labels")
    by_label: dict[int, list[Path]] = {}
    for number, (image, label) in enumerate(zip(images, labels)):
        if label < 0:
            raise ValueError(f"image {number} has the label {label}")
        by_label.setdefault(label, []).append(_below(root, name=image, place=f"image {number}"))
    ordered = sorted(by_label)
    # Some files name all classes, some only their own.
    own = len(names) == len(ordered)
    if not own and ordered and ordered[-1] >= len(names):
        raise ValueError(
            f"image {labels.index(ordered[-1])} has the label {ordered[-1]}, and there are {len(names)} label_names"
        )
    return [(names[place if own else label], tuple(by_label[label])) for place, label in enumerate(ordered)]


def _list_of(kind: type, document: dict[str, Any], key: str, kinds: str) -> list[Any]:
    if key not in document:
        raise ValueError(f"no {key!r} in it")
    found = document[key]
    # By type, not isinstance: true is no number here.
    if not isinstance(found, list) or any(type(item) is not kind for item in found):
        raise ValueError(f"{key!r} is no list of {kinds}")
    return found


def _from_csv(text: str, root: Path) -> Classes:
    """Classes of a ``filename,label`` file; the pictures are in ``images``."""
    lines = csv.DictReader(io.StringIO(text))
    found: dict[str, list[Path]] = {}
    try:
        missing = [name for name in ("filename", "label") if name not in (lines.fieldnames or ())]
        if missing:
            raise ValueError(f"no column {missing[0]!r} in its first line")
        for line in lines:
            place = f"line {lines.line_num}"
            # Fields too many come under None, and None stands for those too few.
            if None in line or not line["filename"] or not line["label"]:
                raise ValueError(f"{place} does not have the {len(lines.fieldnames or ())} fields of the first line")
            path = _below(root, folder="images", name=line["filename"], place=place)
            found.setdefault(line["label"], []).append(path)
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num + 1}: {error}") from None
    return [(name, tuple(files)) for name, files in found.items()]


def _from_folders(text: str, root: Path) -> Classes:
    """Classes of a file with a folder a line. Rotated copies of a class (``/rot090``) are the class itself."""
    found: dict[str, tuple[Path, ...]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name = _ROTATION.sub("", line.strip())
        if not name or name in found:
            continue
        places = [_below(root, folder=part, name=name, place=f"line {number}") for part in _IMAGE_FOLDERS]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise ValueError(f"it names the class {name}, which has no folder in {root}")
        files = tuple(sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES))
        if not files:
            raise ValueError(f"{folder} has no images")
        found[name] = files
    return list(found.items())
