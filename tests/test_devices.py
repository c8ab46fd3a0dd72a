"""What docs/performance.md says of machines that are not here: rows from other people's results, instructions counted in object files."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import add_device
import count_instructions
import pytest

RESULT: dict[str, Any] = {
    "model": None, "shape": "bitnet-2b-4t", "head": "int8", "isa": "neondotprod", "codec": "t2", "threads": 4, "batch": 1, "depth": 0,
    "weight_bytes_per_token": 851_121_600, "prefill_tok_s": 12.34, "decode_tok_s": 10.0, "ms_per_token": 100.0,
    "bandwidth_gb_s": 8.511216, "roofline_gb_s": 9.5,
}  # fmt: skip
ROW = "| Raspberry Pi 5, 8 GB | neondotprod | bitnet-2b-4t, int8 | t2 | 4 | 851.1 | 12.3 | 10.0 | 8.5 | 90% of 9.5 |"


def test_a_result_becomes_a_row_and_replaces_the_one_before(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    begin, end = add_device.MARKERS
    document.write_text(f"before\n{begin}\n{end}\nafter\n")
    printed = "bench table\n" + json.dumps(RESULT) + "\n"
    for name, decode in (("Raspberry Pi 5, 8 GB", 5.0), ("A Mac", 10.0), ("Raspberry Pi 5, 8 GB", 10.0)):
        other = RESULT | {"decode_tok_s": decode, "ms_per_token": 1000 / decode, "bandwidth_gb_s": 0.8511216 * decode}
        add_device.add(document, add_device.row(add_device.parse(json.dumps(other)), name))
    assert add_device.row(add_device.parse(printed), "Raspberry Pi 5, 8 GB") == [cell.strip() for cell in ROW.strip("|").split("|")]
    lines = document.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and lines[4].startswith("| A Mac |") and lines[5] == ROW and len(lines) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode_tok_s": 20.0, "ms_per_token": 50.0}, "bandwidth_gb_s is 8.51; 17 follows from the bytes and the tokens/s"),
        ({"ms_per_token": 50.0}, "ms_per_token is 50; 1000 / decode_tok_s is 100"),
        ({"roofline_gb_s": 0}, "roofline_gb_s is 0; expected a number above 0"),
        ({"prefill_tok_s": float("nan")}, "prefill_tok_s is nan; expected a number above 0"),
        ({"batch": 4}, "batch 4, depth 0; the table holds batch 1 from an empty context"),
    ],
)
def test_numbers_that_do_not_agree_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_device.parse(json.dumps(RESULT | change))


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", json.dumps({"isa": "neon"})])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected what `bitnet bench --json` prints"):
        add_device.parse(text)


@pytest.mark.parametrize("name", ["", "a | b", "two\nlines"])
def test_names_that_break_the_table_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a name in one line"):
        add_device.row(RESULT, name)


def test_the_document_has_the_places() -> None:
    for markers in (add_device.MARKERS, count_instructions.MARKERS):
        assert all(marker in add_device.DOCUMENT.read_text() for marker in markers)


ARM = """
0000000000000000 <void (anonymous namespace)::multiply_tokens<x, 1>(int)>:
   0:	mov	x1, x0
   4:	ldr	q0, [x1], #16
   8:	and	v2.16b, v0.16b, v1.16b
   c:	sdot	v3.4s, v2.16b, v4.4b[0]
  10:	sdot	v5.4s, v2.16b, v4.4b[1]
  14:	prfm	pldl1keep, [x1, #1024]
  18:	cmp	x1, x2
  1c:	b.ne	4 <void (anonymous namespace)::multiply_tokens<x, 1>(int)+0x4>  // b.any
  20:	add	x3, x3, #0x1
  24:	cbnz	x3, 0 <void (anonymous namespace)::multiply_tokens<x, 1>(int)>
  28:	ret
"""
X86 = """
0000000000000010 <f>:
  10:	vmovdqu (%rdi),%ymm0
  14:	vpmaddubsw %ymm1,%ymm0,%ymm2
  18:	{vex} vpdpbusd (%rsi){1to16},%zmm3,%zmm4
  1c:	jne    10 <f>
  1e:	ret
"""


def test_the_inner_loop_is_found_and_counted() -> None:
    ((name, code),) = count_instructions.functions(ARM)
    assert name == "void multiply_tokens<x, 1>(int)"
    assert count_instructions.product_loop(code) == count_instructions.Loop(instructions=7, vector=3, multiplications=2, products=32)
    ((_, code),) = count_instructions.functions(X86)
    assert count_instructions.product_loop(code) == count_instructions.Loop(instructions=4, vector=2, multiplications=2, products=32 + 64)
    assert count_instructions.product_loop(code[:1]) is None


@pytest.mark.skipif(not all(map(shutil.which, ("g++", "objdump"))), reason="needs g++ and objdump")
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="compiles for this machine, which must know AVX2")
def test_compiled_kernels_are_counted(tmp_path: Path) -> None:
    """AVX2's two halves take 8 multiplications for 256 weights, and at least the 22 shifts, masks and sums that its source names."""
    source = Path(__file__).resolve().parents[1] / "native" / "kernels" / "avx2.cpp"
    flags = ("-std=gnu++20", "-O3", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi", "-ffp-contract=off")
    subprocess.run(["g++", *flags, "-c", str(source), "-o", str(tmp_path / "avx2.o")], check=True)
    found = count_instructions.count_set("avx2", tmp_path / "avx2.o")
    assert {"two-bit", "int4", "int8"} <= set(found)
    loop = found["two-bit"]
    assert loop.products == 256 and loop.multiplications == 8 and loop.vector >= 30 and loop.instructions > loop.vector
    assert "| two-bit | avx2 | " in count_instructions.tables({"avx2": found})
