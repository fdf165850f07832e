"""A checkpoint that is not as it was saved is named, never loaded, and never passed by in silence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from samegrad.errors import BadInput
from samegrad.json_record import SCHEMA_VERSION
from samegrad.store import Checkpoint, load_checkpoint, model_into, save_checkpoint
from samegrad.store.manifest import FileEntry, Manifest, View, manifest_text, read_manifest

FILES = ["model.safetensors", "rng.safetensors", "state.json", "manifest.json"]


@pytest.fixture
def two(folder: Path) -> Path:
    """Steps 100 and 120, both good."""
    for step in (100, 120):
        weight = torch.full((30,), float(step))
        tensors = {"model": {"w": weight, "tied": weight}, "rng": {"s": torch.tensor([step], dtype=torch.uint8)}}
        save_checkpoint(folder, step=step, tensors=tensors, state={"best": 1.5})
    return folder


def newest(folder: Path) -> Path:
    return folder / "step-00000120"


def refused(folder: Path, **options: object) -> BadInput:
    with pytest.raises(BadInput) as caught:
        load_checkpoint(folder, **options)  # type: ignore[arg-type]
    return caught.value


def rewrite(checkpoint: Path, change: Callable[[Manifest], Manifest]) -> None:
    """A manifest with another content that is consistent in itself, as an attacker would write it."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    (checkpoint / "manifest.json").write_text(manifest_text(change(manifest)))


def test_the_newest_good_checkpoint_loads_without_warnings(two: Path) -> None:
    loaded = load_checkpoint(two)
    assert (loaded.step, loaded.path, loaded.warnings) == (120, newest(two), ())
    assert loaded.state == {"best": 1.5}
    assert torch.equal(loaded.tensors["model"]["tied"], torch.full((30,), 120.0))


def test_an_explicit_step_is_loaded(two: Path) -> None:
    loaded = load_checkpoint(two, step=100)
    assert loaded.step == 100
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((30,), 100.0))


def test_loaded_tensors_do_not_hang_on_the_file(two: Path) -> None:
    loaded = load_checkpoint(two)
    os.truncate(newest(two) / "model.safetensors", 0)
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((30,), 120.0))
    assert isinstance(loaded, Checkpoint)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.step = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_found_and_the_previous_good_step_named(two: Path, name: str) -> None:
    path = newest(two) / name
    good = path.read_bytes()
    places = random.Random(2).sample(range(len(good) * 8), 25) + [0, len(good) * 8 - 1]
    for place in places:
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        error = refused(two)
        assert str(path) in error.found or "step-00000120" in error.found
        assert "step-00000100" in error.do
        assert error.exit_code == 3
        if name != "manifest.json":
            assert "sha256: expected " in error.found
            assert ", found " in error.found
            assert error.file == str(path)
    path.write_bytes(good)
    assert load_checkpoint(two).step == 120


def test_without_an_earlier_good_one_none_is_offered(two: Path) -> None:
    for step in (100, 120):
        path = two / f"step-00000{step}" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "no good checkpoint before it" in refused(two).do


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_empty_files_have_their_own_texts(two: Path, name: str) -> None:
    path = newest(two) / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    truncated = refused(two)
    os.truncate(path, 0)
    empty = refused(two)
    assert str(path) in truncated.found
    assert str(path) in empty.found
    assert "empty" in empty.found
    if name != "manifest.json":
        assert f"{size - 1} bytes; the manifest says {size} bytes" in truncated.found
    assert "step-00000100" in truncated.do
    assert "step-00000100" in empty.do


@pytest.mark.parametrize("name", FILES)
def test_an_incomplete_newest_is_passed_by_with_a_warning_naming_both(two: Path, name: str) -> None:
    (newest(two) / name).unlink()
    loaded = load_checkpoint(two)
    assert loaded.step == 100
    (warning,) = loaded.warnings
    assert f"step-00000120 is incomplete: {name} is missing" in warning
    assert "step-00000100" in warning


