"""Picture files as eight bits of grey or colour, the right way up; or BadInput with the path.

What becomes what: sixteen bits of grey are scaled to eight (Pillow alone cuts off at 255, which is white for nearly all
of them); a picture stands as its EXIF says; what is transparent lies on white paper; palettes and printing colours
become the colours that they show; of several frames the first is taken.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from samegrad.recipes._recipe.refused_files import open_file, refused_file

if TYPE_CHECKING:
    from PIL import Image

# Pillow's readers of the many formats each have complaints of their own; a file of changed bytes meets all of these.
_READING_ERRORS = (
    OSError, ValueError, TypeError, SyntaxError, EOFError, LookupError, AttributeError, NotImplementedError,
    OverflowError, MemoryError, RuntimeError, struct.error,
)  # fmt: skip
# Formats whose sixteen bits come as mode I, of 32 bits.
_SIXTEEN_BITS_AS_I = ("PNG", "PPM")


def open_picture(path: Path, *, what: str, mode: Literal["L", "RGB"]) -> Image.Image:
    """The picture in ``path``, read whole, as grey (``L``) or colours (``RGB``).

    ``what`` names it as the user knows it: "picture 3 of the class cat". Raises BadInput for a file that holds no
    sound picture, more pixels than Pillow takes for harmless, or numbers without a known range.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    do = "write or fetch the file anew as PNG or JPEG, or take it out of the data"
    try:
        with open_file(path) as file, Image.open(file) as opened:
            return _eight_bits(ImageOps.exif_transpose(opened), opened.format).convert(mode)
    except UnidentifiedImageError:
        raise refused_file(path, what=what, found="no picture in a format that Pillow knows", do=do) from None
    except (*_READING_ERRORS, Image.DecompressionBombError) as error:
        raise refused_file(path, what=what, found=error, do=do) from None


def _eight_bits(picture: Image.Image, file_format: str | None) -> Image.Image:
    """``picture`` with eight bits a channel and nothing transparent."""
    from PIL import Image

    if picture.mode.startswith("I;16") or (picture.mode == "I" and file_format in _SIXTEEN_BITS_AS_I):
        values = np.asarray(picture).astype(np.float64) / 257
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"numbers of 32 bits (mode {picture.mode}), and nothing says which of them is white")
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        above = picture.convert("RGBA")
        paper = Image.new("RGBA", above.size, "white")
        return Image.alpha_composite(paper, above)
    return picture
