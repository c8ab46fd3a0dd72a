"""The machine that we run on, as far as Linux tells: cores, memory, load, CPU flags. Every function has an answer elsewhere too."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from bitnet.errors import BitNetError


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory_bytes() -> int | None:
    """Memory that can still be used without swapping: MemAvailable, or what a container's limit leaves. None if unknown."""
    meminfo = _lines("/proc/meminfo")
    found = [int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable:")]
    limit, used = (_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        files = [
            int(line.split()[1]) for line in _lines("/sys/fs/cgroup/memory.stat") if line.startswith(("inactive_file ", "active_file "))
        ]
        found.append(max(0, limit - used + sum(files)))  # what is cached of files is given up first
    return min(found, default=None)


def require_memory(what: str, needed_bytes: int) -> None:
    """Raises `BitNetError`, with the numbers, if `needed_bytes` exceed the memory that is available."""
    available = available_memory_bytes()
    if available is not None and needed_bytes > available:
        raise BitNetError(
            f"{what} needs {needed_bytes / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available; choose less, or free some"
        )


def total_memory_bytes() -> int | None:
    """Memory of the machine. None if unknown."""
    return next((int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")), None)


def cpu_model() -> str:
    """The processor's name; that of the board where, as on Arm, the processor has none; else "unknown"."""
    named = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return next((name for name in (*named, *(line.strip("\0 ") for line in _lines("/proc/device-tree/model"))) if name), "unknown")


def cpu_flags() -> set[str]:
    """Instruction sets that the kernel reports ("avx2", "avx512_vnni"; "asimddp" on Arm)."""
    line = next((line for line in _lines("/proc/cpuinfo") if line.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].split())


def require_numpy() -> None:
    """Raises `BitNetError` where importing numpy would end Python with an illegal instruction, which no `except` sees.

    numpy's wheels from 2.4 on need what CPUs have since about 2009 (x86-64-v2). Where something of it is missing, a child tries first.
    """
    if "numpy" in sys.modules or not hasattr(os, "fork"):
        return
    try:
        from bitnet._native import missing_instructions
    except ImportError:
        return  # `bitnet doctor` says what is wrong with it
    missing = missing_instructions()
    if not missing:
        return
    child = os.fork()
    if child == 0:
        try:
            import numpy  # noqa: F401
        finally:
            os._exit(0)  # whatever it raises, the parent will meet
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        from importlib.metadata import version

        found = f"numpy {version('numpy')} does not run on this CPU, which has no {', '.join(missing)}"
        raise BitNetError(f"{found}; install one that does: pip install 'numpy<2.4'")


def load_average() -> float:
    """Runnable threads over the last minute; 0.0 if unknown."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return 0.0


def peak_rss_bytes() -> int | None:
    """The most memory this process has had resident. None if unknown."""
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def program_start() -> float:
    """When this program began, as `time.perf_counter()` counts; to be asked at its entry.

    Now, less the processor time used so far: the interpreter's start. The kernel's start time of the process would be wrong for a
    program that a shell became (`make && program`): it includes all that the shell ran before.
    """
    return time.perf_counter() - time.process_time()


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
