"""How much memory this process can still get."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes, or None if this system does not tell.

    On Linux the smallest of what the kernel says is available and of what is left of the limits of the control groups
    (containers) that the process is in; elsewhere the physical memory. `root` is there for tests.
    """
    found = _cgroups_left(root)
    available = _table(root / "proc/meminfo").get("MemAvailable")
    if available is not None:
        found.append(available * 1024)
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # macOS; Windows has no sysconf
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def _cgroups_left(root: Path) -> list[int]:
    """What each control group of this process (version 1 or 2), and each group above it, leaves it."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit, usage, prefix = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, usage, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        # Inside a container the path may be the host's and lead nowhere; then `base` itself is our group.
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if most.isdigit() and used.isdigit():  # "max": no limit
                stat = _table(folder / "memory.stat")
                # Pages of files count as used, but the kernel drops them when memory is asked for.
                reclaimable = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
                found.append(max(0, int(most) - int(used) + reclaimable))
    return found


def _table(path: Path) -> dict[str, int]:
    """Lines such as `MemAvailable:   123 kB` or `inactive_file 123`."""
    rows = (line.replace(":", " ").split() for line in _read(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def _read(path: Path) -> str:
    """The text of a file, empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
