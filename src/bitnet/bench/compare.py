"""Six schemes of weights on one shape, side by side: the table of the article "Ternary Values in Neural Networks: Beyond Binary".

All are made with random weights and take turns, round after round, so that what else the machine does meets all of them; where they do not
fit into memory together, each is made, measured and dropped alone. Layers are in the scheme that is compared; embedding and head, which
are one matrix where the shape ties them, are f16 beside f16 layers and int8 beside all others, unless asked otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bitnet.bench import speed
from bitnet.bench.speed import ROOFLINE_BYTES, Speed, measure
from bitnet.errors import BitNetError, UsageError
from bitnet.machine import available_memory_bytes, require_memory
from bitnet.shapes import random_engine, shape_bytes

if TYPE_CHECKING:
    from bitnet.engine import Engine

SCHEMES = {"fp16": "f16", "int8": "int8", "int4": "int4", "fp4": "fp4", "binary": "binary", "ternary": "ternary"}  # -> weights
# What the article prints for its 12 layers of width 512, as far as its figures are at hand: (MB, ms per token).
ARTICLE_SHAPE = "article-12x512"
ARTICLE: dict[str, tuple[float | None, float | None]] = {"fp16": (192.0, None), "ternary": (None, 8.4)}


@dataclass(frozen=True)
class Row:
    """One scheme: medians over the rounds."""

    scheme: str  # of SCHEMES
    head: str
    codec: str
    weight_bytes: int  # in memory
    weight_bytes_per_token: int
    ms_per_token: float
    bandwidth_gb_s: float  # of weights, while decoding
    roofline_share: float  # of what plain reading reaches
    prefill_tok_s: float
    article_mb: float | None
    article_ms_per_token: float | None


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they were measured with."""

    shape: str
    isa: str
    threads: int
    rounds: int
    together: bool  # in turns; else one after the other
    prompt_tokens: int
    new_tokens: int
    roofline_gb_s: float
    rows: list[Row]


def parse(names: str) -> list[str]:
    """The schemes that a list with commas names. Raises `UsageError` for an unknown or repeated one."""
    found = [name.strip() for name in names.split(",")]
    for name in found:
        if name not in SCHEMES:
            raise UsageError(f"no scheme is called {name!r}; compare some of {','.join(SCHEMES)}")
    if len(set(found)) < len(found):
        raise UsageError(f"{names!r} names a scheme twice; expected each once")
    return found


def compare(
    shape: str, schemes: list[str], *, head: str | None = None, threads: int | None = None, prompt_tokens: int = 512, new_tokens: int = 64,
    rounds: int = 5, progress: Callable[[int, int], None] | None = None,
) -> Comparison:  # fmt: skip
    """Measures `schemes` (of `SCHEMES`) on `shape`: per round and scheme one prompt from an empty context and `new_tokens` decoded.

    `head`: one for all, else int8, and f16 beside f16. Raises `UsageError` as `measure` does, `BitNetError` for what does not fit.
    """
    if rounds < 1:
        raise UsageError(f"repetitions is {rounds}; expected a whole number >= 1")
    heads = {scheme: head or ("f16" if SCHEMES[scheme] == "f16" else "int8") for scheme in schemes}
    needed = {scheme: shape_bytes(shape, heads[scheme], SCHEMES[scheme]) for scheme in schemes}
    free = available_memory_bytes()
    together = free is None or sum(needed.values()) * 1.05 + ROOFLINE_BYTES < free
    if not together:
        largest = max(schemes, key=lambda scheme: needed[scheme])
        require_memory(f"shape {shape} with layers in {largest}", needed[largest] + ROOFLINE_BYTES)
    done, total = 0, len(schemes) * (rounds + 1)

    def once(engine: Engine) -> Speed:
        nonlocal done
        measured = measure(engine, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repetitions=1)
        done += 1
        if progress:
            progress(done, total)
        return measured

    def in_turns(turn: list[str]) -> list[_Measured]:
        engines = [random_engine(shape, threads=threads, head=heads[scheme], weights=SCHEMES[scheme]) for scheme in turn]
        for engine in engines:
            once(engine)  # not counted: memory is touched for the first time
        limits, speeds = [], []
        for _ in range(rounds):
            limits += speed.read_bandwidths(engines[0].threads)
            speeds.append([once(engine) for engine in engines])
        return [
            _Measured(e.isa, e.threads, e.codec, e.weight_bytes, e.weight_bytes_per_token, list(of_engine), limits)
            for e, of_engine in zip(engines, zip(*speeds, strict=True), strict=True)
        ]

    found = in_turns(schemes) if together else [measured for scheme in schemes for measured in in_turns([scheme])]
    rows = []
    for scheme, m in zip(schemes, found, strict=True):
        ms = 1000 / median(s.decode_tok_s for s in m.speeds)
        rate = m.weight_bytes_per_token / ms / 1e6
        mb, article_ms = ARTICLE.get(scheme, (None, None)) if shape == ARTICLE_SHAPE else (None, None)
        prefill = median(s.prefill_tok_s for s in m.speeds)
        rows.append(
            Row(
                scheme, heads[scheme], m.codec, m.weight_bytes, m.weight_bytes_per_token, ms, rate, rate / median(m.limits), prefill,
                mb, article_ms,
            )
        )  # fmt: skip
    limit = median(rate for m in found for rate in m.limits)
    return Comparison(shape, found[0].isa, found[0].threads, rounds, together, prompt_tokens, new_tokens, limit, rows)


