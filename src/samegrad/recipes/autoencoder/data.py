"""Real rows without a network: 48 x 48 grey patches of the pictures that scikit-image ships in its wheel.

A row is one patch, flattened: 2304 numbers in [0, 1], as wide as the activations the document trains on.

**No leak.** Overlapping patches of one place may never stand on two sides of a split, so the split is made before
any patch is cut: each picture is tiled into squares of 64 pixels, each tile belongs to one of train, validation and
test, and a patch lies wholly inside one tile. Two sides therefore share no pixel. Only one eye of the stereo pair
is used, for the same reason.

**Any way up.** A patch is turned or mirrored into one of its eight orientations, drawn once for each row.

**Lazy.** ``Patches`` holds the pictures (5 MB, one byte a pixel) and three numbers a row; a row is cut out when read.

Left out are the pictures of noise-like texture (brick, grass, gravel): a few dozen numbers describe none of it, and it
would drown the errors of all others.

The reference beside a trained model is ``fit_principal``: the best linear autoencoder of the same rank.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PATCH_SIDE = 48
PATCH_WIDTH = PATCH_SIDE * PATCH_SIDE
TILE_SIDE = 64
ORIENTATIONS = 8
PICTURES = (
    "astronaut.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "hubble_deep_field.jpg",
    "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip

Picture = npt.NDArray[np.uint8]


class ReadRows(Protocol):
    """Anything of (N, D) rows that can be read in ranges: ``Patches``, or a tensor's or file's rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """A square of one picture, in pixels: ``[top, bottom) x [left, right)`` of picture number ``picture``."""

    picture: int
    top: int
    left: int
    bottom: int
    right: int

    @property
    def places(self) -> int:
        """How many patches lie wholly inside."""
        return max(0, self.bottom - self.top - PATCH_SIDE + 1) * max(0, self.right - self.left - PATCH_SIDE + 1)


