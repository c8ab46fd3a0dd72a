"""bitnet and llama.cpp on the same shapes, in turns, in one run.

    pip install '.[train,test]' llama-cpp-python      # matplotlib and gguf come with the extras
    python benchmarks/compare.py --quick
    python benchmarks/compare.py --shapes article-12x512,bitnet-2b-4t --types TQ2_0,TQ1_0,Q4_0,Q8_0 --ours b3:int8,t2:int8 --update-docs

Both run random weights of a shape of `bitnet.shapes`: bitnet makes them in memory, llama.cpp reads a GGUF file that random_gguf.py writes
once. A round is one turn of each, one after the other and never at the same time; what waits uses no processor. A turn is one token that
is not timed, a prompt from an empty context, then single tokens from an empty context, as `llama-bench` measures pp and tg. Token ids are
random and the same for all; nothing is sampled. The bandwidth of plain reading, which limits decoding, is measured in the same run.

Writes OUT/compare-DATE.json (every round's raw number), two pictures beside it, and a report in markdown to standard output, which
comparison_report.py makes again from the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import comparison_report as report
import numpy as np
import random_gguf

import bitnet
from bitnet import machine
from bitnet.bench.speed import ROOFLINE_BYTES, read_bandwidths
from bitnet.engine import CODECS, Engine
from bitnet.errors import BitNetError
from bitnet.generation import PREFILL_CHUNK
from bitnet.shapes import HEADS, SHAPES, random_engine, shape_bytes

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("peer_llama_cpp.py")
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512vbmi", "amx_int8", "asimddp", "i8mm", "sve")  # those that kernels use
REST_S = 0.5  # between turns: threads that spin before they sleep do sleep by then
TRIES = 4  # where other programs disturb; the last one counts
DISTURBED_CORES = 0.1
CLOCK_TICKS_S = 0.02  # what two cores that count in hundredths may be off by
TOKENS_SEED = 0

Turn = dict[str, Any]  # prefill_s, decode_s, cpu_s: processor time of all threads


class Bitnet:
    """Our side: an engine in this process."""

    def __init__(self, shape: str, codec: str, head: str, threads: int) -> None:
        machine.require_memory(f"{shape} with head {head}", shape_bytes(shape, head))
        self.engine: Engine = random_engine(shape, threads=threads, head=head, codec=codec)
        self.sequence = self.engine.sequence()
        self.result = {
            "shape": shape, "engine": report.BITNET, "weights": self.engine.codec, "head": head,
            "weight_bytes_per_token": self.engine.weight_bytes_per_token,
        }  # fmt: skip

    def measure(self, prompt: list[int], tokens: list[int]) -> Turn:
        before = time.process_time()
        self.decode(tokens[:1], 1)
        turn = {"prefill_s": self.decode(prompt, PREFILL_CHUNK), "decode_s": self.decode(tokens, 1)}
        return turn | {"cpu_s": time.process_time() - before}

    def decode(self, ids: list[int], step: int) -> float:
        """Seconds for the ids from an empty context, `step` at a time."""
        parts = [np.asarray(ids[at : at + step], np.int32) for at in range(0, len(ids), step)]
        self.sequence.truncate(0)
        start = time.perf_counter()
        for part in parts:
            self.engine.forward([(self.sequence, part)])
        return time.perf_counter() - start

    def close(self) -> None:
        del self.sequence, self.engine


class LlamaCpp:
    """The peer's side: peer_llama_cpp.py in a process of its own, which may crash without taking the run with it."""

    def __init__(self, shape: str, kind: str, threads: int, context: int, python: str, models: Path) -> None:
        s = SHAPES[shape]
        path = random_gguf.make(models, shape, s, kind)
        machine.require_memory(f"{shape} in {kind}", path.stat().st_size)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self.process = subprocess.Popen(
            [python, str(WORKER), str(path), str(threads), str(context)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
        )
        try:
            self.about = self.answer()
        except BitNetError:
            self.close()
            raise
        self.result = {
            "shape": shape, "engine": report.PEER, "weights": kind, "head": random_gguf.HEADS[kind],
            "weight_bytes_per_token": random_gguf.bytes_per_token(s, kind),
        }  # fmt: skip

    def measure(self, prompt: list[int], tokens: list[int]) -> Turn:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and answer() says how
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return dict(json.loads(line))
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        ended = f"crashed (signal {-code})" if code < 0 else f"ended with exit code {code}"
        raise BitNetError(f"llama.cpp {ended}; its last line: {said[-1] if said else 'none'}")

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def main() -> None:
    args = arguments()
    record: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"), "command": command(args), "machine": about_machine(),
        "protocol": {name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "threads", "repetitions")},
        "bitnet": {"version": bitnet.__version__, "commit": commit(), "isa": None}, "llama_cpp": {"note": args.peer_note},
        "read_gb_s": [], "results": [], "failed": [],
    }  # fmt: skip
    if record["machine"]["load_average"] > max(0.7, 0.1 * machine.usable_cores()):
        say(f"load average {record['machine']['load_average']:.1f}: something else runs, and it slows this")
    for shape in args.shapes:
        record["read_gb_s"].append(reading(args.threads))
        compare(shape, args, record)
    record["read_gb_s"].append(reading(args.threads))
    if not record["results"]:
        sys.exit(f"nothing was measured: {record['failed'][0]['reason']}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"compare-{record['date'][:10]}.json"
    path.write_text(json.dumps(report.summarize(record), indent=1) + "\n")
    report.publish(path, args.update_docs)


def compare(shape: str, args: argparse.Namespace, record: dict[str, Any]) -> None:
    """All of one shape, loaded side by side and measured in turns; what fails is noted and left out."""
    makers: list[tuple[str, str, Callable[[], Any]]] = [
        *((report.BITNET, what, lambda what=what: Bitnet(shape, *what.split(":"), args.threads)) for what in args.ours),
        *((report.PEER, kind, lambda kind=kind: peer(shape, kind, args)) for kind in args.types),
    ]  # fmt: skip
    rng = np.random.default_rng(TOKENS_SEED)
    prompt, tokens = (rng.integers(SHAPES[shape].vocab, size=n).tolist() for n in (args.prompt_tokens, args.new_tokens))
    running: dict[tuple[str, str], Any] = {}
    turns: dict[tuple[str, str], list[Turn]] = {}

    def attempt(key: tuple[str, str], step: Callable[[], Any]) -> Any:
        try:
            return step()
        except BitNetError as e:
            say(f"{shape}, {' '.join(key)}: {e}")
            record["failed"].append({"shape": shape, "engine": key[0], "what": key[1], "reason": str(e)})
            if key in running:
                running.pop(key).close()
            return None

    for engine, what, make in makers:
        key = (engine, what)
        side = attempt(key, make)
        if side is not None:
            running[key], turns[key] = side, []
            attempt(key, lambda side=side: side.measure(prompt, tokens[:4]))  # warms up
    for done in range(args.repetitions):
        for key, side in list(running.items()):
            turn = attempt(key, lambda side=side: undisturbed(lambda: side.measure(prompt, tokens)))
            if turn is not None:
                turns[key].append(turn)
                rates = f"{len(prompt) / turn['prefill_s']:,.1f} and {len(tokens) / turn['decode_s']:,.1f} tokens/s"
                say(f"{shape}, round {done + 1} of {args.repetitions}, {' '.join(key)}: {rates}")
    for key, side in running.items():
        raw = {
            "prefill_tok_s": [len(prompt) / turn["prefill_s"] for turn in turns[key]],
            "decode_tok_s": [len(tokens) / turn["decode_s"] for turn in turns[key]],
            "other_programs_cores": [turn["others"] for turn in turns[key]],
        }
        record["results"].append(side.result | raw)
        if key[0] == report.BITNET:
            record["bitnet"]["isa"] = side.engine.isa
        else:
            record["llama_cpp"] |= {name: value for name, value in side.about.items() if name != "load_s"}
        side.close()


def undisturbed(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the step measured, again if other programs disturbed it: that is told by the processor time they took, not by the result."""
    for _ in range(TRIES):
        time.sleep(REST_S)
        busy, start = busy_s(), time.perf_counter()
        result = step()
        others_s = busy_s() - busy - result["cpu_s"] - CLOCK_TICKS_S
        result["others"] = round(max(0.0, others_s / (time.perf_counter() - start)), 2)
        if result["others"] < DISTURBED_CORES:
            break
        say(f"other programs used {result['others']:.1f} cores")
    return result


def peer(shape: str, kind: str, args: argparse.Namespace) -> LlamaCpp:
    return LlamaCpp(shape, kind, args.threads, max(args.prompt_tokens, args.new_tokens), args.peer_python, args.models)


def reading(threads: int) -> float:
    machine.require_memory("memory to measure the bandwidth", ROOFLINE_BYTES)

    def step() -> dict[str, Any]:
        before = time.process_time()
        return {"gb_s": median(read_bandwidths(threads)), "cpu_s": time.process_time() - before}

    gb_s = float(undisturbed(step)["gb_s"])
    say(f"reading alone: {gb_s:.1f} GB/s")
    return gb_s


def busy_s() -> float:
    """Processor time of all programs since the machine started; 0 where the system does not tell."""
    try:
        user, nice, system, _, _, irq, softirq = (int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:8])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def about_machine() -> dict[str, Any]:
    import platform

    flags = machine.cpu_flags()
    return {
        "cpu": machine.cpu_model(), "flags": [flag for flag in FLAGS if flag in flags], "cores": machine.usable_cores(),
        "memory_gb": (machine.total_memory_bytes() or 0) / 1e9, "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": machine.load_average(),
    }  # fmt: skip


def commit() -> str:
    """Of this repository, with "-dirty" if a tracked file differs; "unknown" outside one."""
    try:
        said = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def command(args: argparse.Namespace) -> str:
    """What to type for the same run, without the paths of this machine."""
    parts = ["python benchmarks/compare.py"]
    parts += [f"--{name} {','.join(getattr(args, name))}" for name in ("shapes", "types", "ours")]
    parts += [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in ("repetitions", "threads", "prompt_tokens", "new_tokens")]
    return " ".join(parts)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise ValueError
        return value

    p = argparse.ArgumentParser(description="bitnet and llama.cpp on the same shapes, in turns, in one run.")
    p.add_argument("--shapes", type=names, default="article-12x512,bitnet-2b-4t", help=f"of {', '.join(SHAPES)} (default: %(default)s)")
    p.add_argument("--types", type=names, default="TQ2_0,TQ1_0,Q4_0,Q8_0", help="llama.cpp's weights (default: %(default)s)")
    p.add_argument(
        "--ours", type=names, default="b3:int8,b3:int4,t2:int8", help="bitnet's codec:head, the first for ratios (default: %(default)s)"
    )
    p.add_argument("--repetitions", type=positive, default=5, help="rounds (default: %(default)s)")
    p.add_argument("--threads", type=positive, default=machine.usable_cores(), help="of both (default: %(default)s)")
    p.add_argument("--prompt-tokens", type=positive, default=512, help="default: %(default)s")
    p.add_argument("--new-tokens", type=positive, default=64, help="default: %(default)s")
    p.add_argument("--peer-python", default=sys.executable, help="a Python that has llama_cpp (default: this one)")
    p.add_argument("--peer-note", default="", help="how llama.cpp was built, for the record: its library does not say")
    p.add_argument("--models", type=Path, default=ROOT / "build" / "compare", help="where GGUF files are kept (default: build/compare)")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="where results go (default: benchmarks)")
    p.add_argument("--update-docs", action="store_true", help="put the report into docs/performance.md")
    p.add_argument("--quick", action="store_true", help="article-12x512, TQ2_0, two rounds of 64 and 16 tokens, results to build/compare")
    args = p.parse_args()
    if args.quick:
        args.shapes, args.types, args.repetitions, args.prompt_tokens, args.new_tokens = ["article-12x512"], ["TQ2_0"], 2, 64, 16
        args.out = args.models
    ours = [f"{codec}:{head}" for codec in CODECS for head in HEADS]
    for kind, wanted, known in (("shape", args.shapes, SHAPES), ("type", args.types, random_gguf.HEADS), ("codec:head", args.ours, ours)):
        for name in wanted:
            if name not in known:
                p.error(f"no {kind} is called {name!r}; there are {', '.join(known)}")
    longest = min((SHAPES[shape].context for shape in args.shapes), default=0)
    if max(args.prompt_tokens, args.new_tokens) > longest:
        p.error(f"prompts and new tokens are at most {longest}, the shape's context")
    return args


if __name__ == "__main__":
    main()