@dataclass(frozen=True)
class _Measured:
    isa: str
    threads: int
    codec: str
    weight_bytes: int
    weight_bytes_per_token: int
    speeds: list[Speed]
    limits: list[float]  # GB/s of plain reading in the same rounds


def lines(c: Comparison) -> list[str]:
    """The table, and what it was measured with."""
    article = any(row.article_mb or row.article_ms_per_token for row in c.rows)
    head = f"{'scheme':<8} {'head':<5} {'MB':>8} {'ms/token':>9} {'tokens/s':>9} {'GB/s':>6} {'of limit':>8} {'prompt tokens/s':>16}"
    if article:
        head += f"  {'article: MB':>12} {'ms/token':>9}"
    found = [head]
    for row in c.rows:
        line = (
            f"{row.scheme:<8} {row.head:<5} {row.weight_bytes / 1e6:>8,.1f} {row.ms_per_token:>9.3f} {1000 / row.ms_per_token:>9,.1f} "
            f"{row.bandwidth_gb_s:>6.1f} {row.roofline_share:>8.0%} {row.prefill_tok_s:>16,.0f}"
        )
        if article:
            line += f"  {_figure(row.article_mb):>12} {_figure(row.article_ms_per_token):>9}"
        found.append(line)
    order = "in turns" if c.together else "one after the other, for together they do not fit into memory"
    tokens = f"prompts of {c.prompt_tokens} tokens, {c.new_tokens} decoded"
    found += [
        "",
        f"{c.shape}: random weights, batch 1, {c.threads} threads, {c.isa}; medians of {c.rounds} rounds, {order}; {tokens}.",
        f"MB: weights in memory, scales included. Limit: {c.roofline_gb_s:.1f} GB/s, what reading 2 GiB alone reaches; caches give more.",
    ]
    if article:
        found.append("article: what it prints for such a model on its own CPU; - where its figure is not at hand.")
    return found


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def draw(c: Comparison, file: Path) -> None:
    """Milliseconds per token as bars, each with the time that reading its bytes from memory takes. Raises `BitNetError`."""
    try:
        import matplotlib
    except ImportError:
        raise BitNetError("--picture needs matplotlib, which is not installed; pip install 'bitnet-ternary[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    names = [row.scheme for row in c.rows]
    bars = axes.bar(names, [row.ms_per_token for row in c.rows], color="#4878a8", width=0.6, label="measured")
    least = [row.weight_bytes_per_token / c.roofline_gb_s / 1e6 for row in c.rows]
    for number, (bar, row, bound) in enumerate(zip(bars, c.rows, least, strict=True)):
        axes.plot(
            [number - 0.38, number + 0.38],
            [bound, bound],
            color="#c04040",
            linewidth=2,
            label="" if number else "reading its bytes from memory",
        )
        text = f"{row.ms_per_token:.3g} ms\n{row.weight_bytes / 1e6:,.0f} MB"
        axes.annotate(
            text, (number, max(bar.get_height(), bound)), xytext=(0, 4), textcoords="offset points", ha="center", va="bottom", fontsize=9
        )
    axes.set_ylabel("ms per token")
    axes.set_ylim(0, max(*least, *(row.ms_per_token for row in c.rows)) * 1.18)
    axes.set_title(f"{c.shape}, {c.threads} threads, {c.isa}; reading alone {c.roofline_gb_s:.1f} GB/s", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    try:
        figure.savefig(beside, dpi=150, format=file.suffix[1:] or "png")
        with beside.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        raise BitNetError(f"{file}: the picture cannot be written ({reason}); choose a .png, .svg or .pdf in a writable folder") from None
    finally:
        pyplot.close(figure)
        with suppress(OSError):
            beside.unlink()
