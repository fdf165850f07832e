"""Draws after a restore are the draws that would have come; a damaged state changes no generator."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from samegrad.errors import BadInput
from samegrad.store import load_checkpoint, rng_from_tensors, rng_to_tensors, save_checkpoint


@pytest.fixture(autouse=True)
def keep_generators() -> Iterator[None]:
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    yield
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    numpy.random.set_state(before[2])


def draws() -> list[Any]:
    # Gaussian draws come in pairs in Python and numpy: the spare one is part of the state.
    normal = [random.gauss(0, 1), float(numpy.random.normal()), *torch.randn(3).tolist()]
    return [*normal, random.random(), float(numpy.random.random()), *torch.rand(2).tolist()]


def test_draws_after_a_restore_are_those_that_would_have_come(folder: Path) -> None:
    draws()
    tensors = rng_to_tensors()
    assert {t.dtype for t in tensors.values()} == {torch.uint8}
    save_checkpoint(folder, step=1, tensors={"rng": tensors}, state={})
    expected = draws()
    assert draws() != expected
    assert rng_from_tensors(load_checkpoint(folder).tensors["rng"]) == ()
    assert draws() == expected


def flipped(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:3], torch.tensor([255], dtype=torch.uint8), tensor[4:]])


def fewer_words(tensor: Tensor) -> Tensor:
    """JSON as it should be, with too few words in it: found only when the generator is set."""
    document = json.loads(bytes(tensor.numpy()))
    words = document["words"] if "words" in document else document["state"]["key"]
    words.pop()
    return torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["python", "numpy"])
def test_a_refusal_half_way_takes_back_what_was_set(name: str) -> None:
    tensors = rng_to_tensors()
    tensors[name] = fewer_words(tensors[name])
    draws()
    before = rng_to_tensors()
    with pytest.raises(BadInput):
        rng_from_tensors(tensors)
    after = rng_to_tensors()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["torch_cpu", "python", "numpy"])
@pytest.mark.parametrize("damage", [None, flipped, lambda t: t[:-5], lambda t: t[:0], lambda t: t.float()])
def test_a_damaged_state_is_refused_and_changes_no_generator(name: str, damage: Any) -> None:
    tensors = rng_to_tensors()
    draws()
    before = rng_to_tensors()
    if damage is None:
        del tensors[name]
    elif damage is flipped and name == "torch_cpu":
        tensors[name] = tensors[name].repeat(2)
    else:
        tensors[name] = damage(tensors[name])
    with pytest.raises(BadInput):
        rng_from_tensors(tensors)
    after = rng_to_tensors()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_states_of_cuda_devices_that_are_not_here_are_said() -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    tensors = rng_to_tensors() | {
        f"torch_cuda_{i}": torch.zeros(16, dtype=torch.uint8) for i in range(count, count + 2)
    }
    (warning,) = rng_from_tensors(tensors)
    assert f"2 CUDA devices were saved, {count} are here" in warning.replace(str(count + 2), "2")


@pytest.mark.gpu
def test_cuda_draws_come_back() -> None:
    torch.rand(1, device="cuda")
    tensors = rng_to_tensors()
    expected = torch.rand(5, device="cuda")
    assert rng_from_tensors(tensors) == ()
    assert torch.equal(torch.rand(5, device="cuda"), expected)
