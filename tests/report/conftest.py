"""A whole story, so that every test can change one thing in it."""

from __future__ import annotations

import struct
import zlib

import pytest

from samegrad.records import (
    Budget,
    Category,
    Check,
    Counting,
    Exactness,
    Footprint,
    KnobOrigin,
    Origin,
    Phase,
    PhaseLaw,
    Plan,
    Same,
    StepResult,
    TimelinePoint,
    Verdict,
)
from samegrad.report import Picture, Story

MIB = 2**20


def png(width: int = 3, height: int = 2) -> bytes:
    """The bytes of a grey PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"".join(b"\0" + b"\x80" * width for _ in range(height)))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def moments(*, scale: float = 1.0) -> tuple[TimelinePoint, ...]:
    phases = [Phase.FORWARD] * 5 + [Phase.LOSS] + [Phase.BACKWARD] * 5 + [Phase.HANDOFF, Phase.OPTIMIZER]
    heights = [1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1, 0, 1]
    return tuple(
        TimelinePoint(
            position_fraction=number / len(phases),
            phase=phase,
            live_bytes={Category.PARAMETERS: MIB, Category.ACTIVATIONS: int(height * scale * MIB)},
        )
        for number, (phase, height) in enumerate(zip(phases, heights, strict=True))
    )


def footprint(origin: Origin, *, scale: float = 1.0) -> Footprint:
    law = PhaseLaw(phase=Phase.BACKWARD, fixed_bytes=2.0 * MIB, per_chunk_row_bytes=20000.0, per_batch_row_bytes=8.0)
    return Footprint(
        device="cpu",
        counting=Counting.TENSOR_BYTES,
        origin=origin,
        basis=f"basis of the {origin.value} one",
        rows=250,
        batch_rows=4000,
        peak_allocated_bytes=int((1 + 6 * scale) * MIB),
        seconds=0.0423,
        by_category={Category.PARAMETERS: MIB, Category.ACTIVATIONS: int(6 * scale * MIB)},
        by_phase={Phase.FORWARD: 6 * MIB, Phase.BACKWARD: 7 * MIB},
        laws=(law,),
        plain_laws=(law,),
        facts={"draws": "none found"},
        refusals={"autocast": "a narrower dtype than declared"},
        timeline=moments(scale=scale),
    )


def verdict() -> Verdict:
    return Verdict(
        answer=Same.SAME,
        reference="the plain step on cpu",
        rows_checked=512,
        batch_rows=4000,
        dtype="float64",
        compared_dtype="float64",
        max_relative_error=3.1e-16,
        worst_parameter="encoder.0.weight",
        parameters_checked=24,
        buffers_checked=6,
        checks=(
            Check(name="gradients", passed=True, error=3.1e-16, allowed=6.2e-14, worst="encoder.0.weight"),
            Check(name="buffers", passed=True, error=2.2e-16, allowed=4.1e-14, worst="encoder.1.mean"),
        ),
    )


@pytest.fixture
def story() -> Story:
    budget = Budget(total_bytes=16 * MIB, device="cpu", counting=Counting.TENSOR_BYTES, source="--budget 16MiB")
    return Story(
        title="digits under 16 MiB",
        command="samegrad run autoencoder --budget 16MiB",
        machine={"python": "3.11.9", "device": "cpu"},
        budget=budget,
        plan=Plan(
            levers={"split_rows": {"rows": 250, "passes": 1}},
            exactness=Exactness.SAME_SUM,
            batch_rows=4000,
            predicted_peak_bytes=7 * MIB,
            predicted_seconds=0.041,
            knob_origins={"split_rows.rows": KnobOrigin.CHOSEN},
            reasons={"split_rows": "the plain step does not fit", "recompute": "not needed"},
        ),
        predicted=footprint(Origin.PREDICTED, scale=0.95),
        measured=footprint(Origin.MEASURED),
        results=tuple(
            StepResult(
                index=i, loss=2.0 / i, seconds=0.05, batch_rows=4000, allocated_bytes=MIB, peak_allocated_bytes=8 * MIB
            )
            for i in range(1, 21)
        ),
        validation=((10, 0.31), (20, 0.17)),
        metrics={"final_loss": 0.1, "test_mse": 0.04213, "peak_bytes": 3 * MIB, "auc": None},
        verdict=verdict(),
        pictures=(Picture(caption="histogram of errors", image=png()),),
        explanation="one pass\n  over 16 chunks",
        troubleshooting=("lower the budget",),
        notes=("made by hand",),
    )
