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
