"""Classes that installed packages ship: glyphs of matplotlib's fonts, digits of scikit-learn. Nothing is downloaded.

A glyph class is a letter, drawn in the sixteen fonts that have it (four families, upright and slanted, light and bold),
each a few times turned, sheared, scaled and moved a little. Letters of different alphabets that look alike (Latin and
Greek A) are one class, or the same picture would stand under two names; so are capitals that look like their small
letter. Letters with marks over or under them are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .data import SPLITS, HeldImages

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
)  # fmt: skip
GLYPH_SIDE = 28
DRAWN_PER_FONT = 2
# Mean difference of two pictures of letters, of 1, under which they are one class.
ALIKE = 0.06
_COMPARED_SIDE, _DRAWN_SIDE = 24, 96
SHARES = (0.6, 0.2, 0.2)

Picture = npt.NDArray[np.float32]


def glyph_splits(seed: int, side: int = GLYPH_SIDE) -> dict[str, HeldImages]:
    """Letters dealt out into base, val and novel, no letter in two of them; which goes where follows from ``seed``.

    Raises ModuleNotFoundError without matplotlib or pillow.
    """
    letters = glyph_letters()
    order = np.random.default_rng(seed).permutation(len(letters))
    ends = np.round(np.cumsum((0.0, *SHARES)) * len(letters)).astype(int)
    return {
        split: dataclasses.replace(_drawn_letters(tuple(letters[i] for i in sorted(order[start:end]))), side=side)
        for split, start, end in zip(SPLITS, ends, ends[1:])
    }


def digit_splits(side: int = GLYPH_SIDE) -> dict[str, HeldImages]:
    """scikit-learn's 8 x 8 digits: 0 to 3 to train on, 4 to 6 to validate, 7 to 9 to judge by.

    Raises ModuleNotFoundError without scikit-learn.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = torch.from_numpy((digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    of_split = {"base": (0, 1, 2, 3), "val": (4, 5, 6), "novel": (7, 8, 9)}
    return {
        split: HeldImages(
            names=tuple(map(str, numbers)), pictures=tuple(pictures[labels == number] for number in numbers), side=side
        )
        for split, numbers in of_split.items()
    }


@functools.cache
def glyph_letters() -> tuple[str, ...]:
    """The letters that all sixteen fonts have and that do not look alike, in the order of their code points."""
    from matplotlib.ft2font import FT2Font

    shared = set.intersection(*(set(FT2Font(str(_font_file(name))).get_charmap()) for name in FONTS))
    kept: list[str] = []
    pictures: list[Picture] = []
    for code in sorted(shared):
        letter = chr(code)
        if unicodedata.category(letter) not in ("Lu", "Ll", "Lo") or len(unicodedata.normalize("NFD", letter)) > 1:
            continue
        picture = _boxed(letter, FONTS[0], _COMPARED_SIDE)
        if pictures and np.abs(np.stack(pictures) - picture).mean(axis=(1, 2)).min() <= ALIKE:
            continue
        kept.append(letter)
        pictures.append(picture)
    return tuple(kept)


@functools.cache
def _drawn_letters(letters: tuple[str, ...]) -> HeldImages:
    """Every letter in every font, DRAWN_PER_FONT times; how it is turned follows from the letter alone."""
    pictures = []
    for letter in letters:
        generator = np.random.default_rng(ord(letter))
        drawn = [_turned(letter, font, generator) for font in FONTS for _ in range(DRAWN_PER_FONT)]
        pictures.append(torch.from_numpy(np.stack(drawn)).unsqueeze(1))
    return HeldImages(
        names=tuple(unicodedata.name(letter).lower() for letter in letters), pictures=tuple(pictures), side=GLYPH_SIDE
    )


def _font_file(name: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


@functools.cache
def _large(letter: str, font: str) -> Picture:
    """``letter``, as large as it is in its font at 96 pixels, in the middle of the smallest square that holds it."""
    from PIL import Image, ImageDraw

    opened = _opened(font)
    left, top, right, bottom = (round(edge) for edge in opened.getbbox(letter))
    width, height = right - left, bottom - top
    side = max(width, height)
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).text(
        ((side - width) // 2 - left, (side - height) // 2 - top), letter, font=opened, fill=255
    )
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


@functools.cache
def _opened(font: str) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(str(_font_file(font)), _DRAWN_SIDE)


def _boxed(letter: str, font: str, side: int) -> Picture:
    from PIL import Image

    picture = Image.fromarray((_large(letter, font) * 255).astype(np.uint8))
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / np.float32(255)


def _turned(letter: str, font: str, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """(28, 28), turned by up to 20 degrees, sheared, 60 to 90 percent of the side, a little off the middle."""
    from PIL import Image

    large = Image.fromarray((_large(letter, font) * 255).astype(np.uint8))
    angle, shear = np.deg2rad(generator.uniform(-20, 20)), generator.uniform(-0.2, 0.2)
    scale = large.width / (GLYPH_SIDE * generator.uniform(0.6, 0.9, size=2))
    shift = generator.uniform(-2, 2, size=2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.diag(scale) @ np.array([[1, shear], [0, 1]]) @ turn
    middle = large.width / 2 - matrix @ (GLYPH_SIDE / 2 + shift)
    rows = np.concatenate([matrix, middle[:, None]], axis=1)
    # Reduced first, or thin strokes would fall between the pixels that are read.
    turned = large.transform(
        (GLYPH_SIDE, GLYPH_SIDE), Image.Transform.AFFINE, tuple(rows.flatten()), Image.Resampling.BICUBIC
    )
    return np.asarray(turned)
