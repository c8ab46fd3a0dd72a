"""`bitnet doctor`: can this machine and installation run models, and what to do if not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click

from bitnet.cli.options import debug_option, json_option

RELEVANT_FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vbmi", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
REINSTALL = "reinstall: pip install --force-reinstall bitnet-ternary"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    ok: bool
    detail: str
    advice: str = ""  # what to do, if not ok


@click.command("doctor", short_help="Check that this machine and installation can run models.")
@json_option
@debug_option
def command(as_json: bool) -> None:
    """Check that this machine and installation can run models. The exit code is 1 if anything is broken."""
    findings = []
    for check in (machine_findings, version_findings, kernel_findings, model_findings):
        for finding in guarded(check):
            findings.append(finding)
            advice = "" if finding.ok or not finding.advice else f"; {finding.advice}"
            click.echo(f"{'ok' if finding.ok else 'FAILED':<7} {finding.what:<16} {finding.detail}{advice}")
    broken = [finding.what for finding in findings if not finding.ok]
    click.echo(f"broken: {', '.join(broken)}" if broken else "everything works")
    if as_json:
        click.echo(json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in findings]}))
    if broken:
        sys.exit(1)


def guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of `check`; what it raises is one more, because a doctor must not die of the disease."""
    from bitnet.errors import BitNetError

    try:
        yield from check()
    except BitNetError as error:
        yield Finding(check.__name__.removesuffix("_findings"), False, str(error))
    except Exception as error:
        name = check.__name__.removesuffix("_findings")
        yield Finding(name, False, " ".join(f"{type(error).__name__}: {error}".split()), REINSTALL)


def machine_findings() -> Iterator[Finding]:
    """CPU, cores, memory."""
    import platform

    from bitnet import machine

    flags = machine.cpu_flags()
    seen = " ".join(flag for flag in RELEVANT_FLAGS if flag in flags) or "none that this build uses"
    yield Finding("cpu", True, f"{machine.cpu_model()} ({platform.machine()}): {seen}")
    yield Finding("cores", True, f"{machine.usable_cores()} usable, load average {machine.load_average():.1f}")
    available, total = machine.available_memory_bytes(), machine.total_memory_bytes()
    enough = available is None or available > 256 << 20
    detail = "unknown" if available is None else f"{available / 1e9:.1f} GB available" + (f" of {total / 1e9:.1f} GB" if total else "")
    yield Finding("memory", enough, detail, "close other programs: less than 256 MB are left")


def version_findings() -> Iterator[Finding]:
    """Python and the libraries underneath."""
    import platform

    import numpy
    import tokenizers

    from bitnet import __version__

    found = {"bitnet": __version__, "Python": platform.python_version(), "numpy": numpy.__version__, "tokenizers": tokenizers.__version__}
    yield Finding("versions", True, ", ".join(f"{name} {version}" for name, version in found.items()))


def kernel_findings() -> Iterator[Finding]:
    """The self-test of every instruction set that was compiled in, and which one runs."""
    from bitnet import _native

    native: Any = _native
    self_test = getattr(native, "self_test", None)
    if self_test is None:
        yield Finding("kernels", False, "the native module has no self-test", f"it is of another version: {REINSTALL}")
        return
    for isa, result in self_test().items():
        advice = "set BITNET_ISA=scalar, and report this machine"
        yield Finding(f"kernel {isa}", not result.startswith("FAILED"), result, advice)
    choose = getattr(native, "choose_isa", None)
    if choose is not None:
        isa, failed = choose()
        yield Finding("kernel in use", bool(isa), isa or "none", "unset BITNET_ISA, or set it to one of the kernels above")
        if failed:
            yield Finding("kernel fallback", False, f"{failed} failed its self-test", f"{isa} runs instead; report this machine")


def model_findings() -> Iterator[Finding]:
    """One forward of the embedded model."""
    import numpy as np

    from bitnet.transformer import EMBEDDED_MODEL, TernaryTransformer

    model = TernaryTransformer.from_pretrained(EMBEDDED_MODEL)
    logits = model.logits(model.tokenizer.encode("Once upon a time"))
    finite = bool(np.isfinite(logits).all())
    detail = f"{EMBEDDED_MODEL} loaded in {model.load_s:.2f} s and ran on {model.engine.isa}"
    yield Finding("embedded model", finite, detail if finite else f"{detail}, but its logits are not finite", REINSTALL)
