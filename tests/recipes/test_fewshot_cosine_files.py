"""Broken and odd pictures and split files of real data sets: read as documented, or refused by name, exit code 3."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import samegrad as sg
from samegrad.cli.main import main
from samegrad.recipes.fewshot_cosine import data
from samegrad.recipes.fewshot_cosine.layouts import Splits, open_splits
from samegrad.recipes.fewshot_cosine.options import FewShotOptions
from samegrad.recipes.fewshot_cosine.recipe import make_model

CLASSES = {"train": ("cat", "dog"), "val": ("owl", "pig"), "test": ("ant", "bee")}


def folder_layout(root: Path) -> Path:
    """Two classes of two pictures in each split, listed by folder; the path of the picture that tests spoil."""
    for split, names in CLASSES.items():
        for name in names:
            (root / "data" / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (40, 30), (200, 10 * number, 0)).save(root / "data" / name / f"{number}.png")
        (root / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root / "data" / "cat" / "1.png"


def json_layout(root: Path) -> Path:
    """The same as JSON files; the path of the file that tests spoil."""
    folder_layout(root)
    for split, names in zip(("base", "val", "novel"), CLASSES.values()):
        images = [f"data/{name}/{number}.png" for name in names for number in range(2)]
        document = {"label_names": names, "image_names": images, "image_labels": [0, 0, 1, 1]}
        (root / f"{split}.json").write_text(json.dumps(document))
    return root / "base.json"


def csv_layout(root: Path) -> Path:
    """The same as CSV files; the path of the file that tests spoil."""
    folder_layout(root)
    (root / "data").rename(root / "images")
    for split, names in CLASSES.items():
        lines = [f"{name}/{number}.png,{name}" for name in names for number in range(2)]
        (root / f"{split}.csv").write_text("\n".join(["filename,label", *lines]) + "\n")
    return root / "train.csv"


def opened(root: Path, dataset: str = "miniImagenet", side: int = 20) -> Splits:
    return open_splits(FewShotOptions(dataset=dataset, data_root=root, image_size=side))  # type: ignore[arg-type]  # any name


def grey(root: Path) -> torch.Tensor:
    """The spoilt picture as ink on paper, (20, 20), 0 to 1 from black to white."""
    mean, deviation = data.INK[0][0], data.INK[1][0]
    return 1 - (opened(root, "Omniglot").base.read(0, [1])[0, 0] * deviation + mean)


def coloured(root: Path) -> torch.Tensor:
    """The spoilt picture's colours, (3, 20, 20), 0 to 1."""
    mean, deviation = (torch.tensor(c).view(3, 1, 1) for c in data.COLOUR)
    return opened(root).base.read(0, [1])[0] * deviation + mean


