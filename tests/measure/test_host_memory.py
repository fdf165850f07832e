"""Host memory under control groups of both versions, nested ones and none; a planted wrong reading is caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from samegrad.errors import EnvironmentProblem
from samegrad.measure import host_memory
from samegrad.measure.host_memory import HostMemory, read_host_memory

GIB = 2**30


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


def machine(root: Path, *, total: int = 64 * GIB, available: int = 40 * GIB) -> Path:
    return write(root, {"proc/meminfo": f"MemTotal: {total // 1024} kB\nMemAvailable: {available // 1024} kB"})


def test_without_a_group_it_is_the_machines(tmp_path: Path) -> None:
    assert read_host_memory(machine(tmp_path)) == HostMemory(64 * GIB, 40 * GIB, "MemTotal of the host")


def test_version_2_leaves_out_cached_pages(tmp_path: Path) -> None:
    root = machine(tmp_path)
    write(root, {
        "proc/self/cgroup": "0::/pod/box",
        "sys/fs/cgroup/pod/box/memory.max": 8 * GIB,
        "sys/fs/cgroup/pod/box/memory.current": 5 * GIB,
        "sys/fs/cgroup/pod/box/memory.stat": f"anon 1\ninactive_file {2 * GIB}\nactive_file 7",
    })  # fmt: skip
    found = read_host_memory(root)
    assert found == HostMemory(8 * GIB, 5 * GIB, "the cgroup's limit")
    assert found.used_bytes == 3 * GIB


def test_cached_pages_counted_as_used_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_statistic", lambda *_: 0)
    with pytest.raises(AssertionError):
        test_version_2_leaves_out_cached_pages(tmp_path)


def test_the_group_with_least_left_decides(tmp_path: Path) -> None:
    root = machine(tmp_path)
    write(root, {
        "proc/self/cgroup": "0::/pod/box",
        "sys/fs/cgroup/pod/box/memory.max": "max",
        "sys/fs/cgroup/pod/box/memory.current": GIB,
        "sys/fs/cgroup/pod/memory.max": 16 * GIB,
        "sys/fs/cgroup/pod/memory.current": 15 * GIB,
    })  # fmt: skip
    assert read_host_memory(root) == HostMemory(16 * GIB, GIB, "the cgroup's limit")


def test_version_1_and_its_mark_of_no_limit(tmp_path: Path) -> None:
    root = machine(tmp_path)
    write(root, {
        "proc/self/cgroup": "5:devices:/\n4:memory:/box\n0::/",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 50 * GIB,
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": 4 * GIB,
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": 3 * GIB,
        "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}",
    })  # fmt: skip
    assert read_host_memory(root) == HostMemory(4 * GIB, 2 * GIB, "the cgroup's limit")


def test_inside_a_container_the_group_is_the_top(tmp_path: Path) -> None:
    root = machine(tmp_path)
    write(root, {
        "proc/self/cgroup": "0::/../../outside/box",
        "sys/fs/cgroup/memory.max": 6 * GIB,
        "sys/fs/cgroup/memory.current": GIB,
    })  # fmt: skip
    assert read_host_memory(root) == HostMemory(6 * GIB, 5 * GIB, "the cgroup's limit")


def test_a_group_promises_no_more_than_the_machine_has_left(tmp_path: Path) -> None:
    root = machine(tmp_path, available=2 * GIB)
    write(root, {
        "proc/self/cgroup": "0::/box",
        "sys/fs/cgroup/box/memory.max": 32 * GIB,
        "sys/fs/cgroup/box/memory.current": GIB,
    })  # fmt: skip
    assert read_host_memory(root).available_bytes == 2 * GIB


def test_where_nothing_can_be_read_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="MemTotal"):
        read_host_memory(tmp_path)


def test_this_machine_has_some() -> None:
    found = read_host_memory()
    assert 0 < found.available_bytes <= found.limit_bytes
