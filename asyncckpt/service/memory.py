"""How much memory images may take: what the machine and every enclosing control group leave. No torch."""

from __future__ import annotations

import contextlib
from pathlib import Path

_SHARE = 0.6
_UNLIMITED = 1 << 60  # version 1 writes a huge number for "no limit"


def default_memory_limit(root: Path = Path("/")) -> int:
    """0.6 of the bytes available now. `root` is where /proc and /sys are."""
    available = [_machine_available(root), *_groups_available(root)]
    known = [num_bytes for num_bytes in available if num_bytes is not None]
    return int(_SHARE * min(known)) if known else _UNLIMITED


def _machine_available(root: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _groups_available(root: Path) -> list[int | None]:
    """What each control group over this process leaves: the least counts, since a parent may be the tightest."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    available: list[int | None] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            mount = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = mount / path.lstrip("/")
        while group == mount or mount in group.parents:
            available.append(_group_available(group, *names))
            group = group.parent
    return available


def _group_available(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Limit − (usage − file cache that the kernel would drop)."""
    try:
        limit = int((group / limit_name).read_text())
        usage = int((group / usage_name).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return None if limit >= _UNLIMITED else max(0, limit - usage + int(statistics.get(cache_name, 0)))
    except (OSError, ValueError):  # "max", or no such controller at this level
        return None
