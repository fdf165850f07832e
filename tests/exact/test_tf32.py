"""TF32 is read and switched off through whichever of torch's two sets of settings a user took, and put back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.exact.constants import _ambient
from samegrad.exact.tf32 import Tf32Products, products_in_float32
from samegrad.measure.target import Target
from samegrad.measure.trace import trace_step

# These settings are properties of modules, which torch does not type.
BACKENDS = cast(Any, torch.backends)
PLACES = (BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)


def raw() -> list[Any]:
    """All settings as they are read, and what is said where they cannot be."""
    older: list[Callable[[], Any]] = [
        torch.get_float32_matmul_precision,
        lambda: BACKENDS.cuda.matmul.allow_tf32,
        lambda: BACKENDS.cudnn.allow_tf32,
    ]
    read = [BACKENDS.fp32_precision, *(place.fp32_precision for place in PLACES)]
    for one in older:
        try:
            read.append(one())
        except RuntimeError as error:
            read.append(str(error).splitlines()[0])
    return read


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = raw()
    yield
    BACKENDS.fp32_precision = before[0]
    torch.set_float32_matmul_precision(before[4])
    BACKENDS.cudnn.allow_tf32 = before[6]
    for place, precision in zip(PLACES, before[1:4]):
        place.fp32_precision = precision
    assert raw() == before


def of(name: str, value: str) -> None:
    {"all": BACKENDS, "matrices": PLACES[0], "convolutions": PLACES[1], "recurrences": PLACES[2]}[
        name
    ].fp32_precision = value


SETTINGS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "no convolutions": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "all": lambda: of("all", "tf32"),
    **{
        f"{name} {value}": lambda name=name, value=value: of(name, value)  # type: ignore[misc]  # defaults of a lambda
        for name, value in itertools.product(("matrices", "convolutions", "recurrences"), ("tf32", "ieee"))
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_off_inside_and_every_setting_is_back_also_after_an_exception(name: str) -> None:
    SETTINGS[name]()
    before, products = raw(), Tf32Products.now()
    readable = [not isinstance(value, str) or " " not in value for value in before]
    with pytest.raises(ZeroDivisionError), products_in_float32():
        assert not Tf32Products.now().any
        inside = raw()
        # What the user's code could read it can read.
        assert all(isinstance(value, bool) or " " not in value for value, could in zip(inside, readable) if could)
        with products_in_float32():
            assert raw() == inside
        raise ZeroDivisionError
    assert raw() == before and Tf32Products.now() == products


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_known_and_a_target_and_programs_can_be_made_under_every_setting(name: str) -> None:
    SETTINGS[name]()
    found = Tf32Products.now()
    kind, _, value = name.partition(" ")
    if value in ("tf32", "ieee"):
        assert getattr(found, kind) is (value == "tf32")
    target = Target.named("H100 SXM")
    assert target.tf32 == found
    assert (target.roofline.matmul_tf32, target.roofline.convolution_tf32) == (found.matrices, found.convolutions)
    assert found in _ambient("cpu")


def test_planning_ahead_of_a_card_goes_by_the_newer_settings_too() -> None:
    """torch raises where the older ones are asked then."""
    seconds = []
    for precision in ("ieee", "tf32"):
        PLACES[0].fp32_precision = precision
        with torch.device("meta"):
            model, batch = nn.Linear(2048, 2048), torch.empty(4096, 2048)
        trace = trace_step(declare(model, squares), batch)
        seconds.append(sum(Target.named("H100 SXM").seconds_of(trace)))
    assert seconds[1] < 0.5 * seconds[0]


def squares(outputs: Tensor, _: Any) -> Tensor:
    return outputs.square().mean()
