"""Instructions of the kernels' inner loops, read from object files: what bounds a CPU that nobody here could time.

    cmake --build build/dev && cmake --build build/arm                        # CONTRIBUTING.md has both
    python benchmarks/count_instructions.py build/dev build/arm --update-docs    # puts the tables into docs/performance.md

Each function is disassembled (objdump) and its innermost loops are found by their backward jumps. The inner loop of a product is the one
with the most multiplications; where a panel takes several of the same size (AVX2: two halves), all count. How many weights it covers
follows from its multiplications: what one instruction multiplies is in PRODUCTS.

The bandwidth is an upper bound by arithmetic alone: a core needs at least instructions / width, vector instructions / pipes and
multiplications / multiplying pipes cycles. Widths and pipes are the makers' published ones (CORES); nothing here is measured.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from comparison_report import DOCUMENT, update

MARKERS = ("<!-- instructions -->", "<!-- /instructions -->")
# products of one instruction on a 128-bit register; x86's ymm and zmm hold 2 and 4 of them
PRODUCTS = {"vpdpbusd": 16, "vpmaddubsw": 16, "sdot": 16, "usdot": 16, "smmla": 32, "usmmla": 32}
PRODUCTS |= dict.fromkeys(("smull", "smull2", "smlal", "smlal2"), 8)
CODECS = {  # template, bits
    "two-bit": ("TwoBit", 2.0),
    "base-3": ("Base3", 1.6),
    "int4": ("Int4", 4.0),
    "int8": ("Int8|WholeTiles|TileHalf<255", 8.0),
}
SETS = ("avx2", "avxvnni", "avx512vnni", "avx512vbmi", "neon", "neondotprod", "neoni8mm")
WEIGHTS = 256  # what the tables count for


@dataclass
class Core:
    """What a core can do a cycle: instructions, on vectors, that multiply. In order: taken for one instruction a cycle, whatever pairs."""

    isa: str
    name: str
    width: int
    vector: int
    multiply: int


CORES = (
    Core("avx2", "Intel since Haswell", 4, 3, 2),
    Core("avx512vnni", "Intel since Cascade Lake", 4, 2, 2),
    Core("neon", "Cortex-A53 (Raspberry Pi 3), in order", 1, 1, 1),
    Core("neon", "Cortex-A72 (Raspberry Pi 4)", 3, 2, 1),
    Core("neondotprod", "Cortex-A55, in order", 1, 1, 1),
    Core("neondotprod", "Cortex-A76 (Raspberry Pi 5), Neoverse N1", 4, 2, 2),
    Core("neondotprod", "Apple M1", 8, 4, 4),
    Core("neoni8mm", "Cortex-A710, Neoverse N2", 5, 2, 2),
    Core("neoni8mm", "Apple M2 and later", 8, 4, 4),
)

Instruction = tuple[int, str, str]  # address, mnemonic, operands


@dataclass
class Loop:
    instructions: int = 0
    vector: int = 0  # on vector registers, but loads and stores
    multiplications: int = 0
    products: int = 0

    def __add__(self, other: Loop) -> Loop:
        return Loop(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def functions(disassembly: str) -> Iterator[tuple[str, list[Instruction]]]:
    """(demangled name, instructions) of objdump's text."""
    name = ""
    found: list[Instruction] = []
    for line in disassembly.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            if found:
                yield name, found
            name, found = head[1].replace("(anonymous namespace)::", ""), []
        elif one := re.match(r"\s+([0-9a-f]+):\s+(?:\{vex\} )?(\S+)\s*(.*)", line):
            found.append((int(one[1], 16), one[2], one[3]))
    if found:
        yield name, found


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """From the target of a backward jump to the jump, where no other lies within."""
    at = {address: i for i, (address, _, _) in enumerate(code)}
    spans = set()
    for i, (address, mnemonic, operands) in enumerate(code):
        target = re.search(r"(?:^|[ ,])([0-9a-f]+) <", operands)
        if target and re.match(r"j|b$|b\.|cbn?z|tbn?z", mnemonic):
            to = int(target[1], 16)
            if to <= address and to in at:
                spans.add((at[to], i))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [code[first : last + 1] for first, last in sorted(inner)]


def count(loop: list[Instruction]) -> Loop:
    """What a loop is made of."""
    found = Loop()
    for _, mnemonic, operands in loop:
        found.instructions += 1
        x86 = re.findall(r"%([xyz])mm", operands)
        moves = re.match(r"vmov|vpbroadcast|prefetch|ld|st|prfm", mnemonic) is not None
        found.vector += bool(x86 or re.search(r"\b[vq]\d+\b|\bv\d+\.", operands)) and not moves
        if mnemonic in PRODUCTS:
            found.multiplications += 1
            found.products += PRODUCTS[mnemonic] * (max({"x": 1, "y": 2, "z": 4}[r] for r in x86) if x86 else 1)
    return found


