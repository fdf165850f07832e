"""Patches: real, lazy, the same for a seed, and no pixel on two sides of a split. PCA: the reference, exact."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from samegrad.recipes.autoencoder import data

SHARES = (0.5, 0.2, 0.3)


def pictures_of_unique_pixels() -> list[Any]:
    """Two pictures in which every pixel has a value of its own, so that a patch tells where it was cut."""
    first = np.arange(200 * 330).reshape(200, 330)
    return [first, first.size + np.arange(260 * 150).reshape(260, 150)]


def patches_in(tiles: list[data.Tile], rows: int, *, seed: int) -> data.Patches:
    return data._turned_patches(pictures_of_unique_pixels(), tiles, rows, seed=seed, dtype=torch.float64)


def pixels_of(patches: data.Patches) -> set[int]:
    return set((patches.read(0, len(patches)) * 255).round().long().flatten().tolist())


def shared_pixels(sides: list[data.Patches]) -> int:
    pixels = [pixels_of(side) for side in sides]
    return sum(len(pixels[i] & pixels[j]) for i in range(len(pixels)) for j in range(i))


def test_no_two_sides_of_a_split_share_a_pixel() -> None:
    sides = data.split_tiles(data.tiles_of(pictures_of_unique_pixels()), SHARES, seed=3)
    patches = [patches_in(tiles, 150, seed=number) for number, tiles in enumerate(sides)]
    assert shared_pixels(patches) == 0


def test_a_split_of_patches_instead_of_tiles_would_be_caught() -> None:
    everywhere = data.tiles_of(pictures_of_unique_pixels())
    assert shared_pixels([patches_in(everywhere, 150, seed=number) for number in range(3)]) > 0


def test_tiles_cover_every_pixel_once() -> None:
    pictures = pictures_of_unique_pixels()
    covered = [np.zeros(picture.shape, dtype=int) for picture in pictures]
    for tile in data.tiles_of(pictures):
        covered[tile.picture][tile.top : tile.bottom, tile.left : tile.right] += 1
    assert all((count == 1).all() for count in covered)


@pytest.mark.parametrize("orientation", range(data.ORIENTATIONS))
def test_a_turned_patch_holds_the_pixels_of_its_place(orientation: int) -> None:
    picture = pictures_of_unique_pixels()[0]
    place = np.array([[0, 17, 120]], dtype=np.int32)
    turned = data.turn_places(place, [picture.shape], np.array([orientation]))
    patch = data.Patches(data.oriented([picture]), turned, dtype=torch.float64).read(0, 1)
    here = picture[17 : 17 + 48, 120 : 120 + 48]
    expected = here.T if orientation & 1 else here
    expected = expected[::-1] if orientation & 2 else expected
    expected = expected[:, ::-1] if orientation & 4 else expected
    np.testing.assert_allclose(patch.numpy().reshape(48, 48) * 255, expected, rtol=1e-15)


def test_places_within_a_tile_set_are_all_different() -> None:
    tiles = data.tiles_of(pictures_of_unique_pixels())
    every = sum(tile.places for tile in tiles)
    places = data.sample_places(tiles, every, seed=0)
    assert len(np.unique(places, axis=0)) == every


def test_more_patches_than_places_are_refused() -> None:
    tiles = data.tiles_of(pictures_of_unique_pixels())[:1]
    with pytest.raises(ValueError, match="hold 289 places"):
        data.sample_places(tiles, tiles[0].places + 1, seed=0)


def test_patches_are_a_function_of_the_seed_and_leave_the_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    first, again, other = (data.patch_splits(60, SHARES, seed=seed) for seed in (7, 7, 8))
    for mine, same, different in zip(first, again, other):
        assert torch.equal(mine.read(0, len(mine)), same.read(0, len(same)))
        assert not torch.equal(mine.read(0, len(mine)), different.read(0, len(different)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # type: ignore[index]


def test_rows_are_grey_values_between_zero_and_one() -> None:
    train, _, _ = data.patch_splits(200, SHARES, seed=1)
    rows = train.read(0, len(train))
    assert rows.dtype == torch.float32 and rows.shape == (100, 2304)
    assert rows.min() >= 0 and rows.max() <= 1 and rows.std() > 0.05


def test_a_range_read_into_given_memory_is_that_range() -> None:
    train, _, _ = data.patch_splits(60, SHARES, seed=1)
    out = torch.empty(7, 2304)
    assert train.read(5, 12, out=out) is out
    assert torch.equal(out, train.read(0, len(train))[5:12])


def test_an_epochs_order_is_a_permutation_and_a_function_of_seed_and_epoch() -> None:
    train, _, _ = data.patch_splits(60, SHARES, seed=1)
    rows = sorted(map(tuple, train.places.tolist()))
    orders = [train.shuffled(seed=4, epoch=epoch).places for epoch in (0, 0, 1)]
    assert all(sorted(map(tuple, order.tolist())) == rows for order in orders)
    assert (orders[0] == orders[1]).all() and not (orders[0] == orders[2]).all()


def test_pictures_come_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert len(data.bundled_pictures()) == len(data.PICTURES)


def test_a_picture_that_is_not_shipped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PICTURES", ("no_such_picture.png",))
    with pytest.raises(FileNotFoundError, match="no_such_picture"):
        data.bundled_pictures()


def test_two_hundred_thousand_rows_are_there_on_every_side() -> None:
    parts = data.patch_splits(200_000, SHARES, seed=42)
    assert [len(part) for part in parts] == [100_000, 40_000, 60_000]


def test_written_patches_are_the_rows_that_reading_gives(tmp_path: Path) -> None:
    path = data.write_patches(tmp_path / "rows.npy", 130, seed=5, partition_rows=32)
    written = np.load(path)
    pictures = data.bundled_pictures()
    source = data.Patches(pictures, data.sample_places(data.tiles_of(pictures), 130, seed=5))
    assert written.dtype == np.float32
    assert (written == source.read(0, 130).numpy()).all()


class Memory:
    """Rows of a tensor, with the largest range that was read."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.shape, self.largest = rows, tuple(rows.shape), 0

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        self.largest = max(self.largest, stop - start)
        return self.rows[start:stop]


@pytest.mark.parametrize("row_count", [151, 13], ids=["more rows than numbers a row", "fewer"])
def test_pca_over_ragged_partitions_is_sklearns(row_count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    rows = 5 + torch.randn(row_count, 20, generator=generator, dtype=torch.float64) @ mixing
    fresh = 5 + torch.randn(40, 20, generator=generator, dtype=torch.float64) @ mixing
    source = Memory(rows)
    mine = data.fit_principal(source, 4, partition_rows=37)
    theirs = PCA(4, svd_solver="full").fit(rows.numpy())
    aligned = (mine.components @ torch.from_numpy(theirs.components_).t()).abs()
    torch.testing.assert_close(aligned, torch.eye(4, dtype=torch.float64), atol=1e-10, rtol=0)
    expected = ((theirs.inverse_transform(theirs.transform(fresh.numpy())) - fresh.numpy()) ** 2).mean()
    assert data.principal_mse(mine, Memory(fresh), partition_rows=9) == pytest.approx(expected, rel=1e-10)
    assert source.largest == min(37, row_count)
