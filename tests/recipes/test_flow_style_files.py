"""Broken latents, codecs, checkpoints and pictures of flow_style: refused by path, exit code 3, and never run."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

import samegrad as sg
from samegrad.cli.main import main
from samegrad.recipes.flow_style import inference, preprocess
from samegrad.recipes.flow_style.checkpoint import save_flow
from samegrad.recipes.flow_style.codec import LinearCodec
from samegrad.recipes.flow_style.model import make_flow
from samegrad.recipes.flow_style.options import FlowStyleOptions
from samegrad.recipes.flow_style.sampling import Sampler
from samegrad.recipes.flow_style.splits import open_splits


def latents(root: Path) -> Path:
    """Two styles of three latents; the path of the one that tests spoil."""
    generator = torch.Generator().manual_seed(0)
    for style in ("monet", "photo"):
        (root / style).mkdir(parents=True)
        for number in range(3):
            torch.save(torch.randn(4, 8, 8, generator=generator), root / style / f"{number}.pt")
    return root / "photo" / "1.pt"


class Canary:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("canary",))


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut(fraction: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])


def put(value: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


WRONG_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut(0.7), "central directory"),
    "zero bytes": (lambda path: path.write_bytes(b""), "in "),
    "text": (lambda path: path.write_text("no tensor"), "in "),
    "other letters": (lambda path: path.write_bytes(b"\x80\x02X\x03\x00\x00\x00\xff\xfe\xfd."), "in "),
    "folder": (make_a_folder, "a folder"),
    "runs code": (put(Canary()), "[Ww]eights"),
    "a bare pickle that runs code": (lambda path: path.write_bytes(pickle.dumps(Canary())), "in "),
}
WRONG_LATENTS = {
    "channels": (put(torch.zeros(3, 8, 8)), r"not \(4, height, width\)"),
    "side": (put(torch.zeros(4, 6, 8)), "multiples of 4"),
    "no side": (put(torch.zeros(4, 0, 8)), "multiples of 4"),
    "another side": (put(torch.randn(4, 4, 4)), r"shape \(4, 4, 4\)"),
    "not a number": (put(torch.full((4, 8, 8), math.nan)), "not finite"),
    "too large": (put(torch.full((4, 8, 8), 1e300, dtype=torch.float64)), "not finite"),
    "complex": (put(torch.zeros(4, 8, 8, dtype=torch.complex64)), "complex64"),
    "bytes": (put(torch.zeros(4, 8, 8, dtype=torch.uint8)), "uint8"),
    "sparse": (put(torch.randn(4, 8, 8).to_sparse()), "sparse"),
    "without values": (put(torch.zeros(4, 8, 8, device="meta")), "meta"),
    "a dictionary": (put({"latent": torch.zeros(4, 8, 8)}), "dict"),
    "one number": (put(1), "int"),
}


@pytest.mark.parametrize("fault", [*WRONG_FILES, *WRONG_LATENTS])
def test_a_wrong_latent_is_refused_by_its_path(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, told = (WRONG_FILES | WRONG_LATENTS)[fault]
    path = latents(tmp_path / "latents")
    spoil(path)
    with pytest.raises(sg.BadInput, match=told) as refused:
        open_splits(FlowStyleOptions(data_root=tmp_path / "latents"))
    assert refused.value.file == str(path) and str(path) in str(refused.value) and refused.value.exit_code == 3
    assert not Path("canary").exists()


def test_a_wrong_latent_ends_the_command_with_code_3_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = latents(tmp_path / "latents")
    cut(0.5)(path)
    line = f"run flow_style --data_root {tmp_path / 'latents'} --device cpu --output {tmp_path / 'run'}"
    assert main(line.split()) == 3
    told = capsys.readouterr().err
    assert str(path) in told and "do:" in told and "Traceback" not in told


def codec(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    eye = torch.eye(4, 192)
    return {"mean": torch.zeros(192), "components": eye, "spread": torch.ones(4)} | changed


def keep(**changed: torch.Tensor) -> Callable[[Path], object]:
    return lambda path: safetensors.torch.save_file(codec(**changed), path)


WRONG_CODECS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut(0.7), "not fully covered"),
    "zero bytes": (lambda path: path.write_bytes(b""), "in "),
    "text": (lambda path: path.write_text("no codec at all"), "in "),
    "another file": (lambda path: safetensors.torch.save_file({"mean": torch.zeros(192)}, path), "no components"),
    "other shapes": (keep(components=torch.zeros(4, 48)), r"components has shape \(4, 48\)"),
    "not a number": (keep(mean=torch.full((192,), math.nan)), "'mean' holds values that are not finite"),
    "no spread": (keep(spread=torch.zeros(4)), "spread"),
}


@pytest.mark.parametrize("fault", WRONG_CODECS)
def test_a_wrong_codec_is_refused_by_its_path(fault: str, tmp_path: Path) -> None:
    spoil, told = WRONG_CODECS[fault]
    latents(tmp_path)
    path = tmp_path / "codec.safetensors"
    keep()(path)
    assert open_splits(FlowStyleOptions(data_root=tmp_path)).codec is not None
    spoil(path)
    with pytest.raises(sg.BadInput, match=told) as refused:
        open_splits(FlowStyleOptions(data_root=tmp_path))
    assert refused.value.file == str(path) and str(path) in str(refused.value)


def checkpoint(path: Path) -> Path:
    model = make_flow(2, base_channels=4, ode_steps=2, seed=0, dtype=torch.float32)
    found = codec()
    held = LinearCodec(found["mean"], found["components"], found["spread"])
    return save_flow(path, model, names=("monet", "photo"), base_channels=4, sampler=Sampler(steps=2), codec=held)


def change(**values: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(torch.load(path, weights_only=True) | values, path)


def lose_weights(path: Path) -> None:
    found = torch.load(path, weights_only=True)
    first = next(iter(found["weights"]))
    change(weights={name: value for name, value in found["weights"].items() if name != first})(path)


def spoil_weights(path: Path) -> None:
    found = torch.load(path, weights_only=True)
    next(iter(found["weights"].values())).fill_(math.nan)
    torch.save(found, path)


WRONG_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a state dict": (put({"weight": torch.zeros(2)}), "no weights in it"),
    "a list": (put([1, 2]), "list"),
    "one tensor": (put(torch.zeros(2)), "Tensor"),
    "no styles": (change(styles=3), "styles"),
    "other width": (change(base_channels=8), "another network"),
    "width in words": (change(base_channels="four"), "base_channels"),
    "weights missing": (lose_weights, "another network"),
    "weights no tensors": (change(weights={"a": 1}), "weights"),
    "weights not numbers": (spoil_weights, "not finite"),
    "sampler of another kind": (change(sampler={"pace": 3}), "sampler"),
    "sampler of words": (change(sampler={"steps": "two"}), "sampler"),
    "codec of another kind": (change(codec={"mean": torch.zeros(192)}), "codec"),
}


@pytest.mark.parametrize("fault", [*WRONG_FILES, *WRONG_CHECKPOINTS])
def test_a_wrong_checkpoint_is_refused_by_its_path_and_nothing_is_written(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, told = (WRONG_FILES | WRONG_CHECKPOINTS)[fault]
    path = checkpoint(tmp_path / "flow_style.pt")
    source, output = tmp_path / "source.pt", tmp_path / "out" / "styled.pt"
    torch.save(torch.randn(4, 8, 8), source)
    spoil(path)
    with pytest.raises(sg.BadInput, match=told) as refused:
        inference.style_file(path, source, output)
    assert refused.value.file == str(path) and str(path) in str(refused.value)
    assert not output.exists() and not Path("canary").exists()


@pytest.mark.parametrize("name", ["source.pt", "source.png"])
@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_wrong_source_is_refused_by_its_path(
    name: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / name
    source.mkdir() if content is None else source.write_bytes(content)
    asked = [str(checkpoint(tmp_path / "flow_style.pt")), str(source), str(tmp_path / "styled.pt")]
    assert inference.main(asked) == 3
    assert str(source) in capsys.readouterr().err and not (tmp_path / "styled.pt").exists()


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("styled", "a name without a suffix"), ("styled.xyz", "no pictures are written as .xyz"),
        # Pillow reads the first, and writes the second without colours.
        ("styled.psd", "no pictures are written as .psd"), ("styled.xbm", "no pictures are written as .xbm"),
        ("", "a folder"),
    ],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_refused_before_the_checkpoint_is_read(
    output: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / output
    (tmp_path / "out").mkdir()
    assert inference.main([str(tmp_path / "none.pt"), str(tmp_path / "source.png"), str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and told in error and ".png" in error
    # With a good one the missing checkpoint is told.
    for name in ("styled.png", "styled.JPG", "styled.pt", "new/styled.webp"):
        good = str(tmp_path / "out" / name)
        assert inference.main([str(tmp_path / "none.pt"), str(tmp_path / "source.png"), good]) == 3
        assert "none.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("target_size", "250", "not a multiple of 32"), ("target_size", "260", "not a multiple of 32"),
        ("target_size", "0", "it must be positive"), ("target_size", "-32", "it must be positive"),
        ("steps", "0", "it must be at least 1\n"), ("start_time", "2", "it must be from 0 to 1\n"),
    ],
)  # fmt: skip
def test_a_setting_that_the_flow_cannot_take_is_refused_before_the_checkpoint_is_read(
    option: str, value: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / name) for name in ("none.pt", "source.png", "styled.png")]
    assert inference.main([*files, f"--{option}={value}"]) == 2
    error = capsys.readouterr().err
    assert f"--{option} {value}" in error and told in error


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", None], ids=["zero bytes", "cut off", "folder"])
def test_a_wrong_picture_is_refused_by_its_path_before_anything_is_written(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for style in ("dark", "light"):
        (tmp_path / "raw" / style).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "raw" / style / "0.png")
    path = tmp_path / "raw" / "light" / "1.png"
    path.mkdir() if content is None else path.write_bytes(content)
    asked = ["--raw_data_root", str(tmp_path / "raw"), "--output_root", str(tmp_path / "out"), "--target_size", "64"]
    assert preprocess.main(asked) == 3
    assert str(path) in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_pictures_of_one_colour_are_refused_with_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for style in ("dark", "light"):
        (tmp_path / "raw" / style).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "raw" / style / "0.png")
    asked = ["--raw_data_root", str(tmp_path / "raw"), "--output_root", str(tmp_path / "out"), "--target_size", "64"]
    assert preprocess.main(asked) == 3
    assert "four components" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_style_with_one_latent_is_refused_by_name(tmp_path: Path) -> None:
    latents(tmp_path)
    for number in (0, 1):
        (tmp_path / "photo" / f"{number}.pt").unlink()
    with pytest.raises(sg.BadInput, match=r"photo.*one latent"):
        open_splits(dataclasses.replace(FlowStyleOptions(), data_root=tmp_path))
