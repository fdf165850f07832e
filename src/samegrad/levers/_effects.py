"""What levers share that leave the chunks as they are: their prediction, by an effect that was traced for each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from samegrad.errors import NotMeasured
from samegrad.levers._variants import predicted_at, predicted_whole
from samegrad.records import Effect, Footprint, Origin, PhaseLaw


def effects_of(name: str, footprint: Footprint) -> Iterator[Effect]:
    """Every effect of lever ``name`` that was traced; a lever without any is not worth trying."""
    return (effect for effect in footprint.effects if effect.lever == name)


def with_effect_of(name: str, knobs: dict[str, Any], footprint: Footprint) -> Footprint:
    """The footprint with lever ``name`` taken. Raises NotMeasured when it was not traced with these knobs.

    Laws change as well, so that a lever that splits may be predicted before this one or after it.
    """
    effect = next((effect for effect in effects_of(name, footprint) if effect.knobs == knobs), None)
    if effect is None:
        raise NotMeasured(
            asked=f"predict {name} with {knobs}", found="that was not traced for this step", do="measure the step again"
        )
    base = footprint if footprint.origin is Origin.PREDICTED else predicted_whole(footprint)
    chunks = -(-base.batch_rows // base.rows)
    added = effect.added_seconds_per_row * base.batch_rows + effect.added_seconds_per_chunk * chunks
    by_phase = {
        phase: max(0, math.ceil(peak - effect.saved_bytes(phase, rows=base.rows)))
        for phase, peak in base.by_phase.items()
    }
    seconds = None if base.seconds is None else base.seconds + added
    return dataclasses.replace(
        predicted_at(base, base.rows, by_phase, seconds),
        laws=_less(base.laws, effect),
        plain_laws=_less(base.plain_laws, effect),
        variants=tuple(
            dataclasses.replace(
                variant,
                laws=_less(variant.laws, effect),
                seconds_per_row=_more(variant.seconds_per_row, effect.added_seconds_per_row),
                seconds_per_chunk=_more(variant.seconds_per_chunk, effect.added_seconds_per_chunk),
            )
            for variant in base.variants
        ),
        seconds_per_row=_more(base.seconds_per_row, effect.added_seconds_per_row),
        seconds_per_chunk=_more(base.seconds_per_chunk, effect.added_seconds_per_chunk),
        host_bytes=(base.host_bytes or 0) + effect.host_bytes(rows=base.rows),
    )


def _less(laws: tuple[PhaseLaw, ...], effect: Effect) -> tuple[PhaseLaw, ...]:
    return tuple(
        dataclasses.replace(
            law,
            fixed_bytes=law.fixed_bytes - effect.saved_fixed_bytes,
            per_chunk_row_bytes=law.per_chunk_row_bytes - effect.saved_row_bytes,
        )
        if law.phase in effect.phases
        else law
        for law in laws
    )


def _more(seconds: float | None, added: float) -> float | None:
    return None if seconds is None else seconds + added
