"""What the host has: the limit of this process's control group or the machine's memory, what is in use, what is left.

No torch here. A process may stand in several nested control groups (a container in a pod in a slice); the one with
least left decides. Cached file pages that the kernel drops under pressure do not count as used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from samegrad.errors import EnvironmentProblem

# cgroup v1 writes a number near 2**63 when there is no limit.
_NO_LIMIT_BYTES = 2**60


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory: ``limit_bytes`` for all that shares the limit, ``available_bytes`` that are left of it.

    ``source`` names the limit: "the cgroup's limit" or "MemTotal of the host".
    """

    limit_bytes: int
    available_bytes: int
    source: str

    @property
    def used_bytes(self) -> int:
        return max(0, self.limit_bytes - self.available_bytes)


def read_host_memory(root: Path = Path("/")) -> HostMemory:
    """What the host has for this process; ``root`` is where its ``proc`` and ``sys`` are. Raises EnvironmentProblem."""
    total, available = _meminfo(root, "MemTotal"), _meminfo(root, "MemAvailable")
    found = [HostMemory(total, available, "MemTotal of the host")]
    for limit, used in _control_groups(root):
        if limit < total:
            # A group may be promised more than the machine has left.
            found.append(HostMemory(limit, min(available, max(0, limit - used)), "the cgroup's limit"))
    return min(found, key=lambda memory: (memory.available_bytes, memory.limit_bytes))


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each control group that this process stands in, version 2 and 1."""
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = ("memory.max", "memory.current", "inactive_file")
            tops = [mounts, mounts / "unified"]
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            tops = [mounts / "memory", mounts / controllers]
        else:
            continue
        for top in tops:
            # Inside a container its own group is the top, and the path of the outside is not there.
            for folder in _up_to(top, top / path.lstrip("/")):
                limit, used = (_text(folder / name) for name in files[:2])
                if limit.isdigit() and used.isdigit() and int(limit) < _NO_LIMIT_BYTES:
                    yield int(limit), int(used) - _statistic(folder / "memory.stat", files[2])


def _up_to(top: Path, folder: Path) -> Iterator[Path]:
    while folder != top and top in folder.parents:
        yield folder
        folder = folder.parent
    yield top


def _statistic(file: Path, name: str) -> int:
    for line in _text(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _meminfo(root: Path, field: str) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise EnvironmentProblem(
        asked="how much memory is free",
        found=f"no {field} in /proc/meminfo",
        do="give a budget in bytes, for example budget='6GiB'",
    )


def _text(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""
