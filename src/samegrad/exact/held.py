"""What a loss or a forward holds without being a module: closures, globals, defaults, partials, objects it belongs to.

Trials and verification run them more often than the step does; a moving centre or a queue that stands in a closure
must be found as it was, like a buffer.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from samegrad.declared import DeclaredStep, Within
from samegrad.errors import UsageError
from samegrad.exact import containers
from samegrad.exact.attributes import Attribute, arrays_in, can_hold_state
from samegrad.exact.softmax_loss import SoftmaxLoss

# Tables and data sets are held as well, and hardly ever written; copies of them are not what memory is for.
_LARGEST_BYTES = 2**28
# A function of items is looked at in every call.
_LARGEST_BYTES_EACH_CALL = 2**20
_DEEPEST = 3
_LIBRARIES = ("torch", "samegrad", "numpy")


@dataclasses.dataclass(frozen=True)
class Place:
    """One place that holds state, as it was. ``write`` is None where the object there cannot be replaced.

    ``before``: a copy, None of what is large; ``marks`` tell whether the tensors there are others or were written.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None] | None
    before: Attribute | None
    marks: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls, name: str, read: Callable[[], Any], write: Callable[[Any], None] | None, largest_bytes: int
    ) -> Place:
        value = read()
        large = sum(array.nbytes for array in arrays_in(value)) > largest_bytes
        return cls(name, read, write, None if large else Attribute.of(value), _marks(value))

    def changed(self) -> bool:
        try:
            now = self.read()
        except (KeyError, ValueError):  # deleted
            return True
        return _marks(now) != self.marks if self.before is None else not self.before.same(now)

    def concerns_arrays(self) -> bool:
        """Whether tensors or arrays stand there, or stood there."""
        return self.before is None or bool(arrays_in(self.before.value) or arrays_in(self.read()))

    def restore(self) -> None:
        """Raises UsageError for what is too large to be copied and was written."""
        if self.before is not None:
            value = self.before.restored()
            if self.write is not None:
                self.write(value)
        elif self.changed():
            raise UsageError(
                asked="try the step on a few rows and leave everything as it was",
                found=f"{self.name} is written, and too large to be set aside",
                do="hold it as a buffer of an nn.Module that the step knows, and fill it again",
            )


def _marks(value: Any) -> tuple[tuple[int, int], ...]:
    return tuple((id(array), array._version) for array in arrays_in(value) if isinstance(array, Tensor))


