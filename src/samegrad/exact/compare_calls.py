"""Whether runs on other numbers of rows made the same calls, up to numbers that follow the rows.

A number follows the rows when it is the same in all runs, a multiple of the rows, a constant over them, or, where
nothing is computed with it (shapes, ends of slices), a whole multiple of the rows and something. A loop that runs for
every row is the same loop in all runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

from samegrad.exact.calls import Call, Calls, Length, OfTensor

# With their numbers something is computed, so that they may not be shifted.
_ARITHMETIC = frozenset(
    "add sub subtract rsub radd mul multiply rmul div divide true_divide truediv rtruediv floor_divide floordiv pow "
    "rpow float_power remainder fmod mod lerp addcmul addcdiv iadd isub imul itruediv".split()
)
_BROADCASTS = frozenset({"expand", "expand_as", "broadcast_to"})
# Longer bodies of loops are not looked for.
_LONGEST_BODY = 256


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first calls that differ, of runs on ``rows``; None where a run has no more calls."""

    rows: tuple[int, int]
    calls: tuple[Call | None, Call | None]

    @property
    def place(self) -> str:
        """The module that made the call, and the line."""
        call = self.calls[1] or self.calls[0]
        assert call is not None
        return call.place + (f", {call.line}," if call.line else "")

    @property
    def words(self) -> str:
        """What differs, in words."""
        (n, m), (a, b) = self.rows, self.calls
        if a is None or b is None or a.place != b.place:
            # Where both call something, it is the later run that does not stay in step.
            call, rows, other = (b, m, n) if b is not None else (a, n, m)
            return f"calls {call.function if call else ''} on {rows} rows and not on {other}"
        if a.function != b.function:
            return f"calls {b.function} on {m} rows and {a.function} on {n}"
        if a.leaves == b.leaves:
            return f"calls {b.function}, which gives {_made(b)} on {m} rows and {_made(a)} on {n}"
        return f"calls {b.function} with {_numbers(b)} on {m} rows and with {_numbers(a)} on {n}"


def first_difference(runs: Sequence[Calls]) -> Difference | None:
    """The first difference between ``runs`` on two or more numbers of rows; None where there is none.

    Runs that ended early are compared as far as they came.
    """
    first, *others = sorted(map(_without_broadcasts, runs), key=lambda run: run.rows)
    runs = [first, *others]
    for other in others:
        if found := _different_functions(first, other):
            return found
    if len({len(run.calls) for run in runs if not run.failure}) > 1:
        # Loops over rows were compared with their numbers.
        return None
    return _different_numbers([first, *others])


def _without_broadcasts(run: Calls) -> Calls:
    """What one row needs to be made as many as the others changes no number; shapes after it are compared."""
    return dataclasses.replace(run, calls=[call for call in run.calls if call.function not in _BROADCASTS])


def _different_functions(first: Calls, other: Calls) -> Difference | None:
    keys = [[_key(call) for call in run.calls] for run in (first, other)]
    if first.failure or other.failure:
        shorter = min(map(len, keys))
        keys = [some[:shorter] for some in keys]
    if keys[0] == keys[1] or _same_loops((first, other)):
        return None
    at = next((i for i, (a, b) in enumerate(zip(*keys)) if a != b), min(map(len, keys)))
    calls = [run.calls[at] if at < len(run.calls) else None for run in (first, other)]
    return Difference((first.rows, other.rows), (calls[0], calls[1]))


def _different_numbers(runs: Sequence[Calls]) -> Difference | None:
    rows = [run.rows for run in runs]
    for calls in zip(*(run.calls for run in runs)):
        computed = calls[0].function.strip("_") in _ARITHMETIC
        wrong = _first_unlike(rows, [call.leaves for call in calls], computed)
        if wrong is None:
            wrong = _first_unlike(rows, [call.shapes for call in calls], computed=False)
        if wrong is not None:
            return Difference((rows[0], rows[wrong]), (calls[0], calls[wrong]))
    return None


def _first_unlike(rows: Sequence[int], numbers: Sequence[tuple[object, ...]], computed: bool) -> int | None:
    """The first run whose numbers do not follow the rows."""
    if all(each == numbers[0] for each in numbers):
        return None
    if len({len(each) for each in numbers}) > 1:
        return next(k for k, each in enumerate(numbers) if len(each) != len(numbers[0]))
    for values in zip(*numbers):
        for k in range(1, len(rows)):
            if not _alike(rows, values, k, computed):
                return k
    return None


