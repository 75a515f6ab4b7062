"""How much memory there is left."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_MEMORY_INFO = Path("/proc/meminfo")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


def available_bytes(info: Path = _MEMORY_INFO, limit: Path = _MEMORY_LIMIT) -> int | None:
    """Memory that can be had without swapping; None where the system does not say.

    Args:
        info: the kernel's file about memory.
        limit: of the container, if it is one.
    """
    found: list[int] = []
    with suppress(OSError, ValueError, IndexError):
        lines = info.read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # "max" is none
        found.append(int(limit.read_text()))
    return min(found, default=None)
