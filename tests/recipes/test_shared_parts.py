"""What recipes share: refusals of options, clipping, precision, and what is written at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import samegrad as sg
from samegrad.recipes import find_options, recipe_names
from samegrad.recipes._recipe import (
    INSTALL,
    CommonOptions,
    array_files,
    needed_for_pictures,
    picture_files,
    tensor_files,
)
from samegrad.recipes._recipe.clipping import clip_before_step
from samegrad.recipes._recipe.precision import forward_under, narrow_dtype, weight_dtype
from samegrad.recipes._recipe.written import save_weights


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize(("option", "value"), [("dtype", "float23"), ("random_seed", -1)])
def test_what_no_recipe_can_do_is_refused_by_its_options_name(name: str, option: str, value: Any) -> None:
    with pytest.raises(sg.UsageError, match=f"--{option} {value}") as refused:
        find_options(name)(**{option: value})
    assert refused.value.option == option


class Numbers(CommonOptions):
    def __init__(self, number: float | None) -> None:
        self.__dict__["number"] = number


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ("_at_least", (2, 3, None), (1, -1)),
        ("_positive", (1e-9, 2, None), (0, -1, float("nan"), float("inf"))),
        ("_not_negative", (0, 2.5, None), (-1e-9, float("nan"), float("inf"))),
    ],
)
def test_numbers_are_refused_outside_their_range_and_nowhere_else(check: str, right: Any, wrong: Any) -> None:
    least = (2,) if check == "_at_least" else ()
    for number in right:
        getattr(Numbers(number), check)(*least, "number", do="")
    for number in wrong:
        with pytest.raises(sg.UsageError, match="it must be"):
            getattr(Numbers(number), check)(*least, "number", do="")


@pytest.mark.parametrize(("largest", "expected"), [(0.5, 0.5), (100.0, 10.0), (0.0, 10.0)])
def test_gradients_are_scaled_down_to_the_norm_before_the_step(largest: float, expected: float) -> None:
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clip_before_step(optimizer, largest)
    weight.grad = torch.full_like(weight, 5.0)
    optimizer.step()
    assert float(weight.detach().norm()) == pytest.approx(expected, rel=1e-6)


def test_narrow_formats_are_autocasts_and_never_those_of_the_weights() -> None:
    layer, rows = nn.Linear(3, 2), torch.ones(4, 3)
    for dtype in ("float32", "float64"):
        assert narrow_dtype(dtype) is None and weight_dtype(dtype) is getattr(torch, dtype)
    assert forward_under(None) is None
    under = forward_under(narrow_dtype("bfloat16"))
    assert under is not None and under(layer, rows).dtype is torch.bfloat16
    assert weight_dtype("bfloat16") is layer.weight.dtype is layer(rows).dtype is torch.float32


def test_weights_are_read_back_from_both_files(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    first, second = save_weights(model, tmp_path, "weights")
    assert [path.name for path in (first, second)] == ["weights.safetensors", "weights.pt"]
    for found in (safetensors.torch.load_file(first), torch.load(second, weights_only=True)):
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_a_missing_package_is_told_with_what_installs_it_and_other_errors_pass() -> None:
    with pytest.raises(sg.EnvironmentProblem, match="no_such_package") as told, needed_for_pictures():
        __import__("no_such_package")
    assert told.value.do == INSTALL
    with pytest.raises(ZeroDivisionError), needed_for_pictures():
        _ = 1 / 0


READERS = {
    "array": lambda path: array_files.read_array(path, what="numbers"),
    "archive": lambda path: array_files.read_archive(path, ["a"], what="numbers"),
    "plain": lambda path: tensor_files.read_plain(path, what="weights"),
    "tensors": lambda path: tensor_files.read_tensors(path, what="weights"),
    "picture": lambda path: picture_files.open_picture(path, what="a picture", mode="L"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    os.mkfifo(path)
    # A reader in the background, so that a failure is a failure and no hang.
    held = os.open(path, os.O_RDWR)
    os.write(held, b"no array")
    try:
        with pytest.raises(sg.BadInput, match=r"(?s)rows.*a pipe, a socket or a device, not a file"):
            READERS[name](path)
    finally:
        os.close(held)


@pytest.mark.parametrize("name", READERS)
def test_a_name_that_is_too_long_is_told_in_words(name: str, tmp_path: Path) -> None:
    with pytest.raises(sg.BadInput) as refused:
        READERS[name](tmp_path / ("x" * 300 + ".safetensors"))
    assert refused.value.found == "File name too long"
