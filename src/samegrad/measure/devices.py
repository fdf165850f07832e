"""Finds a card by the name a person or torch gives it, and what was measured on it.

A card's stated rates are ceilings. What part of them torch reaches is a calibration: measured on one card with one
torch and cuDNN, kept as one small file a card in ``calibration/``. A card without one is timed with the prior below,
and every number made so says "uncalibrated".
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import re
from collections.abc import Sequence

from samegrad.errors import BadInput, UsageError
from samegrad.json_record import Record
from samegrad.measure.cards import CARDS, Card
from samegrad.measure.operation_classes import OperationClass
from samegrad.records import Origin
from samegrad.units import format_bytes

# Words that tell no two cards apart.
_FILLERS = frozenset("nvidia geforce gpu tesla quadro generation card tensor core graphics".split())
# Words that make another card of the one before: without them the other is never meant.
_VARIANTS = frozenset("ti super laptop ada".split())
# A whole card's reported total is 1 to 9 % under its box; neighbours in size are further apart than this.
_SIZE_WITHIN = 0.15
_ANY = "any"
# Kinds that mostly move bytes are not timed by their arithmetic; should they do much of it, at this part of the peak.
_LEAST_FLOPS_FRACTION = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration(Record):
    """What torch reaches on one card. ``card`` is a card's name; "" for the prior of cards that were not measured.

    ``torch_version`` as "2.11.0+cu130", ``cudnn_version`` as torch gives it. ``source``: the command or document.
    ``dispatch_seconds`` and ``launch_seconds``: what the host takes for an operation that computes and for each of its
    kernels; ``view_seconds`` for one that computes nothing. ``kernel_seconds``: the least that a kernel takes on the
    device. ``flops_fractions`` of the card's peak for the dtype, ``bandwidth_fractions`` of its bandwidth; the outer
    key of the first is a dtype ("tf32" for float32 in TF32) or "any". ``library_workspace_bytes`` by library, taken
    once and kept. ``context_bytes``: what the driver holds for a process that allocated nothing.
    """

    card: str
    origin: Origin
    source: str
    dispatch_seconds: float
    launch_seconds: float
    view_seconds: float
    kernel_seconds: float
    flops_fractions: dict[str, dict[OperationClass, float]]
    bandwidth_fractions: dict[OperationClass, float]
    torch_version: str = ""
    cudnn_version: str = ""
    library_workspace_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    context_bytes: int | None = None
    pinned_bytes_per_second: float | None = None
    pageable_bytes_per_second: float | None = None

    def flops_fraction(self, kind: OperationClass, dtype: str) -> float:
        own = self.flops_fractions.get(dtype, {})
        return own.get(kind, self.flops_fractions[_ANY].get(kind, _LEAST_FLOPS_FRACTION))

    def bandwidth_fraction(self, kind: OperationClass) -> float:
        return self.bandwidth_fractions[kind]


def find_card(name: str, *, memory_bytes: int | None = None) -> Card:
    """The card meant by ``name``: as torch names it, or in words ("rtx 4070 laptop", "a100 sxm 80gb", "h200").

    ``memory_bytes``: the total that torch reports, which tells apart the sizes torch gives one name. Raises UsageError
    with the nearest names when no card, or more than one, is meant.
    """
    found = [card for card in CARDS if _plain(card.torch_name) == _plain(name)] or _by_words(_words(name))
    if memory_bytes is not None:
        found = [card for card in found if abs(memory_bytes / card.memory_bytes - 1) < _SIZE_WITHIN]
        found = sorted(found, key=lambda card: abs(memory_bytes - card.memory_bytes))[:1]
    if len(found) == 1:
        return found[0]
    size = f" with {format_bytes(memory_bytes)}" if memory_bytes is not None else ""
    raise UsageError(
        asked=f"device {name!r}{size}",
        found=f"that name fits {_listed(found)}" if found else "no such card in the catalogue",
        do=f"name {'one of them' if found else f'a card, the nearest are {_listed(_nearest(name))}'}; "
        "samegrad doctor --cards lists all",
        option="device",
    )


def find_calibration(card: Card, *, torch_version: str = "", cudnn_version: str = "") -> Calibration:
    """The calibration of ``card``, nearest to the versions at hand; the prior where the card was never measured."""
    own = [calibration for calibration in calibrations() if calibration.card == card.name]
    if not own:
        return dataclasses.replace(PRIOR, card=card.name)
    release = _release(torch_version)

    def nearness(calibration: Calibration) -> tuple[bool, bool, str]:
        same_release = _release(calibration.torch_version) == release
        return same_release, calibration.cudnn_version == cudnn_version, calibration.torch_version

    return max(own, key=nearness)


def calibration_in_words(calibration: Calibration, *, torch_version: str = "") -> str:
    """Whether and with what the card was measured; says "uncalibrated" where it was not."""
    if calibration.origin is Origin.PREDICTED:
        return f"uncalibrated: {calibration.source}"
    versions = f"torch {calibration.torch_version}"
    if calibration.cudnn_version:
        versions += f", cuDNN {calibration.cudnn_version}"
    other = torch_version and _release(torch_version) != _release(calibration.torch_version)
    return f"calibrated with {versions}{f', this is torch {torch_version}' if other else ''}: {calibration.source}"


@functools.cache
def calibrations() -> tuple[Calibration, ...]:
    """All calibrations that come with samegrad, by file name. Raises BadInput naming a file that is wrong."""
    folder = importlib.resources.files("samegrad.measure") / "calibration"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return tuple(read_calibration(file.read_text(), file=file.name) for file in files)


def read_calibration(text: str, *, file: str) -> Calibration:
    """The calibration that ``text`` holds. Raises BadInput when a field is wrong or a kind of operation is missing."""
    calibration = Calibration.from_json(text, file=file)
    missing = [kind.value for kind in OperationClass if kind not in calibration.bandwidth_fractions]
    if _ANY not in calibration.flops_fractions or missing:
        what = f"no bandwidth_fractions of {', '.join(missing)}" if missing else f"no flops_fractions of {_ANY!r}"
        raise BadInput(
            asked=f"read a calibration of {calibration.card}",
            found=f"{file}: {what}",
            do="write it anew with benchmarks/calibrate_gpu.py on that card",
            file=file,
        )
    return calibration


def _by_words(asked: frozenset[str]) -> list[Card]:
    """The cards that have all words of ``asked`` and are no other variant of it."""
    rest = {card.name: _words(card.name) - asked for card in CARDS if asked and asked <= _words(card.name)}
    return [card for card in CARDS if card.name in rest and not rest[card.name] & _VARIANTS]


def _words(name: str) -> frozenset[str]:
    text = _plain(name).replace("mobile", "laptop").replace("adalovelace", "ada")
    text = re.sub(r"(\d+)\s*gi?b\b", r"\1gb", text)
    # "rtx4070ti" and "4060ti16gb" are written too; an A100 and an L40S are one word.
    text = re.sub(r"(rtx)(?=\d)", r"\1 ", text)
    text = re.sub(r"(?<=\d)(ti|super|laptop)(?![a-z])", r" \1 ", text)
    text = re.sub(r"\bsxm\d?\b", "sxm", text)
    return frozenset(text.split()) - _FILLERS


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", name.lower()).strip().removeprefix("nvidia ")


def _nearest(name: str) -> list[Card]:
    asked = _words(name)

    def nearness(card: Card) -> tuple[int, float]:
        return len(asked & _words(card.name)), difflib.SequenceMatcher(None, _plain(name), _plain(card.name)).ratio()

    return sorted(CARDS, key=nearness, reverse=True)[:3]


def _listed(cards: Sequence[Card]) -> str:
    return ", ".join(card.name for card in cards)


def _release(torch_version: str) -> tuple[str, ...]:
    return tuple(torch_version.split(".")[:2])


_K = OperationClass
PRIOR = Calibration(
    card="",
    origin=Origin.PREDICTED,
    source="stated rates times fractions set between one H200's and the whole; nothing was measured on this card",
    dispatch_seconds=12e-6,
    launch_seconds=4e-6,
    view_seconds=2e-6,
    kernel_seconds=4e-6,
    flops_fractions={
        _ANY: {_K.MATMUL: 0.65, _K.CONVOLUTION: 0.25, _K.ATTENTION: 0.4},
        "tf32": {_K.MATMUL: 0.65, _K.CONVOLUTION: 0.35, _K.ATTENTION: 0.4},
        "float32": {_K.MATMUL: 0.8, _K.CONVOLUTION: 0.6, _K.ATTENTION: 0.4},
        "float64": {_K.MATMUL: 0.8, _K.CONVOLUTION: 0.6, _K.ATTENTION: 0.4},
    },
    bandwidth_fractions={
        _K.MATMUL: 0.75, _K.CONVOLUTION: 0.6, _K.ATTENTION: 0.6, _K.NORMALISATION: 0.4, _K.ELEMENTWISE: 0.7,
        _K.REDUCTION: 0.2, _K.EMBEDDING: 0.4, _K.COPY: 0.7, _K.OPTIMIZER: 0.45,
    },
)  # fmt: skip
