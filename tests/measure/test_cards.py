"""The catalogue's figures hold together: clocks, units and memory allow no other, sparse ones least of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import MappingProxyType

import pytest

from samegrad.measure.cards import CARDS, Card
from samegrad.measure.devices import find_card

# What one multiprocessor does in a cycle, dense, summing in float32, by compute capability; a product and a sum are two
# operations. These are powers of two, as units are; stated rates divided by multiprocessors and clock come to them.
OPERATIONS_PER_CYCLE: dict[tuple[int, int], dict[str, int]] = {
    (7, 0): {"float64": 64, "float32": 128, "float16": 1024},
    (7, 5): {"float64": 4, "float32": 128, "float16": 1024},
    (8, 0): {"float64": 128, "float32": 128, "tf32": 1024, "float16": 2048, "bfloat16": 2048},
    (8, 6): {"float64": 4, "float32": 256, "tf32": 512, "float16": 1024, "bfloat16": 1024},
    (8, 9): {"float64": 4, "float32": 256, "tf32": 512, "float16": 1024, "bfloat16": 1024},
    (9, 0): {"float64": 256, "float32": 256, "tf32": 2048, "float16": 4096, "bfloat16": 4096},
    (10, 0): {"float64": 128, "float32": 256, "tf32": 4096, "float16": 8192, "bfloat16": 8192},
    (12, 0): {"float64": 4, "float32": 256, "tf32": 512, "float16": 1024, "bfloat16": 1024},
}
# GeForce cards sum in float32 at half rate.
HALVED_ON_GEFORCE = ("tf32", "float16", "bfloat16")


def implausible(card: Card) -> list[str]:
    """What in ``card`` cannot be."""
    wrong = [] if card.source.strip() else ["no source"]
    units = OPERATIONS_PER_CYCLE[card.compute_capability]
    if card.flops_per_second.keys() != units.keys():
        wrong.append(f"dtypes {sorted(card.flops_per_second)}")
    for dtype, rate in card.flops_per_second.items():
        per_cycle = units.get(dtype, 0) // (2 if "GeForce" in card.torch_name and dtype in HALVED_ON_GEFORCE else 1)
        peak = per_cycle * card.streaming_multiprocessors * card.boost_hertz
        # Tensor cores of the largest cards run slower than the boost clock, by up to a tenth.
        if not 0.9 * peak <= rate <= 1.03 * peak:
            wrong.append(f"{dtype} {rate:.3g} where units and clock give {peak:.3g}")
    if "tf32" in units and not 1.9 <= card.flops_per_second["bfloat16"] / card.flops_per_second["tf32"] <= 2.1:
        wrong.append("bfloat16 is not twice tf32")
    if not 60 <= card.flops_per_second["float16"] / card.bandwidth_bytes_per_second <= 450:
        wrong.append("operations a byte")
    if not 0.9 * card.nominal_memory_bytes <= card.memory_bytes <= card.nominal_memory_bytes:
        wrong.append("memory")
    if not 10e9 <= card.host_bandwidth_bytes_per_second <= 64e9:
        wrong.append("link to the host")
    return wrong


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_holds_together(card: Card) -> None:
    assert implausible(card) == []


def _with_rate(dtype: str, factor: float) -> Callable[[Card], Card]:
    def plant(card: Card) -> Card:
        rates = {**card.flops_per_second, dtype: card.flops_per_second[dtype] * factor}
        return dataclasses.replace(card, flops_per_second=MappingProxyType(rates))

    return plant


@pytest.mark.parametrize("name", ["H200", "RTX 4090", "L4", "A100 SXM4 80GB", "RTX 5090"])
@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(_with_rate("bfloat16", 2), id="the sparse rate"),
        pytest.param(_with_rate("tf32", 2), id="the sparse rate of tf32"),
        pytest.param(_with_rate("float16", 2), id="the rate that sums in float16"),
        pytest.param(_with_rate("float64", 2), id="float64 doubled"),
        pytest.param(lambda c: dataclasses.replace(c, bandwidth_bytes_per_second=c.bandwidth_bytes_per_second / 8),
                     id="bits a second"),
        pytest.param(lambda c: dataclasses.replace(c, reported_memory_bytes=2 * c.nominal_memory_bytes), id="memory"),
        pytest.param(lambda c: dataclasses.replace(c, streaming_multiprocessors=c.streaming_multiprocessors // 2),
                     id="multiprocessors"),
        pytest.param(lambda c: dataclasses.replace(c, source=" "), id="no source"),
    ],
)  # fmt: skip
def test_a_planted_figure_is_caught(name: str, plant: Callable[[Card], Card]) -> None:
    assert implausible(plant(find_card(name))) != []


def test_both_tensor_rates_doubled_are_caught() -> None:
    """As a data sheet's sparse column would be copied: their ratio stays right."""
    card = find_card("L40S")
    for dtype in ("tf32", "float16", "bfloat16"):
        card = _with_rate(dtype, 2)(card)
    assert len(implausible(card)) >= 3


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ("RTX 3060 12GB", "RTX 3070"), ("RTX 3070", "RTX 3080 10GB"), ("RTX 3080 10GB", "RTX 3090"),
        ("RTX 4060", "RTX 4070"), ("RTX 4070", "RTX 4080"), ("RTX 4080", "RTX 4090"), ("RTX 4070 Laptop", "RTX 4070"),
        ("RTX 4080 Laptop", "RTX 4080"), ("RTX 4090 Laptop", "RTX 4090"), ("RTX 5060 Ti 16GB", "RTX 5070"),
        ("RTX 5070", "RTX 5070 Ti"), ("RTX 5070 Ti", "RTX 5080"), ("RTX 5080", "RTX 5090"),
        ("RTX 5090 Laptop", "RTX 5090"), ("T4", "A10"), ("A10", "L40S"), ("V100 PCIe 16GB", "A100 SXM4 40GB"),
        ("A100 PCIe 80GB", "H100 PCIe 80GB"), ("H100 PCIe 80GB", "H100 SXM 80GB"), ("H200", "B200"),
        ("RTX A6000", "RTX 6000 Ada"),
    ],
)  # fmt: skip
def test_larger_cards_are_faster(slower: str, faster: str) -> None:
    one, other = find_card(slower), find_card(faster)
    assert one.flops_per_second["float16"] < other.flops_per_second["float16"]
    assert one.bandwidth_bytes_per_second < other.bandwidth_bytes_per_second


def test_an_h200_is_an_h100_with_more_and_faster_memory() -> None:
    one, other = find_card("H100 SXM 80GB"), find_card("H200")
    assert one.flops_per_second == other.flops_per_second
    assert one.bandwidth_bytes_per_second < other.bandwidth_bytes_per_second
    assert one.memory_bytes < other.memory_bytes


def test_a_card_without_a_unit_for_a_dtype_runs_it_as_float32() -> None:
    assert find_card("T4").arithmetic_of("bfloat16", tf32=False) == "float32"
    assert find_card("V100 SXM2 32GB").arithmetic_of("float32", tf32=True) == "float32"
    assert find_card("L4").arithmetic_of("float32", tf32=True) == "tf32"
    assert find_card("L4").arithmetic_of("float32", tf32=False) == "float32"
    assert find_card("L4").arithmetic_of("int64", tf32=True) == "float32"


def test_what_memory_is_said_to_be() -> None:
    assert find_card("H200").memory_basis == "as the runtime reports it"
    assert find_card("RTX 4070").memory_basis == "as on the box"
    assert find_card("RTX 4070").memory_bytes == 12 * 2**30