@dataclasses.dataclass(frozen=True)
class Held:
    """The places, and the modules that samegrad was not given.

    ``arrays_only``: a changed count or switch is no matter, only what a computation may read back.
    """

    places: tuple[Place, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    arrays_only: bool = False

    def changed(self) -> list[str]:
        return [place.name for place in self._concerned() if place.changed()]

    def restore(self) -> None:
        for place in self._concerned():
            place.restore()

    def _concerned(self) -> Sequence[Place]:
        return [p for p in self.places if p.concerns_arrays()] if self.arrays_only else self.places


def held_by(declared: DeclaredStep) -> Held:
    """What the step's loss and forward hold, as it is now."""
    return held_in({"loss_fn": declared.loss_fn, "forward": declared.forward}, [declared.model, *declared.modules])


def arrays_held_in(function: Any, known: Sequence[nn.Module], *, each_call: bool = False) -> Held:
    """The tensors and arrays that a function of rows or items holds; whoever counts its calls may go on counting.

    ``each_call``: this is asked in every step, so only small ones are copied.
    """
    largest = _LARGEST_BYTES_EACH_CALL if each_call else _LARGEST_BYTES
    return dataclasses.replace(held_in({"fn": function}, known, largest), arrays_only=True)


def held_in(functions: Mapping[str, Any], known: Sequence[nn.Module], largest_bytes: int | None = None) -> Held:
    """What ``functions`` hold, as it is now; ``known`` modules are looked after elsewhere."""
    most = _LARGEST_BYTES if largest_bytes is None else largest_bytes
    search = _Search({id(part) for module in known for part in module.modules()}, most)
    for name, function in functions.items():
        search.look(function, name, 0)
    return Held(tuple(search.places), tuple(search.modules))


class _Search:
    def __init__(self, seen: set[int], largest_bytes: int) -> None:
        self._seen, self._largest_bytes = seen, largest_bytes
        self.places: list[Place] = []
        self.modules: list[nn.Module] = []

    def look(self, value: Any, name: str, depth: int) -> None:
        """Into what is no state itself but may hold some."""
        if id(value) in self._seen or depth > _DEEPEST or isinstance(value, (type, ModuleType)):
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self.modules.append(value)
            self._seen |= {id(part) for part in value.modules()}
        elif isinstance(value, (Within, SoftmaxLoss)):
            self.look(value.function, name, depth)
        elif isinstance(value, functools.partial):
            for at, held in ((value.func, ""), *((part, f"({i})") for i, part in enumerate(value.args))):
                self._fixed(at, name + held, depth)
            for key, part in value.keywords.items():
                self._fixed(part, f"{name}({key})", depth)
        elif isinstance(value, MethodType):
            self.look(value.__self__, f"{name}'s object", depth)
            self.look(value.__func__, name, depth)
        elif isinstance(value, FunctionType):
            if not of_a_library(value):
                self._function(value, name, depth)
        elif isinstance(getattr(value, "__dict__", None), dict) and not of_a_library(type(value)):
            for key in list(vars(value)):
                self._at(vars(value), key, f"{name}.{key}", depth)
            if isinstance(call := vars(type(value)).get("__call__"), FunctionType):
                self.look(call, name, depth)

    def _function(self, function: FunctionType, name: str, depth: int) -> None:
        for key, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            self._cell(cell, f"{name}'s {key}", depth)
        for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._fixed(part, f"a default of {name}", depth)
        for key in global_names(function.__code__)[0]:
            if key in function.__globals__:
                self._at(function.__globals__, key, f"the global {key}", depth)

    def _cell(self, cell: CellType, name: str, depth: int) -> None:
        try:
            held = cell.cell_contents
        except ValueError:  # not assigned yet
            return
        if can_hold_state(held):
            self._add(name, lambda: cell.cell_contents, lambda value: setattr(cell, "cell_contents", value))
            self._within(held, name, depth)
        else:
            self.look(held, name, depth + 1)

    def _at(self, holder: dict[str, Any], key: str, name: str, depth: int) -> None:
        held = holder[key]
        if can_hold_state(held):
            self._add(name, lambda: holder[key], lambda value: holder.__setitem__(key, value))
            self._within(held, name, depth)
        else:
            self.look(held, name, depth + 1)

    def _fixed(self, held: Any, name: str, depth: int) -> None:
        if can_hold_state(held):
            self._add(name, lambda: held, None)
            self._within(held, name, depth)
        else:
            self.look(held, name, depth + 1)

    def _within(self, held: Any, name: str, depth: int) -> None:
        """Objects in a short container: a list of modules, a dictionary of queues."""
        if isinstance(held, (list, tuple, dict)) and len(held) <= 64:
            content = containers.plain(held)
            for key, part in content.items() if isinstance(content, dict) else enumerate(content):
                if not can_hold_state(part):
                    self.look(part, f"{name}[{key!r}]", depth + 1)

    def _add(self, name: str, read: Callable[[], Any], write: Callable[[Any], None] | None) -> None:
        value = read()
        if not (isinstance(value, Tensor) and value.requires_grad):  # parameters are the engine's
            self.places.append(Place.of(name, read, write, self._largest_bytes))


def of_a_library(kind: Any) -> bool:
    """Whether a function or a class is torch's, numpy's or samegrad's own."""
    return (getattr(kind, "__module__", None) or "").partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=1024)
def global_names(code: CodeType) -> tuple[frozenset[str], bool]:
    """The globals that ``code`` and the functions within it name, and whether it assigns to any."""
    named: set[str] = set()
    stored = False
    for part in codes_within(code):
        for instruction in dis.get_instructions(part):
            if instruction.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"):
                named.add(str(instruction.argval))
                stored = stored or instruction.opname != "LOAD_GLOBAL"
    return frozenset(named), stored


def codes_within(code: CodeType) -> Iterator[CodeType]:
    """``code`` and that of every function, class and comprehension written inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_within(constant)
