"""How much memory there is, and how people write it."""

import ctypes
import functools
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import jax

from jprune.errors import JpruneError
from jprune.runs.stopwatch import peak_memory_bytes

SHARE = 0.75
"""Of the free memory that a run may take unless told otherwise."""
GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Limits of the control group that this process runs in, version 2 and version 1, and what is used of them."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse(text: str) -> int:
    """Bytes, from words such as 6GB, 512MiB or 2e9.

    Raises:
      JpruneError: no size.
    """
    found = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    try:
        size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise JpruneError(f"{text!r} is not an amount of memory; expected something like 6GB or 512MiB")
    return size


def default_limit() -> int:
    """Bytes that a run may take unless told otherwise: what the process has, and three quarters of what is free."""
    return resident() + int(SHARE * free())


def free() -> int:
    """Bytes that this process could still get: of the machine, or of the container or job that it runs in."""
    candidates = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        candidates.append(int(lines["MemAvailable"].split()[0]) * 1024)
    else:  # macOS does not say what is free; half of all is a careful guess
        candidates.append(_total() // 2)
    for limit, used in GROUPS:
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            candidates.append(int(most) - int(used.read_text()) + _file_cache(used.parent))
    return max(min(candidates), 0)


def _file_cache(group: Path) -> int:
    """Bytes of a control group that hold files, which the system gives back when they are needed."""
    lines = (group / "memory.stat").read_text().split("\n") if (group / "memory.stat").exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _total() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def trim() -> None:
    """Returns freed memory to the system, where the C library keeps it for itself (glibc: arrays below 32 MiB)."""
    if (function := _malloc_trim()) is not None:
        function(0)


@functools.cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def resident() -> int:
    """Bytes of host memory that this process has now."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else peak_memory_bytes()


def device_limit() -> int | None:
    """Bytes that the accelerator lets us take; None on CPU, whose memory is the host's."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return None if jax.default_backend() == "cpu" else statistics.get("bytes_limit")