def _alike(rows: Sequence[int], values: Sequence[object], k: int, computed: bool) -> bool:
    """Whether ``values[k]`` is for ``rows[k]`` rows what ``values[0]`` is for ``rows[0]``; the last says how steep."""
    a, b, last = values[0], values[k], values[-1]
    if not (_is_number(a) and _is_number(b) and _is_number(last)):
        return bool(a == b)
    assert isinstance(a, (int, float)) and isinstance(b, (int, float)) and isinstance(last, (int, float))
    n, m = rows[0], rows[k]
    if a == b or (a != a and b != b) or _near(a * m, b * n) or _near(a * n, b * m):
        return True
    if computed or not all(isinstance(value, int) for value in (a, b, last)):
        return False
    slope, rest = divmod(last - a, rows[-1] - n)
    return rest == 0 and b == a + slope * (m - n)


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _key(call: Call) -> Hashable:
    """What must be the same whatever the rows: the call without its numbers."""
    kinds = tuple("#" if _is_number(leaf) else leaf for leaf in call.leaves)
    return call.function, call.place, kinds


# Loops


@dataclasses.dataclass(frozen=True)
class _Loop:
    body: tuple[Hashable, ...]
    count: int


def _same_loops(runs: tuple[Calls, Calls]) -> bool:
    """Whether the runs differ only in how often loops ran, and that by as much for every row."""
    counts: list[tuple[int, int]] = []
    folded = [_folded([_key_in_loop(call) for call in run.calls]) for run in runs]
    if any(run.failure for run in runs) or not _matched(folded[0], folded[1], counts):
        return False
    n, m = (run.rows for run in runs)
    return all((b - a) % (m - n) == 0 and (b - a) // (m - n) >= 0 for a, b in counts)


def _key_in_loop(call: Call) -> Hashable:
    """Where a loop stands is in its indices; numbers that are computed with must be the same in every turn."""
    computed = call.function.strip("_") in _ARITHMETIC
    leaves: list[Hashable] = []
    for leaf, following in zip(call.leaves, (*call.leaves[1:], None)):
        if isinstance(leaf, Length) and isinstance(following, OfTensor):
            # A list with a tensor for each turn.
            break
        leaves.append("#" if isinstance(leaf, int) and not isinstance(leaf, bool) and not computed else leaf)
    return call.function, call.place, tuple(leaves)


def _folded(keys: list[Hashable]) -> list[Hashable]:
    """``keys`` with repeated stretches as loops, inner ones first, until there are no more."""
    while True:
        found: list[Hashable] = []
        at = 0
        while at < len(keys):
            body, count = _repeated(keys, at)
            found.append(_Loop(body, count) if count > 1 else keys[at])
            at += count * len(body)
        if len(found) == len(keys):
            return keys
        keys = found


def _repeated(keys: Sequence[Hashable], at: int) -> tuple[tuple[Hashable, ...], int]:
    """The shortest stretch at ``at`` that follows upon itself, and how often it stands there."""
    for length in range(1, min(_LONGEST_BODY, (len(keys) - at) // 2) + 1):
        if keys[at] != keys[at + length] or keys[at : at + length] != keys[at + length : at + 2 * length]:
            continue
        body, count = keys[at : at + length], 2
        while keys[at + count * length : at + (count + 1) * length] == body:
            count += 1
        return tuple(body), count
    return (keys[at],), 1


def _matched(a: Sequence[Hashable], b: Sequence[Hashable], counts: list[tuple[int, int]]) -> bool:
    """Whether ``a`` and ``b`` are the same but for how often loops run, which is added to ``counts``."""
    i = j = 0
    while i < len(a) or j < len(b):
        left, right = a[i] if i < len(a) else None, b[j] if j < len(b) else None
        if left == right:
            i, j = i + 1, j + 1
        elif isinstance(left, _Loop) and isinstance(right, _Loop) and left.body == right.body:
            counts.append((left.count, right.count))
            i, j = i + 1, j + 1
        elif isinstance(right, _Loop):
            # A loop that ran once, or not at all, does not look like one.
            once = tuple(a[i : i + len(right.body)]) == right.body
            counts.append((int(once), right.count))
            i, j = i + once * len(right.body), j + 1
        elif isinstance(left, _Loop):
            once = tuple(b[j : j + len(left.body)]) == left.body
            counts.append((left.count, int(once)))
            i, j = i + 1, j + once * len(left.body)
        else:
            return False
    return True


def _numbers(call: Call) -> str:
    """The numbers and words that ``call`` was made with."""
    told = [leaf for leaf in call.leaves if not isinstance(leaf, Length)]
    return ", ".join("a tensor" if isinstance(leaf, OfTensor) else str(leaf) for leaf in told) or "nothing"


def _made(call: Call) -> str:
    """What ``call`` gave, in words."""
    count, *lengths = call.shapes
    first = tuple(lengths[: len(lengths) // 2])
    return f"{first}" if count == 1 else f"{count} tensors, the first {first}, the last {tuple(lengths[len(first):])}"