class Patches:
    """A row source of (N, 2304) patches with values in [0, 1], cut out of the pictures when they are read.

    ``places`` is (N, 3) int32: number of the picture (in one of its orientations), top, left. ``dtype`` is float32 or
    float64.
    """

    def __init__(
        self, pictures: Sequence[Picture], places: npt.NDArray[np.int32], *, dtype: torch.dtype = torch.float32
    ) -> None:
        self.pictures = tuple(pictures)
        self.places = places
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.places), PATCH_WIDTH)

    def __len__(self) -> int:
        return len(self.places)

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` as (stop - start, 2304) on the host, written into ``out`` if given."""
        places = self.places[start:stop]
        rows = torch.empty(len(places), PATCH_WIDTH, dtype=self.dtype) if out is None else out
        # A loop of plain slices: indexing all patches at once takes twice as long.
        squares = rows.numpy().reshape(len(places), PATCH_SIDE, PATCH_SIDE)
        for (number, top, left), square in zip(places.tolist(), squares):
            square[...] = self.pictures[number][top : top + PATCH_SIDE, left : left + PATCH_SIDE]
        return rows.div_(255)

    def shuffled(self, *, seed: int, epoch: int) -> Patches:
        """The same rows in the order of ``epoch``, a function of (seed, epoch, number of rows) alone."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self))
        return Patches(self.pictures, self.places[order], dtype=self.dtype)


def bundled_pictures() -> tuple[Picture, ...]:
    """The pictures of PICTURES as grey (height, width) uint8, read from the installed scikit-image package.

    Raises ModuleNotFoundError without scikit-image or pillow, FileNotFoundError naming a picture that the installed
    version does not ship. Never downloads: scikit-image's own loaders would.
    """
    from PIL import Image

    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'skimage'", name="skimage")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    pictures = []
    for name in PICTURES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"scikit-image does not ship {name} in {folder}")
        with Image.open(folder / name) as opened:
            pictures.append(np.asarray(opened.convert("L")).copy())
    return tuple(pictures)


def tiles_of(pictures: Sequence[Picture]) -> list[Tile]:
    """All pictures cut into tiles of at least 64 pixels a side, none overlapping, no pixel left out."""
    tiles = []
    for number, picture in enumerate(pictures):
        height, width = picture.shape
        for top, bottom in _cuts(height):
            for left, right in _cuts(width):
                tiles.append(Tile(picture=number, top=top, left=left, bottom=bottom, right=right))
    return tiles


def _cuts(length: int) -> list[tuple[int, int]]:
    # The last tile takes the rest, so that no strip too thin for a patch is lost.
    edges = [TILE_SIDE * i for i in range(max(1, length // TILE_SIDE))] + [length]
    return list(itertools.pairwise(edges))


def split_tiles(tiles: Sequence[Tile], fractions: Sequence[float], *, seed: int) -> list[list[Tile]]:
    """The tiles dealt out at random, each side holding its fraction of all *places*, as nearly as tiles allow."""
    order = np.random.default_rng(seed).permutation(len(tiles))
    total = sum(tile.places for tile in tiles)
    sides: list[list[Tile]] = [[] for _ in fractions]
    held = [0] * len(fractions)
    for index in order:
        # Each tile goes where the most is still missing, so every side stays close to its share.
        needy = max(range(len(fractions)), key=lambda side: fractions[side] * total - held[side])
        sides[needy].append(tiles[index])
        held[needy] += tiles[index].places
    return sides


def oriented(pictures: Sequence[Picture]) -> list[Picture]:
    """Each picture in its eight orientations, as views: number 8 · picture + orientation."""
    views = []
    for picture in pictures:
        for orientation in range(ORIENTATIONS):
            turned = picture.T if orientation & 1 else picture
            views.append(turned[:: -1 if orientation & 2 else 1, :: -1 if orientation & 4 else 1])
    return views


def turn_places(
    places: npt.NDArray[np.int32], shapes: Sequence[tuple[int, int]], orientations: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """``places`` in pictures of ``shapes`` as places of the same pixels in the views of ``oriented``."""
    height, width = np.array(shapes)[places[:, 0]].T
    top, left = places[:, 1], places[:, 2]
    swap = (orientations & 1).astype(bool)
    height, width = np.where(swap, width, height), np.where(swap, height, width)
    top, left = np.where(swap, left, top), np.where(swap, top, left)
    top = np.where(orientations & 2, height - PATCH_SIDE - top, top)
    left = np.where(orientations & 4, width - PATCH_SIDE - left, left)
    return np.stack([ORIENTATIONS * places[:, 0] + orientations, top, left], axis=1).astype(np.int32)


def sample_places(tiles: Sequence[Tile], rows: int, *, seed: int) -> npt.NDArray[np.int32]:
    """``rows`` different patch places inside ``tiles``, (rows, 3) int32, in random order.

    Raises ValueError when the tiles hold fewer places.
    """
    counts = np.array([tile.places for tile in tiles])
    ends = np.cumsum(counts)
    available = int(ends[-1]) if len(ends) else 0
    if rows > available:
        raise ValueError(f"{rows} patches wanted, the pictures hold {available} places here")
    flat = np.random.default_rng(seed).choice(available, size=rows, replace=False)
    which = np.searchsorted(ends, flat, side="right")
    inside = flat - (ends - counts)[which]
    across = np.array([tile.right - tile.left - PATCH_SIDE + 1 for tile in tiles])[which]
    origin = np.array([(tile.picture, tile.top, tile.left) for tile in tiles])[which]
    origin[:, 1] += inside // across
    origin[:, 2] += inside % across
    return origin.astype(np.int32)


def patch_splits(
    patch_rows: int, fractions: Sequence[float], *, seed: int, dtype: torch.dtype = torch.float32
) -> list[Patches]:
    """``patch_rows`` patches in all, one ``Patches`` a fraction; no two of them share a pixel. A pure function.

    Raises ValueError when a side would have no row or more rows than places.
    """
    pictures = bundled_pictures()
    # Cumulative rounding: the counts add up to patch_rows.
    ends = [round(patch_rows * math.fsum(fractions[: i + 1])) for i in range(len(fractions))]
    counts = [end - start for start, end in zip([0, *ends[:-1]], ends)]
    if min(counts) < 1:
        raise ValueError(f"{patch_rows} patches in parts {tuple(fractions)} leave a part with no row")
    sides = split_tiles(tiles_of(pictures), fractions, seed=seed)
    return [
        _turned_patches(pictures, tiles, count, seed=seed + 1 + number, dtype=dtype)
        for number, (tiles, count) in enumerate(zip(sides, counts))
    ]


def _turned_patches(
    pictures: Sequence[Picture], tiles: Sequence[Tile], rows: int, *, seed: int, dtype: torch.dtype
) -> Patches:
    places = sample_places(tiles, rows, seed=seed)
    orientations = np.random.default_rng([seed, 1]).integers(ORIENTATIONS, size=rows)
    return Patches(oriented(pictures), turn_places(places, [p.shape for p in pictures], orientations), dtype=dtype)


def write_patches(path: Path, rows: int, *, seed: int = 0, partition_rows: int = 4096) -> Path:
    """``rows`` patches of all pictures written to ``path`` as a (rows, 2304) float32 ``.npy``, partition by partition.

    One partition is in memory at a time. Meant for benchmarks: nothing is split here.
    """
    pictures = bundled_pictures()
    source = Patches(pictures, sample_places(tiles_of(pictures), rows, seed=seed))
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=source.shape)
    for start, stop in partitions(rows, partition_rows):
        source.read(start, stop, out=torch.from_numpy(mapped[start:stop]))
    mapped.flush()
    return path


def partitions(rows: int, partition_rows: int) -> Iterator[tuple[int, int]]:
    """The ranges ``[start, stop)`` that cut ``rows`` into parts of ``partition_rows``, the last one shorter."""
    for start in range(0, rows, partition_rows):
        yield start, min(start + partition_rows, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Principal:
    """The best linear autoencoder of its rank: mean_row (D,) and components (L, D), float64, orthonormal rows."""

    mean_row: Tensor
    components: Tensor

    def reconstruct(self, rows: Tensor) -> Tensor:
        """Rows (B, D) projected on the components, float64."""
        centred = rows.double() - self.mean_row
        return self.mean_row + (centred @ self.components.t()) @ self.components


def mean_row_of(rows: ReadRows, *, partition_rows: int = 4096) -> Tensor:
    """The mean row (D,), float64, read partition by partition."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for start, stop in partitions(len(rows), partition_rows):
        total += rows.read(start, stop).sum(dim=0, dtype=torch.float64)
    return total / len(rows)


def fit_principal(rows: ReadRows, rank: int, *, partition_rows: int = 4096) -> Principal:
    """The ``rank`` leading principal components of (N, D) rows, from the exact covariance, accumulated in float64.

    Two sweeps: the mean first, then the centred products; subtracting it afterwards would cancel.
    Holds one partition, twice, and the (D, D) covariance; of fewer rows than D, the rows instead.
    """
    mean_row = mean_row_of(rows, partition_rows=partition_rows)
    if rank <= len(rows) < len(mean_row):
        centred = rows.read(0, len(rows)).double() - mean_row
        return Principal(mean_row=mean_row, components=torch.linalg.svd(centred, full_matrices=False).Vh[:rank])
    covariance = torch.zeros(len(mean_row), len(mean_row), dtype=torch.float64)
    for start, stop in partitions(len(rows), partition_rows):
        centred = rows.read(start, stop).double() - mean_row
        covariance.addmm_(centred.t(), centred)
    from scipy import linalg

    # Of thousands of vectors a few are asked for; torch has no way to leave out the others.
    width = len(mean_row)
    _, vectors = linalg.eigh(covariance.numpy(), subset_by_index=(max(0, width - rank), width - 1))
    return Principal(mean_row=mean_row, components=torch.from_numpy(vectors).flip(1).t().contiguous())


def principal_mse(principal: Principal, rows: ReadRows, *, partition_rows: int = 4096) -> float:
    """Mean squared error of ``principal`` over all elements of ``rows``."""
    total = 0.0
    for start, stop in partitions(len(rows), partition_rows):
        read = rows.read(start, stop)
        total += float((principal.reconstruct(read) - read).square_().sum())
    return total / (len(rows) * rows.shape[1])
