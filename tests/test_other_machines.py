"""Machines that are not this one: older CPUs in an emulator, a system that forbids what the CPU claims, kernels that fail their self-test.

The same story everywhere, or one line. That a kernel that lies fails its self-test is shown in native/native_tests.cpp.
"""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import smoke
from click.testing import Result

from bitnet import _native

QEMU = shutil.which("qemu-x86_64")
X86_LINUX = sys.platform == "linux" and platform.machine() == "x86_64"
on_older_x86 = pytest.mark.skipif(not (X86_LINUX and QEMU), reason="no qemu-x86_64 for this Python (apt install qemu-user)")


def emulated(cpu: str) -> list[str]:
    return [str(QEMU), "-cpu", cpu, sys.executable, "-m", "bitnet"]


@on_older_x86
@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "scalar"), ("IvyBridge", "scalar"), ("Haswell", "avx2")])
def test_an_older_cpu_tells_the_same_story(cpu: str, isa: str, process_environment: dict[str, str]) -> None:
    assert smoke.told(*emulated(cpu), "run", env=process_environment)["isa"] == isa


@on_older_x86
def test_doctor_on_an_older_cpu(process_environment: dict[str, str]) -> None:
    found = {
        f["what"]: f["detail"] for f in smoke.record([*emulated("IvyBridge"), "doctor", "--json"], env=process_environment)["findings"]
    }
    assert found["kernel in use"] == "scalar" and found["kernel scalar"] == "ok"
    assert {found[f"kernel {isa}"] for isa in ("amx", "avx512vbmi", "avx512vnni", "avx2")} == {"not supported by this CPU"}


@on_older_x86
@pytest.mark.parametrize("cpu", ["core2duo", "qemu64"])
@pytest.mark.parametrize(
    "door", [["-m", "bitnet", "run", "-p", "Once"], ["-c", "from bitnet.cli.article import main; main()", "-p", "Once"]]
)
def test_a_cpu_that_numpy_does_not_run_on(cpu: str, door: list[str], process_environment: dict[str, str]) -> None:
    """numpy's wheels from 2.4 on end Python with an illegal instruction there; older ones run, and then so do we."""
    done = subprocess.run(
        [str(QEMU), "-cpu", cpu, sys.executable, *door, "-n", "2"], capture_output=True, text=True, env=process_environment
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("qemu")]
    if tuple(map(int, np.__version__.split(".")[:2])) < (2, 4):
        assert done.returncode == 0, said
    else:
        advice = "install one that does: pip install 'numpy<2.4'"
        assert done.returncode == 1 and len(said) == 1
        assert said[0].startswith(f"error: numpy {np.__version__} does not run on this CPU, which has no ") and said[0].endswith(advice)


# seccomp: BPF instructions (code, jump if true, jump if false, k), and the word of struct seccomp_data that is loaded
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16
X86_64, ARCH_PRCTL, REQUEST_PERMISSION = 0xC000003E, 158, 0x1023
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM


def forbid_tiles() -> None:
    """From here on the system refuses this process, and those it starts, the registers of AMX."""

    class Instruction(ctypes.Structure):
        _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction)))

    tests = [(ARCHITECTURE, X86_64), (NUMBER, ARCH_PRCTL), (ARGUMENT, REQUEST_PERMISSION)]
    code = [step for i, (word, value) in enumerate(tests) for step in ((LOAD, 0, 0, word), (EQUAL, 0, 2 * (len(tests) - i) - 1, value))]
    code += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    program = Program(len(code), (Instruction * len(code))(*(Instruction(*step) for step in code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    no_new_privileges, seccomp, filtered = 38, 22, 2
    if prctl(no_new_privileges, 1, 0, 0, 0) or prctl(seccomp, filtered, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


@pytest.mark.skipif(_native.self_test().get("amx") != "ok", reason="no AMX here that could be forbidden")
def test_amx_that_the_system_forbids(process_environment: dict[str, str]) -> None:
    bitnet = [sys.executable, "-m", "bitnet", "run"]
    environment = {k: v for k, v in process_environment.items() if k != "BITNET_ISA"}
    assert smoke.told(*bitnet, env=environment)["isa"] == "amx"
    assert smoke.told(*bitnet, env=environment, preexec_fn=forbid_tiles)["isa"] == "avx512vbmi"


def test_kernels_that_fail_their_self_test_are_named(bitnet: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "choose_isa", lambda: ("scalar", "avx2"))
    done = bitnet("run", "-p", smoke.PROMPT, "-n", len(smoke.STORY), "--temperature", 0, "--json")
    record = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 0 and record["isa"] == "scalar" and record["token_ids"] == smoke.STORY
    assert "warning: the avx2 kernels failed their self-test on this CPU; running scalar instead\n" in done.stderr
    done = bitnet("doctor")
    assert done.exit_code == 1
    assert "FAILED  kernel fallback  avx2 failed its self-test; scalar runs instead; report this machine\n" in done.stdout


def test_kernels_that_are_asked_for_and_fail(bitnet: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "choose_isa", lambda: ("", "avx2"))
    monkeypatch.setenv("BITNET_ISA", "avx2")
    done = bitnet("run", "-p", smoke.PROMPT)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: BITNET_ISA=avx2 cannot run here, where it failed its self-test; there are ")
    there = [name for name, found in _native.self_test().items() if found == "ok"]
    assert f"; there are {', '.join(there)} (see" in done.stderr
