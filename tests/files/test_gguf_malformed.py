"""GGUF files that lie. Each must end in one clear line of the right kind, within a second and 64 MB beyond twice its own size."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import ARRAY, BOOL, F32, F64, I32, STRING, U8, U32, U64, array, file, healthy, number, pair, tensor, text, value
from mutations import mutate, outcome

from bitnet.errors import BitNetError, FormatError, UnsupportedModelError
from bitnet.files import MEMORY_BYTES, gguf
from bitnet.models import canonical, open_checkpoint

TOP = (1 << 64) - 1
ONE = tensor("w", (4, 2))
DATA = bytes(32)
HUGE = [1 << 20, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, 1 << 63, TOP]


def aligned(n: int, kind: int = U32) -> bytes:
    return file([pair("general.alignment", value(kind, n))], [ONE], DATA)


# name -> (bytes, what the line must say)
FILES: dict[str, tuple[bytes, str]] = {
    "magic of another": (b"GGML" + bytes(40), "begins with b'GGML'; expected a GGUF file"),
    "magic alone": (b"GGUF", "ends within version"),
    "three bytes": (b"GGU", "begins with b'GGU'"),
    "cut in the version": (b"GGUF\x03\0", "ends within version; 4 bytes expected, 2 left"),
    "cut in the count of tensors": (b"GGUF\x03\0\0\0\0\0\0", "ends within the number of tensors; 8 bytes expected, 3 left"),
    "cut in the count of pairs": (b"GGUF\x03\0\0\0" + bytes(9), "ends within the number of metadata pairs"),
    "version 0": (file(version=0), "is of GGUF version 0; this build reads little-endian versions 2 and 3"),
    "version 1": (file(version=1), "is of GGUF version 1"),
    "version 4": (file(version=4), "is of GGUF version 4"),
    "version 2^32 - 1": (file(version=(1 << 32) - 1), "is of GGUF version 4294967295"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian file of version 3"),
    "a pair too few": (file(n_pairs=1) + bytes(40), "key of 0 bytes; expected 1 to 1024"),
    "a tensor too few": (file(n_tensors=1) + bytes(80), "tensor name of 0 bytes"),
    "49 bytes": (b"GGUF" + struct.pack("<IQQ", 3, TOP, TOP) + bytes(25), "metadata pairs, but only 25 bytes follow"),
    "pairs that could lie in the file, but too many": (file(n_pairs=20_000) + bytes(400_000), "20,000 metadata pairs"),
    "tensors that could lie in the file, but too many": (file(n_tensors=70_000) + bytes(3_000_000), "70,000 tensors"),
    "key not UTF-8": (file([pair(b"\xff\xfe", value(U32, 1))]), "key b'\\xff\\xfe' is not UTF-8"),
    "key of 2,000 bytes": (file([pair("k" * 2000, value(U32, 1))]), "key of 2,000 bytes; expected 1 to 1024"),
    "key empty": (file([pair("", value(U32, 1))]), "key of 0 bytes"),
    "key twice": (file([pair("a", value(U32, 1)), pair("a", value(U32, 2))]), "key 'a' appears twice"),
    "key with a line feed, twice": (file([pair("a\nb", value(U32, 1))] * 2), "b' appears twice"),
    "no value": (file([text("abcdef")], n_pairs=1) + bytes(2), "ends within the type of 'abcdef'"),
    "value cut": (
        file([pair("abcdefgh", struct.pack("<I", U64) + bytes(3))]),
        "'abcdefgh' has 1 items of 8 bytes, but only 3 bytes follow",
    ),
    "bool of 2": (file([pair("a", struct.pack("<I", BOOL) + b"\x02")]), "'a' holds a bool of 2; expected 0 or 1"),
    "bools of 255": (file([pair("a", struct.pack("<IIQ", ARRAY, BOOL, 2) + b"\x01\xff")]), "a bool of 255"),
    "text cut": (file([pair("a", struct.pack("<I", STRING) + text("hello", 6))]), "the text of 'a' of 6 bytes, but only 5 follow"),
    "array without items' type": (file([pair("a", struct.pack("<I", ARRAY))]) + b"\0", "ends within the type of 'a''s items"),
    "array without a count": (file([pair("a", struct.pack("<III", ARRAY, U8, 0))]), "ends within the number of items of 'a'"),
    "array in an array": (file([pair("a", struct.pack("<IIQ", ARRAY, ARRAY, 1) + array(U8, [1])[4:])]), "arrays of arrays are not used"),
    "arrays a thousand deep": (file([pair("a", struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 1000)]), "arrays of arrays"),
    "array of type 13": (file([pair("a", struct.pack("<IIQ", ARRAY, 13, 1) + bytes(8))]), "'a' holds items of type 13"),
    "text in an array cut": (
        file([pair("a", struct.pack("<IIQ", ARRAY, STRING, 1) + text("hello", 6))]),
        "'a' has a text of 6 bytes, but only 5",
    ),
    "second text's length cut": (file([pair("a", struct.pack("<IIQ", ARRAY, STRING, 2) + text("12345678") + b"\0")]), "'a' has a text of"),
    "a million empty texts and more": (
        file([pair("a", array(STRING, [], (1 << 20) + 1))]) + bytes(8 * ((1 << 20) + 1)), "1,048,577 texts, but",
    ),
    "alignment 0": (aligned(0), "general.alignment is 0; expected a power of two from 8 to 65536"),
    "alignment 3": (aligned(3), "general.alignment is 3"),
    "alignment 4": (aligned(4), "general.alignment is 4"),
    "alignment 48": (aligned(48), "general.alignment is 48"),
    "alignment 2^17": (aligned(1 << 17), "general.alignment is 131072"),
    "alignment 2^31": (aligned(1 << 31), "general.alignment is 2147483648"),
    "alignment 2^63": (aligned(1 << 63, U64), "general.alignment is 9223372036854775808"),
    "alignment -32": (aligned(-32, I32), "general.alignment is -32"),
    "alignment 32.0": (file([pair("general.alignment", value(F32, 32.0))], [ONE], DATA), "general.alignment is 32.0"),
    "alignment true": (file([pair("general.alignment", value(BOOL, True))], [ONE], DATA), "general.alignment is True"),
    "alignment a text": (file([pair("general.alignment", value(STRING, "32"))], [ONE], DATA), "general.alignment is 32; expected"),
    "alignment an array": (file([pair("general.alignment", array(U32, [32]))], [ONE], DATA), "general.alignment is [32]"),
    "alignment that moves the data past the end": (aligned(1 << 16), "ends 65,"),
    "tensor twice": (file([], [ONE, ONE], DATA), "tensor 'w' appears twice"),
    "tensor name not UTF-8": (file([], [tensor(b"\xc0\xaf", (4, 2))], DATA), "is not UTF-8"),
    "tensor name of 5,000 bytes": (file([], [tensor("w" * 5000, (4, 2))], DATA), "tensor name of 5,000 bytes"),
    "tensor cut in its name": (file([], [text("w", 4)], n_tensors=1) + bytes(24), "has 0 dimensions"),
    "tensor cut in its dimensions": (
        file([], [tensor("w" * 20, (4, 2))[:-20]]) + bytes(2),
        "values in a dimension; 8 bytes expected, 2 left",
    ),
    "tensor cut in its type": (file([], [tensor("w12345", (4, 2))[:-10]]), "ends within the type of tensor 'w12345'"),
    "tensor cut in its offset": (file([], [tensor("w12345", (4, 2))[:-3]]), "'s offset; 8 bytes expected, 5 left"),
    "no dimensions": (file([], [tensor("w", ())], DATA), "tensor 'w' has 0 dimensions; expected 1 to 4"),
    "five dimensions": (file([], [tensor("w", (1, 1, 1, 1, 1))], DATA), "tensor 'w' has 5 dimensions"),
    "2^32 - 1 dimensions": (file([], [tensor("w", (4, 2), n_dims=(1 << 32) - 1)], DATA), "4,294,967,295 dimensions"),
    "a dimension of 0": (file([], [tensor("w", (4, 0))], DATA), "has shape [0, 4]; expected sizes of 1 or more"),
    "a dimension of 2^64 - 1": (file([], [tensor("w", (TOP, 2))], DATA), "expected sizes of 1 or more, and no more values than"),
    "dimensions whose product wraps to 8": (file([], [tensor("w", ((1 << 63) + 4, 2))], DATA), "no more values than a model has"),
    "dimensions of 2^32 each": (file([], [tensor("w", (1 << 32, 1 << 32))], DATA), "no more values than a model has"),
    "dimensions of 2^16 each": (file([], [tensor("w", (1 << 16,) * 4)], DATA), "no more values than a model has"),
    "type 4": (file([], [tensor("w", (32, 2), 4)], DATA), "is of ggml type 4, unknown to this build"),
    "type 33": (file([], [tensor("w", (32, 2), 33)], DATA), "ggml type 33"),
    "type 2^32 - 1": (file([], [tensor("w", (32, 2), (1 << 32) - 1)], DATA), "ggml type 4294967295"),
    "TL1": (file([], [tensor("w", (32, 2), 38)], DATA), "type TL1 (38), tiled for one CPU and one matrix shape"),
    "TL2": (
        file([pair("general.architecture", value(STRING, "bitnet-b1.58"))], [tensor("w", (32, 2), 39)], bytes(64)),
        "type TL2 (39), tiled for",
    ),
    "Q8_0 of 33 a row": (file([], [tensor("w", (33, 32), 8)], bytes(2000)), "has 33 values a row; expected a multiple of 32 for q8_0"),
    "Q4_K of 128 a row": (file([], [tensor("w", (128, 2), 12)], bytes(200)), "expected a multiple of 256 for q4_k"),
    "TQ1_0 of 1 a row": (file([], [tensor("w", (1, 256), 34)], bytes(64)), "expected a multiple of 256 for tq1_0"),
    "Q2_0 of 32 a row": (file([], [tensor("w", (32, 2), 42)], bytes(64)), "expected a multiple of 64 for q2_0"),
    "PQ2_0 of 64 a row": (file([], [tensor("w", (64, 2), 142)], bytes(64)), "expected a multiple of 128 for pq2_0"),
    "I2_S of 64 values": (file([], [tensor("w", (32, 2), 36)], bytes(64)), "expected a multiple of 128 for i2_s"),
    "I2_S without its scale": (file([], [tensor("w", (128, 1), 36)], bytes(32)), "ends 32 bytes after the file does"),
    "offset 1": (file([], [tensor("w", (4, 2), 0, 1)], bytes(64)), "begins at offset 1 of the data; expected a multiple of 32"),
    "offset past the end": (file([], [tensor("w", (4, 2), 0, 64)], DATA), "ends 64 bytes after the file does"),
    "offset 2^63": (file([], [tensor("w", (4, 2), 0, 1 << 63)], DATA), "bytes after the file does"),
    "offset that wraps to 0": (file([], [tensor("w", (4, 2), 0, TOP - 31)], DATA), "bytes after the file does"),
    "two at one place": (file([], [tensor("a", (4, 2)), tensor("b", (4, 2))], bytes(64)), "but the next tensor begins 0 bytes after it"),
    "overlap": (file([], [tensor("a", (16, 2)), tensor("b", (4, 2), 0, 64)], bytes(128)), "takes 128 bytes, but the next tensor begins 64"),
    "overlap, the order turned": (
        file([], [tensor("b", (4, 2), 0, 64), tensor("a", (16, 2))], bytes(128)), "takes 128 bytes, but the next tensor begins 64",
    ),
    "data cut by a byte": (file([], [ONE], bytes(31)), "ends 1 bytes after the file does"),
    "data missing": (file([], [ONE]), "the download is not complete"),
    "Q2_0 of neither size": (file([], [tensor("a", (256, 4), 42), tensor("b", (4, 2), 0, 160)], bytes(640)), "takes 288 bytes, but"),
}  # fmt: skip
for many in HUGE:
    FILES |= {
        f"{many:,} tensors": (file(n_tensors=many) + bytes(100), f"{many:,} tensors, but only 100 bytes follow"),
        f"{many:,} pairs": (file(n_pairs=many) + bytes(100), f"{many:,} metadata pairs, but only 100 bytes follow"),
        f"key of {many:,} bytes": (file([text("k", many) + bytes(9)]), f"key of {many:,} bytes, but only 10 follow"),
        f"text of {many:,} bytes": (
            file([pair("a", struct.pack("<I", STRING) + text("x", many))]),
            f"of {many:,} bytes, but only 1 follow",
        ),
        f"array of {many:,} numbers": (file([pair("a", array(F64, [1.0], many))]), f"'a' has {many:,} items of 8 bytes, but only 8"),
        f"array of {many:,} texts": (file([pair("a", array(STRING, ["x"], many))]), f"'a' has {many:,} texts, but only 9 bytes follow"),
        f"text of {many:,} bytes in an array": (
            file([pair("a", struct.pack("<IIQ", ARRAY, STRING, 1) + text("x", many))]),
            f"'a' has a text of {many:,} bytes, but only 1 follow",
        ),
        f"tensor name of {many:,} bytes": (file([], [text("w", many) + bytes(40)]), f"tensor name of {many:,} bytes, but only 41 follow"),
        f"tensor of {many:,} rows": (file([], [tensor("w", (4, many))], DATA), "tensor 'w'"),
    }  # fmt: skip
FILES |= {
    f"value of type {kind}": (file([pair("a", struct.pack("<I", kind) + bytes(16))]), f"'a' is of type {kind}; expected a metadata type")
    for kind in (13, 14, 255, 1 << 31)
}  # fmt: skip


def test_the_catalogue_is_long_enough() -> None:
    assert len(FILES) >= 120


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_lies_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, words = FILES[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(BitNetError) as error:
        gguf.read(path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    line = str(error.value)
    assert words in line and line.startswith(str(path)) and line.isprintable(), line
    assert isinstance(error.value, (FormatError, UnsupportedModelError))
    assert seconds < 1 and peak < MEMORY_BYTES + 2 * len(content)


def test_many_small_texts_stay_within_the_memory(tmp_path: Path) -> None:
    """A million texts of one character that is two bytes: refused, or held within the bound."""
    n = 1 << 20
    body = (struct.pack("<Q", 2) + "ü".encode()) * n
    path = tmp_path / "x.gguf"
    path.write_bytes(file([pair("a", struct.pack("<IIQ", ARRAY, STRING, n) + body)]))
    tracemalloc.start()
    with pytest.raises(FormatError, match="all texts together would take too much memory"):
        gguf.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY_BYTES + 2 * path.stat().st_size


LLAMA = {
    "general.architecture": value(STRING, "llama"), "llama.block_count": value(U32, 1), "llama.embedding_length": value(U32, 32),
    "llama.feed_forward_length": value(U32, 64), "llama.attention.head_count": value(U32, 2), "llama.context_length": value(U32, 64),
    "llama.attention.layer_norm_rms_epsilon": value(F32, 1e-5),
}  # fmt: skip
SHAPES = {
    "token_embd.weight": (32, 50), "output_norm.weight": (32,), "blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (32, 32), "blk.0.attn_v.weight": (32, 32), "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_gate.weight": (32, 64), "blk.0.ffn_up.weight": (32, 64), "blk.0.ffn_down.weight": (64, 32),
}  # fmt: skip


def model(pairs: dict[str, bytes | None], shapes: dict[str, tuple[int, ...] | None]) -> bytes:
    """A whole llama of one layer; `None` leaves out."""
    tensors, data = [], b""
    for name, shape in (SHAPES | shapes).items():
        if shape is not None:
            tensors.append(tensor(name, shape, 0, len(data)))
            data += bytes(-(-4 * int(np.prod(shape)) // 32) * 32)
    return file([pair(key, encoded) for key, encoded in (LLAMA | pairs).items() if encoded is not None], tensors, data)


# a file that is a sound GGUF, but no model: (pairs, shapes, what the line must say)
MODELS: dict[str, tuple[dict[str, bytes | None], dict[str, tuple[int, ...] | None], str]] = {
    "no architecture": ({"general.architecture": None}, {}, "architecture None; this build runs llama, bitnet"),
    "architecture mamba": ({"general.architecture": value(STRING, "mamba")}, {}, "architecture 'mamba'; this build runs"),
    "architecture a number": ({"general.architecture": value(U32, 3)}, {}, "architecture 3; this build runs"),
    "architecture of two lines": ({"general.architecture": value(STRING, "a\nb")}, {}, "architecture 'a\\nb'"),
    "architecture an array": ({"general.architecture": array(STRING, ["llama"])}, {}, "architecture ['llama']"),
    "no layers": ({"llama.block_count": None}, {}, "metadata llama.block_count not found; expected a number"),
    "0 layers": ({"llama.block_count": value(U32, 0)}, {}, "num_hidden_layers is 0; expected an integer from 1 to 1024"),
    "2^32 - 1 layers": ({"llama.block_count": value(U32, (1 << 32) - 1)}, {}, "num_hidden_layers is 4294967295"),
    "two layers": ({"llama.block_count": value(U32, 2)}, {}, "tensor 'blk.1.attn_q.weight' and 8 more not found"),
    "layers a text": ({"llama.block_count": value(STRING, "1")}, {}, "num_hidden_layers is '1'"),
    "0 heads": ({"llama.attention.head_count": value(U32, 0)}, {}, "num_attention_heads is 0"),
    "-1 heads": ({"llama.attention.head_count": value(I32, -1)}, {}, "num_attention_heads is -1"),
    "heads by layer": ({"llama.attention.head_count": array(U32, [2, 4])}, {}, "llama.attention.head_count differs from layer to layer"),
    "no heads in an array": ({"llama.attention.head_count": array(U32, [])}, {}, "llama.attention.head_count differs"),
    "0 kv heads": ({"llama.attention.head_count_kv": value(U32, 0)}, {}, "num_key_value_heads is 0"),
    "kv heads that do not divide": ({"llama.attention.head_count_kv": value(U32, 3)}, {}, "is not a multiple of num_key_value_heads 3"),
    "odd heads": ({"llama.attention.key_length": value(U32, 15)}, {}, "head_dim is 15; rope needs an even number"),
    "values of another length": (
        {"llama.attention.value_length": value(U32, 8)}, {},
        "llama.attention.value_length is 8 where heads are 16",
    ),
    "rope over half of a head": ({"llama.rope.dimension_count": value(U32, 8)}, {}, "llama.rope.dimension_count is 8 where heads are 16"),
    "experts": ({"llama.expert_count": value(U32, 8)}, {}, "has 8 experts; this build runs dense feed-forwards"),
    "width 0": ({"llama.embedding_length": value(U32, 0)}, {}, "hidden_size is 0"),
    "eps not a number": ({"llama.attention.layer_norm_rms_epsilon": value(F32, float("nan"))}, {}, "rms_norm_eps is nan"),
    "eps 0": ({"llama.attention.layer_norm_rms_epsilon": value(F32, 0.0)}, {}, "rms_norm_eps is 0"),
    "theta infinite": ({"llama.rope.freq_base": value(F32, float("inf"))}, {}, "rope_theta is inf"),
    "rope scaling unknown": (
        {"llama.rope.scaling.type": value(STRING, "ntk")}, {},
        "rope scaling 'ntk'; this build computes default, linear",
    ),
    "rope scaling without a factor": ({"llama.rope.scaling.type": value(STRING, "linear")}, {}, "factor is None"),
    "context 0": ({"llama.context_length": value(U32, 0)}, {}, "max_position_embeddings is 0"),
    "one of five files": ({"split.count": value(U32, 5)}, {}, "is one of 5 files of a split model; join them"),
    "rotated": ({"prism.hadamard.block": value(U32, 128)}, {}, "in a rotated basis (prism.hadamard.block)"),
    "no embedding": ({}, {"token_embd.weight": None}, "tensor 'token_embd.weight' not found"),
    "embedding of one dimension": ({}, {"token_embd.weight": (1600,)}, "tensor 'token_embd.weight' not found as a matrix"),
    "embedding of another width": (
        {}, {"token_embd.weight": (64, 50)},
        "'token_embd.weight' has shape [50, 64]; the model's configuration",
    ),
    "no norm": ({}, {"output_norm.weight": None}, "tensor 'output_norm.weight' not found"),
    "norm of another width": ({}, {"output_norm.weight": (31,)}, "'output_norm.weight' has shape [31]"),
    "q turned": ({"llama.attention.head_count_kv": value(U32, 1)}, {}, "'blk.0.attn_k.weight' has shape [32, 32]"),
    "a tensor of another kind of model": (
        {}, {"blk.0.ffn_gate_exps.weight": (32, 64)},
        "has tensors that such a model does not have (1, the first",
    ),
    "a bias that is none of ours": ({}, {"output.bias": (50,)}, "has biases (1, the first 'output.bias')"),
    "rope's divisors all 0": ({}, {"rope_freqs.weight": (8,)}, "expected 8 divisors of rope's frequencies, each above 0"),
    "rope's divisors too few": ({}, {"rope_freqs.weight": (7,)}, "expected 8 divisors of rope's frequencies"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    from bitnet.weights import load_engine

    pairs, shapes, words = MODELS[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(model(pairs, shapes))
    start = time.perf_counter()
    with pytest.raises(BitNetError) as error:
        checkpoint = open_checkpoint(path)
        canonical(checkpoint)
        load_engine(checkpoint, threads=1)
    line = str(error.value)
    assert words in line and str(path) in line and line.isprintable(), line
    assert time.perf_counter() - start < 1


def test_the_model_that_those_are_made_from_is_sound(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(model({}, {}))
    assert canonical(open_checkpoint(tmp_path / "x.gguf")).config.rope_interleaved


@pytest.mark.parametrize("seed", range(300))
def test_a_mutated_file_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    """tests/files/mutations.py runs many more."""
    original = healthy() if seed % 2 else model({}, {})
    outcome(mutate(original, seed), tmp_path / "x.gguf")


def test_cutting_the_file_anywhere_is_noticed(tmp_path: Path) -> None:
    content = healthy()
    for end in [*range(0, 700, 3), *range(700, len(content), 97)]:
        (tmp_path / "x.gguf").write_bytes(content[:end])
        with pytest.raises(BitNetError):
            gguf.read(tmp_path / "x.gguf")
    assert number(U8, 5) == b"\x05"