def truncate(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def cut_within_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def break_the_checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 255
    path.write_bytes(bytes(content))


def write_a_bomb(path: Path) -> None:
    """A PNG of 400 megapixels in a few bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


BROKEN: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "cut within the header": cut_within_the_header,
    "zero bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no picture"),
    "checksum": break_the_checksum,
    "bomb": write_a_bomb,
    "floats": lambda path: Image.fromarray(np.ones((30, 40), dtype=np.float32)).save(path, format="TIFF"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_picture_is_refused_by_its_path_class_and_number(fault: str, tmp_path: Path) -> None:
    path = folder_layout(tmp_path)
    BROKEN[fault](path)
    with pytest.raises(sg.BadInput) as refused:
        opened(tmp_path).base.read(0, [0, 1])
    assert refused.value.file == str(path) and str(path) in str(refused.value)
    assert "picture 1 of the class cat" in refused.value.asked and refused.value.exit_code == 3


def test_a_strip_is_refused_that_would_be_gigabytes_once_it_is_as_wide_as_asked(tmp_path: Path) -> None:
    path = folder_layout(tmp_path)
    Image.new("L", (20_000, 1)).save(path)
    # A small side, so that a failure of this test takes no memory.
    with pytest.raises(sg.BadInput, match="20000 x 1 pixels") as refused:
        opened(tmp_path, side=2).base.read(0, [1])
    assert refused.value.file == str(path)


def test_a_picture_that_goes_while_it_is_used_is_refused_by_its_path(tmp_path: Path) -> None:
    path = folder_layout(tmp_path)
    splits = opened(tmp_path)
    path.unlink()
    with pytest.raises(sg.BadInput, match="no such file") as refused:
        splits.base.read(0, [1])
    assert refused.value.file == str(path)


@pytest.mark.parametrize("spoil", [make_a_folder, Path.unlink], ids=["folder", "missing"])
@pytest.mark.parametrize("layout", [json_layout, csv_layout])
def test_any_picture_that_is_no_file_is_refused_before_training(
    layout: Callable[[Path], Path], spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    layout(tmp_path)
    spoil(next(tmp_path.glob("*/dog/1.png")))
    with pytest.raises(sg.BadInput, match=r"dog/1\.png, which is no file"):
        opened(tmp_path)


def test_a_folder_with_a_pictures_name_is_refused_before_training(tmp_path: Path) -> None:
    make_a_folder(folder_layout(tmp_path))
    with pytest.raises(sg.BadInput, match=r"cat/1\.png, which is no file"):
        opened(tmp_path)


def test_a_broken_picture_ends_the_command_with_code_3_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    for path in [folder_layout(root), root / "data" / "cat" / "0.png", *(root / "data" / "dog").glob("*.png")]:
        path.write_bytes(b"no picture")
    asked = "--dataset miniImagenet --backbone Conv4 --image_size 32 --n_way 2 --k_shot 1 --n_query 1 --device cpu"
    line = ["run", "fewshot_cosine", "--data_root", str(root), *asked.split(), "--output", str(tmp_path / "run")]
    assert main(line) == 3
    told = capsys.readouterr().err
    assert str(root / "data") in told and "do:" in told and "Traceback" not in told


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off(mode: str, tmp_path: Path) -> None:
    path = folder_layout(tmp_path)
    values = np.full((30, 40), 0x8080, dtype=np.uint16 if mode == "I;16" else np.int32)
    # A PGM of 16 bits is read as I.
    picture = Image.fromarray(values)
    assert picture.mode == mode
    picture.save(path, format="PNG" if mode == "I;16" else "PPM")
    torch.testing.assert_close(grey(tmp_path), torch.full((20, 20), 128 / 255), rtol=0, atol=1e-5)
    torch.testing.assert_close(coloured(tmp_path), torch.full((3, 20, 20), 128 / 255), rtol=0, atol=1e-5)


def test_a_picture_stands_upright_as_its_exif_says(tmp_path: Path) -> None:
    path = folder_layout(tmp_path)
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: what is on the left belongs on top
    Image.fromarray(pixels).save(path, exif=exif)
    upright = coloured(tmp_path)
    assert float(upright[:, :8].min()) > 0.95 and float(upright[:, 12:].max()) < 0.05


def test_what_is_transparent_is_paper(tmp_path: Path) -> None:
    path = folder_layout(tmp_path)
    pixels = np.zeros((40, 40, 4), dtype=np.uint8)
    pixels[:20, :, 3] = 255
    Image.fromarray(pixels).save(path)
    assert float(grey(tmp_path)[:8].max()) < 0.05 and float(grey(tmp_path)[12:].min()) > 0.95
    # The same as a palette with one transparent entry.
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(0, (0, 0, 40, 20))
    palette.save(path, transparency=1)
    assert float(grey(tmp_path)[:8].max()) < 0.05 and float(grey(tmp_path)[12:].min()) > 0.95


def test_palettes_and_printing_colours_are_the_colours_they_show(tmp_path: Path) -> None:
    path = folder_layout(tmp_path)
    shown = Image.new("RGB", (40, 30), (255, 0, 0))
    expected = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 20, 20)
    for picture, kind in ((shown.convert("P"), "PNG"), (shown.convert("CMYK"), "TIFF")):
        picture.save(path, format=kind)
        torch.testing.assert_close(coloured(tmp_path), expected, rtol=0, atol=0.01)


OUTSIDE = ["../outside.png", "data/../../outside.png", "{outside}", "data/cat/../../../outside.png"]


@pytest.mark.parametrize("entry", OUTSIDE)
@pytest.mark.parametrize("layout", [json_layout, csv_layout])
def test_no_picture_outside_the_root_is_opened(layout: Callable[[Path], Path], entry: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    Image.new("RGB", (40, 30)).save(outside)
    listed = layout(tmp_path / "root")
    entry = entry.format(outside=outside)
    first = "data/cat/0.png" if listed.suffix == ".json" else "cat/0.png"
    listed.write_text(listed.read_text().replace(first, entry))
    with pytest.raises(sg.BadInput, match="outside") as refused:
        opened(tmp_path / "root")
    assert refused.value.file == str(listed) and entry in str(refused.value)


@pytest.mark.parametrize("entry", ["../outside", "{outside}", "cat/../../../outside"])
def test_no_folder_outside_the_root_is_opened(entry: str, tmp_path: Path) -> None:
    folder_layout(tmp_path / "root")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "root" / "outside").mkdir()
    for folder in (outside, tmp_path / "root" / "outside"):
        Image.new("RGB", (40, 30)).save(folder / "0.png")
    (tmp_path / "root" / "train.txt").write_text(f"cat\n{entry.format(outside=outside)}\n")
    with pytest.raises(sg.BadInput, match="outside") as refused:
        opened(tmp_path / "root")
    assert refused.value.file == str(tmp_path / "root" / "train.txt") and "line 2" in str(refused.value)


def test_absolute_names_below_the_root_are_read_also_through_a_link(tmp_path: Path) -> None:
    listed = json_layout(tmp_path / "root")
    listed.write_text(listed.read_text().replace("data/", f"{tmp_path}/root/data/"))
    assert opened(tmp_path / "root").base.read(0, [0]).shape == (1, 3, 20, 20)
    (tmp_path / "link").symlink_to(tmp_path / "root")
    assert opened(tmp_path / "link").base.read(0, [0]).shape == (1, 3, 20, 20)


def with_value(key: str, value: object) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return spoil


WRONG_JSON: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (lambda path: path.write_text(path.read_text()[:-20]), "no JSON"),
    "zero bytes": (lambda path: path.write_bytes(b""), "no JSON"),
    "nested without end": (lambda path: path.write_text("[" * 200_000), "no JSON"),
    "other letters": (lambda path: path.write_bytes(path.read_text().encode("utf-16")), "no text in UTF-8"),
    "a list": (lambda path: path.write_text('["label_names", "image_names", "image_labels"]'), "a list, not an object"),
    "names no list": (with_value("image_names", "data"), "'image_names' is no list of texts"),
    "names no texts": (with_value("image_names", [1, 2, 3, 4]), "'image_names' is no list of texts"),
    "classes no list": (with_value("label_names", {"cat": 0}), "'label_names' is no list of texts"),
    "labels no list": (with_value("image_labels", 4), "'image_labels' is no list of whole numbers"),
    "labels as words": (with_value("image_labels", ["cat", "cat", "dog", "dog"]), "'image_labels' is no list of whole"),
    "half a label": (with_value("image_labels", [0.5, 0.5, 1, 1]), "'image_labels' is no list of whole"),
    "labels not numbers": (with_value("image_labels", [float("nan"), 0, 1, 1]), "'image_labels' is no list of whole"),
    "label beyond": (with_value("image_labels", [0, 0, 1, 7]), "image 3 has the label 7"),
    "label below": (with_value("image_labels", [0, 0, 1, -1]), "image 3 has the label -1"),
}


@pytest.mark.parametrize("fault", WRONG_JSON)
def test_a_wrong_json_file_is_refused_in_plain_words(fault: str, tmp_path: Path) -> None:
    spoil, told = WRONG_JSON[fault]
    path = json_layout(tmp_path)
    spoil(path)
    with pytest.raises(sg.BadInput, match=told) as refused:
        opened(tmp_path)
    assert refused.value.file == str(path)


WRONG_CSV: dict[str, tuple[Callable[[Path], object], str]] = {
    "other columns": (lambda path: path.write_text("file;class\ncat/0.png;cat\n"), "no column 'filename'"),
    "zero bytes": (lambda path: path.write_bytes(b""), "no column 'filename'"),
    "header only": (lambda path: path.write_text("filename,label\n"), "names no class"),
    "short row": (lambda path: path.write_text("filename,label\ncat/0.png,cat\ncat/1.png\n"), "line 3"),
    "long row": (lambda path: path.write_text("filename,label\ncat/0.png,cat,1\n"), "line 2"),
    "empty field": (lambda path: path.write_text("filename,label\ncat/0.png,\n"), "line 2"),
    "huge field": (lambda path: path.write_text(f"filename,label\n{'x' * 200_000},cat\n"), "line 2"),
    "other letters": (lambda path: path.write_bytes(path.read_text().encode("utf-16")), "no text in UTF-8"),
}


@pytest.mark.parametrize("fault", WRONG_CSV)
def test_a_wrong_csv_file_is_refused_with_the_line(fault: str, tmp_path: Path) -> None:
    spoil, told = WRONG_CSV[fault]
    path = csv_layout(tmp_path)
    spoil(path)
    with pytest.raises(sg.BadInput, match=told) as refused:
        opened(tmp_path)
    assert refused.value.file == str(path)


def test_a_class_list_in_other_letters_is_refused(tmp_path: Path) -> None:
    folder_layout(tmp_path)
    (tmp_path / "train.txt").write_bytes("cat\ndög\n".encode("latin-1"))
    with pytest.raises(sg.BadInput, match="no text in UTF-8") as refused:
        opened(tmp_path)
    assert refused.value.file == str(tmp_path / "train.txt")


@pytest.mark.parametrize("layout", [folder_layout, json_layout, csv_layout])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    layout(tmp_path)
    before = [opened(tmp_path).named(split) for split in data.SPLITS]
    for path in (*tmp_path.glob("*.txt"), *tmp_path.glob("*.csv"), *tmp_path.glob("*.json")):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_text().replace("\n", "\r\n").encode())
    assert [opened(tmp_path).named(split) for split in data.SPLITS] == before


@pytest.mark.parametrize("name", ["backbone.pt", "backbone.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", None, "missing"])
def test_a_wrong_backbone_file_is_refused_by_its_path(name: str, content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(sg.BadInput) as refused:
        make_model(FewShotOptions(dataset="digits", FETI=path))
    assert refused.value.file == str(path) and str(path) in str(refused.value)


def test_a_backbone_of_other_content_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "backbone.pt"
    for content in ([1], {"layer1.0.weight": 3}, {"layer1.0.weight": torch.full((3,), torch.nan)}):
        torch.save(content, path)
        with pytest.raises(sg.BadInput) as refused:
            make_model(FewShotOptions(dataset="digits", FETI=path))
        assert refused.value.file == str(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow tells of each damaged tag
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
def test_pictures_with_changed_bytes_are_read_or_refused_by_path(kind: str, tmp_path: Path) -> None:
    path = folder_layout(tmp_path)
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(random.integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(path, format=kind, exif=exif)
    sound, splits = path.read_bytes(), opened(tmp_path)
    refused = 0
    for _ in range(150):
        content = bytearray(sound[: random.integers(1, len(sound) + 1)] if random.integers(3) == 0 else sound)
        for at in random.integers(0, min(len(content), 400), size=random.integers(1, 6)):
            content[at] = random.integers(256)
        path.write_bytes(bytes(content))
        try:
            assert bool(splits.base.read(0, [1]).isfinite().all())
        except sg.BadInput as error:
            assert error.file == os.fspath(path)
            refused += 1
    assert refused > 20
