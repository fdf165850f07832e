"""Rows at a time with a choice for the chain: fewer rows keep less of everything, recomputation less of some units."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from samegrad.errors import BadInput
from samegrad.plan.chain import ChainChoice, HostLink, predict_chain
from samegrad.plan.heights import Chain
from samegrad.plan.solve import pareto
from samegrad.unit_tables import Unit


@dataclasses.dataclass(frozen=True)
class RowsAndChain:
    """``rows`` at a time, each chunk run by ``choice``, with the predicted peak and seconds of the whole step."""

    rows: int
    choice: ChainChoice
    peak_bytes: int
    seconds: float


def split_with_chain(
    batch_rows: int,
    rows_options: Sequence[int],
    units_of_rows: Callable[[int], Sequence[Unit]],
    resident_bytes: int,
    budget_bytes: int,
    chunk_seconds: float,
    forwards: int,
    *,
    accumulator_bytes: int = 0,
    chunk_counts: Sequence[int] = (),
    link: HostLink | None = None,
) -> list[RowsAndChain]:
    """Rows at a time with choices for the chain that fit ``budget_bytes``, fastest first, each next one smaller.

    ``units_of_rows(rows)``: the units at so many rows. ``chunk_seconds``: what a chunk costs beside its units.
    ``forwards``: forwards of a row in a step before anything runs again, 2 for two passes. ``accumulator_bytes`` stand
    beside the resident bytes where there is more than one chunk. The last chunk takes what rows are left.

    Raises BadInput for rows that are not from 1 to the batch's.
    """
    found: list[RowsAndChain] = []
    for rows in sorted(set(rows_options), reverse=True):
        if not 1 <= rows <= batch_rows:
            raise BadInput(
                asked=f"{rows} rows at a time", found=f"the batch has {batch_rows} rows",
                do=f"give rows from 1 to {batch_rows}",
            )  # fmt: skip
        full, rest = divmod(batch_rows, rows)
        sizes = {rows: full} | ({rest: 1} if rest else {})
        chains = {size: Chain.of(units_of_rows(size)) for size in sizes}
        beside_bytes = resident_bytes + (accumulator_bytes if sum(sizes.values()) > 1 else 0)
        beside_seconds = sum(
            count * (chunk_seconds + (forwards - 1) * float(chains[size].forward_seconds.sum()))
            for size, count in sizes.items()
        )
        for choice in pareto(chains[rows].units, resident_bytes=beside_bytes, chunk_counts=chunk_counts, link=link):
            chunks = {
                size: predict_chain(
                    chain, choice.stages, resident_bytes=beside_bytes, link=link,
                    in_flight_bytes=choice.in_flight_bytes,
                )
                for size, chain in chains.items()
            }  # fmt: skip
            peak_bytes = max(chunk.peak_bytes for chunk in chunks.values())
            seconds = beside_seconds + sum(count * chunks[size].seconds for size, count in sizes.items())
            if peak_bytes <= budget_bytes:
                found.append(RowsAndChain(rows, choice, peak_bytes, seconds))
    front: list[RowsAndChain] = []
    for one in sorted(found, key=lambda one: (one.seconds, one.peak_bytes, -one.rows)):
        if not front or one.peak_bytes < front[-1].peak_bytes:
            front.append(one)
    return front
