"""State that a forward changes, as a transaction: chunks see the state before the step, one commit a step.

Every chunk starts from the same buffers and counters; what each makes of them is reduced to what the whole batch would
have made. How is found by experiment on a few rows (``learn_rules``) and is one of

identical  every chunk makes the same of it: power iterations on weights, counts of calls
mean       the rows' weighted mean over chunks: moving averages of batch means, since each chunk starts from the same
sum        the chunks' contributions added to the decayed value before: counts of rows, codebook sums

Anything else is refused by name. The user's tensors are not touched before ``commit``: chunks work on copies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samegrad.errors import CannotSplit
from samegrad.exact.dataless import has_data


class Reducer(enum.Enum):
    """How the chunks' states become the step's."""

    IDENTICAL = "identical"
    MEAN = "mean"
    SUM = "sum"


@dataclasses.dataclass(frozen=True)
class StateRule:
    """``key`` of the module at ``path`` (a buffer or an attribute), and how it is reduced.

    ``decay``: what a SUM multiplies the value before by.
    """

    path: str
    key: str
    reducer: Reducer
    decay: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.path}.{self.key}" if self.path else self.key


_PLAIN = (int, float, bool, str, type(None))
# One forward's values of some state: tensors, or plain numbers.
Values = dict[str, Any]


@dataclasses.dataclass
class _Slot:
    """A place that holds state: ``holder[key]``, a module's buffers or its attributes."""

    holder: dict[str, Any]
    key: str
    rule: StateRule
    before: Any
    # What chunks start from: ``before``, and a copy of it once the commit has written there.
    start: Any

    @classmethod
    def of(cls, network: nn.Module, rule: StateRule) -> _Slot:
        part = network.get_submodule(rule.path)
        holder: dict[str, Any] = part._buffers if rule.key in part._buffers else vars(part)
        return cls(holder, rule.key, rule, holder[rule.key], holder[rule.key])


class StateTransaction:
    """The state named by ``rules``, kept apart for the chunks of one step.

    ``chunk`` encloses the forward of one chunk; with ``share`` (its rows over the batch's) what it leaves is reduced,
    without (recomputation) it is dropped. ``commit`` writes the result once; chunks that run again after it see the
    state before the step all the same.
    """

    def __init__(self, network: nn.Module, rules: Sequence[StateRule]) -> None:
        self._slots = [_Slot.of(network, rule) for rule in rules]
        self._reduced: list[Any] = [None] * len(self._slots)
        self._in_place: list[bool] = [True] * len(self._slots)
        self._dtypes: list[torch.dtype | None] = [None] * len(self._slots)
        # Entries that should be the same in every chunk and were not; on the device, read once.
        self._different: dict[str, Any] = {}

    @property
    def kept(self) -> bool:
        """Whether there is any state to keep."""
        return bool(self._slots)

    @property
    def names(self) -> list[str]:
        return [slot.rule.name for slot in self._slots]

    @contextlib.contextmanager
    def chunk(self, share: float | None) -> Iterator[None]:
        if not self._slots:
            yield
            return
        copies = [_copied(slot.start) for slot in self._slots]
        standing = [slot.holder[slot.key] for slot in self._slots]
        try:
            for slot, copy in zip(self._slots, copies):
                slot.holder[slot.key] = copy
            yield
            if share is not None:
                self._fold(copies, share)
        finally:
            for slot, value in zip(self._slots, standing):
                slot.holder[slot.key] = value

    def _fold(self, copies: Sequence[Any], share: float) -> None:
        for index, (slot, copy) in enumerate(zip(self._slots, copies)):
            now = slot.holder[slot.key]
            if slot.rule.reducer is Reducer.SUM and now is copy and isinstance(now, Tensor) and not now._version:
                # Nothing was written: a codebook that is frozen now, say, and not one that decays and gets nothing.
                continue
            self._in_place[index] = now is copy
            self._dtypes[index] = now.dtype if isinstance(now, Tensor) else None
            self._reduced[index] = self._reduce(slot, self._reduced[index], _detached(now), share)

    def _reduce(self, slot: _Slot, so_far: Any, now: Any, share: float) -> Any:
        if slot.rule.reducer is Reducer.IDENTICAL:
            if so_far is None:
                return now
            name = slot.rule.name
            self._different[name] = self._different.get(name, 0) + _differences(so_far, now)
            return so_far
        wide = _wide(now)
        if slot.rule.reducer is Reducer.MEAN:
            return wide * share if so_far is None else so_far + wide * share
        # The value before is in every chunk's; it counts once.
        return wide if so_far is None else so_far + (wide - _wide(slot.before) * slot.rule.decay)

    def check(self) -> None:
        """Raises CannotSplit when chunks differ in what was the same on the first rows."""
        for name, count in self._different.items():
            if isinstance(count, Tensor) and not has_data(count):
                continue
            if int(count):
                raise CannotSplit(
                    asked=f"one value of {name} for all chunks",
                    found="two chunks made different ones of it, although the first rows did not",
                    do="run the step whole (a larger budget, or rows=<the batch's rows>); nothing was handed over",
                )

    @torch.no_grad()
    def commit(self) -> None:
        """Writes the step's state: in place where the forward writes in place, a new object where it makes one."""
        for slot, reduced, in_place, dtype in zip(self._slots, self._reduced, self._in_place, self._dtypes):
            if reduced is None:
                continue
            if in_place and isinstance(slot.before, Tensor):
                slot.start = _copied(slot.before)
                slot.before.copy_(reduced)
            else:
                slot.holder[slot.key] = reduced.to(dtype) if isinstance(reduced, Tensor) else reduced

    @contextlib.contextmanager
    def committed(self) -> Iterator[None]:
        """A block for which the step's state is written; should it raise, or the writing, all of it is taken back."""
        with self.undone_on_failure():
            self.commit()
            yield

    @contextlib.contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """A block after which the state is as before, should it raise."""
        before = [_copied(slot.before) for slot in self._slots]
        try:
            yield
        except BaseException:
            self._take_back(before)
            raise

    @torch.no_grad()
    def _take_back(self, before: Sequence[Any]) -> None:
        for slot, value in zip(self._slots, before):
            slot.holder[slot.key] = slot.before
            if isinstance(slot.before, Tensor):
                slot.before.copy_(value)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _wide(value: Any) -> Any:
    """Sums over many chunks are kept in float64; buffers are small."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _differences(a: Any, b: Any) -> Any:
    """How many entries differ: () int64 on their device, or a number. NaN is itself."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        return ((a != b) & ~((a != a) & (b != b))).sum()
    return int(not _same(a, b))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # NaN is itself.
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and bool(a == b)


