"""How much memory a process may have."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")
"""The control group of this process, as a container sees it."""


def memory_limit() -> int:
    """Bytes of RAM, used and free, that a process may have: the control group's limit, or all of this machine."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        return min(total, int((GROUP / "memory.max").read_text()))
    return total
