"""`bitnet doctor`: can this machine and installation run models, is a model sound, and what to do if not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitnet.cli.options import debug_option, hub_options, json_option

if TYPE_CHECKING:
    from bitnet.evaluate.diagnose import Diagnosis
    from bitnet.evaluate.finding import Finding

RELEVANT_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vbmi",
    "avx512_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
)
DISTRIBUTION = "bitnet-ternary"
REINSTALL = f"reinstall: pip install --force-reinstall {DISTRIBUTION}"


@click.command("doctor", short_help="Check this machine, or a model: does it run right, and if not, why.")
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--data", metavar="FILE", help="With MODEL: a text to measure perplexity on as well, such as WikiText-2's test set.")
@click.option("--ternary", is_flag=True, expose_value=False, help="Accepted as by every command: the model is checked as it is stored.")
@hub_options
@json_option
@debug_option
def command(model: str | None, data: str | None, as_json: bool, **hub: str | None) -> None:
    """Check that this machine and installation can run models and, with MODEL, that the model is what it says and runs as it was trained.

    Each line is one finding: ok, warning or FAILED. A model reads a short English text; where that is doubtful, the known mistakes of
    converters are tried one by one. The exit code is 1 if anything FAILED.
    """
    given = [name for name, value in {"data": data, **hub}.items() if value is not None]
    if model is None and given:
        raise click.UsageError(f"--{given[0]} is for a MODEL; name one, or leave it out to check this machine")
    path = opened_path(model, hub)
    if data is not None:
        from bitnet.evaluate.perplexity import read_text

        read_text(Path(data))  # before the long part
    findings = []
    for check in (machine_findings, version_findings, namesake_findings, kernel_findings, tuning_findings, model_findings):
        findings += shown(check)
    broken = failed(findings)
    record: dict[str, Any] = {"ok": not broken, "findings": [asdict(finding) for finding in findings]}
    click.echo(f"broken: {', '.join(broken)}" if broken else "everything works" if model is None else "the machine is sound")
    if path is not None:
        record["model"] = diagnosed(str(model), path, data)
        record["ok"] = not broken and record["model"]["ok"]
    if as_json:
        click.echo(json.dumps(record))
    if not record["ok"]:
        sys.exit(1)


def opened_path(model: str | None, hub: dict[str, str | None]) -> Path | None:
    """Where the model lies, or None for none; a name that is no model is bad usage and no finding."""
    if model is None:
        return None
    from bitnet.source import resolve

    return resolve(model, **hub)


def diagnosed(name: str, path: Path, data: str | None) -> dict[str, Any]:
    """The report on one model, shown as it is found, and its record."""
    from bitnet.cli.progress import DelayedBar
    from bitnet.evaluate.diagnose import Diagnosis
    from bitnet.evaluate.statistics import table

    diagnosis = Diagnosis(path, name)
    click.echo(f"\n{path}")
    findings = []
    for check in (diagnosis.of_file, diagnosis.of_configuration, diagnosis.of_tokenizer):
        findings += shown(check)
    findings += shown(partial(diagnosis.of_weights, DelayedBar))
    if diagnosis.matrices:
        click.echo("\n" + "\n".join(f"  {line}" for line in table(diagnosis.matrices)) + "\n")
    findings += shown(partial(diagnosis.of_text, DelayedBar, data))
    broken = failed(findings)
    verdict, step = diagnosis.verdict(broken)
    click.echo(f"\nverdict: {verdict}\nnext:    {step}")
    return {"ok": not broken, "path": str(path), "verdict": verdict, "next": step, "cause": diagnosis.cause, **numbers(diagnosis, findings)}


def numbers(diagnosis: Diagnosis, findings: list[Finding]) -> dict[str, Any]:
    """What was measured, as a plain record."""
    score = None if diagnosis.score is None else asdict(diagnosis.score)
    return {"findings": [asdict(f) for f in findings], "score": score, "weights": [asdict(matrix) for matrix in diagnosis.matrices]}


def failed(findings: list[Finding]) -> list[str]:
    """What FAILED."""
    return [finding.what for finding in findings if finding.status == "FAILED"]


def shown(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Prints the findings of `check` as they come, and gives them."""
    findings = []
    for finding in guarded(check):
        findings.append(finding)
        click.echo(finding.line())
    return findings


def guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of `check`; what it raises is one more, because a doctor must not die of the disease."""
    from bitnet.errors import BitNetError, UsageError
    from bitnet.evaluate.finding import FAILED, Finding

    called: Any = check.func if isinstance(check, partial) else check
    name = called.__name__.removesuffix("_findings").removeprefix("of_")
    try:
        yield from check()
    except UsageError as error:
        if isinstance(check, partial):  # the user's own --data
            raise
        yield Finding(name, FAILED, str(error))
    except BitNetError as error:
        yield Finding(name, FAILED, str(error))
    except Exception as error:
        yield Finding(name, FAILED, " ".join(f"{type(error).__name__}: {error}".split()), REINSTALL)


def machine_findings() -> Iterator[Finding]:
    """CPU, cores, memory."""
    import platform

    from bitnet import machine
    from bitnet.evaluate.finding import FAILED, OK, Finding

    flags = machine.cpu_flags()
    seen = " ".join(flag for flag in RELEVANT_FLAGS if flag in flags) or "none that this build uses"
    yield Finding("cpu", OK, f"{machine.cpu_model()} ({platform.machine()}): {seen}")
    yield Finding("cores", OK, f"{machine.usable_cores()} usable, a thread on each by default; load average {machine.load_average():.1f}")
    available, total = machine.available_memory_bytes(), machine.total_memory_bytes()
    enough = available is None or available > 256 << 20
    detail = "unknown" if available is None else f"{available / 1e9:.1f} GB available" + (f" of {total / 1e9:.1f} GB" if total else "")
    yield Finding("memory", OK if enough else FAILED, detail, "close other programs: less than 256 MB are left")


def version_findings() -> Iterator[Finding]:
    """Python and the libraries underneath."""
    import platform

    import numpy
    import tokenizers

    from bitnet import __version__
    from bitnet.evaluate.finding import OK, Finding

    found = {"bitnet": __version__, "Python": platform.python_version(), "numpy": numpy.__version__, "tokenizers": tokenizers.__version__}
    yield Finding("versions", OK, ", ".join(f"{name} {version}" for name, version in found.items()))


def namesake_findings() -> Iterator[Finding]:
    """Other installed distributions that bring a module or a command called `bitnet`: whichever was installed last wins."""
    from bitnet.evaluate.finding import OK, WARNING, Finding

    others = namesakes()
    detail = f"{', '.join(others)} also installs a module or command called bitnet" if others else "no other package is called bitnet"
    advice = f"pip uninstall {' '.join(others)}, then {REINSTALL}"
    yield Finding("namesakes", WARNING if others else OK, detail, advice)


def namesakes() -> list[str]:
    """Names of the distributions, ours left out."""
    from importlib.metadata import distributions

    found = set()
    for distribution in distributions():
        name = distribution.metadata["Name"] or "an unnamed package"
        top = (distribution.read_text("top_level.txt") or "").split()
        scripts = {entry.name for entry in distribution.entry_points if entry.group == "console_scripts"}
        files = {path.parts[0] for path in distribution.files or () if path.suffix == ".py" and path.parts}
        if name.lower().replace("_", "-") != DISTRIBUTION and ("bitnet" in {*top, *scripts} or files & {"bitnet", "bitnet.py"}):
            found.add(name)
    return sorted(found)


def kernel_findings() -> Iterator[Finding]:
    """The self-test of every instruction set that was compiled in, and which one runs."""
    from bitnet import _native
    from bitnet.evaluate.finding import FAILED, OK, Finding

    native: Any = _native
    self_test = getattr(native, "self_test", None)
    if self_test is None:
        yield Finding("kernels", FAILED, "the native module has no self-test", f"it is of another version: {REINSTALL}")
        return
    for isa, result in self_test().items():
        advice = "set BITNET_ISA=scalar, and report this machine"
        yield Finding(f"kernel {isa}", FAILED if result.startswith("FAILED") else OK, result, advice)
    choose = getattr(native, "choose_isa", None)
    if choose is not None:
        isa, failed = choose()
        yield Finding("kernel in use", OK if isa else FAILED, isa or "none", "unset BITNET_ISA, or set it to one of the kernels above")
        if failed:
            yield Finding("kernel fallback", FAILED, f"{failed} failed its self-test", f"{isa} runs instead; report this machine")


def tuning_findings() -> Iterator[Finding]:
    """What `bitnet bench --tune` chose on this machine."""
    import warnings

    from bitnet.evaluate.finding import OK, WARNING, Finding
    from bitnet.tuning import saved_choices

    with warnings.catch_warnings(record=True) as told:
        choices = saved_choices()
    for warning in told:
        yield Finding("tuning", WARNING, str(warning.message))
    for model, choice in choices:
        yield Finding("tuning", OK, f"{model}: {choice.text()}")
    if not choices and not told:
        yield Finding(
            "tuning", OK, "none on this machine: models run as stored, a thread on each core (bitnet bench --tune [MODEL] measures)"
        )


def model_findings() -> Iterator[Finding]:
    """One forward of the embedded model."""
    import numpy as np

    from bitnet._native import choose_isa
    from bitnet.engine import chosen_codec
    from bitnet.evaluate.finding import FAILED, OK, Finding
    from bitnet.machine import usable_cores
    from bitnet.source import EMBEDDED_MODEL
    from bitnet.transformer import TernaryTransformer

    codec = chosen_codec("auto", choose_isa()[0])
    model = TernaryTransformer.from_pretrained(EMBEDDED_MODEL, codec=codec, head="stored", threads=usable_cores())  # untuned
    logits = model.logits(model.tokenizer.encode("Once upon a time"))
    finite = bool(np.isfinite(logits).all())
    detail = f"{EMBEDDED_MODEL} loaded in {model.load_s:.2f} s and ran on {model.engine.isa}"
    yield Finding("embedded model", OK if finite else FAILED, detail if finite else f"{detail}, but its logits are not finite", REINSTALL)
