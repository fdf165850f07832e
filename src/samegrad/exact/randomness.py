"""Random draws that a split does not change: each row draws what it draws in the unsplit step.

Every draw a model makes through torch's Python functions is a function of (step key, stream, call, sample id,
element) alone, so it is the same for every split, every order of the rows, and when a chunk is run again in backward.
Nothing is stored for that, and torch's generators advance by the step's key and by nothing else.

    sites = learn_sites(first, second)          from two runs under ``recording()``, on 8 and on 5 rows
    key = StepKey()                             once a step
    with keyed(key, row_ids, sites=sites):      a chunk, first time or again, in any thread
        outputs = model(chunk)

Under ``torch.compile`` and in a captured graph, pass the key as a () int64 tensor on the device and write the next
step's key into it. Bits are the same on every device; Philox is specified in ``philox``. Draws made below Python
(by a kernel) are not seen: those of attention and of recurrent layers are replaced in ``drawn_layers``.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from samegrad.exact import drawn_layers, drawn_values
from samegrad.exact.draw_sites import DrawSites, LeadingRows, Recorder, Sites, learn_sites
from samegrad.exact.draws import Draws, StepKey, caller_id

__all__ = ["DrawSites", "LeadingRows", "Recorder", "StepKey", "keyed", "learn_sites", "recording"]

_KEYED = {**drawn_values.KEYED, **drawn_layers.KEYED}
# Known to draw, without a form whose rows are their own.
_UNCOVERED = {
    function
    for space, names in (
        (torch, "randperm poisson binomial _standard_gamma _sample_dirichlet _fused_dropout _sobol_engine_scramble_"),
        (torch._C._nn, "rrelu_with_noise rrelu_with_noise_"),
        (torch.nn.init, "uniform_ normal_ kaiming_uniform_"),
    )
    for name in names.split()
    if (function := getattr(space, name, None)) is not None
}


@contextlib.contextmanager
def keyed(
    key: StepKey | Tensor, row_ids: Tensor, *, sites: Sites, stream: int = 0, first_call: int | None = None
) -> Iterator[Draws]:
    """A block whose draws are keyed; yields them, and ``.calls`` says how many were made.

    key: the step's, the same for all chunks. row_ids: (n,) int64 on the device, the chunk's rows in the whole batch.
    sites: ``DrawSites`` for a chunk, ``DrawSites.for_all_rows()`` for a step that is not split, ``LeadingRows()`` for
    a loss on all rows. stream: 0 to 255, another for each part of a step that counts its calls from 0.
    first_call: for a part of the run that makes the sites' draws from this one on.
    Raises CannotSplit for a draw that cannot be keyed by rows, and at the end if it drew more or less often than when
    its sites were learnt.
    """
    # Above this generator is contextlib, and above that who runs the block.
    draws = Draws(key, row_ids, sites, stream, caller_id(2))
    draws.calls = first_call or 0
    with _KeyedDraws(draws):
        yield draws
    if first_call is None:
        sites.finish(draws.calls)


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """A block whose draws are recorded for ``learn_sites``. It draws numbers of key 0; generators are left alone."""
    recorder = Recorder()
    nothing = torch.zeros((), dtype=torch.int64)
    with _KeyedDraws(Draws(nothing, nothing.new_empty(0), recorder, 0, caller_id(2))):
        yield recorder


class _KeyedDraws(TorchFunctionMode):
    """Hands torch's draws to ``draws``. Other functions run as they are, under this mode where they are Python."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self._draws = draws

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        ours = _KEYED.get(func)
        if ours is not None:
            generator = options.get("generator")
            if generator is None:
                return ours(self._draws, *args, **options)
            self._draws.sites.allow_generator(resolve_name(func) or str(func), generator)
        elif func in _UNCOVERED:
            self._draws.sites.allow_uncovered(resolve_name(func) or str(func))
        elif _is_composite(func):
            with self:
                return _unhidden(func)(*args, **options)
        return func(*args, **options)


def _is_composite(func: Any) -> bool:
    return isinstance(func, types.FunctionType) and func.__module__ == F.__name__


def _unhidden(func: types.FunctionType) -> types.FunctionType:
    """``func`` of torch.nn.functional as it runs where nothing overrides it.

    Those functions ask first whether a mode is on and hand themselves over if so; run from a mode they would do so for
    ever, and run without it they would hide what they draw. The twin is the same code with that question answered no.
    """
    twin = _twins.get(func)
    if twin is None:
        # Some only choose between two others, which they hold in their closure.
        cells = func.__closure__ and tuple(
            types.CellType(_unhidden(cell.cell_contents)) if _is_composite(cell.cell_contents) else cell
            for cell in func.__closure__
        )
        names = _twin_globals() if func.__globals__ is vars(F) else func.__globals__
        twin = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, cells)
        twin.__kwdefaults__ = func.__kwdefaults__
        _twins[func] = twin
    return twin


_twins: dict[types.FunctionType, types.FunctionType] = {}
_globals: dict[str, Any] = {}


def _twin_globals() -> dict[str, Any]:
    if not _globals:
        _globals.update(vars(F))
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            _globals[name] = _not_overridden
        # A compiler would look its names up in the module of that name, and find the question there.
        del _globals["__name__"]
    return _globals


def _not_overridden(*_: Any) -> bool:
    return False
