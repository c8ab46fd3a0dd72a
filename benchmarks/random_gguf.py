"""GGUF files of a benchmark shape with random weights, for llama.cpp to be measured on: nothing is downloaded, nothing quantized.

A block of random bytes is a block of random weights where every byte means something: Q4_0, Q8_0 and Q6_K are drawn so, with a fixed scale.
TQ2_0 and TQ1_0 draw codes and look up their bytes, because 3 is no code of theirs. The tensors and their types are those that llama.cpp's
converter and quantizer choose for such a model: token_embd (tied) or output in Q6_K, or in Q8_0 in a Q8_0 file; norms in F32.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from bitnet.shapes import Shape

U8 = NDArray[np.uint8]
RECIPE = 1  # in the file's name; to be raised whenever a file would come out otherwise
SEED = 1
HEADS = {"TQ1_0": "Q6_K", "TQ2_0": "Q6_K", "Q4_0": "Q6_K", "Q8_0": "Q8_0"}  # type of the layers -> of the embedding and head

_DIGITS = np.indices((3,) * 5).reshape(5, -1).T  # all codes of five trits [243, 5]
_BASE3 = _DIGITS @ 3 ** np.arange(4, -1, -1)  # [243]
FIVE = ((_BASE3 * 256 + 242) // 243).astype(np.uint8)  # ceil(v * 256 / 243)
FOUR = FIVE[::3]  # the last digit 0: only four are used
TWO_BITS = (np.indices((3,) * 4).reshape(4, -1).T @ 4 ** np.arange(4)).astype(np.uint8)  # [81]


def half(n: int, value: float) -> U8:
    """The same f16 for n blocks, as bytes [n, 2]."""
    return np.full((n, 1), value, np.float16).view(np.uint8)


def drawn(rng: np.random.Generator, n: int, nbytes: int, table: U8 | None = None) -> U8:
    """Random bytes [n, nbytes], of a table or of all 256."""
    raw = np.frombuffer(rng.bytes(n * nbytes), np.uint8).reshape(n, nbytes)
    return raw if table is None else table[raw % len(table)]  # some a little likelier than others, which costs nothing here


def tq1_0(rng: np.random.Generator, n: int) -> U8:
    return np.hstack([drawn(rng, n, 48, FIVE), drawn(rng, n, 4, FOUR), half(n, 0.02)])


def tq2_0(rng: np.random.Generator, n: int) -> U8:
    return np.hstack([drawn(rng, n, 64, TWO_BITS), half(n, 0.02)])


def q4_0(rng: np.random.Generator, n: int) -> U8:
    return np.hstack([half(n, 0.004), drawn(rng, n, 16)])


def q8_0(rng: np.random.Generator, n: int) -> U8:
    return np.hstack([half(n, 0.0003), drawn(rng, n, 32)])


def q6_k(rng: np.random.Generator, n: int) -> U8:
    return np.hstack([drawn(rng, n, 192), drawn(rng, n, 16), half(n, 1e-5)])  # 6-bit codes, int8 scales of 16 values, scale


BLOCKS: dict[str, Callable[[np.random.Generator, int], U8]] = {
    "TQ1_0": tq1_0, "TQ2_0": tq2_0, "Q4_0": q4_0, "Q8_0": q8_0, "Q6_K": q6_k,
}  # fmt: skip


def architecture(s: Shape) -> str:
    return "bitnet" if s.bitnet else "qwen3" if s.qk_norms else "llama"


def tensors(s: Shape, kind: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape with rows first, type) of everything in the file."""
    q, kv, head = s.heads * s.head_dim, s.kv_heads * s.head_dim, HEADS[kind]
    found: list[tuple[str, tuple[int, ...], str]] = [("token_embd", (s.vocab, s.width), head), ("output_norm", (s.width,), "F32")]
    if not s.tied:
        found.append(("output", (s.vocab, s.width), head))
    vectors = {"attn_norm": s.width, "ffn_norm": s.width}
    if s.bitnet:
        vectors |= {"attn_sub_norm": q, "ffn_sub_norm": s.ffn}
    if s.qk_norms:
        vectors |= {"attn_q_norm": s.head_dim, "attn_k_norm": s.head_dim}
    matrices = {
        "attn_q": (q, s.width), "attn_k": (kv, s.width), "attn_v": (kv, s.width), "attn_output": (s.width, q),
        "ffn_gate": (s.ffn, s.width), "ffn_up": (s.ffn, s.width), "ffn_down": (s.width, s.ffn),
    }  # fmt: skip
    for i in range(s.layers):
        found += [(f"blk.{i}.{part}", (n,), "F32") for part, n in vectors.items()]
        found += [(f"blk.{i}.{part}", shape, kind) for part, shape in matrices.items()]
    return [(f"{name}.weight", shape, dtype) for name, shape, dtype in found]


def byte_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """[rows, columns] of values -> [rows, bytes]."""
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if shape[-1] % values:
        raise ValueError(f"a row of {shape[-1]} values is not whole blocks of {values}, as {kind} needs")
    return (*shape[:-1], shape[-1] // values * nbytes)


def bytes_per_token(s: Shape, kind: str) -> int:
    """Read to decode one token: all tensors, norms included, but of a separate embedding only a row, which is left out."""
    read = [(shape, dtype) for name, shape, dtype in tensors(s, kind) if s.tied or name != "token_embd.weight"]
    return sum(int(np.prod(byte_shape(shape, dtype))) for shape, dtype in read)


def make(folder: Path, name: str, s: Shape, kind: str) -> Path:
    """The file of this shape and type, written if it is not there yet: beside its place, one tensor at a time, then renamed."""
    path = folder / f"{name}-{kind.lower()}-{RECIPE}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        write(partial, s, kind)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write(path: Path, s: Shape, kind: str) -> None:
    file = gguf.GGUFWriter(path, architecture(s))
    file.add_tokenizer_model("no_vocab")  # token ids are given
    file.add_vocab_size(s.vocab)
    file.add_context_length(s.context)
    file.add_embedding_length(s.width)
    file.add_block_count(s.layers)
    file.add_feed_forward_length(s.ffn)
    file.add_head_count(s.heads)
    file.add_head_count_kv(s.kv_heads)
    file.add_key_length(s.head_dim)
    file.add_value_length(s.head_dim)
    file.add_rope_dimension_count(s.head_dim)
    file.add_rope_freq_base(500_000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{kind}"]))
    if s.bitnet:
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(1.0)
    plan = [(name, byte_shape(shape, dtype), dtype) for name, shape, dtype in tensors(s, kind)]
    for name, shape, dtype in plan:
        plain = dtype == "F32"
        of_numpy = np.dtype(np.float32 if plain else np.uint8)
        as_numpy = tuple(n // 4 for n in shape) if plain else shape
        file.add_tensor_info(name, as_numpy, of_numpy, int(np.prod(shape)), None if plain else gguf.GGMLQuantizationType[dtype])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_ti_data_to_file()
    rng = np.random.default_rng(SEED)
    for _, shape, dtype in plan:
        if dtype == "F32":
            file.write_tensor_data(np.ones(shape[0] // 4, np.float32))
        else:
            block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]][1]
            file.write_tensor_data(BLOCKS[dtype](rng, int(np.prod(shape)) // block).reshape(shape))
    file.close()