@pytest.mark.parametrize("name", FILES)
def test_an_incomplete_newest_is_an_error_when_strict_or_asked_for(two: Path, name: str) -> None:
    (newest(two) / name).unlink()
    for options in ({"strict": True}, {"step": 120}):
        error = refused(two, **options)
        assert f"{name} is missing" in error.found
        assert "step-00000100" in error.do


def test_a_not_finite_newest_is_an_error_when_strict_and_loads_with_a_warning_when_asked_for(two: Path) -> None:
    save_checkpoint(two, step=130, tensors={"model": {"w": torch.tensor([torch.nan])}}, state={})
    assert load_checkpoint(two).step == 120
    assert "not finite" in refused(two, strict=True).found
    asked = load_checkpoint(two, step=130)
    assert asked.step == 130
    assert "not finite (model: w)" in asked.warnings[0]


def test_a_newer_schema_has_its_own_text(two: Path) -> None:
    path = newest(two) / "manifest.json"
    document = json.loads(path.read_text())
    document["schema_version"] = SCHEMA_VERSION + 1
    path.write_text(json.dumps(document))
    error = refused(two)
    assert f"schema version {SCHEMA_VERSION + 1} is newer" in error.found
    assert "sha256" not in error.found


def test_an_empty_or_absent_folder_is_never_a_fresh_start(tmp_path: Path) -> None:
    assert "no checkpoint" in refused(tmp_path).found
    assert refused(tmp_path / "none").found == f"{tmp_path / 'none'}: not a folder"
    (tmp_path / ".tmp-1-step-00000003").mkdir()
    assert "no checkpoint" in refused(tmp_path).found


def test_a_step_that_does_not_exist_lists_those_that_do(two: Path) -> None:
    assert "no step 110; the steps there are 100, 120" in refused(two, step=110).found


def test_a_checkpoint_moved_under_another_step_is_refused(two: Path) -> None:
    shutil.copytree(newest(two), two / "step-00000200")
    assert "the manifest is of step 120" in refused(two).found


