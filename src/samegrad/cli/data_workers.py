"""What torch's data workers end in: killed, hung, out of shared memory, or an exception of the user's own code.

Only texts come out of another process: torch raises plain RuntimeErrors for a worker that is gone, in whatever code
runs just then, and an exception of a worker again with its traceback written into its message.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

from samegrad import errors
from samegrad.errors import BadInput, EnvironmentProblem, SamegradError

_ASKED = "read the batches by data workers"
_GONE = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) (?P<how>is killed|exited)")
_SIGNAL = re.compile(r"killed by signal: (?P<name>[^.]+)\.")
_EXIT_CODE = re.compile(r"with exit code (?P<code>\d+)")
_HUNG = re.compile(r"DataLoader timed out after (?P<seconds>\d+) seconds")
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+), in ', re.MULTILINE)
_TRACEBACK = "Traceback (most recent call last):\n"
_THREE_PARTS = re.compile(
    r"samegrad\.errors\.(?P<kind>\w+): (?P<asked>.*?)\n  found: (?P<found>.*?)\n  do:    (?P<do>.*)", re.DOTALL
)
# How the system and torch word that there is no room for the batches that workers hand over.
_SHARED_MEMORY = re.compile(
    r"unable to (open|write|resize|allocate|mmap).*(No space left|Cannot allocate)|insufficient shared memory",
    re.DOTALL,
)
_HOST_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
_ROOM = "--shm-size for a container, or torch.multiprocessing.set_sharing_strategy('file_system') in the file"


def worker_is_gone(error: BaseException) -> bool:
    """Whether ``error`` is torch's for a data worker that died. It has no type for it."""
    return type(error) is RuntimeError and _GONE.match(str(error)) is not None


def of_a_worker(error: BaseException) -> SamegradError | None:
    """``error`` in our words where a data worker died or hung, or ran out of what its process has; else None."""
    text = str(error)
    if worker_is_gone(error):
        return _gone(error)
    if type(error) is RuntimeError and (hung := _HUNG.match(text)):
        return EnvironmentProblem(
            asked=_ASKED, found=f"no batch came within the loader's timeout of {hung['seconds']} s",
            do="give the DataLoader a longer timeout=, or num_workers=0, which shows what it waits for",
        )  # fmt: skip
    if type(error) is RuntimeError and text.startswith("Too many open files"):
        return EnvironmentProblem(
            asked=_ASKED, found="too many open files: every batch that a worker hands over is one",
            do="raise the limit with ulimit -n, take fewer workers, or call "
            "torch.multiprocessing.set_sharing_strategy('file_system') in the file",
        )  # fmt: skip
    told = told_in(error)
    if told is None:
        return None
    if ours := _THREE_PARTS.match(told):
        kind = getattr(errors, ours["kind"])
        return kind(asked=ours["asked"], found=ours["found"], do=ours["do"])  # type: ignore[no-any-return]  # one of ours
    if isinstance(error, MemoryError) or _HOST_ALLOCATOR in told:
        return EnvironmentProblem(
            asked=_ASKED, found=f"a worker ran out of host memory: {told}",
            do="take fewer workers (num_workers=) or a smaller prefetch_factor=: each holds its own batches",
        )  # fmt: skip
    if _SHARED_MEMORY.search(told):
        return EnvironmentProblem(
            asked=_ASKED, found=f"there is no shared memory left for its batches: {told}",
            do=f"take fewer workers (num_workers=, 0 needs none), or make room: {_ROOM}",
        )  # fmt: skip
    return None


def told_in(error: BaseException) -> str | None:
    """The exception that a worker raised, as Python words it, where ``error`` is what torch makes of it."""
    original = _original(error)
    if original is None:
        return None
    frames = list(_FRAME.finditer(original))
    after = original[frames[-1].end() :] if frames else original
    # What follows the last frame: the frame's name and source are its own line and indented ones.
    lines = after.split("\n")[1:]
    first = next((place for place, line in enumerate(lines) if line and not line.startswith(" ")), 0)
    # A class of the user's file, by the name that the file is loaded under.
    return "\n".join(lines[first:]).strip().removeprefix("samegrad_target_")


def frames_in(error: BaseException) -> list[tuple[str, int]]:
    """File and line of every frame of a worker's exception, outermost first; none where ``error`` is no worker's."""
    original = _original(error)
    return [] if original is None else [(frame["file"], int(frame["line"])) for frame in _FRAME.finditer(original)]


def _original(error: BaseException) -> str | None:
    """The last traceback in the message, where torch raised ``error`` again for a worker."""
    place = error.__traceback__
    last = None
    while place is not None:
        last, place = place.tb_frame.f_code, place.tb_next
    # By the place that raises, since a text can be anybody's.
    if last is None or last.co_name != "reraise" or Path(last.co_filename).parts[-2:] != ("torch", "_utils.py"):
        return None
    return str(error).rpartition(_TRACEBACK)[2]


def _gone(error: BaseException) -> SamegradError:
    texts = [str(one) for one in _chain(error)]
    gone = _GONE.match(texts[0])
    assert gone is not None, "asked by worker_is_gone"
    worker = f"data worker with process id {gone['pids']}"
    named = next((found["name"] for text in texts if (found := _SIGNAL.search(text))), None)
    left = next((found["code"] for text in texts if (found := _EXIT_CODE.search(text))), None)
    if left is not None:
        return BadInput(
            asked=_ASKED, found=f"the {worker} ended with exit code {left}",
            do="look for what ends the process in the dataset's code; num_workers=0 shows it in this process",
        )  # fmt: skip
    number = None if named is None else _number(named)
    ended = f"the {worker} " + ("is gone" if named is None else f"was killed by {_name(number, named)}")
    if number in (None, signal.SIGKILL):
        why = "the system does that when host memory runs out"
        do = (
            "take fewer workers (num_workers=) or a smaller prefetch_factor=, so that fewer batches are held on the "
            "host; num_workers=0 reads in this process"
        )
    elif number == signal.SIGBUS:
        why = "shared memory for the batches ran out, mostly"
        do = f"take fewer workers, num_workers=0 for none, or make room: {_ROOM}"
    else:
        why = "by somebody, or by a library in the dataset's code"
        do = "see with num_workers=0, in this process, what it was"
    return EnvironmentProblem(asked=_ASKED, found=f"{ended}: {why}", do=do)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised from: torch's handler for a child that ended knows the signal."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _number(named: str) -> int:
    """The signal whose description is ``named``, which is what torch tells ("Killed"); -1 where it is none."""
    if named.startswith("Unknown signal "):
        return int(named.rpartition(" ")[2])
    return next((s for s in signal.valid_signals() if signal.strsignal(s) == named), -1)


def _name(number: int | None, named: str) -> str:
    return next((one.name for one in signal.Signals if one == number), named)
