"""The machine that we run on, as far as Linux tells: cores, memory, load, CPU flags. Every function has an answer elsewhere too."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory_bytes() -> int | None:
    """Memory that can still be used without swapping: MemAvailable, or what a container's limit leaves. None if unknown."""
    meminfo = _lines("/proc/meminfo")
    found = [int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable:")]
    limit, used = (_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        found.append(max(0, limit - used))
    return min(found, default=None)


def total_memory_bytes() -> int | None:
    """Memory of the machine. None if unknown."""
    return next((int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")), None)


def cpu_model() -> str:
    """The processor's name, "unknown" if there is none."""
    return next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown")


def cpu_flags() -> set[str]:
    """Instruction sets that the kernel reports ("avx2", "avx512_vnni"; "asimddp" on Arm)."""
    line = next((line for line in _lines("/proc/cpuinfo") if line.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].split())


def load_average() -> float:
    """Runnable threads over the last minute; 0.0 if unknown."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def peak_rss_bytes() -> int:
    """The most memory this process has had resident."""
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def seconds_since_process_start() -> float | None:
    """Age of this process, to about 10 ms (field 22 of /proc/self/stat counts clock ticks since boot). None if unknown."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
