"""What compare.py measured, in words: medians, ratios, a table per shape, where the peer is faster, and two pictures.

    python benchmarks/comparison_report.py benchmarks/compare-DATE.json --update-docs     # again, without measuring

A ratio is the median over the rounds of bitnet's rate over llama.cpp's in the same round, so that what slows the machine for a while
slows both. Bytes per token over the read bandwidth is the shortest time a token can take; the share of that limit is
tokens/s x bytes per token / bandwidth. Keys and values are read as well and not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BITNET, PEER = "bitnet", "llama.cpp"
CODECS = {"t2": "two-bit", "b3": "base-3"}  # of bitnet.engine, in words
RATES = ("prefill_tok_s", "decode_tok_s")
BEGIN, END = "<!-- compare -->", "<!-- /compare -->"
COLORS = {BITNET: "#c2410c", PEER: "#475569"}
MARKERS = "osD^vP"


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """The record with what follows from its raw numbers: medians, GB/s, share of the limit, ratios of all pairs of a shape."""
    read = median(record["read_gb_s"])
    results = []
    for r in record["results"]:
        decode = median(r["decode_tok_s"])
        gb_s = decode * r["weight_bytes_per_token"] / 1e9
        medians = {"prefill": median(r["prefill_tok_s"]), "decode": decode}
        results.append(r | {"medians": medians, "weights_gb_s": gb_s, "share_of_limit": gb_s / read})
    pairs = [
        {
            "shape": ours["shape"],
            "bitnet": label(ours),
            "llama_cpp": theirs["weights"],
            "prefill": ratio(ours["prefill_tok_s"], theirs["prefill_tok_s"]),
            "decode": ratio(ours["decode_tok_s"], theirs["decode_tok_s"]),
        }
        for ours in results
        for theirs in results
        if ours["engine"] == BITNET and theirs["engine"] == PEER and ours["shape"] == theirs["shape"]
    ]
    return record | {"read_gb_s_median": read, "results": results, "ratios": pairs}


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios of each round."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def spread(results: list[dict[str, Any]], rate: str) -> float:
    """The largest distance of any round from its median, as a share."""
    return max(abs(value / median(r[rate]) - 1) for r in results for value in r[rate])


def label(r: dict[str, Any]) -> str:
    return f"{r['engine']} {CODECS.get(r['weights'], r['weights'])}, head {r['head']}"


def rate(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def table(summary: dict[str, Any], shape: str) -> str:
    """One shape, markdown. Ratios are of bitnet's first row over the llama.cpp row they stand in."""
    results = [r for r in summary["results"] if r["shape"] == shape]
    first = next((label(r) for r in results if r["engine"] == BITNET), None)
    ratios = {p["llama_cpp"]: p for p in summary["ratios"] if p["shape"] == shape and p["bitnet"] == first}
    head = (
        shape,
        "MB a token",
        "prompt tokens/s",
        "decode tokens/s",
        "GB/s",
        "share of the limit",
        "bitnet's prompt",
        "bitnet's decode",
    )
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in results:
        pair = ratios.get(r["weights"]) if r["engine"] == PEER else None
        times = [f"{pair[what]:.2f} x" for what in ("prefill", "decode")] if pair else ["", ""]
        cells = [
            label(r), f"{r['weight_bytes_per_token'] / 1e6:,.1f}", rate(r["medians"]["prefill"]), rate(r["medians"]["decode"]),
            f"{r['weights_gb_s']:.1f}", f"{r['share_of_limit']:.0%}", *times,
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def losses(summary: dict[str, Any]) -> str:
    """Every pair in which llama.cpp is the faster one, in a sentence."""
    if not summary["ratios"]:
        return "Nothing was measured side by side."
    words = {"prefill": "prompts", "decode": "decoding"}
    found = [
        f"{words[what]} of {p['shape']}, {p['llama_cpp']} against {p['bitnet']}: {1 / p[what]:.2f} x"
        for p in summary["ratios"]
        for what in ("prefill", "decode")
        if p[what] < 1
    ]
    return "llama.cpp is faster at " + "; ".join(found) + "." if found else "llama.cpp is faster in none of these rows."


def conditions(summary: dict[str, Any]) -> str:
    """Where, when, what and how."""
    m, p, theirs = summary["machine"], summary["protocol"], summary["llama_cpp"]
    said = ", ".join(f"{name} {theirs[name]}" for name in ("llama_cpp", "ggml", "commit") if theirs.get(name))
    parts = [
        f"{summary['date']}, {m['cpu']} ({', '.join(m['flags'])}), {m['cores']} cores, {m['memory_gb']:.0f} GB, {m['system']}, "
        f"load average {m['load_average']:.1f} before",
        f"bitnet {summary['bitnet']['version']} at commit {summary['bitnet']['commit']}, kernels: {summary['bitnet']['isa']}",
    ]
    if theirs.get("llama_cpp_python"):
        note = f"; {theirs['note']}" if theirs.get("note") else ""
        parts.append(f"llama-cpp-python {theirs['llama_cpp_python']} (its library says {said}{note}): `{theirs['system_info']}`")
    others = max(cores for r in summary["results"] for cores in r["other_programs_cores"])
    farthest = [f"{spread(summary['results'], name):.0%}" for name in RATES]
    parts += [
        f"`{summary['command']}`",
        f"a prompt of {p['prompt_tokens']} tokens, and {p['new_tokens']} tokens decoded from an empty context; {p['threads']} threads; "
        f"medians of {p['repetitions']} rounds, of which the farthest is {farthest[0]} (prompts) and {farthest[1]} (decoding) away; "
        f"other programs used at most {others:.1f} cores during a turn",
        f"reading alone: {summary['read_gb_s_median']:.1f} GB/s, the median of {', '.join(f'{x:.1f}' for x in summary['read_gb_s'])}",
    ]
    return "\n".join(f"- {part}" for part in parts)


def markdown(summary: dict[str, Any], pictures: list[str]) -> str:
    shapes = list(dict.fromkeys(r["shape"] for r in summary["results"]))
    failed = [f"- {f['shape']}, {f['engine']} {f['what']}: {f['reason']}" for f in summary["failed"]]
    parts = [conditions(summary), *(table(summary, shape) for shape in shapes), losses(summary)]
    if failed:
        parts.append("Not measured:\n\n" + "\n".join(failed))
    return "\n\n".join([*parts, *(f"![decoding, as in the tables]({picture})" for picture in pictures)])


def update(document: Path, text: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Puts the text between the markers of a document."""
    before, begin, rest = document.read_text().partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(f"{document}: expected the markers {markers[0]} and {markers[1]}")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def draw(summary: dict[str, Any], stem: Path) -> list[Path]:
    """STEM-roofline.png and STEM-share.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    results, read = summary["results"], summary["read_gb_s_median"]
    shapes = list(dict.fromkeys(r["shape"] for r in results))

    figure, axes = plt.subplots(figsize=(8, 5.5), dpi=130, layout="constrained")
    megabytes = [r["weight_bytes_per_token"] / 1e6 for r in results]
    line = [min(megabytes) / 1.6, max(megabytes) * 1.6]
    axes.plot(line, [read * 1e3 / x for x in line], color="black", linewidth=1, label=f"limit: {read:.1f} GB/s, reading alone")
    for marker, shape in zip(MARKERS, shapes, strict=False):
        for engine, color in COLORS.items():
            here = [r for r in results if r["shape"] == shape and r["engine"] == engine]
            points = [(r["weight_bytes_per_token"] / 1e6, r["medians"]["decode"]) for r in here]
            if not here:
                continue
            axes.scatter(*zip(*points, strict=True), color=color, marker=marker, s=42, zorder=3, label=f"{engine}, {shape}")
            # bitnet's points lie close together: its labels go above them, the fastest highest
            by_speed = sorted(range(len(points)), key=lambda i: points[i][1])
            for i, (r, point) in enumerate(zip(here, points, strict=True)):
                name, at, align = r["weights"], (-8, -3), "right"
                if engine == BITNET:
                    name, at, align = f"{CODECS.get(r['weights'], r['weights'])}, {r['head']}", (10, 4 + 9 * by_speed.index(i)), "left"
                box = {"color": "white", "pad": 0.5}  # where the line would cross it
                axes.annotate(name, point, xytext=at, textcoords="offset points", ha=align, fontsize=8, color=color, bbox=box)
    axes.set(xscale="log", yscale="log", xlabel="MB of weights a token", ylabel="tokens/s, decoding")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_locator(NullLocator())
    axes.grid(color="#e2e8f0")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    roofline = stem.with_name(stem.name + "-roofline.png")
    figure.savefig(roofline)
    plt.close(figure)

    heights = [sum(r["shape"] == shape for r in results) + 0.5 for shape in shapes]
    size = (8, 0.6 * len(shapes) + 0.32 * len(results) + 0.5)
    figure, rows = plt.subplots(
        len(shapes), 1, figsize=size, dpi=130, layout="constrained", sharex=True, squeeze=False, height_ratios=heights
    )
    for axes, shape in zip(rows[:, 0], shapes, strict=True):
        here = [r for r in results if r["shape"] == shape]
        names = [label(r) for r in here]
        axes.axvline(100, color="black", linewidth=1, zorder=1)
        bars = axes.barh(names, [100 * r["share_of_limit"] for r in here], height=0.7, color=[COLORS[r["engine"]] for r in here], zorder=2)
        said = [f"{r['share_of_limit']:.0%}, {rate(r['medians']['decode'])} tokens/s" for r in here]
        axes.bar_label(bars, said, padding=4, fontsize=8, bbox={"color": "white", "pad": 1}, zorder=3)
        axes.set_title(shape, loc="left", fontsize=10)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    rows[-1, 0].set_xlabel(f"decoding: share of the {read:.1f} GB/s that reading alone reaches, %")
    share = stem.with_name(stem.name + "-share.png")
    figure.savefig(share)
    plt.close(figure)
    return [roofline, share]


def publish(path: Path, update_docs: bool) -> None:
    """Draws the pictures beside the JSON, prints the report, and puts it into the document if asked."""
    summary = summarize(json.loads(path.read_text()))
    try:
        pictures = draw(summary, path.with_suffix(""))
    except ImportError as e:
        print(f"no pictures: {e}", file=sys.stderr)
        pictures = []
    print(markdown(summary, [str(picture) for picture in pictures]))
    if update_docs:
        update(DOCUMENT, markdown(summary, [Path(os.path.relpath(picture, DOCUMENT.parent)).as_posix() for picture in pictures]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The report of a comparison, from its JSON.")
    parser.add_argument("json", type=Path)
    parser.add_argument("--update-docs", action="store_true")
    publish(parser.parse_args().json, parser.parse_args().update_docs)
