"""A real model by somebody else: stories260K (Andrej Karpathy), converted by our example, against an independent forward pass."""

from __future__ import annotations

import heapq
import importlib.util
import struct
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy_llama import NumpyLlama

from bitnet.errors import FormatError
from bitnet.evaluate.perplexity import read_text, score_text
from bitnet.transformer import TernaryTransformer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def converter() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_llama2c", ROOT / "examples" / "convert_llama2c.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source() -> Path:
    folder = ROOT.parent / "shared" / "data" / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("stories260K is not here; its checkpoint is fetched apart from this repository")
    return folder


@pytest.fixture(scope="module")
def folder(converter: ModuleType, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("stories260K")
    converter.convert(source / "stories260K.bin", source / "tok512.bin", target)
    return target


def test_logits_are_those_of_the_independent_forward(folder: Path, source: Path) -> None:
    model, reference = TernaryTransformer.from_pretrained(folder), NumpyLlama(source / "stories260K.bin")
    ids = [1, *np.random.default_rng(0).integers(3, 512, 200).tolist()]
    expected = reference.logits(ids, cache=np.float16)
    # float32 noise may round a key or value to the other neighbour, by 2^-11 of itself; attention averages, the norms are scale-free
    assert np.abs(model.logits(ids) - expected).max() <= 2**-11 * np.abs(expected).max()


def test_it_tells_a_proper_story(folder: Path) -> None:
    story = TernaryTransformer.from_pretrained(folder).generate("Once upon a time", max_new_tokens=60, temperature=0.0).text
    assert story.startswith(", there was a little girl named Lily. She loved to play outside in the park.")


def test_bits_per_byte(folder: Path, source: Path, shared_data: Path) -> None:
    text = read_text(shared_data / "eval" / "tinystories-val-a.txt", max_bytes=100_000)
    model, reference = TernaryTransformer.from_pretrained(folder), NumpyLlama(source / "stories260K.bin")
    ours = score_text(model, text)
    ids = model.tokenizer.encode(text, add_special=False)
    nll = hits = 0.0
    step = reference.context - 1
    for at in range(0, len(ids), step):
        window = ids[at : at + step]
        logits = reference.logits([1, *window])[:-1]
        top = logits.max(-1)
        nll += (top + np.log(np.exp(logits - top[:, None]).sum(-1)) - logits[np.arange(len(window)), window]).sum()
        hits += (logits.argmax(-1) == window).sum()
    assert ours.tokens == len(ids) and ours.bytes == len(text.encode())
    assert ours.bits_per_byte == pytest.approx(nll / np.log(2) / ours.bytes, abs=5e-4)
    assert ours.next_token_accuracy == pytest.approx(hits / len(ids), abs=1e-3)


def llama2c_encode(path: Path, vocab_size: int, text: str) -> list[int]:
    """llama2.c's own tokenization: bytes where a character has no piece, then the best-scored pair first, again and again."""
    data, at, pieces, scores = path.read_bytes(), 4, [], []
    for _ in range(vocab_size):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length])
        scores.append(score)
        at += 8 + length
    ids = {p: i for i, p in reversed(list(enumerate(pieces)))}
    tokens = [ids[b" "]] if text else []
    for ch in text:
        raw = ch.encode()
        tokens += [ids[raw]] if raw in ids and ids[raw] >= 259 else [b + 3 for b in raw]
    while True:
        pairs = [(-scores[ids[pieces[a] + pieces[b]]], i) for i, (a, b) in enumerate(pairwise(tokens)) if pieces[a] + pieces[b] in ids]
        if not pairs:
            return tokens
        _, i = heapq.nsmallest(1, pairs)[0]
        tokens[i : i + 2] = [ids[pieces[tokens[i]] + pieces[tokens[i + 1]]]]


@pytest.mark.parametrize(
    "text", ["Once upon a time", "hello  world", "É, naïve café\n\tx", "🙂 ok", 'Lily\'s "ball" — rolled. 42!', " leading and trailing "]
)
def test_tokens_are_those_of_llama2c(folder: Path, source: Path, text: str) -> None:
    tokenizer = TernaryTransformer.from_pretrained(folder).tokenizer
    ids = tokenizer.encode(text, add_special=False)
    assert ids == llama2c_encode(source / "tok512.bin", 512, text)
    assert tokenizer.decode(ids) == text


def test_bad_checkpoints_are_refused(converter: ModuleType, source: Path, tmp_path: Path) -> None:
    good = (source / "stories260K.bin").read_bytes()
    for name, data, expected in [
        ("short", good[:20], "has 20 bytes; a llama2.c checkpoint begins with a header of 28"),
        ("cut", good[:-4], "its header makes it"),
        ("zero", struct.pack("<7i", *[0] * 7) + good[28:], r"is none of llama2\.c's"),
    ]:
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(FormatError, match=expected):
            converter.read_checkpoint(path)
    (tmp_path / "tok").write_bytes((source / "tok512.bin").read_bytes()[:100])
    with pytest.raises(FormatError, match=r"is not a llama2\.c tokenizer of 512 tokens"):
        converter.read_tokenizer(tmp_path / "tok", 512)
