"""Adds a machine to the table of devices in docs/performance.md, from what `bitnet bench --json` printed there.

    bitnet bench --shape bitnet-2b-4t --json > result.json                     # on the machine
    python benchmarks/add_device.py result.json --machine "Raspberry Pi 5, 8 GB"    # in a clone of the repository

Every number is checked against the others before it gets in. A second result of the same machine, instruction set, model, head, codec and
threads replaces the first.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from comparison_report import DOCUMENT, update

MARKERS = ("<!-- devices -->", "<!-- /devices -->")
COLUMNS = (
    "machine", "isa", "model or shape, head", "codec", "threads", "MB a token",
    "prompt tokens/s", "decode tokens/s", "GB/s", "share of reading alone",
)  # fmt: skip
KEY = 5  # the first columns: what a row is about
NUMBERS = ("weight_bytes_per_token", "prefill_tok_s", "decode_tok_s", "ms_per_token", "bandwidth_gb_s", "roofline_gb_s")


def parse(text: str) -> dict[str, Any]:
    """The JSON object in the last line of what bench printed. Raises `ValueError` for anything that bench would not print."""
    lines = text.strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        raise ValueError("the last line is no JSON; expected what `bitnet bench --json` prints") from None
    missing = [
        name for name in (*NUMBERS, "isa", "codec", "threads", "head", "batch", "depth") if not isinstance(found, dict) or name not in found
    ]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; expected what `bitnet bench --json` prints")
    for name in NUMBERS:
        value = found[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} is {value!r}; expected a number above 0")
    if found["batch"] != 1 or found["depth"] != 0:
        raise ValueError(
            f"batch {found['batch']}, depth {found['depth']}; the table holds batch 1 from an empty context (bench's defaults)"
        )
    expected = found["weight_bytes_per_token"] * found["decode_tok_s"] / 1e9
    if not math.isclose(found["bandwidth_gb_s"], expected, rel_tol=0.01):
        raise ValueError(f"bandwidth_gb_s is {found['bandwidth_gb_s']:.3g}; {expected:.3g} follows from the bytes and the tokens/s")
    if not math.isclose(found["ms_per_token"] * found["decode_tok_s"], 1000, rel_tol=0.01):
        raise ValueError(f"ms_per_token is {found['ms_per_token']:.3g}; 1000 / decode_tok_s is {1000 / found['decode_tok_s']:.3g}")
    return found


def row(found: dict[str, Any], machine: str) -> list[str]:
    """The cells of a result."""
    if not machine.strip() or "|" in machine or "\n" in machine:
        raise ValueError(f"machine is {machine!r}; expected a name in one line, without |")
    what = found.get("shape") or Path(str(found.get("model"))).name
    return [
        machine.strip(), str(found["isa"]), f"{what}, {found['head']}", str(found["codec"]), str(found["threads"]),
        f"{found['weight_bytes_per_token'] / 1e6:,.1f}", f"{found['prefill_tok_s']:,.1f}", f"{found['decode_tok_s']:,.1f}",
        f"{found['bandwidth_gb_s']:.1f}", f"{found['bandwidth_gb_s'] / found['roofline_gb_s']:.0%} of {found['roofline_gb_s']:.1f}",
    ]  # fmt: skip


def add(document: Path, cells: list[str]) -> None:
    """Puts the row into the table, in the order of machines."""
    inside = document.read_text().partition(MARKERS[0])[2].partition(MARKERS[1])[0]
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in inside.strip().splitlines()[2:]]
    rows = sorted([*(r for r in rows if r[:KEY] != cells[:KEY]), cells], key=lambda r: r[:KEY])
    table = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    update(document, "\n".join(f"| {' | '.join(r)} |" for r in table), MARKERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what `bitnet bench --json` printed")
    parser.add_argument("--machine", required=True, help="its name, as a reader would know it, and its memory")
    args = parser.parse_args()
    try:
        cells = row(parse(args.result.read_text()), args.machine)
    except (OSError, ValueError) as error:
        sys.exit(f"{args.result}: {error}")
    add(DOCUMENT, cells)
    print(f"docs/performance.md now has: {' | '.join(cells)}")


if __name__ == "__main__":
    main()
