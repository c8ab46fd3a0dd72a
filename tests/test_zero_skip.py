"""Skipping zeros changes no bit, whatever the batch, the threads and the way of reading; and what is decided is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from click.testing import Result

from bitnet import TernaryTransformer, zero_skip
from bitnet.bench.zero_skip import measure_skipping, shift_gates
from bitnet.engine import CODECS, Engine, new_native
from bitnet.errors import UsageError
from bitnet.evaluate.zeros import _counts
from bitnet.models import LINEARS, ModelConfig
from bitnet.models.config import weight_shapes
from bitnet.models.rope import Rope
from bitnet.weights import layer_norms

EMBEDDED = "tinyllm-ternary-v2"


def small_engine(codec: str = "t2", threads: int = 2, width: int = 192, ffn: int = 700, activation: str = "relu2") -> Engine:
    config = ModelConfig(
        architecture="bitnet", vocab_size=97, hidden_size=width, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_size=ffn,
        max_context=128, norm_eps=1e-5, rope=Rope(10_000.0), activation=activation, sub_norms=True, tied=True, attention_scale=0.25,
    )  # fmt: skip
    native, shapes = new_native(config, threads), weight_shapes(config)
    native.set_random("embedding", "int8", *shapes["embedding"], 1, 1)
    for i in range(config.n_layers):
        for number, part in enumerate(LINEARS):
            native.set_random(f"layers.{i}.{part}", CODECS[codec], *shapes[part], 1, 16 * i + number)
        for part in layer_norms(config):
            native.set_vector(f"layers.{i}.{part}", np.ones(shapes[part], np.float32))
    native.set_vector("final_norm", np.ones(shapes["final_norm"], np.float32))
    return Engine(config, native, codec)


@pytest.mark.parametrize("codec", ["t2", "b3"])
@pytest.mark.parametrize("zeros", [0.05, 0.5, 0.8, 0.99])
def test_the_same_bits(codec: str, zeros: float) -> None:
    engine = small_engine(codec)
    shift_gates(engine, zeros)
    ids = np.random.default_rng(0).integers(97, size=60).tolist()
    dense = engine.forward([(engine.sequence(), ids)], all_logits=True)
    engine.zero_skip = True
    assert engine.zero_skip
    whole = engine.forward([(engine.sequence(), ids)], all_logits=True)
    assert np.array_equal(whole, dense)
    one, other = engine.sequence(), engine.sequence()
    rows = [engine.forward([(one, [token]), (other, [token])])[0] for token in ids]
    assert np.array_equal(np.stack(rows), dense)
    for step in (2, 3, 5, 17):
        chunked = engine.sequence()
        parts = [engine.forward([(chunked, ids[at : at + step])], all_logits=True) for at in range(0, 60, step)]
        assert np.array_equal(np.concatenate(parts), dense)
    engine.zero_skip = False
    assert np.array_equal(engine.forward([(engine.sequence(), ids)], all_logits=True), dense)


def test_zeros_are_what_was_asked_and_lines_are_skipped() -> None:
    engine = small_engine()
    shift_gates(engine, 0.8)
    shares = zero_skip.zero_shares(engine, list(range(64)))
    assert all(0.6 < gates < 0.95 and gates <= inputs for gates, inputs in shares)
    found = measure_skipping(engine, new_tokens=8, repetitions=1)
    assert found.same_bits and 0 < found.up_rows_read < 0.4 and 0 < found.down_columns_read <= found.up_rows_read
    assert found.saved_bytes == pytest.approx(engine.skippable_bytes / 2 * (2 - found.up_rows_read - found.down_columns_read))
    assert not engine.zero_skip


def test_no_zeros_without_relu2() -> None:
    engine = small_engine(activation="silu")
    assert not engine.can_skip_zeros
    with pytest.raises(UsageError, match="zero_skip is True; no relu"):
        engine.zero_skip = True
    found = zero_skip.decide(engine, "auto", [1, 2, 3])
    assert not found.on and found.text().startswith("off: no relu^2 feed-forward")
    with pytest.raises(UsageError, match="gate-zeros is for shapes with relu"):
        shift_gates(engine, 0.5)
    with pytest.raises(UsageError, match="expected a share between 0 and 1"):
        shift_gates(small_engine(), 1.5)


def test_auto_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine()
    assert zero_skip.decide(engine, "auto", [1, 2]).text().startswith("off: 0.1 MB of feed-forward weights stay in the cache")
    monkeypatch.setattr(zero_skip, "LEAST_BYTES", 0)
    shift_gates(engine, 0.2)
    found = zero_skip.decide(engine, "auto", range(32))
    assert not found.on and found.gate_zeros is not None and "of the gates are zero; it takes 60%" in found.why
    shift_gates(engine, 0.9)
    monkeypatch.setattr(zero_skip, "LEAST_GAIN", 0.0)
    found = zero_skip.decide(engine, "auto", range(32))
    assert found.on and engine.zero_skip and found.dense_ms and found.skip_ms and "ms a token" in found.why
    monkeypatch.setattr(zero_skip, "LEAST_GAIN", 1e9)
    assert not zero_skip.decide(engine, "auto", range(32)).on and not engine.zero_skip


def test_auto_fits_into_a_small_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_skip, "LEAST_BYTES", 0)
    for context in (1, 5, 6, 20):
        model = TernaryTransformer.from_pretrained(EMBEDDED, max_context=context)
        found = model.zero_skip
        assert found is not None and (found.why == f"a context of {context} tokens leaves nothing to measure") == (context < 6)


def test_the_first_texts_of_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_skip, "LEAST_BYTES", 0)
    monkeypatch.setattr(zero_skip, "LEAST_ZEROS", 0.0)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(3):
            model = TernaryTransformer.from_pretrained(EMBEDDED, threads=1)
            with ThreadPoolExecutor(4) as pool:
                waiting = [pool.submit(model.generate, "Once", max_new_tokens=4, temperature=0) for _ in range(4)]
            assert len({done.result().text for done in waiting}) == 1
    finally:
        sys.setswitchinterval(switch)


def test_groups_of_activations_are_refused() -> None:
    engine = small_engine()
    engine.zero_skip = True
    with pytest.raises(UsageError, match="activation_group is 32; skipping zeros takes one step per token"):
        engine.activation_group = 32


def test_the_embedded_model(bitnet: Callable[..., Result]) -> None:
    dense = TernaryTransformer.from_pretrained(EMBEDDED, zero_skip=False)
    skipping = TernaryTransformer.from_pretrained(EMBEDDED, zero_skip=True)
    assert skipping.engine.zero_skip and skipping.zero_skip is not None and skipping.zero_skip.text() == "on: as asked"
    ids = dense.generate("Once upon a time", max_new_tokens=40, temperature=0).token_ids
    assert skipping.generate("Once upon a time", max_new_tokens=40, temperature=0).token_ids == ids
    assert np.array_equal(dense.logits(ids), skipping.logits(ids))
    record = json.loads(bitnet("run", "-p", "Once", "-n", 8, "--seed", 1, "--json", "--zero-skip").stdout)["zero_skip"]
    assert record["on"] and 0 < record["up_rows_read"] <= 1 and 0 < record["down_columns_read"] <= 1


def test_zeros_of_weights() -> None:
    used = np.ones((32, 32), bool)
    used[:16, :4] = used[20] = False
    (weights, rows, columns, small, tile, *_) = (zero / of for zero, of in _counts(used))
    assert (weights, rows, columns) == ((64 + 32) / 1024, 1 / 32, 0)
    assert (small, tile) == (4 / 64, 1 / 16)


def test_inspect_counts_zeros(bitnet: Callable[..., Result]) -> None:
    done = bitnet("inspect", "--zeros", "--json")
    zeros = json.loads(done.stdout.splitlines()[-1])["zeros"]
    assert zeros["activation"] == "relu2" and len(zeros["layers"]) == 11 and {kind["part"] for kind in zeros["weights"]} == set(LINEARS)
    assert all(0 < layer["gates"] <= layer["inputs"] < 1 for layer in zeros["layers"])
    assert "zeros among the ternary weights" in done.stdout


def test_nothing_to_skip_is_a_warning(bitnet: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "can_skip_zeros", False)
    done = bitnet("run", "-p", "a", "-n", 2, "--zero-skip")
    why = "no relu^2 feed-forward with ternary weights, one scale a row and one step per token"
    assert done.stderr.startswith(f"warning: nothing to skip: {why}; it runs dense, with the same result\nprompt: ")
