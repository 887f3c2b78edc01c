"""The default memory limit, read from made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncckpt.service.memory import default_memory_limit

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def meminfo(gib: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: {2 * gib * 1024**2} kB\nMemAvailable: {gib * 1024**2} kB\n"}


def group(path: str, limit: str, usage: int, cache: int) -> dict[str, str]:
    return {
        f"{path}/memory.max": limit,
        f"{path}/memory.current": str(usage),
        f"{path}/memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


def group_1(path: str, limit: int, usage: int, cache: int) -> dict[str, str]:
    return {
        f"{path}/memory.limit_in_bytes": str(limit),
        f"{path}/memory.usage_in_bytes": str(usage),
        f"{path}/memory.stat": f"inactive_file 0\ntotal_inactive_file {cache}\n",
    }


@pytest.mark.parametrize(
    ("files", "available"),
    [
        (meminfo(10), 10 * GIB),
        # Version 2: the tightest of all ancestors, file cache not counted as used.
        (
            {
                **meminfo(100),
                "proc/self/cgroup": "0::/pod/job\n",
                **group("sys/fs/cgroup/pod/job", "max", 2 * GIB, 0),
                **group("sys/fs/cgroup/pod", str(8 * GIB), 6 * GIB, 3 * GIB),
            },
            5 * GIB,
        ),
        # The machine may be the tightest.
        (
            {**meminfo(3), "proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", str(8 * GIB), 0, 0)},
            3 * GIB,
        ),
        # Version 1, among other controllers; a huge number means no limit.
        (
            {
                **meminfo(100),
                "proc/self/cgroup": "3:cpu,cpuacct:/a\n2:memory:/a/b\n",
                **group_1("sys/fs/cgroup/memory/a/b", 4 * GIB, 3 * GIB, 1 * GIB),
                **group_1("sys/fs/cgroup/memory/a", 0x7FFFFFFFFFFFF000, 9 * GIB, 0),
            },
            2 * GIB,
        ),
        # More used than allowed leaves nothing, not less than nothing.
        (
            {**meminfo(9), "proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", str(GIB), 2 * GIB, 0)},
            0,
        ),
    ],
)
def test_default_memory_limit(files: dict[str, str], available: int, tmp_path: Path) -> None:
    assert default_memory_limit(write(tmp_path, files)) == int(0.6 * available)


def test_where_nothing_is_known_there_is_no_limit(tmp_path: Path) -> None:
    assert default_memory_limit(tmp_path) > 1000 * GIB


def test_on_this_machine() -> None:
    assert 0 < default_memory_limit() < 100_000 * GIB
