"""Where a model draws random numbers, found on a few rows, and whether chunks can draw the same.

Draws through torch's functions are recorded at two row counts, which shows where the rows of each are
(``draw_sites.py``). What advances a generator all the same, numpy's, Python's or one inside a kernel, cannot be keyed
by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from samegrad.errors import CannotSplit
from samegrad.exact.draw_sites import DrawSites, Recorder, learn_sites
from samegrad.exact.module_names import entered, first_module
from samegrad.exact.randomness import recording
from samegrad.exact.undisturbed import Generators

_WAYS_OUT = "draw it outside the model and pass it in the batch, put that module in eval mode, or run the step whole " \
    "(a larger budget, or rows=<the batch's rows>)"


def find_sites(
    network: torch.nn.Module,
    runs: Sequence[Callable[[], object]],
    rows: tuple[int, int],
    generators: Generators,
    restored: Callable[[], None],
) -> DrawSites | None:
    """The model's draws, None where it makes none. Raises CannotSplit naming the module that cannot be keyed.

    ``runs``: forwards of ``rows[0]`` and of ``rows[1]`` rows. ``restored`` puts state and generators back.
    """
    runs[0]()
    drew = generators.advanced()
    restored()
    if not drew:
        return None
    first, second = (_recorded(network, run, generators, restored) for run in runs)
    return learn_sites(first, second, rows=rows)


def check_sites(
    sites: DrawSites, network: torch.nn.Module, run: Callable[[], object], restored: Callable[[], None]
) -> None:
    """Raises CannotSplit, naming the module, when one of the draws is not made row by row."""
    try:
        sites.check_split()
    except CannotSplit as refused:
        call = next(i for i, site in enumerate(sites.sites) if site.place is None)
        with recording() as record:
            place = first_module(network, run, lambda: len(record.draws) > call)
        restored()
        raise _named(place, refused) from None


def _recorded(
    network: torch.nn.Module, run: Callable[[], object], generators: Generators, restored: Callable[[], None]
) -> Recorder:
    with recording() as record, entered(network) as running:
        try:
            run()
        except CannotSplit as refused:
            restored()
            raise _named(running[-1] if running else "the model", refused) from None
    drew = generators.advanced()
    restored()
    if drew:
        with recording():
            place = first_module(network, run, lambda: bool(generators.advanced()))
        restored()
        raise CannotSplit(
            asked="split the rows of a step",
            found=f"{place} draws random numbers (generator: {', '.join(drew)}) that cannot be keyed by row; each "
            "chunk would draw its own",
            do=_WAYS_OUT,
        )
    return record


def _named(place: str, refused: CannotSplit) -> CannotSplit:
    return CannotSplit(
        asked="split the rows of a step", found=f"{place} draws random numbers: {refused.found}", do=_WAYS_OUT
    )