def product_loop(code: list[Instruction]) -> Loop | None:
    """The inner loop of a product, or the sum of those that are as large; None if the function multiplies nothing.

    Of those that fetch only the shortest: the compiler makes one loop that also fetches into L1, and one for CPUs that do it themselves.
    """
    loops = [(count(loop), any(re.match(r"prefetch|prfm", mnemonic) for _, mnemonic, _ in loop)) for loop in innermost_loops(code)]
    most = max((loop.multiplications for loop, _ in loops), default=0)
    if not most:
        return None
    largest = [(loop, fetches) for loop, fetches in loops if loop.multiplications == most]
    fetching = sorted((loop for loop, fetches in largest if fetches), key=lambda loop: loop.instructions)
    return sum((loop for loop, fetches in largest if not fetches), sum(fetching[:1], Loop()))


def disassemble(path: Path) -> str:
    """objdump's text of an object file of x86-64 or 64-bit Arm."""
    machine = int.from_bytes(path.read_bytes()[18:20], "little")  # e_machine of ELF
    tool = {62: "objdump", 183: "aarch64-linux-gnu-objdump"}.get(machine)
    if tool is None:
        raise SystemExit(f"{path}: ELF machine {machine}; expected an object file of x86-64 (62) or 64-bit Arm (183)")
    return subprocess.run([tool, "-dC", "--no-show-raw-insn", str(path)], check=True, capture_output=True, text=True).stdout


def count_set(isa: str, path: Path) -> dict[str, Loop]:
    """codec -> its loop for one token; "prompt" -> that of many tokens."""
    found: dict[str, Loop] = {}
    for name, code in functions(disassemble(path)):
        loop = product_loop(code)
        if loop is None:
            continue
        for codec, (template, _) in CODECS.items():
            if re.match(rf"void multiply_tokens<(?:(?!Unpacked)\w+<)?(?:\w+, )?(?:{template})\w*[> ]*, 1>\(", name):
                loop.products //= (
                    2 if (isa, codec) == ("avx2", "int8") else 1
                )  # an int8 code takes two multiplications there, of its halves
                found[codec] = loop
        if re.match(r"(?:static )?(?:void|auto) gemm", name) or name.startswith("gemm"):
            best = found.get("prompt")
            if best is None or loop.products / loop.instructions > best.products / best.instructions:
                found["prompt"] = loop
    return found


def tables(counts: dict[str, dict[str, Loop]]) -> str:
    """The two tables in Markdown."""
    lines = [
        f"| codec | set | instructions for {WEIGHTS} weights | of them on vectors | that multiply | instructions a weight |",
        "|---|---|---|---|---|---|",
    ]
    for codec in CODECS:
        for isa, found in counts.items():
            if codec in found and not (codec == "base-3" and isa != "avx512vbmi"):
                loop = found[codec]
                per = WEIGHTS / loop.products
                lines.append(
                    f"| {codec} | {isa} | {loop.instructions * per:.0f} | {loop.vector * per:.0f} | {loop.multiplications * per:.0f} |"
                    f" {loop.instructions / loop.products:.3f} |"
                )
    able = "a cycle: instructions, on vectors, that multiply"
    lines += [
        "",
        f"| two-bit, one token | {able} | cycles for 256 weights, 64 bytes | GB/s a core at 2 GHz | at 3 GHz |",
        "|---|---|---|---|---|",
    ]
    for core in CORES:
        if core.isa in counts:
            loop = counts[core.isa]["two-bit"]
            cycles = (
                max(loop.instructions / core.width, loop.vector / core.vector, loop.multiplications / core.multiply)
                * WEIGHTS
                / loop.products
            )
            rates = [WEIGHTS * CODECS["two-bit"][1] / 8 / cycles * ghz for ghz in (2, 3)]
            able = f"{core.width}, {core.vector}, {core.multiply}"
            lines.append(f"| {core.isa}: {core.name} | {able} | {cycles:.1f} | {rates[0]:.1f} | {rates[1]:.1f} |")
    lines += ["", "| many tokens | products in the inner loop | instructions | products an instruction |", "|---|---|---|---|"]
    for isa, found in counts.items():
        if "prompt" in found:
            loop = found["prompt"]
            lines.append(f"| {isa} | {loop.products} | {loop.instructions} | {loop.products / loop.instructions:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, nargs="+", help="a CMake build folder of the native core")
    parser.add_argument("--update-docs", action="store_true")
    args = parser.parse_args()
    objects = {path.name.split(".")[0]: path for folder in args.build for path in folder.rglob("*.o")}
    counts = {isa: count_set(isa, objects[isa]) for isa in SETS if isa in objects}
    if not counts:
        sys.exit(f"{', '.join(map(str, args.build))}: no kernels' object files; build the native core there first (CONTRIBUTING.md)")
    text = tables(counts)
    print(text)
    if args.update_docs:
        update(DOCUMENT, text, MARKERS)


if __name__ == "__main__":
    main()
