"""What ``--device`` may name: a device of torch's, which a step runs on, or a card of the catalogue, which is planned.

Names of cards are read without importing torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from samegrad.errors import UsageError
from samegrad.measure.cards import CARDS, Card
from samegrad.measure.devices import calibration_in_words, find_calibration, find_card
from samegrad.records import Origin


def find_card_asked(device: str | None) -> Card | None:
    """The card that ``device`` names; None for one of torch's devices, for "auto" and for nothing.

    Raises UsageError with the nearest names where it is neither.
    """
    if device is None or device == "auto":
        return None
    import torch

    try:
        torch.device(device)
    except RuntimeError:
        return _card(device)
    return None


def _card(name: str) -> Card:
    try:
        return find_card(name)
    except UsageError as error:
        raise UsageError(
            asked=f"--device {name!r}",
            found=f"no device of torch's (cpu, cuda, cuda:1){_nearest_device(name)}, and as a card: {error.found}",
            do=error.do,
            option="device",
        ) from None


def _nearest_device(name: str) -> str:
    """``"; did you mean 'cuda:0'?"`` for a device's name with a slip in it, or nothing."""
    kind, _, number = name.partition(":")
    near = difflib.get_close_matches(kind.lower(), ("cpu", "cuda", "auto"), n=1)
    index = f":{number}" if number.isdecimal() and near == ["cuda"] else ""
    return f"; did you mean {near[0] + index!r}?" if near else ""


def refuse_card(command: str, device: str | None) -> None:
    """Raises UsageError where a card is named for a command that needs the device itself."""
    card = find_card_asked(device)
    if card is not None:
        raise UsageError(
            asked=f"samegrad {command} --device {device!r}",
            found=f"{card.name} is a name of the catalogue: steps are planned for it, and run on a device of torch's",
            do=f"name the device (cuda, cuda:1, cpu) to {command} on, or plan with samegrad plan --device {device!r}",
            option="device",
        )


def list_cards() -> Iterator[Mapping[str, Any]]:
    """Every card of the catalogue: its name, memory, and what its predicted times rest on."""
    for card in CARDS:
        calibration = find_calibration(card)
        yield {
            "name": card.name,
            "memory_bytes": card.memory_bytes,
            "memory_basis": card.memory_basis,
            "bandwidth_bytes_per_second": card.bandwidth_bytes_per_second,
            "calibrated": calibration.origin is Origin.MEASURED,
            "times": calibration_in_words(calibration),
            "source": card.source,
        }