def learn_rules(
    names: Sequence[tuple[str, str]],
    whole: Values,
    splits: Sequence[Sequence[tuple[float, Values]]],
    before: Values,
) -> list[StateRule]:
    """The rule of every changed state. Raises CannotSplit naming the first that has none.

    ``names``: (module path, key) of what changes. ``whole``: its values after a forward of all rows. ``splits``: for
    each of several ways to part the rows, each part's share of the rows and the values after its forward. All start
    from ``before``.
    """
    rules = []
    for path, key in names:
        rule = _rule_of(StateRule(path, key, Reducer.IDENTICAL), whole, splits, before)
        if rule is None:
            name = f"{path}.{key}" if path else key
            raise CannotSplit(
                asked="split the rows of a step",
                found=f"the forward changes {name}, which is neither the same for every chunk nor their mean or sum: "
                "it would be updated once a chunk, not once a step",
                do="run the step whole (a larger budget, or rows=<the batch's rows>), name the parts of the model that "
                "treat rows alone with segments=, or update that state outside the forward",
            )
        rules.append(rule)
    return rules


def _rule_of(
    plain: StateRule, whole: Values, splits: Sequence[Sequence[tuple[float, Values]]], before: Values
) -> StateRule | None:
    name = plain.name
    if name not in before or name not in whole:
        # Made by the forward or removed by it; there is nothing to start every chunk from.
        return None
    target, start = whole[name], before[name]
    parts = [[(share, values[name]) for share, values in split] for split in splits]
    if not isinstance(target, (Tensor, *_PLAIN)):
        return None
    if all(_same(value, target) for split in parts for _, value in split):
        return plain
    if start is None or isinstance(target, (bool, str)) or target is None:
        return None
    if isinstance(target, Tensor) and any(v.shape != target.shape for split in parts for _, v in split):
        return None
    exact = isinstance(target, int) or (isinstance(target, Tensor) and not target.is_floating_point())
    if not exact and all(_near(sum(share * _wide(v) for share, v in split), target, target) for split in parts):
        return dataclasses.replace(plain, reducer=Reducer.MEAN)
    # Σ_k (decay · before + s_k) = whole + (parts - 1) · decay · before, for every way to part the rows.
    kept = [(sum(_wide(v) for _, v in split) - _wide(target)) / (len(split) - 1) for split in parts]
    decay = _ratio(kept[0], start)
    if all(_near(k, _wide(start) * decay, target) for k in kept):
        return dataclasses.replace(plain, reducer=Reducer.SUM, decay=decay)
    return None


def _ratio(kept: Any, start: Any) -> float:
    """The factor that takes ``start`` nearest to ``kept``, snapped to what a person would have written."""
    a = torch.as_tensor(kept, dtype=torch.float64).reshape(-1)
    b = torch.as_tensor(start, dtype=torch.float64).reshape(-1)
    norm = float(b.dot(b))
    # From zero nothing is seen of a decay.
    factor = float(a.dot(b)) / norm if norm else 1.0
    near = round(factor, 4)
    return near if abs(near - factor) <= 1e-6 else factor


def _near(a: Any, b: Any, of: Any) -> bool:
    """Whether ``a`` and ``b`` agree on the scale of ``of``; parts of other sizes round differently."""
    a, b, of = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b, of))
    scale = max((float(v.abs().max()) for v in (a, b, of) if v.numel()), default=0.0)
    return bool(((a - b).abs() <= 1e-5 * scale).all())
