"""Cards are found by the names that people and torch use, and a card says whether it was ever measured."""

from __future__ import annotations

import dataclasses

import pytest

from samegrad.errors import BadInput, UsageError
from samegrad.measure import devices
from samegrad.measure.cards import CARDS, Card
from samegrad.measure.devices import (
    PRIOR,
    Calibration,
    calibration_in_words,
    find_calibration,
    find_card,
    read_calibration,
)
from samegrad.measure.operation_classes import OperationClass
from samegrad.records import Origin


def test_there_are_enough_cards_and_each_has_its_own_name() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS) >= 25


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_is_found_by_its_name_and_by_torchs(card: Card) -> None:
    assert find_card(card.name) is card
    assert find_card(card.name.upper().replace(" ", "-")) is card
    assert find_card(card.torch_name, memory_bytes=card.memory_bytes) is card


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("rtx 4070 laptop", "RTX 4070 Laptop"), ("RTX 4070 mobile", "RTX 4070 Laptop"), ("4070", "RTX 4070"),
        ("rtx4060ti16gb", "RTX 4060 Ti 16GB"), ("GeForce RTX 3090", "RTX 3090"), ("rtx 5070ti", "RTX 5070 Ti"),
        ("3060", "RTX 3060 12GB"), ("h200", "H200"), ("nvidia h100 sxm5", "H100 SXM 80GB"),
        ("h100 pcie", "H100 PCIe 80GB"),
        ("a100 sxm 80 GB", "A100 SXM4 80GB"), ("Tesla V100 SXM2 32 GiB", "V100 SXM2 32GB"), ("l40s", "L40S"),
        ("A6000", "RTX A6000"), ("RTX 6000 Ada", "RTX 6000 Ada"), ("tesla t4", "T4"),
    ],
)  # fmt: skip
def test_people_name_cards_in_many_ways(asked: str, meant: str) -> None:
    assert find_card(asked).name == meant


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("RTX 4070 Ti", "RTX 4070"), ("RTX 6000", "RTX 6000 Ada"), ("L40", "L40S"), ("GTX 1080", "RTX"), ("", "RTX")],
)
def test_another_card_is_never_taken_for_the_one_meant(asked: str, nearest: str) -> None:
    with pytest.raises(UsageError, match="no such card in the catalogue") as caught:
        find_card(asked)
    assert nearest in caught.value.do and "doctor --cards" in caught.value.do
    assert caught.value.option == "device"


@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        ("h100", ("H100 SXM 80GB", "H100 PCIe 80GB")), ("NVIDIA GeForce RTX 3080", ("RTX 3080 10GB", "RTX 3080 12GB")),
        ("4060 ti", ("RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB")), ("a100 80gb", ("A100 SXM4 80GB", "A100 PCIe 80GB")),
    ],
)  # fmt: skip
def test_a_name_of_several_cards_lists_them(asked: str, fits: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="that name fits") as caught:
        find_card(asked)
    assert all(name in caught.value.found for name in fits)


def test_the_reported_memory_tells_sizes_apart() -> None:
    gib = 2**30
    assert find_card("NVIDIA GeForce RTX 3080", memory_bytes=int(9.7 * gib)).name == "RTX 3080 10GB"
    assert find_card("NVIDIA GeForce RTX 3080", memory_bytes=int(11.7 * gib)).name == "RTX 3080 12GB"
    with pytest.raises(UsageError, match="no such card"):
        find_card("NVIDIA GeForce RTX 3080", memory_bytes=20 * gib)


def test_a_card_that_was_not_measured_says_so() -> None:
    calibration = find_calibration(find_card("rtx 4070 laptop"), torch_version="2.13.0")
    assert calibration.origin is Origin.PREDICTED
    assert calibration_in_words(calibration).startswith("uncalibrated: ")
    assert calibration.library_workspace_bytes == {} and calibration.context_bytes is None


def test_the_h200_has_a_file_and_says_where_its_figures_come_from() -> None:
    calibration = find_calibration(find_card("h200"), torch_version="2.11.0+cu130")
    assert calibration.origin is Origin.MEASURED
    assert calibration_in_words(calibration, torch_version="2.11.0").startswith("calibrated with torch 2.11.0")
    assert "this is torch" not in calibration_in_words(calibration, torch_version="2.11.1")
    assert "this is torch 2.13.0" in calibration_in_words(calibration, torch_version="2.13.0")
    assert sum(calibration.library_workspace_bytes.values()) == 64 * 2**20


@pytest.mark.parametrize("calibration", [PRIOR, *devices.calibrations()], ids=lambda c: c.card or "prior")
def test_calibrations_are_of_known_cards_and_whole(calibration: Calibration) -> None:
    assert calibration.card in {"", *(card.name for card in CARDS)}
    assert calibration.source and Calibration.from_json(calibration.to_json()) == calibration
    assert set(calibration.bandwidth_fractions) == set(OperationClass)
    fractions = [*calibration.bandwidth_fractions.values()]
    fractions += [fraction for kinds in calibration.flops_fractions.values() for fraction in kinds.values()]
    assert all(0 < fraction <= 1 for fraction in fractions)
    assert "any" in calibration.flops_fractions
    for seconds in (calibration.dispatch_seconds, calibration.launch_seconds, calibration.kernel_seconds):
        assert 1e-7 < seconds < 1e-4


def test_of_several_files_the_release_at_hand_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, cudnn = (
        dataclasses.replace(PRIOR, card="L4", origin=Origin.MEASURED, torch_version=torch_version, cudnn_version=cudnn)
        for torch_version, cudnn in (("2.11.0", "91002"), ("2.13.1", "91002"), ("2.13.0", "91400"))
    )
    monkeypatch.setattr(devices, "calibrations", lambda: (new, old, cudnn))
    card = find_card("L4")
    assert find_calibration(card, torch_version="2.11.2+cu130") is old
    assert find_calibration(card, torch_version="2.13.0", cudnn_version="91400") is cudnn
    assert find_calibration(card, torch_version="2.13.0", cudnn_version="91002") is new
    assert find_calibration(card, torch_version="2.15.0") is new


@pytest.mark.parametrize(
    "planted",
    [
        ("dispatch_seconds", "dispatch_second"), ('"matmul"', '"matmull"'), ('"measured"', '"guessed"'),
        ('"any"', '"some"'), ('    "embedding": 0.4,\n', ""),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_field(planted: tuple[str, str]) -> None:
    text = dataclasses.replace(PRIOR, origin=Origin.MEASURED).to_json()
    assert read_calibration(text, file="h900.json").bandwidth_fractions == PRIOR.bandwidth_fractions
    with pytest.raises(BadInput, match=r"h900\.json"):
        read_calibration(text.replace(*planted), file="h900.json")
