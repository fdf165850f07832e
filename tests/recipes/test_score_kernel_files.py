"""Broken CIFAR-10 batches, centers and weights: refused by path, exit code 3; nothing in them runs or is trusted."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import samegrad as sg
from samegrad.cli.main import main
from samegrad.cli.run import CONFIG, config_text, parse_run
from samegrad.recipes.score_kernel import data
from samegrad.recipes.score_kernel.options import ScoreKernelOptions
from samegrad.recipes.score_kernel.recipe import build
from samegrad.recipes.score_kernel.splits import open_points

PIXELS = np.random.default_rng(0).integers(0, 256, size=(40, 3072), dtype=np.uint8)


def options(**values: Any) -> ScoreKernelOptions:
    small = {
        "train_kernel_size": 6, "train_samples_size": 11, "test_samples_size": 2, "dtype": "float64", "device": "cpu",
        "hiddenunits": 4, "depth": 2, "batch_size": 5,
    }  # fmt: skip
    return ScoreKernelOptions(**(small | values))


def batch(root: Path, protocol: int = 2) -> Path:
    path = root / "cifar-10-batches-py" / "data_batch_1"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({b"data": PIXELS, b"labels": [0] * len(PIXELS)}, protocol=protocol))
    return path


class Canary:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("canary",))


def holds(value: Any) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(pickle.dumps({b"data": value}, protocol=4))


def names_numpys(path: Path) -> None:
    """An array of objects made of plain bytes: numpy would take them for addresses and read there."""
    array = np.empty((1, 3072), dtype=object)
    rebuild, arguments, state = array.__reduce__()
    path.write_bytes(_reduced(rebuild, arguments, (*state[:-1], b"\x41" * array.nbytes)))


def _reduced(rebuild: Any, arguments: Any, state: Any) -> bytes:
    class Array:
        def __reduce__(self) -> Any:
            return rebuild, arguments, state

    return pickle.dumps({b"data": Array()}, protocol=2)


def claims_more(path: Path) -> None:
    rebuild, arguments, state = PIXELS.__reduce__()
    path.write_bytes(_reduced(rebuild, arguments, (state[0], (1 << 40, 3072), *state[2:])))


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


WRONG_BATCHES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:5000]), "unexpected end of data|ends too early"),
    "zero bytes": (lambda p: p.write_bytes(b""), "ends too early"),
    "text": (lambda p: p.write_text("no pickle"), "not a batch"),
    "runs code": (holds(Canary()), "which no batch of CIFAR-10 needs"),
    "a list": (lambda p: p.write_bytes(pickle.dumps([1, 2])), "a list, not a dictionary"),
    "no data": (lambda p: p.write_bytes(pickle.dumps({b"labels": [0]})), "no 'data'"),
    "data in a list": (holds([[0] * 3072]), "no array of bytes"),
    "wide numbers": (holds(PIXELS.astype(np.int32) + 1000), "no array of bytes"),
    "fractions": (holds(PIXELS / 255), "no array of bytes"),
    "other width": (holds(PIXELS[:, :100]), r"shape \(40, 100\), not \(N, 3072\)"),
    "no pictures": (holds(PIXELS[:0]), r"shape \(0,.* with a picture in it"),
    "objects": (names_numpys, "no array of bytes"),
    "more than there is": (claims_more, "cannot reshape array of size 122880"),
}


@pytest.mark.parametrize("fault", WRONG_BATCHES)
def test_a_wrong_batch_is_refused_by_its_path_and_not_run(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, told = WRONG_BATCHES[fault]
    path = batch(tmp_path / "cifar")
    spoil(path)
    with pytest.raises(sg.BadInput, match=told) as refused:
        open_points(options(data="cifar10", data_root=tmp_path / "cifar"))
    assert str(path) in str(refused.value) and refused.value.exit_code == 3
    assert not Path("canary").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 3074, None], ids=["zero bytes", "another length", "folder"])
def test_a_wrong_binary_batch_is_refused_by_its_path(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1.bin"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(sg.BadInput, match=r"data_batch_1\.bin"):
        open_points(options(data="cifar10", data_root=tmp_path))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_of_every_protocol_are_their_pixels(protocol: int, order: Any, tmp_path: Path) -> None:
    path = batch(tmp_path)
    path.write_bytes(pickle.dumps({b"data": np.array(PIXELS, order=order)}, protocol=protocol))
    np.testing.assert_array_equal(data.read_cifar10(tmp_path), _standardised(PIXELS))


def _standardised(pixels: np.ndarray) -> np.ndarray:
    pictures = pixels.reshape(-1, 3, 32, 32).astype(np.float64) / 255
    mean, deviation = (f(axis=(0, 2, 3), keepdims=True) for f in (pictures.mean, pictures.std))
    return ((pictures - mean) / deviation).reshape(len(pixels), 3072)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_batches_with_changed_bytes_are_read_or_refused_and_never_end_the_process(
    protocol: int, tmp_path: Path
) -> None:
    path = batch(tmp_path, protocol)
    sound, random, refused = path.read_bytes(), np.random.default_rng(protocol), 0
    for _ in range(600):
        content = bytearray(sound[: random.integers(1, len(sound) + 1)] if random.integers(4) == 0 else sound)
        for at in random.integers(0, min(len(content), 300), size=random.integers(1, 5)):
            content[at] = random.integers(256)
        path.write_bytes(bytes(content))
        try:
            assert data.read_cifar10(tmp_path).shape[1] == 3072
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 200


def test_a_wrong_batch_ends_the_command_with_code_3_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = batch(tmp_path / "cifar")
    path.write_bytes(path.read_bytes()[:-10])
    line = f"run score_kernel --data cifar10 --data_root {tmp_path / 'cifar'} --device cpu --output {tmp_path / 'run'}"
    assert main(line.split()) == 3
    told = capsys.readouterr().err
    assert str(path) in told and "do:" in told and "Traceback" not in told


WRONG_CENTERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "zero bytes": ("centers.pt", lambda p: p.write_bytes(b""), "in "),
    "text": ("centers.pt", lambda p: p.write_text("none"), "in "),
    "runs code": ("centers.pt", lambda p: torch.save(Canary(), p), "[Ww]eights"),
    "folder": ("centers.pt", lambda p: p.mkdir(), "a folder"),
    "missing": ("centers.pt", lambda p: None, "no such file"),
    "missing too": ("centers.safetensors", lambda p: None, "no such file"),
    "text as tensors": ("centers.safetensors", lambda p: p.write_text("none at all"), "in "),
    "folder of tensors": ("centers.safetensors", lambda p: p.mkdir(), "in "),
    "not a number": ("centers.pt", lambda p: torch.save(torch.full((3, 64), math.nan), p), "not finite"),
    "infinite": (
        "centers.safetensors",
        lambda p: safetensors.torch.save_file({"centers": torch.full((3, 64), math.inf)}, p),
        "not finite",
    ),
    "complex": ("centers.pt", lambda p: torch.save(torch.zeros(3, 64, dtype=torch.complex64), p), "complex64"),
    "other width": ("centers.pt", lambda p: torch.save(torch.zeros(3, 5), p), r"shape \(3, 5\)"),
    "none": ("centers.pt", lambda p: torch.save(torch.zeros(0, 64), p), r"shape \(0, 64\)"),
    "without values": ("centers.pt", lambda p: torch.save(torch.zeros(3, 64, device="meta"), p), "meta"),
    "sparse": ("centers.pt", lambda p: torch.save(torch.eye(3, 64).to_sparse(), p), "sparse"),
}


@pytest.mark.parametrize("fault", WRONG_CENTERS)
def test_wrong_centers_are_refused_by_their_path(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, spoil, told = WRONG_CENTERS[fault]
    spoil(tmp_path / name)
    with pytest.raises(sg.BadInput, match=told) as refused:
        open_points(options(load_centers_path=tmp_path / name))
    assert refused.value.file == str(tmp_path / name) and name in str(refused.value)
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (torch.zeros(3), "another network"), ([1], "list"), ({"a": 1}, "'a' is a int"), ({1: torch.zeros(3)}, "1"),
        ({"layers.0.weight": torch.full((4, 64), math.nan)}, "not finite"),
    ],
    ids=["one tensor", "a list", "no tensors", "a name that is a number", "not a number"],
)  # fmt: skip
def test_wrong_weights_are_refused_by_their_path(content: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "factornet.pt"
    torch.save(content, path)
    with pytest.raises(sg.BadInput, match=told) as refused:
        build(options(load_model_path=path))
    assert refused.value.file == str(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pt", "old pt", "safetensors"])
def test_tensor_files_with_changed_bytes_are_read_or_refused_by_path(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"centers.{kind.split()[-1]}"
    centers = torch.randn(3, 2, dtype=torch.float64)
    if kind == "safetensors":
        safetensors.torch.save_file({"centers": centers}, path)
    else:
        torch.save(centers, path, _use_new_zipfile_serialization=kind == "pt")
    sound, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    # The default number of centers: a changed file may have any.
    asked = options(data="8gaussians", load_centers_path=path, train_kernel_size=100)
    for _ in range(400):
        content = bytearray(sound[: random.integers(1, len(sound) + 1)] if random.integers(3) == 0 else sound)
        for at in random.integers(0, min(len(content), 500), size=random.integers(1, 5)):
            content[at] = random.integers(256)
        path.write_bytes(bytes(content))
        try:
            assert bool(open_points(asked).centers.isfinite().all())
        except sg.BadInput as error:
            assert error.file == str(path)
            refused += 1
    assert refused > 100


def test_a_save_that_can_be_no_folder_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "factornet.pt"
    taken.write_bytes(b"weights")
    for save in (taken, taken / "deeper"):
        with pytest.raises(sg.UsageError, match=r"factornet\.pt stands there and is no folder") as refused:
            options(save=save)
        assert refused.value.option == "save"
    line = f"run score_kernel --data moons --niters 2 --device cpu --save {taken} --output {tmp_path / 'run'}"
    assert main(line.split()) == 2
    assert "--save" in capsys.readouterr().err and not (tmp_path / "run").exists()
    options(save=tmp_path / "new" / "folder")


def test_a_save_that_fails_at_the_end_leaves_the_runs_files_and_another_may_be_given_on_resume(
    tmp_path: Path,
) -> None:
    run, kept = tmp_path / "run", tmp_path / "kept"
    run.mkdir()
    program = build(options(data="moons", save=kept))
    kept.write_bytes(b"came meanwhile")
    with pytest.raises(sg.EnvironmentProblem, match="--resume with another --save"):
        program.write(run)
    assert {path.name for path in run.iterdir()} >= {"samples.png", "density.png", "factornet.pt", "centers.pt"}
    kept.unlink()
    line = ["score_kernel", "--output", str(run)]
    (run / CONFIG).write_text(config_text(*parse_run([*line, "--save", str(kept)])))
    _, call = parse_run([*line, "--resume", "--save", str(tmp_path / "other")])
    assert call.part(ScoreKernelOptions).save == tmp_path / "other"
