"""Convert a llama2.c checkpoint (model.bin and tokenizer.bin) to a folder in Hugging Face layout that bitnet runs.

    python examples/convert_llama2c.py stories260K.bin tok512.bin stories260K/
    bitnet run stories260K --prompt "Once upon a time"

Formats (llama2.c, Andrej Karpathy): the checkpoint is seven little-endian int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads,
vocab_size, max_seq_len; a negative vocab_size says that the head is not the embedding), then float32 weights, each kind for all layers
together. Its q and k rows are in the order of interleaved rope and are reordered here for the half-split one. The tokenizer
is int32 longest token, then per token float32 score, int32 length, bytes; a SentencePiece BPE with byte fallback.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from bitnet.errors import BitNetError, FormatError
from bitnet.files import safetensors

HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")


def read_checkpoint(path: Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """(header, tensors under Hugging Face names, float32)."""
    data = path.read_bytes()
    if len(data) < 28:
        raise FormatError(f"{path}: has {len(data)} bytes; a llama2.c checkpoint begins with a header of 28")
    head = dict(zip(HEADER, struct.unpack("<7i", data[:28]), strict=True))
    tied, head["vocab_size"] = head["vocab_size"] > 0, abs(head["vocab_size"])
    dim, hidden, layers, heads, kv_heads, vocab, context = (head[k] for k in HEADER)
    if min(head.values()) < 1 or max(head.values()) > 1 << 20 or dim % heads or heads % kv_heads:
        raise FormatError(f"{path}: the header {tuple(head.values())} is none of llama2.c's: {', '.join(HEADER)}")
    head_dim, kv_dim = dim // heads, dim // heads * kv_heads
    per_layer = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv_dim, dim),
        "self_attn.v_proj": (kv_dim, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    floats = vocab * dim * (1 if tied else 2) + layers * sum(int(np.prod(s)) for s in per_layer.values()) + dim + context * head_dim
    if len(data) != 28 + 4 * floats:
        raise FormatError(f"{path}: has {len(data)} bytes; its header makes it {28 + 4 * floats}")
    values, at = np.frombuffer(data, "<f4", offset=28), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        at += int(np.prod(shape))
        return values[at - int(np.prod(shape)) : at].reshape(shape)

    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    for name, shape in per_layer.items():
        for layer, weight in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):  # rows (pair, 2) -> (2, pair) within each head
                weight = weight.reshape(-1, head_dim // 2, 2, dim).swapaxes(1, 2).reshape(shape)
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ascontiguousarray(weight)
    tensors["model.norm.weight"] = take(dim)
    take(context * head_dim)  # rope tables, which follow from the positions
    if not tied:
        tensors["lm_head.weight"] = take(vocab, dim)
    return head, tensors


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The SentencePiece BPE as a `tokenizers` one: its merges are the vocabulary's pairs in the order of their scores."""
    data, at, pieces, scores = path.read_bytes(), 4, [], []
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, at)
            if not 0 <= length <= len(data) - at - 8:
                raise struct.error(f"a token of {length} bytes at offset {at}")
            pieces.append(data[at + 8 : at + 8 + length].decode("utf-8"))
            scores.append(score)
            at += 8 + length
    except (struct.error, UnicodeDecodeError) as e:
        raise FormatError(f"{path}: is not a llama2.c tokenizer of {vocab_size} tokens ({e})") from None
    pieces = ["<unk>", "<s>", "</s>", *(p.replace(" ", "▁") for p in pieces[3:])]
    ids = {p: i for i, p in reversed(list(enumerate(pieces)))}
    merges = []
    for piece, score in zip(pieces[259:], scores[259:], strict=True):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [(-score, ids[a], ids[b], (a, b)) for a, b in splits if a in ids and b in ids]
    tok = Tokenizer(models.BPE(ids, [m[3] for m in sorted(merges)], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.add_special_tokens([AddedToken(t, normalized=False) for t in pieces[:3]])
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tok


def convert(checkpoint: Path, tokenizer: Path, folder: Path) -> None:
    """Write `folder` with config.json, model.safetensors and tokenizer.json."""
    head, tensors = read_checkpoint(checkpoint)
    tok = read_tokenizer(tokenizer, head["vocab_size"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": head["vocab_size"],
        "hidden_size": head["dim"],
        "intermediate_size": head["hidden_dim"],
        "num_hidden_layers": head["n_layers"],
        "num_attention_heads": head["n_heads"],
        "num_key_value_heads": head["n_kv_heads"],
        "max_position_embeddings": head["max_seq_len"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": 1,
        "eos_token_id": [1, 2],  # llama2.c's stories end where the next one begins
        "dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: convert_llama2c.py MODEL.bin TOKENIZER.bin FOLDER")
    try:
        convert(*(Path(a) for a in sys.argv[1:]))
    except (BitNetError, OSError) as e:
        sys.exit(f"error: {e}")
