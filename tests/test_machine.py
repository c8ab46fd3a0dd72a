"""What the machine says about itself is plausible, and missing files are no errors."""

from __future__ import annotations

import sys
import time

import pytest

from bitnet import machine


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_plausible() -> None:
    available, total = machine.available_memory_bytes(), machine.total_memory_bytes()
    assert machine.usable_cores() >= 1 and machine.load_average() >= 0
    assert available is not None and total is not None and 1 << 20 < available <= total
    assert 1 << 20 < machine.peak_rss_bytes() < total
    assert 0 < time.perf_counter() - machine.program_start() < 86400
    assert machine.cpu_model()


def test_a_board_names_a_processor_that_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {
        "/proc/cpuinfo": ["processor : 0", "Features : fp asimd asimddp"],
        "/proc/device-tree/model": ["Raspberry Pi 5 Model B Rev 1.0\0"],
    }
    monkeypatch.setattr(machine, "_lines", lambda path: lines.get(path, []))
    assert machine.cpu_model() == "Raspberry Pi 5 Model B Rev 1.0" and machine.cpu_flags() == {"fp", "asimd", "asimddp"}


def test_unknown_where_nothing_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.Path
    monkeypatch.setattr(machine, "Path", lambda path: real(f"/no/such/folder{path}"))
    assert machine.available_memory_bytes() is None and machine.total_memory_bytes() is None
    assert machine.cpu_model() == "unknown" and machine.cpu_flags() == set()


def test_what_is_cached_of_files_does_not_fill_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a download of 7 GB in a container of 8."""
    numbers = {"/sys/fs/cgroup/memory.max": 8_000_000_000, "/sys/fs/cgroup/memory.current": 7_950_000_000}
    stat = ["anon 800000000", "file 7000000000", "inactive_file 6000000000", "active_file 1000000000"]
    monkeypatch.setattr(machine, "_number", numbers.get)
    monkeypatch.setattr(machine, "_lines", lambda path: stat if path.endswith("memory.stat") else [])
    assert machine.available_memory_bytes() == 7_050_000_000
