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
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from samegrad.exact import drawn_layers, drawn_values
from samegrad.exact.compiled_draws import handed_over
from samegrad.exact.composite_functions import twins_of_drawing
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
# Python functions that may call one of these.
_TWINS = twins_of_drawing([*_KEYED, *_UNCOVERED])
_SEEN = {*_KEYED, *_UNCOVERED, *_TWINS}
_show_compilers = handed_over([*_KEYED, *_UNCOVERED])


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
        if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
            _show_compilers()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Every function of a model comes through here: what is no draw is told by one look.
        if func not in _SEEN:
            return func(*args, **kwargs) if kwargs else func(*args)
        return self._seen(func, args, kwargs or {})

    def _seen(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        ours = _KEYED.get(func)
        if ours is not None:
            generator = options.get("generator")
            if generator is None:
                return ours(self._draws, *args, **options)
            self._draws.sites.allow_generator(_name(func), generator)
        elif func in _UNCOVERED:
            self._draws.sites.allow_uncovered(_name(func))
        else:
            with self:
                return _TWINS[func](*args, **options)
        return func(*args, **options)


def _name(func: Any) -> str:
    return resolve_name(func) or str(func)
