"""The embedded model written as GGUF, by hand: the same logits to the bit, and what the doctor says when it is written wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import BOOL, F32, I32, STRING, U32, array, file, pair, tensor, value

from bitnet.errors import UsageError
from bitnet.files.hf import Checkpoint
from bitnet.models import canonical, gguf, open_checkpoint
from bitnet.packing import BLOCKS
from bitnet.source import EMBEDDED_MODEL, resolve
from bitnet.transformer import TernaryTransformer
from bitnet.weights import load_engine

IDS = np.random.default_rng(5).integers(1, 4000, 60).tolist()
BF16, I2_S = 30, 36


def write(path: Path, source: Checkpoint, *, i2_s: str = "i2_s", architecture: str = "bitnet-b1.58") -> Path:
    """Embedding in bf16, linear layers in I2_S, norms in f32, and the byte-level vocabulary with its merges."""
    model = canonical(source)
    c, theirs = model.config, gguf.names(model.config)
    tensors, data = [], b""
    for ours, name in model.names.items():
        stored = source.tensors[name]
        if stored.scheme == "ternary":
            trits = stored.trits()
            shape, kind = trits.shape, I2_S
            raw = BLOCKS[i2_s].pack(trits.reshape(-1, 128)).tobytes() + stored.scales().astype("<f4").tobytes() + bytes(28)
        elif len(stored.shape) == 2:
            shape, kind, raw = stored.shape, BF16, stored.raw().tobytes()
        else:
            shape, kind, raw = stored.shape, 0, stored.dense().tobytes()
        tensors.append(tensor(theirs[ours], shape[::-1], kind, len(data)))
        data += raw + bytes(-len(raw) % 32)
    vocabulary = json.loads(source.tokenizer_json or b"")
    texts = [text for text, _ in sorted(vocabulary["model"]["vocab"].items(), key=lambda item: item[1])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["model"]["merges"]]
    counts = {
        "block_count": c.n_layers, "embedding_length": c.hidden_size, "feed_forward_length": c.ffn_size,
        "attention.head_count": c.n_heads, "attention.head_count_kv": c.n_kv_heads, "context_length": c.max_context,
    }  # fmt: skip
    pairs = [pair("general.architecture", value(STRING, architecture))]
    pairs += [pair(f"{architecture}.{key}", value(U32, n)) for key, n in counts.items()]
    pairs += [pair(f"{architecture}.attention.layer_norm_rms_epsilon", value(F32, c.norm_eps))]
    pairs += [pair(f"{architecture}.rope.freq_base", value(F32, c.rope.theta))]
    pairs += [pair("tokenizer.ggml.model", value(STRING, "gpt2")), pair("tokenizer.ggml.pre", value(STRING, "gpt-2"))]
    pairs += [pair("tokenizer.ggml.tokens", array(STRING, texts)), pair("tokenizer.ggml.merges", array(STRING, merges))]
    special = {token["id"] for token in vocabulary["added_tokens"] if token["special"]}
    pairs += [pair("tokenizer.ggml.token_type", array(I32, [3 if i in special else 1 for i in range(len(texts))]))]
    pairs += [pair("tokenizer.ggml.bos_token_id", value(U32, 0)), pair("tokenizer.ggml.eos_token_id", value(U32, 0))]
    pairs += [pair("tokenizer.ggml.add_bos_token", value(BOOL, True))]
    path.write_bytes(file(pairs, tensors, data))
    return path


@pytest.fixture(scope="module")
def embedded() -> Checkpoint:
    return open_checkpoint(resolve(EMBEDDED_MODEL))


def logits(checkpoint: Checkpoint) -> np.ndarray:
    engine = load_engine(checkpoint, threads=2)
    return engine.forward([(engine.sequence(), IDS)], all_logits=True)


@pytest.mark.parametrize("architecture", ["bitnet", "bitnet-b1.58", "bitnet-25"])
def test_the_same_bits_as_from_its_folder(tmp_path: Path, embedded: Checkpoint, architecture: str) -> None:
    found = open_checkpoint(write(tmp_path / "m.gguf", embedded, architecture=architecture))
    assert np.array_equal(logits(found), logits(embedded))


def test_the_same_text_as_from_its_folder(tmp_path: Path, embedded: Checkpoint) -> None:
    ours = TernaryTransformer.from_pretrained(write(tmp_path / "model.bin", embedded))
    theirs = TernaryTransformer.from_pretrained(EMBEDDED_MODEL)
    prompt = "Once upon a time, in 1999, there wasn't a fox."
    assert ours.tokenizer.encode(prompt, add_special=False) == theirs.tokenizer.encode(prompt, add_special=False)
    options = {"max_new_tokens": 40, "temperature": 0}
    assert ours.engine.activations == "int8 per token"
    assert ours.generate(prompt, **options).text == theirs.generate(prompt, **options).text  # type: ignore[arg-type]


def test_i2_s_of_an_arm_build_is_read_when_asked_for_and_named_by_the_doctor(tmp_path: Path, embedded: Checkpoint) -> None:
    path = write(tmp_path / "m.gguf", embedded, i2_s="i2_s_arm")
    assert not np.allclose(logits(open_checkpoint(path)), logits(embedded), atol=0.5), "read as usual it is noise"
    assert np.array_equal(logits(open_checkpoint(path, i2_s="arm")), logits(embedded))
    with pytest.raises(UsageError, match="has no I2_S tensors"):
        open_checkpoint(resolve(EMBEDDED_MODEL), i2_s="arm")


def test_the_doctor_names_the_arm_build(tmp_path: Path, embedded: Checkpoint) -> None:
    from click.testing import CliRunner

    from bitnet.cli import cli

    done = CliRunner().invoke(cli, ["doctor", str(write(tmp_path / "m.gguf", embedded, i2_s="i2_s_arm"))])
    assert done.exit_code == 1 and "--i2-s arm" in done.stdout, done.stdout
