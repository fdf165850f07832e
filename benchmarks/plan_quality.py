"""Choices for chains of units against the best there are, at ten budgets each: time, feasibility, monotony, solve time.

The best is found by trying every choice where there are few units, else by an integer program solved to the end, whose
heights are read off the prediction stage by stage and not off the planner's tables.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import _plan_chains
import _results
import numpy as np
from scipy import optimize, sparse

from samegrad.plan.chain import HostLink, plain_stages, predict_chain
from samegrad.plan.heights import Chain, Stage, Way
from samegrad.plan.solve import choose_for, pareto
from samegrad.unit_tables import Unit

FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
WITHIN = 1.02
MOST_UNITS_TRIED = 9

# The fastest time within a budget, or None.
Best = Callable[[int], float | None]


def stages_between(units: Sequence[Unit], first: int, last: int, chunk_counts: Sequence[int]) -> Iterator[Stage]:
    inside = units[first : last + 1]
    if first == last:
        yield Stage(first, last, Way.KEEP)
    if all(unit.recomputable for unit in inside):
        yield Stage(first, last, Way.RECOMPUTE)
        if all(unit.row_independent for unit in inside):
            yield from (Stage(first, last, Way.CHUNKED, chunks) for chunks in chunk_counts)


def by_trying_all(units: Sequence[Unit], chunk_counts: Sequence[int]) -> Best:
    chain, found = Chain.of(units), []
    for cuts in itertools.product([False, True], repeat=len(units) - 1):
        edges = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), len(units)]
        ways = [list(stages_between(units, a, b - 1, chunk_counts)) for a, b in itertools.pairwise(edges)]
        for stages in itertools.product(*ways):
            one = predict_chain(chain, stages)
            found.append((one.peak_bytes, one.seconds))
    return lambda budget_bytes: min((seconds for peak, seconds in found if peak <= budget_bytes), default=None)


def by_integer_program(units: Sequence[Unit], chunk_counts: Sequence[int]) -> Best:
    """A path through the chain, at every unit within the budget; HiGHS, no gap."""
    chain, count = Chain.of(units), len(units)
    plain = list(plain_stages(units))
    before = np.concatenate([[0], np.cumsum([unit.kept_bytes for unit in units])])
    pairs = itertools.combinations_with_replacement(range(count), 2)
    arcs = [stage for first, last in pairs for stage in stages_between(units, first, last, chunk_counts)]
    heights, left, extra = [], [], []
    for arc in arcs:
        one = predict_chain(chain, [*plain[: arc.first], arc, *plain[arc.last + 1 :]])
        inside = [p.live_bytes for p in one.positions if arc.first <= p.unit <= arc.last]
        heights.append(max(inside) - int(before[arc.first]))
        left.append(chain.left_bytes(arc))
        extra.append(one.seconds - chain.plain_seconds)
    path, kept, high = (sparse.lil_matrix((count, len(arcs))) for _ in range(3))
    for k, arc in enumerate(arcs):
        path[arc.first, k] = 1
        if arc.last + 1 < count:
            path[arc.last + 1, k] = -1
            kept[arc.last + 1 :, k] = left[k]
        high[arc.first, k] = heights[k]
    begins = np.eye(1, count)[0]

    def best(budget_bytes: int) -> float | None:
        answer = optimize.milp(
            np.array(extra) / chain.plain_seconds,
            constraints=[
                optimize.LinearConstraint(path.tocsr(), begins, begins),
                optimize.LinearConstraint((kept + high).tocsr() / budget_bytes, -np.inf, 1 + 1e-9),
            ],
            bounds=optimize.Bounds(0, 1),
            integrality=np.ones(len(arcs)),
            options={"mip_rel_gap": 0.0},
        )
        return None if answer.x is None else chain.plain_seconds + float(np.dot(np.round(answer.x), extra))

    return best


def quality_of(units: list[Unit], chunk_counts: tuple[int, ...]) -> dict[str, Any]:
    tried = len(units) <= MOST_UNITS_TRIED
    best = (by_trying_all if tried else by_integer_program)(units, chunk_counts)
    floor = pareto(units, chunk_counts=chunk_counts)[-1].peak_bytes
    plain = predict_chain(units, plain_stages(units))
    ratios, slower, seconds, choices = [], [], [], []
    for fraction in FRACTIONS:
        budget_bytes = floor + int(fraction * (plain.peak_bytes - floor))
        start = time.perf_counter()
        choice = choose_for(units, budget_bytes, chunk_counts=chunk_counts)
        seconds.append(time.perf_counter() - start)
        fastest = best(budget_bytes)
        if choice is None or fastest is None:
            raise SystemExit(f"nothing within {budget_bytes} bytes, from which on there is a choice")
        found = predict_chain(units, choice.stages)
        if found.peak_bytes > budget_bytes or found.peak_bytes != choice.peak_bytes:
            raise SystemExit(f"a choice of {found.peak_bytes} bytes within {budget_bytes}")
        ratios.append(found.seconds / fastest)
        slower.append(found.seconds / plain.seconds)
        choices.append(choice)
    return {
        "units": len(units),
        "best_by": "trying every choice" if tried else "integer program",
        "floor_of_plain_peak": floor / plain.peak_bytes,
        "time_of_best": ratios,
        "time_of_plain": slower,
        "largest_time_of_best": max(ratios),
        # That nothing is smaller takes an integer program too long to prove.
        "less_than_the_floor_is_impossible": best(floor - 1) is None if tried else None,
        "monotone": all(
            a.peak_bytes <= b.peak_bytes and a.seconds >= b.seconds for a, b in itertools.pairwise(choices)
        ),
        "median_solve_seconds": statistics.median(seconds),
        "largest_solve_seconds": max(seconds),
    }


def offload_of(units: list[Unit], link: HostLink) -> dict[str, Any]:
    """What a host on a bus is worth."""
    plain = predict_chain(units, plain_stages(units))
    floor = pareto(units)[-1].peak_bytes
    figures: dict[str, Any] = {"bytes_per_second": link.bytes_per_second, "host_bytes": link.host_bytes}
    for fraction in (0.05, 0.3, 0.6):
        budget_bytes = floor + int(fraction * (plain.peak_bytes - floor))
        alone = choose_for(units, budget_bytes)
        start = time.perf_counter()
        choice = choose_for(units, budget_bytes, link=link)
        figures[f"fraction {fraction}"] = {
            "time_of_plain_without": alone.seconds / plain.seconds if alone else None,
            "time_of_plain": choice.seconds / plain.seconds if choice else None,
            "stall_of_plain": choice.stall_seconds / plain.seconds if choice else None,
            "host_bytes": choice.host_bytes if choice else None,
            "solve_seconds": time.perf_counter() - start,
        }
    return figures


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    # The first call loads what it needs.
    choose_for(_plan_chains.uniform(3), 2**40, link=HostLink(host_bytes=1))
    cases = {name: quality_of(*case) for name, case in _plan_chains.chains().items()}
    deep, start = _plan_chains.uneven(96, 1), time.perf_counter()
    choose_for(deep, 2**40)
    figures = {
        "budgets": "floor + fraction of (plain peak - floor)",
        "fractions": FRACTIONS,
        "all_within_two_percent": all(case["largest_time_of_best"] <= WITHIN for case in cases.values()),
        "no_smaller_floor": all(case["less_than_the_floor_is_impossible"] is not False for case in cases.values()),
        "all_monotone": all(case["monotone"] for case in cases.values()),
        "largest_time_of_best": max(case["largest_time_of_best"] for case in cases.values()),
        "largest_solve_seconds": max(case["largest_solve_seconds"] for case in cases.values()),
        "solve_seconds_of_96_uneven_units": time.perf_counter() - start,
        "chains": cases,
        "offload": {
            name: offload_of(_plan_chains.chains()[name][0], HostLink(bytes_per_second=50e9, host_bytes=2**36))
            for name in ("ResNet-34, 105 rows", "GPT-2 XL, 4 x 1024")
        },
    }
    _results.write("plan_quality", figures)


if __name__ == "__main__":
    main()