# --- manifests made to lead astray: consistent in themselves, so that no sha256 gives them away


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "a/../../secret.safetensors", "..", ""])
def test_a_manifest_cannot_name_a_file_outside_its_folder(two: Path, name: str) -> None:
    secret = two / "secret.safetensors"
    shutil.copy(newest(two) / "model.safetensors", secret)

    def astray(manifest: Manifest) -> Manifest:
        entry = manifest.files["model.safetensors"]
        return dataclasses.replace(manifest, files={**manifest.files, name: entry})

    rewrite(newest(two), astray)
    error = refused(two)
    assert repr(name) in error.found
    assert "plain file name" in error.found


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_folder_is_refused(two: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (newest(two) / name).rename(outside)
    (newest(two) / name).symlink_to(outside)
    assert "outside the checkpoint" in refused(two).found


def test_a_checkpoint_that_is_itself_a_link_is_refused(two: Path, tmp_path: Path) -> None:
    newest(two).rename(tmp_path / "elsewhere")
    newest(two).symlink_to(tmp_path / "elsewhere")
    assert "a link to" in refused(two).found


def test_a_pipe_in_the_place_of_a_file_does_not_hang(two: Path) -> None:
    (newest(two) / "state.json").unlink()
    os.mkfifo(newest(two) / "state.json")
    assert "not a plain file" in refused(two).found


@pytest.mark.parametrize(
    "view",
    [
        {"shape": (31,), "stride": (1,)}, {"shape": (4,), "stride": (10,)}, {"shape": (2,), "stride": (-1,)},
        {"shape": (2,), "stride": (1,), "first_element": 29}, {"shape": (2, 2), "stride": (1,)},
        {"shape": (1,), "stride": (1,), "of": "nothing"}, {"shape": (1,), "stride": (1,), "name": "w"},
        {"shape": (1,), "stride": (1,), "first_element": -1},
    ],
)  # fmt: skip
def test_a_view_cannot_reach_outside_the_tensor_it_is_on(two: Path, view: dict[str, object]) -> None:
    manifest = read_manifest(newest(two))
    assert manifest is not None
    # Which of two tied names owns the memory is the writer's choice.
    owner = manifest.views["model.safetensors"][0].of
    fields = {"name": "new", "of": owner, "first_element": 0} | view
    if fields["name"] == "w":
        fields["name"] = owner
    views = {"model.safetensors": (View(**fields),)}  # type: ignore[arg-type]
    rewrite(newest(two), lambda manifest: dataclasses.replace(manifest, views=views))
    assert "view" in refused(two).found or "twice" in refused(two).found


@pytest.mark.parametrize(
    "content",
    [
        (2**40).to_bytes(8, "little") + b"{}",
        b"",
        b'\x50\0\0\0\0\0\0\0{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"v":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}' + b"\0" * 12,
        b"\x80\x04cos\nsystem\n.",
    ],
    ids=["header of 1 TB", "empty", "overlapping", "pickle"],
)
def test_a_crafted_tensor_file_is_refused_by_name(two: Path, content: bytes) -> None:
    (newest(two) / "model.safetensors").write_bytes(content)
    entry = FileEntry(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    rewrite(
        newest(two),
        lambda manifest: dataclasses.replace(manifest, files={**manifest.files, "model.safetensors": entry}),
    )
    error = refused(two)
    assert "not a sound safetensors file" in error.found
    assert error.file == str(newest(two) / "model.safetensors")


def test_mutated_manifests_load_or_are_refused_and_nothing_else(two: Path) -> None:
    path = newest(two) / "manifest.json"
    good = path.read_bytes()
    dice = random.Random(11)
    for _ in range(150):
        data = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(data))
            data[at : at + dice.randint(0, 3)] = dice.randbytes(dice.randint(0, 3))
        path.write_bytes(data)
        try:
            loaded = load_checkpoint(two)
        except BadInput:
            continue
        # An added space changes nothing; anything that loads is what was saved.
        assert torch.equal(loaded.tensors["model"]["tied"], torch.full((30,), 120.0))
    for odd in (b"[]", b"null", b"{}", b'{"schema_version":"x"}', b"[" * 100_000, b'{"sha256":NaN}'):
        path.write_bytes(odd)
        refused(two)


# --- into a model


def model(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def test_a_model_takes_its_tensors_bit_for_bit(folder: Path) -> None:
    source, target = model(), model()
    save_checkpoint(folder, step=1, tensors={"model": source.state_dict()}, state={})
    model_into(target, load_checkpoint(folder).tensors["model"])
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


def test_a_tied_model_stays_tied(folder: Path) -> None:
    source, target = model(3), model(3)
    for one in (source, target):
        one.add_module("tied", nn.Linear(3, 3))
        one.tied.weight = one[0].weight
    save_checkpoint(folder, step=1, tensors={"model": source.state_dict()}, state={})
    model_into(target, load_checkpoint(folder).tensors["model"])
    assert target.tied.weight is target[0].weight
    assert torch.equal(target.tied.weight, source[0].weight)


def test_a_model_of_another_shape_lists_five_differences_counts_the_rest_and_stays_untouched() -> None:
    source, target = model(5), model(4)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(BadInput) as caught:
        model_into(target, source.state_dict())
    differing = [n for n, t in source.state_dict().items() if t.shape != before[n].shape]
    assert [name for name in differing[:5] if name not in caught.value.found] == []
    assert f"and {len(differing) - 5} more" in caught.value.found
    assert "(4, 3) here, (5, 3) in the checkpoint" in caught.value.found
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("2.bias"), "2.bias is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "extra is only in the checkpoint"),
        (lambda t: t.update({"2.bias": t["2.bias"].double()}), "float32 here, torch.float64 in the checkpoint"),
    ],
)
def test_names_and_dtypes_are_checked(change: Callable[[dict[str, torch.Tensor]], object], text: str) -> None:
    tensors = dict(model().state_dict())
    change(tensors)
    with pytest.raises(BadInput, match=text):
        model_into(model(), tensors)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        target = model()
    with pytest.raises(BadInput, match="meta device"):
        model_into(target, model().state_dict())
