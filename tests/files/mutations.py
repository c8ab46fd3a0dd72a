"""Damaged files by the thousand: python tests/files/mutations.py [--count 20000] [--format gguf|safetensors].

A mutation overwrites, inserts, deletes, swaps or cuts bytes of a sound file, or puts a number that parsers trip over (0, -1, 2^31, ...)
in place of another. Whatever comes out must be read whole, or refused in one line; in a second, and within 64 MB beyond twice its size.
"""

from __future__ import annotations

import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np

from bitnet.errors import BitNetError
from bitnet.files import MEMORY_BYTES
from bitnet.models import canonical, open_checkpoint

EVIL = [
    0,
    1,
    2,
    3,
    7,
    8,
    13,
    31,
    127,
    128,
    255,
    256,
    65535,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 62,
    (1 << 63) - 1,
]
EVIL += [1 << 63, (1 << 64) - 1, (1 << 64) - 32]


def mutate(content: bytes, seed: int) -> bytes:
    """One to four mutations of `content`, most of them near its beginning, where the structure is."""
    rng = np.random.default_rng(seed)
    found = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        near = min(len(found), 1200 if rng.random() < 0.8 else len(found))
        at = int(rng.integers(0, max(1, near)))
        kind = int(rng.integers(0, 7))
        if kind == 0:
            found[at : at + 1] = bytes([int(rng.integers(0, 256))])
        elif kind == 1:
            size, form = [(8, "<Q"), (4, "<I")][int(rng.integers(0, 2))]
            found[at : at + size] = struct.pack(form, EVIL[int(rng.integers(0, len(EVIL)))] & ((1 << 8 * size) - 1))
        elif kind == 2:
            del found[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            found[at:at] = rng.integers(0, 256, int(rng.integers(1, 40)), np.uint8).tobytes()
        elif kind == 4:
            other, size = int(rng.integers(0, max(1, near))), int(rng.integers(1, 60))
            found[at:at] = found[other : other + size]
        elif kind == 5:
            found[at : at + 1] = bytes([byte ^ (1 << int(rng.integers(0, 8))) for byte in found[at : at + 1]])
        elif rng.random() < 0.3:
            del found[at:]
    return bytes(found)


def outcome(content: bytes, path: Path) -> str:
    """Reads everything that the file offers; the name of what came of it. AssertionError where it is none of the allowed."""
    path.write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        checkpoint = open_checkpoint(path)
        for tensor in checkpoint.tensors.values():
            if tensor.nbytes < 1 << 20:
                try:
                    tensor.dense()
                except BitNetError:
                    continue
        canonical(checkpoint)
        found = "read"
    except BitNetError as error:
        line = str(error)
        assert line.isprintable() and len(line) < 2000, line
        found = type(error).__name__
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1, f"{seconds:.2f} s"
    assert peak < MEMORY_BYTES + 2 * len(content), f"{peak:,} bytes for {len(content):,}"
    return found


def sound(kind: str) -> list[bytes]:
    """Files that mutations begin from."""
    if kind == "gguf":
        from gguf_bytes import healthy
        from test_gguf_malformed import model

        return [healthy(), model({}, {})]
    from bitnet.files import safetensors

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        weights = {"a.weight": np.zeros((3, 4), np.uint8), "a.weight_scale": np.ones(1, np.float32), "b": np.ones((2, 5), np.float32)}
        config = '{"model_type": "llama", "quantization_config": {"quant_method": "bitnet"}}'
        safetensors.write(path, weights, {"format": "pt", "config": config})
        return [path.read_bytes()]


def main() -> None:
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    count, kind = int(options.get("--count", 20_000)), options.get("--format", "gguf")
    files, results = sound(kind), Counter[str]()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for seed in range(count):
            results[outcome(mutate(files[seed % len(files)], seed), Path(folder) / "x")] += 1
    print(f"{count:,} mutated files of {kind}: {', '.join(f'{n:,} {name}' for name, n in results.most_common())}; none broke a rule")


if __name__ == "__main__":
    main()
