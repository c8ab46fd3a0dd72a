"""Quantized caches in whole models: what a token sees was quantized when it was written, so the bits never depend on the batch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet import TernaryTransformer, _native
from bitnet.engine import Engine
from bitnet.errors import UsageError
from bitnet.evaluate.accuracy import log_softmax
from bitnet.evaluate.kv import LENGTHS, KvLoss, kv_losses, left_out
from bitnet.kv import KvFormat, kv_format
from bitnet.models import open_checkpoint
from bitnet.shapes import SHAPES, Shape, random_engine
from bitnet.source import EMBEDDED_MODEL, resolve
from bitnet.weights import load_engine

FORMATS = [
    KvFormat(8, 8),
    KvFormat(4, 4),
    KvFormat(4, 4, rotate=False),
    KvFormat(8, 4, 32, center=False),
    KvFormat(16, 4, 16),
    KvFormat(4, 16),
]
PROMPT = np.random.default_rng(0).integers(4000, size=400).tolist()
Bitnet = Callable[..., Any]


def embedded(threads: int = 2) -> Engine:
    engine = load_engine(open_checkpoint(resolve(EMBEDDED_MODEL)), threads=threads)
    engine.center_keys(PROMPT[:100])
    return engine


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_the_same_bits_in_any_batch_chunks_and_threads(kv: KvFormat) -> None:
    engine, one_thread = embedded(), embedded(1)
    whole = engine.forward([(engine.sequence(kv=kv), PROMPT)], all_logits=True)
    assert not np.array_equal(whole, engine.forward([(engine.sequence(), PROMPT)], all_logits=True))
    assert np.array_equal(whole, one_thread.forward([(one_thread.sequence(kv=kv), PROMPT)], all_logits=True))
    chunks, other = engine.sequence(kv=kv), engine.sequence()
    at = 0
    for n in (1, 1, 15, 100, 130, 9, 1, 143):  # with a sequence of another format in the batch
        both = engine.forward([(chunks, PROMPT[at : at + n]), (other, PROMPT[at : at + n])], all_logits=True)
        assert np.array_equal(both[:n], whole[at : at + n])
        at += n
    chunks.truncate(270)
    assert np.array_equal(engine.forward([(chunks, PROMPT[270:])], all_logits=True), whole[270:])


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_the_same_bits_on_every_instruction_set(kv: KvFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for isa in [name for name, state in _native.self_test().items() if state == "ok"]:
        monkeypatch.setenv("BITNET_ISA", isa)
        engine = embedded()
        assert engine.isa == isa
        found.append(engine.forward([(engine.sequence(kv=kv), PROMPT[:300])], all_logits=True))
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_what_the_bits_say(name: str) -> None:
    s = SHAPES[name]
    values = 2 * s.layers * s.kv_heads * s.head_dim
    scales = 2 * values // 64  # f16, one for 64 values
    sizes = {
        kv: kv.bytes_per_token(s.layers, s.kv_heads, s.head_dim) for kv in (KvFormat(), KvFormat(8, 8), KvFormat(4, 4), KvFormat(8, 4))
    }
    assert list(sizes.values()) == [2 * values, values + scales, values // 2 + scales, 3 * values // 4 + scales]


@pytest.mark.parametrize("head_dim", [16, 24, 96])
@pytest.mark.parametrize("kv", [KvFormat(), KvFormat(8, 8), KvFormat(4, 4, 16), KvFormat(16, 4)], ids=str)
def test_native_memory_is_what_python_says(head_dim: int, kv: KvFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape(2, 32, 32, 4, 2, 64, head_dim))
    engine = random_engine("tiny", threads=1, head="f16")
    if (kv.group_size == 16 and head_dim == 24) or (kv.quantized and kv.group_size == 64 and head_dim == 96):
        with pytest.raises(
            UsageError, match=f"kv_group_size is {kv.group_size}, this model's heads have {head_dim} values; expected a mul"
        ):
            engine.kv = kv
        return
    engine.kv = kv
    sequence = engine.sequence()
    assert sequence.bytes_per_token == engine.kv_bytes_per_token
    engine.forward([(sequence, [1] * 257)])
    assert [page.nbytes for page in sequence.pages()] == [256 * engine.kv_bytes_per_token] * 2


def test_groups_that_fit() -> None:
    assert [kv_format(4).group(n) for n in (16, 64, 128, 256)] == [0, 0, 64, 64]  # 0: the whole head
    assert kv_format(4, kv_group_size=96).group(96) == 0 and kv_format(16, kv_group_size=7).group(64) == 0
    for group in (7, 24, 48, 128):
        with pytest.raises(
            UsageError, match=f"kv_group_size is {group}, this model's heads have 64 values; expected a multiple of 16 that"
        ):
            kv_format(4, kv_group_size=group).group(64)
    assert kv_format(4, kv_bits_k=8) == KvFormat(8, 4) and kv_format(kv_bits_v=4) == KvFormat(16, 4)


def test_the_article_s_call() -> None:
    model = TernaryTransformer.from_pretrained(EMBEDDED_MODEL, kv_bits=4, kv_group_size=64, device="cpu")
    assert model.engine.kv == KvFormat(4, 4, 64) and model.engine.kv_bytes_per_token == 11 * 4 * 2 * (32 + 2)
    out = model.generate("Once upon a time", max_new_tokens=30, temperature=0)
    assert (
        out.text
        == TernaryTransformer.from_pretrained(kv_bits=4, threads=1).generate("Once upon a time", max_new_tokens=30, temperature=0).text
    )


def test_the_report_has_every_format_and_f16_loses_nothing() -> None:
    model = TernaryTransformer.from_pretrained()
    text = "Once upon a time, there was a little girl called Lily. She liked to play in the garden with her dog. " * 40
    losses = kv_losses(model, text)
    ways = [(True, True), (True, False), (False, True), (False, False)]
    assert [(loss.length, loss.cache, loss.rotated, loss.centered) for loss in losses] == [
        (512, "f16", False, False), *[(512, cache, *way) for cache in ("8 bits", "K8V4", "4 bits") for way in ways]
    ]  # fmt: skip
    exact, *others = losses
    assert (
        exact.kl == 0
        and exact.top1 == exact.top1_second_half == 1
        and exact.tokens == 511 * ((len(model.tokenizer.encode(text)) - 1) // 511)
    )
    assert all(0 < loss.kl < 0.1 and loss.kl_second_half > 0 and loss.perplexity < 1.2 * exact.perplexity for loss in others)
    assert others[0].kl < others[4].kl < others[8].kl
    windows = [model.tokenizer.encode(text)[1:][at : at + 511] for at in range(0, exact.tokens, 511)]
    nll = 0.0
    for window in windows:  # the perplexity, once more and plainly
        rows = model.logits([*model.tokenizer.prefix_ids, *window])[:-1].astype(np.float64)
        nll -= (rows[np.arange(511), window] - np.log(np.exp(rows).sum(axis=1))).sum()
    assert exact.perplexity == pytest.approx(np.exp(nll / exact.tokens), rel=1e-9)


def test_what_the_report_leaves_out_is_said() -> None:
    losses = [KvLoss(512, 511, "f16", False, False, 1, 1.0, 0.0, 1.0, 0.0, 1.0)]
    assert left_out(losses, 32768) == "no windows of 2,048 and 4,096 tokens: the text has fewer"
    assert (
        left_out(losses, 3000) == "no windows of 2,048 tokens: the text has fewer; no windows of 4,096 tokens: the model's context is 3,000"
    )
    assert left_out([replace(losses[0], length=n) for n in LENGTHS], 4096) == ""


def test_formats_that_there_are_not() -> None:
    for wrong in ({"key_bits": 5}, {"value_bits": 2}, {"key_bits": 4, "group_size": 0}):
        with pytest.raises(UsageError, match="expected 16, 8 or 4 bits, and a group of at least 1 value"):
            KvFormat(**wrong)
    assert KvFormat(4, 4).group(1024) == 64
    with pytest.raises(UsageError, match="heads have 1040 values, a quantized KV cache takes at most 1024; leave kv_bits at 16"):
        KvFormat(16, 8, 16).group(1040)


def test_the_report_on_the_command_line(bitnet: Bitnet, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The little dog ran after the ball. " * 100)
    done = bitnet("eval", "--kv-report", text, "--json", "--max-bytes", 2500)
    lines = done.stdout.splitlines()
    found = json.loads(lines[-1])
    assert done.exit_code == 0 and len(lines) == 1 + 13 + 1 and found["data"] == str(text) and len(found["results"]) == 13
    assert lines[1].split()[:5] == ["512", "f16", "-", "-", "11,264"]
    assert lines[10].split()[:6] == [
        "512",
        "4",
        "bits",
        "yes",
        "yes",
        "2,992",
    ]
    assert done.stderr == "no windows of 2,048 and 4,096 tokens: the model's context is 1,024\n"
    done = bitnet("eval", "--kv-report", text, "--max-bytes", 50)
    assert done.exit_code == 2 and re.fullmatch(
        rf"error: {text}: the text has \d+ tokens; expected at least 511, one window\n", done.stderr
    )
    done = bitnet("eval", "--kv-report", text, "--kv-bits", 8)
    assert done.exit_code == 2 and "leave --kv-bits, --kv-bits-k and --kv-bits-v out" in done.stderr
    done = bitnet("eval", "--data", text, "--kv-report", text)
    assert done.exit_code == 2 and done.stderr == "error: --data and --kv-report exclude each other (see 'bitnet eval --help')\n"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--kv-bits", "5", "error: kv_bits is 5; expected 16, 8 or 4\n"),
        ("--kv-bits-k", "2", "error: kv_bits_k is 2; expected 16, 8 or 4\n"),
        ("--kv-bits-v", "0", "error: kv_bits_v is 0; expected 16, 8 or 4\n"),
        (
            "--kv-group-size", "48",
            "error: kv_group_size is 48, this model's heads have 64 values; expected a multiple of 16 that divides them: 16, 32, 64\n",
        ),
        (
            "--prefix-cache-bytes", "1000",
            "error: prefix_cache_bytes is 1000, and one page of 256 tokens takes 765952 bytes in this model; expected at least that, or 0 "
            "for no prefix cache\n",
        ),
        ("--prefix-cache-bytes", "-1", "error: prefix_cache_bytes is -1; expected a whole number >= 0\n"),
        ("--max-context", "0", "error: max_context is 0; expected a whole number >= 1\n"),
        ("--max-context", str(1 << 30), "error: max_context is 1073741824; expected 1 to 16777216 tokens\n"),
    ],
)  # fmt: skip
def test_bad_values_are_one_line(bitnet: Bitnet, option: str, value: str, message: str) -> None:
    done = bitnet("run", "-p", "a", "--kv-bits", "4", option, value)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", message)


def test_a_longer_context_must_be_asked_for() -> None:
    prompt = "a " * 1100
    with pytest.raises(UsageError, match="the model's context holds 1024 and one must be left"):
        TernaryTransformer.from_pretrained().generate(prompt)
    with pytest.warns(UserWarning, match="max_context is 2000; the model was made for 1024 tokens, and beyond them its text may be noise"):
        model = TernaryTransformer.from_pretrained(max_context=2000)
    assert model.generate(prompt, max_new_tokens=3).timings["generated_tokens"] == 3
    with pytest.raises(UsageError, match="the model's context holds 100"):
        TernaryTransformer.from_pretrained(max_context=100).generate("a " * 100)


def test_what_all_keys_have_in_common_costs_nothing() -> None:
    """A bias that makes one slow dimension of all keys large: softmax does not feel it, four bits do, unless the mean is taken off."""
    plain, biased = embedded(), load_engine(open_checkpoint(resolve(EMBEDDED_MODEL)), threads=2)
    bias = np.zeros((plain.config.n_kv_heads, plain.config.head_dim), np.float32)
    bias[:, plain.config.head_dim // 2 - 1] = 100  # turns least with the position
    for layer in range(plain.config.n_layers):
        biased._native.set_vector(f"layers.{layer}.k_bias", bias.reshape(-1))
    biased.center_keys(PROMPT[:100])

    def loss(engine: Engine, kv: KvFormat) -> float:
        exact, found = (log_softmax(engine.forward([(engine.sequence(kv=kv), PROMPT)], all_logits=True)) for kv in (KvFormat(), kv))
        return float((np.exp(exact) * (exact - found)).sum(axis=1).mean())

    without = loss(plain, KvFormat(4, 16))
    assert loss(biased, KvFormat(4, 16, center=False)) > 5 * without
    assert loss(biased, KvFormat(4, 16)) < 2 * without


def test_another_center_is_for_sequences_that_begin_after_it() -> None:
    engine = embedded(threads=1)
    began = {kv: engine.sequence(kv=kv) for kv in (KvFormat(8, 8), KvFormat(8, 8, center=False), KvFormat(16, 8))}
    for sequence in began.values():
        engine.forward([(sequence, PROMPT[:8])])
    empty, left = engine.sequence(kv=KvFormat(8, 8)), PROMPT[8:12]
    alike = [sequence for kv, sequence in began.items() if kv.key_bits == 16 or not kv.center]
    before = [engine.forward([(sequence, left)]) for sequence in alike]
    engine.center_keys(PROMPT[:3])
    for rest in (PROMPT[8:9], left):
        with pytest.raises(UsageError, match=r"^forward: the sequence began before center_keys, which changed the keys; begin another$"):
            engine.forward([(began[KvFormat(8, 8)], rest)])
    for sequence, logits in zip(alike, before, strict=True):  # none of their keys has a center
        sequence.truncate(8)
        assert np.array_equal(engine.forward([(sequence, left)]), logits)
    began[KvFormat(8, 8)].truncate(0)
    fresh = engine.forward([(engine.sequence(kv=KvFormat(8, 8)), PROMPT[:8])])
    for sequence in (empty, began[KvFormat(8, 8)]):
        assert np.array_equal(engine.forward([(sequence, PROMPT[:8])]), fresh)


def test_the_keys_of_a_cache_are_read_back() -> None:
    engine = embedded()
    whole, chunks = engine.sequence(), engine.sequence()
    engine.forward([(whole, PROMPT)])
    for at in range(0, len(PROMPT), 7):
        engine.forward([(chunks, PROMPT[at : at + 7])])
    for layer in range(engine.config.n_layers):
        keys = engine._native.keys(whole._cache, layer)
        assert keys.shape == (len(PROMPT), engine.config.n_kv_heads * engine.config.head_dim)
        assert np.array_equal(keys, engine._native.keys(chunks._cache, layer)) and len(np.unique(keys, axis=0)) == len(PROMPT)
    with pytest.raises(ValueError, match="in f16"):
        engine._native.keys(engine.sequence(kv=KvFormat(4, 4))._cache, 0)


def test_pages_of_another_format_are_refused() -> None:
    engine = embedded()
    one, other = engine.sequence(kv=KvFormat(8, 4)), engine.sequence(kv=KvFormat(4, 8))  # of the same size
    engine.forward([(one, PROMPT)])
    with pytest.raises(ValueError, match="a page of another cache"):
        other.share(one.pages(), 100)
