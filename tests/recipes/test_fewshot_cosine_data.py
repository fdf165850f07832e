"""Classes and episodes: disjoint, repeatable, from packages and from the real data sets' layouts; the baseline."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import samegrad as sg
from samegrad.recipes.fewshot_cosine import data, offline
from samegrad.recipes.fewshot_cosine.layouts import EXPECTED, open_splits
from samegrad.recipes.fewshot_cosine.options import FewShotOptions

CLASSES = {"train": ("cat", "dog"), "val": ("owl", "pig"), "test": ("ant", "bee")}
IMAGES = 3


def picture(path: Path, brightness: int, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (brightness, 0, 255 - brightness)).save(path)
    return path


def json_layout(root: Path) -> None:
    names = [name for group in CLASSES.values() for name in group]
    for split, aliased in zip(("base", "val", "novel"), CLASSES):
        images, labels = [], []
        for name in CLASSES[aliased]:
            for number in range(IMAGES):
                images.append(str(picture(root / "pictures" / f"{name}{number}.png", 80 * number).relative_to(root)))
                # Labels count through all splits, as in the published files.
                labels.append(names.index(name))
        document = {"label_names": names, "image_names": images, "image_labels": labels}
        (root / f"{split}.json").write_text(json.dumps(document))


def folder_layout(root: Path, images: str, splits: str) -> None:
    for split, names in CLASSES.items():
        for name in names:
            for number in range(IMAGES):
                picture(root / images / name / f"{number}.png", 80 * number)
        (root / splits).mkdir(parents=True, exist_ok=True)
        (root / splits / f"{split}.txt").write_text("\n".join(names) + "\n")


def csv_layout(root: Path) -> None:
    for split, names in CLASSES.items():
        lines = ["filename,label"]
        for name in names:
            lines += [f"{picture(root / 'images' / f'{name}{n}.jpg', 80 * n).name},{name}" for n in range(IMAGES)]
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")


def rotated_layout(root: Path) -> None:
    folder_layout(root, "images_background", "splits/vinyals")
    for split, names in CLASSES.items():
        turned = [f"{name}/rot{angle}" for name in names for angle in ("000", "090")]
        (root / "splits/vinyals" / f"{split}.txt").write_text("\n".join(turned))


LAYOUTS: dict[str, tuple[str, Any]] = {
    "JSON files": ("miniImagenet", json_layout),
    "CSV files": ("miniImagenet", csv_layout),
    "CIFAR-FS": ("CIFAR", lambda root: folder_layout(root, "data", "splits/bertinetto")),
    "CUB": ("CUB", lambda root: folder_layout(root, "images", "split")),
    "Omniglot": ("Omniglot", rotated_layout),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_real_data_set_is_read_in_its_layout(layout: str, tmp_path: Path) -> None:
    dataset, write = LAYOUTS[layout]
    write(tmp_path)
    options = FewShotOptions(dataset=dataset, data_root=tmp_path, image_size=20)  # type: ignore[arg-type]
    splits = open_splits(options)
    for split, names in zip(data.SPLITS, CLASSES.values()):
        assert sorted(splits.named(split).names) == sorted(names)
    read = splits.base.read(0, [0, 2])
    assert splits.base.count(0) == IMAGES and read.shape == (2, options.channels, 20, 20)
    if options.channels == 3:
        mean, deviation = (torch.tensor(c) for c in data.COLOUR)
        of_first = (torch.tensor([0.0, 0.0, 1.0]) - mean) / deviation
        torch.testing.assert_close(read[0, :, 7, 7], of_first, rtol=0, atol=0.03)


def test_a_real_data_sets_name_without_its_folder_is_refused_and_nothing_put_in_its_place() -> None:
    with pytest.raises(sg.UsageError, match="glyphs") as refused:
        open_splits(FewShotOptions(dataset="miniImagenet"))
    assert refused.value.option == "data_root" and EXPECTED["miniImagenet"] in str(refused.value)


def spoil_json(root: Path) -> None:
    json_layout(root)
    (root / "val.json").write_text("{}")


def miscount(root: Path) -> None:
    json_layout(root)
    document = json.loads((root / "novel.json").read_text())
    (root / "novel.json").write_text(json.dumps(document | {"image_labels": [0]}))


def lose_a_file(root: Path) -> None:
    json_layout(root)
    (root / "pictures" / "cat0.png").unlink()


def share_a_class(root: Path) -> None:
    json_layout(root)
    (root / "novel.json").write_text((root / "base.json").read_text())


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda root: None, "no base.json"), (spoil_json, "no 'label_names'"), (miscount, "but 1 image_labels"),
        (lose_a_file, "which is no file"), (share_a_class, "is in base and in novel"),
    ],
)  # fmt: skip
def test_files_that_are_wrong_are_named(spoil: Any, told: str, tmp_path: Path) -> None:
    spoil(tmp_path)
    with pytest.raises(sg.BadInput, match=told) as refused:
        open_splits(FewShotOptions(dataset="miniImagenet", data_root=tmp_path))
    assert refused.value.file is not None


def test_letters_are_in_one_split_only_and_enough_for_five_ways() -> None:
    splits = offline.glyph_splits(42)
    names = [set(splits[split].names) for split in data.SPLITS]
    assert [len(group) for group in names] == [148, 49, 49]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    for classes in splits.values():
        assert {tuple(pictures.shape) for pictures in classes.pictures} == {(32, 1, 28, 28)}
    assert set(offline.glyph_splits(1)["novel"].names) != names[2]


def test_no_two_letters_look_alike_and_none_has_a_mark() -> None:
    letters = offline.glyph_letters()
    pictures = np.stack([offline._boxed(letter, offline.FONTS[0], 24) for letter in letters])
    flat = torch.from_numpy(pictures.reshape(len(letters), -1))
    apart = torch.cdist(flat, flat, p=1) / flat.shape[1]
    apart.fill_diagonal_(1)
    assert float(apart.min()) > offline.ALIKE
    assert "A" in letters and "А" not in letters and "Α" not in letters
    assert all(len(unicodedata.normalize("NFD", letter)) == 1 for letter in letters)


def test_digits_are_ten_classes_in_three_groups() -> None:
    splits = offline.digit_splits()
    assert [splits[split].names for split in data.SPLITS] == [("0", "1", "2", "3"), ("4", "5", "6"), ("7", "8", "9")]
    assert splits["novel"].read(0, [0]).shape == (1, 1, 28, 28)
    assert offline.digit_splits(16)["novel"].read(0, [0]).shape == (1, 1, 16, 16)
    assert offline.glyph_splits(42, 84)["novel"].read(0, [0, 1]).shape == (2, 1, 84, 84)


def held(counts: list[int]) -> data.HeldImages:
    pictures = tuple(torch.full((n, 1, 2, 2), c, dtype=torch.uint8) for c, n in enumerate(counts))
    for images in pictures:
        images[:, 0, 0, 0] = torch.arange(len(images))
    return data.HeldImages(names=tuple(map(str, range(len(counts)))), pictures=pictures, side=2)


def test_an_episode_is_a_function_of_its_number_and_takes_no_image_twice() -> None:
    episodes = data.Episodes(classes=held([9, 9, 3, 9]), n_way=3, per_class=5, seed=(1, 2))
    first, names = episodes.draw(4)
    again, _ = episodes.draw(4)
    assert torch.equal(first, again) and not torch.equal(first, episodes.draw(5)[0])
    assert sorted(names) == ["0", "1", "3"] and first.shape == (3, 5, 1, 2, 2)
    assert all(len(torch.unique(images[:, 0, 0, 0])) == 5 for images in first)


def test_too_few_classes_are_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="3 of 4 classes have as many"):
        data.Episodes(classes=held([9, 9, 3, 9]), n_way=4, per_class=5, seed=(0,))


def test_the_nearest_prototype_is_the_nearest_mean() -> None:
    support = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[0.0, 4.0], [2.0, 6.0]]])
    queries = torch.tensor([[[1.0, 1.0], [1.0, 4.0]], [[1.0, 5.0], [1.0, 0.0]]])
    predicted = data.prototype_predictions(torch.cat([support, queries], dim=1), 2)
    assert predicted.tolist() == [[0, 1], [1, 0]]


def test_augmented_images_are_a_function_of_the_seed_and_signs_are_not_mirrored() -> None:
    images = torch.rand(4, 1, 12, 12)
    before = torch.get_rng_state()
    one = data.augmented(images, seed=(1, 2), flips=False)
    assert torch.equal(one, data.augmented(images, seed=(1, 2), flips=False))
    assert torch.equal(before, torch.get_rng_state())
    assert one.shape == images.shape and not torch.equal(one, data.augmented(images, seed=(1, 3), flips=False))
    # A sign whose left side is bright stays so, unless it may be mirrored.
    bright_left = torch.zeros(64, 1, 16, 16)
    bright_left[..., :8] = 1
    leans = [
        (moved[..., :6].mean(dim=(1, 2, 3)) > moved[..., -6:].mean(dim=(1, 2, 3))).double().mean()
        for moved in (data.augmented(bright_left, seed=(0,), flips=flips) for flips in (False, True))
    ]
    assert leans[0] == 1 and 0.2 < leans[1] < 0.8
