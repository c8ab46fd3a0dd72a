"""What is timed, and the bytes that it is held against."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitnet.bench import tune
from bitnet.bench.speed import TOKEN_SEED, kv_bytes_per_token, measure
from bitnet.bench.tune import Candidate, fastest, thread_counts
from bitnet.engine import Engine
from bitnet.kv import KvFormat
from bitnet.models import open_checkpoint
from bitnet.source import EMBEDDED_MODEL, resolve
from bitnet.tuning import Choice
from bitnet.weights import HEADS, load_engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(open_checkpoint(resolve(EMBEDDED_MODEL)), threads=1)


@pytest.mark.parametrize(("prompt_tokens", "depth"), [(3, 0), (3, 2), (3, 7)])
def test_decoding_goes_on_after_the_first_tokens_up_to_the_depth(engine: Engine, prompt_tokens: int, depth: int) -> None:
    seen: list[tuple[int, ...]] = []
    speed = measure(
        engine, prompt_tokens=prompt_tokens, new_tokens=5, depth=depth, batch=2, repetitions=2, progress=lambda *done: seen.append(done),
        around=lambda: seen.append(()),
    )  # fmt: skip
    ids = np.random.default_rng(TOKEN_SEED).integers(engine.config.vocab_size, size=(2, max(prompt_tokens, depth) + 1))[0]
    sequence, expected = engine.sequence(), []
    token = int(engine.forward([(sequence, ids[: depth + 1])])[0].argmax())
    for _ in range(5):
        expected.append(token)
        token = int(engine.forward([(sequence, [token])])[0].argmax())
    assert speed.token_ids == expected
    assert seen == [(1, 4), (2, 4), (), (3, 4), (4, 4), ()]
    assert 0 < speed.outside_matmul_share < 1 and speed.attention_ms > 0


@pytest.mark.parametrize(("kv", "one"), [(KvFormat(), 2 * 2 * 16), (KvFormat(4, 4), 2 * (8 + 2)), (KvFormat(8, 4), 16 + 2 + 8 + 2)])
def test_bytes_of_keys_and_values(engine: Engine, monkeypatch: pytest.MonkeyPatch, kv: KvFormat, one: int) -> None:
    # one: of a head of 16 values, with the scale of a quantized one
    config = replace(engine.config, n_layers=3, n_kv_heads=2, head_dim=16, windowed=(), sliding_window=0)
    monkeypatch.setattr(engine, "config", config)
    monkeypatch.setattr(engine, "_kv", kv)
    assert kv_bytes_per_token(engine, 0, 1) == 3 * 2 * one
    assert kv_bytes_per_token(engine, 10, 2) == 3 * 2 * one * 11.5
    monkeypatch.setattr(engine, "config", replace(config, windowed=(True, False, True), sliding_window=4))
    assert kv_bytes_per_token(engine, 2, 3) == 2 * one * ((3 + 4 + 5) + 2 * (3 + 4 + 4)) / 3


def test_every_number_of_threads_that_may_be_best_is_tried() -> None:
    assert [thread_counts(cores) for cores in (1, 2, 6)] == [[1], [1, 2], [1, 2, 3, 4, 5, 6]]
    assert thread_counts(48) == [1, 2, 4, 8, 16, 32, 48]


def test_the_rule() -> None:
    slow, quick = (Choice("t2", head, 2, rate, 1.0, 0.0) for head, rate in (("stored", 5.0), ("int8", 9.0)))
    assert fastest([Candidate(slow, True), Candidate(quick, True)]) == quick
    assert fastest([Candidate(slow, True), Candidate(quick, False)]) == slow


def test_all_candidates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "usable_cores", lambda: 2)
    monkeypatch.setattr(tune, "MEASURE_S", 0.0)
    seen: list[tuple[int, int]] = []
    found = tune.candidates(open_checkpoint(resolve(EMBEDDED_MODEL)), list(range(40)), lambda *done: seen.append(done))
    tried = [(c.choice.codec, c.choice.head, c.choice.threads) for c in found]
    assert tried[:6] == [(codec, head, 2) for codec in ("t2", "b3") for head in ("stored", "int8", "int4")]
    assert tried[6:] == [(fastest(found[:6]).codec, fastest(found[:6]).head, 1)]
    assert all(c.choice.decode_tok_s > 0 and c.allowed == (c.choice.top1_agreement >= tune.LEAST_AGREEMENT) for c in found)
    assert seen[-1] == (7, 7)


def test_a_model_without_ternary_layers_has_no_codec_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_models = pytest.importorskip("random_models", reason="torch or transformers is not installed (extra [train])")
    monkeypatch.setattr(tune, "usable_cores", lambda: 1)
    monkeypatch.setattr(tune, "MEASURE_S", 0.0)
    checkpoint = open_checkpoint(random_models.save(random_models.qwen3(seed=1), tmp_path))
    assert [(c.choice.codec, c.choice.head) for c in tune.candidates(checkpoint, [1, 2, 3])] == [("auto", h) for h in HEADS]
