"""What a traced step takes and gives back, request by request, against what one GPU's allocator was asked for."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from samegrad.measure import accumulation, convolution_workspaces, kernel_scratch, recurrent_workspaces
from samegrad.measure.library_calibration import calibrate_libraries
from samegrad.measure.trace import trace_step
from samegrad.measure.workspaces import with_workspaces

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
try:
    import _steps
finally:
    sys.path.remove(BENCHMARKS)

DOCUMENT = json.loads((Path(__file__).parent / "h200_steps.json").read_text())
RECORDED: dict[str, list[int]] = DOCUMENT["steps"]
PICTURES: dict[str, int] = DOCUMENT["pictures_peak_blocks"]
BLOCK_BYTES = 512
# Smaller requests than 4 KiB were not kept: numbers, counts, semaphores.
FEWEST_BLOCKS = 8
# Sizes may be apart by as much: alignment of a workspace's parts.
APART_BLOCKS = 2


def traced(name: str) -> list[int]:
    """The second step's changes in blocks."""
    [case] = [case for case in _steps.CASES if case.name == name]
    step, batch = _steps.make_step(case, "meta")
    trace = with_workspaces(trace_step(step.declared, batch), calibrate_libraries((9, 0), "2.11.0"))
    blocks = []
    for event in trace.events:
        if event.operation >= 0 and trace.operations[event.operation].step == 1:
            size = -(-abs(event.change_bytes) // BLOCK_BYTES)
            blocks.append(size if event.change_bytes > 0 else -size)
    return [block for block in blocks if abs(block) >= FEWEST_BLOCKS]


def share_in_order(mine: list[int], recorded: list[int]) -> float:
    """The share of requests that come in the same order; sizes of workspaces are brought together first."""
    known = set(recorded)
    near = {block: min(known, key=lambda size: abs(size - block)) for block in set(mine)}
    near = {block: size if abs(size - block) <= APART_BLOCKS else block for block, size in near.items()}
    return difflib.SequenceMatcher(None, [near[block] for block in mine], recorded, autojunk=False).ratio()


def peak_blocks(changes: list[int]) -> int:
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("name", RECORDED)
def test_requests_come_as_they_were_recorded(name: str) -> None:
    mine, recorded = traced(name), RECORDED[name]
    assert share_in_order(mine, recorded) > 0.97
    assert peak_blocks(mine) == pytest.approx(peak_blocks(recorded), rel=0.001)


@pytest.mark.parametrize(
    ("name", "holder", "lost", "instead"),
    [
        ("gpt_mini 32 fp32", accumulation, "adds_in_place", lambda *_: False),
        ("gpt_mini 32 fp32", kernel_scratch, "scratch_changes", lambda *_: ()),
        ("lstm_small 64 fp32", recurrent_workspaces, "recurrence_bytes", lambda *_: 0),
    ],
    ids=["sums of gradients", "scratch of attention", "workspaces of recurrent layers"],
)
def test_what_is_lost_is_seen(
    name: str, holder: object, lost: str, instead: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, lost, instead)
    with pytest.raises(AssertionError):
        test_requests_come_as_they_were_recorded(name)


@pytest.mark.parametrize("name", PICTURES)
def test_steps_on_pictures_hold_as_much(name: str) -> None:
    # Which kernel cuDNN takes is not known for every convolution.
    assert peak_blocks(traced(name)) == pytest.approx(PICTURES[name], rel=0.004)


def test_without_workspaces_of_convolutions_they_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution_workspaces, "_copies_bytes", lambda *_, **__: 0)
    with pytest.raises(AssertionError):
        test_steps_on_pictures_hold_as_much("resnet18 48 fp32")
