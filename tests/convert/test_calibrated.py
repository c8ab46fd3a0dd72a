"""Ternary by calibration text: the walk through the layers, thresholds and scales of least output error, and error feedback."""

from __future__ import annotations

from itertools import product as combinations
from pathlib import Path

import numpy as np
import packed_models
import pytest

from bitnet.convert import Ternarization, convert
from bitnet.convert.calibrated import TRIED, as_ternary, best_rows, best_threshold, output_error, refit
from bitnet.convert.layerwise import plain_product, sequences, walk
from bitnet.convert.quantize import ternarized
from bitnet.convert.source import Weight, read, scaled
from bitnet.errors import BitNetError, UsageError
from bitnet.models import open_checkpoint

UNITS = ["tensor", "row", 32, 64]
TEXT = np.random.default_rng(3).integers(0, packed_models.VOCABULARY, (6, 40)).astype(np.int32)
CACHE = 2e-3  # of the logits' norm: the engine's keys and values are f16, rounded by up to 2^-11, in one to six layers


def weight_of(values: np.ndarray, name: str = "layers.0.q") -> Weight:
    return Weight(name, values.shape, "f32", "test", lambda first, last: values[first:last])


def correlated(rows: int = 32, inputs: int = 128, tokens: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights [rows, in] whose rows differ in size, inputs [tokens, in] that go together, their gram)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, inputs)) @ (rng.standard_normal((inputs, inputs)) * rng.random((inputs, 1)) ** 2)
    w = 0.05 * rng.standard_normal((rows, inputs)) * np.exp(0.5 * rng.standard_normal((rows, 1)))
    x = x.astype(np.float32)
    return w.astype(np.float32), x, x.T @ x / np.float32(tokens)


def error_of(w: np.ndarray, made: Weight, gram: np.ndarray) -> float:
    return output_error(w, made.values(0, len(w)), gram, plain_product).relative


@pytest.mark.parametrize("family", packed_models.PARTICULARS)
def test_the_walk_computes_what_the_engine_does(tmp_path: Path, family: str) -> None:
    source = packed_models.write(tmp_path / "m", family, trits=False, **({"num_hidden_layers": 3} if family != "gemma3_text" else {}))
    model, seen = read(open_checkpoint(source)), []
    text = np.array([packed_models.IDS, packed_models.IDS[::-1]], np.int32)
    hidden = walk(model, model.weights["embedding"], text, lambda weight, gram: (seen.append(weight.name), weight)[1])
    head = model.weights["embedding" if model.config.tied else "head"]
    expected = packed_models.logits(source)
    found = hidden[0] @ head.values(0, head.shape[0]).T
    assert np.linalg.norm(found - expected) <= CACHE * np.linalg.norm(expected)
    linears = 7 * model.config.n_layers
    assert len(seen) == len(set(seen)) == linears + (not model.config.tied)
    assert seen[:7] == [f"layers.0.{kind}" for kind in ("q", "k", "v", "o", "gate", "up", "down")]


def test_later_layers_see_what_the_chosen_ones_leave(tmp_path: Path) -> None:
    model, grams = read(open_checkpoint(packed_models.write(tmp_path / "m", "qwen3", trits=False))), []
    for spoilt in (False, True):

        def rule(weight: Weight, gram: np.ndarray, spoilt: bool = spoilt) -> Weight:
            grams.append((weight.kind, gram))
            return weight_of(0 * weight.values(0, weight.shape[0]), weight.name) if spoilt and weight.kind == "v" else weight

        walk(model, model.weights["embedding"], TEXT, rule)
    one, other = dict(grams[:7]), dict(grams[7:])
    assert np.array_equal(one["q"], other["q"])
    assert not other["o"].any() and one["o"].any(), "without values nothing is attended to"
    assert not np.array_equal(one["down"], other["down"])


def test_output_error_is_that_of_the_outputs() -> None:
    w, x, gram = correlated()
    made = ternarized(weight_of(w), Ternarization("absmean"), "f32").values(0, 32)
    y, off = x @ w.T, x @ (w - made).T
    found = output_error(w, made, gram, plain_product, head=8)
    assert found.relative == pytest.approx(np.linalg.norm(off) / np.linalg.norm(y), rel=1e-4)
    by_head = [np.linalg.norm(off[:, at : at + 8]) / np.linalg.norm(y[:, at : at + 8]) for at in range(0, 32, 8)]
    assert found.heads == pytest.approx(by_head, rel=1e-4)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("seed", [0, 1])
def test_auto_is_at_least_as_good_as_any_fixed_alpha(unit: str | int, seed: int) -> None:
    w, _, gram = correlated(seed=seed)
    made, alphas = best_threshold(weight_of(w), gram, unit, "f32", 8, plain_product)
    fixed = [error_of(w, ternarized(weight_of(w), Ternarization("threshold", a, unit), "f32"), gram) for a in TRIED]
    absmean = error_of(w, ternarized(weight_of(w), Ternarization("absmean", None, unit), "f32"), gram)
    assert error_of(w, made, gram) <= min(*fixed, absmean) * (1 + 1e-6)
    assert error_of(w, made, gram) < 0.99 * min(fixed[:4]), "and better than the article's"
    assert isinstance(alphas, tuple) == (unit == "tensor") and (unit != "tensor" or len(alphas) == 4), "one for each head"


def test_auto_takes_the_best_of_all_choices_of_a_head() -> None:
    """Brute force over every pair of alphas of two heads, each with the best scale for both."""
    w, _, gram = correlated(rows=8, inputs=32)
    made, _ = best_threshold(weight_of(w), gram, "tensor", "f32", 4, plain_product)
    best = np.inf
    for pair in combinations(TRIED, repeat=2):
        how = Ternarization("threshold", alphas=(("q", tuple(pair)),))
        trits = ternarized(weight_of(w), how, "f32").codes(0, 8)
        scales, _ = refit(w, w @ gram, trits, np.ones((1, 1), np.float32), gram, plain_product)
        best = min(best, error_of(w, as_ternary(weight_of(w), trits, scales, "f32"), gram))
    assert best <= error_of(w, made, gram) * (1 + 1e-6) and error_of(w, made, gram) <= 1.01 * best, "in turn, not jointly: near the best"


@pytest.mark.parametrize("groups", [1, 4])
def test_refit_lowers_the_output_error(groups: int) -> None:
    w, _, gram = correlated()
    trits = np.sign(w).astype(np.int8) * (np.abs(w) > 0.02)
    start = np.full((32, groups), 0.03, np.float32)
    found, squared = refit(w, w @ gram, trits, start, gram, plain_product)

    def error(scales: np.ndarray) -> float:
        return output_error(w, scaled(trits, scales), gram, plain_product).relative

    assert error(found) < error(start)
    assert squared == pytest.approx(error(found) ** 2 * np.einsum("ri,ij,rj->", w, gram, w, dtype=np.float64), rel=1e-4)
    if groups == 1:  # the closed form: no other scale of a row is better
        assert error(found) <= min(error(found * np.float32(1.01)), error(found * np.float32(0.99)))


def test_best_rows_is_the_least_weight_error() -> None:
    w = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)
    made = best_rows(weight_of(w, "embedding"), "row", "f32").values(0, 6)
    for row, found in zip(w, made, strict=True):
        every = []
        for trits in combinations((-1, 0, 1), repeat=8):
            t = np.array(trits)
            s = row @ t / max(t @ t, 1)
            every.append(((row - s * t) ** 2).sum())
        assert ((row - found) ** 2).sum() == pytest.approx(min(every), rel=1e-5)


def gptq() -> object:
    pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    from bitnet.convert.gptq import ErrorFeedback

    return ErrorFeedback()


def numpy_feedback(w: np.ndarray, scales: np.ndarray, gram: np.ndarray, damping: float) -> np.ndarray:
    """GPTQ from its definition: round one input of those that remain, then solve anew for the best values of all others."""
    h = gram.astype(np.float64) + damping * np.diag(gram).mean() * np.eye(len(gram))
    left, order = w.astype(np.float64).copy(), np.argsort(-np.diag(gram), kind="stable")
    trits = np.zeros(w.shape, np.int8)
    for n, i in enumerate(order):
        s = np.repeat(scales, w.shape[1] // scales.shape[1], axis=1)[:, i]
        trits[:, i] = np.clip(np.rint(left[:, i] / s), -1, 1)
        rest = order[n + 1 :]
        if len(rest):  # argmin over rest of (d_i, d_rest) H (d_i, d_rest)^T with d_i fixed: d_rest = -d_i H_ir H_rr^-1
            off = trits[:, i] * s - left[:, i]
            left[:, rest] -= np.outer(off, np.linalg.solve(h[np.ix_(rest, rest)], h[rest, i]))
    return trits


@pytest.mark.parametrize("groups", [1, 3])
def test_error_feedback_is_its_definition(groups: int) -> None:
    feedback = gptq()
    from bitnet.convert.gptq import DAMPING, error_feedback

    w, _, gram = correlated(rows=5, inputs=192)  # more than one block of columns
    scales = (0.03 + 0.02 * np.random.default_rng(0).random((5, groups))).astype(np.float32)
    upper, order = feedback._factored(gram, "test")
    found = error_feedback(feedback.torch, w, scales, upper, order)
    expected = numpy_feedback(w, scales, gram, DAMPING)
    differing = (found != expected).mean()  # a value within float32's noise of a threshold goes the other way, and takes others with it
    assert differing < 0.02
    error = [output_error(w, scaled(t, scales), gram, plain_product).relative for t in (found, expected)]
    assert error[0] == pytest.approx(error[1], rel=0.02)


@pytest.mark.parametrize("unit", UNITS)
def test_gptq_is_better_than_rounding_where_inputs_go_together(unit: str | int) -> None:
    w, _, gram = correlated()
    made = gptq().ternary(weight_of(w), gram, unit, "f32")
    auto, _ = best_threshold(weight_of(w), gram, unit, "f32", 8, plain_product)
    absmean = ternarized(weight_of(w), Ternarization("absmean", None, unit), "f32")
    assert error_of(w, made, gram) < 0.85 * error_of(w, auto, gram) < error_of(w, absmean, gram)
    assert set(np.unique(made.codes(0, 32)).tolist()) == {-1, 0, 1}


def test_gptq_rounds_where_inputs_do_not_go_together() -> None:
    """H = I: no error can be taken up by another input, so trits are those of plain rounding at their scale."""
    w, _, _ = correlated()
    made = gptq().ternary(weight_of(w), np.eye(128, dtype=np.float32), "row", "f32")
    assert np.array_equal(made.codes(0, 32), np.clip(np.rint(w / made.scales), -1, 1))


@pytest.mark.parametrize(
    "how", [Ternarization(alpha="auto"), Ternarization("gptq"), Ternarization("gptq", scale="row"), Ternarization("gptq", scale=64)]
)
def test_a_model_becomes_ternary(tmp_path: Path, how: Ternarization) -> None:
    if how.method == "gptq":
        gptq()
    source = packed_models.write(tmp_path / "m", "llama", trits=False)
    target, form = (tmp_path / "t", "hf") if how.scale == "tensor" else (tmp_path / "t.gguf", "gguf-q2_0")
    report = convert(source, target, format=form, quantization="ternary", ternarization=how, calibration=TEXT)
    plain = convert(
        source, tmp_path / "p.gguf", format="gguf-q2_0", quantization="ternary", ternarization=Ternarization("absmean"), calibration=TEXT
    )
    assert report.verified and {layer.name for layer in report.layers} == {
        w for w in read(open_checkpoint(source)).weights if "norm" not in w
    }
    for found, other in zip(report.layers, plain.layers, strict=True):
        assert (found.output_error is None) == (found.kind == "embedding")
        if found.output_error is not None and other.output_error is not None and found.kind in ("q", "k", "v"):  # of the same inputs
            assert found.output_error < other.output_error
            assert len(found.head_output_errors) == (4 if found.kind == "q" else 2)
    written = read(open_checkpoint(target))
    assert all(w.scheme == "ternary" for w in written.weights.values() if w.kind in ("q", "k", "v", "o", "gate", "up", "down"))
    packed_models.logits(target)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("method", ["auto", "gptq"])
def test_very_small_weights_keep_their_size(unit: str | int, method: str) -> None:
    w, _, gram = correlated()
    small = w * np.float32(1e-10)

    def made(w: np.ndarray) -> Weight:
        return (
            best_threshold(weight_of(w), gram, unit, "f32", 8, plain_product)[0]
            if method == "auto"
            else gptq().ternary(weight_of(w), gram, unit, "f32")
        )

    assert error_of(small, made(small), gram) == pytest.approx(error_of(w, made(w), gram), rel=0.05)
    assert not made(0 * w).codes(0, 32).any()


def test_sequences_of_a_text() -> None:
    ids = list(range(100, 125))
    assert sequences(ids, [1], 2, 8, 512).tolist() == [[1, *range(100, 107)], [1, *range(107, 114)]]
    assert sequences(ids, [], 128, 8, 6).shape == (4, 6)
    assert sequences(ids, [1], 128, 512, 512).shape == (1, 26), "a short text is one short sequence"
    with pytest.raises(UsageError, match="calibration text has 1 tokens; expected at least 2"):
        sequences([5], [], 128, 512, 512)


@pytest.mark.parametrize("how", [Ternarization(alpha="auto"), Ternarization("gptq")])
def test_what_is_not_finite_is_refused(tmp_path: Path, how: Ternarization) -> None:
    if how.method == "gptq":
        gptq()
    source = packed_models.write(tmp_path / "m", "qwen3", trits=False)
    stored = packed_models.safetensors.read(source / "model.safetensors").tensors
    plain = {name: ("BF16", t.raw().copy()) for name, t in stored.items()}
    for name, message in (
        ("model.layers.0.mlp.up_proj.weight", "holds NaN or infinity"),
        ("model.layers.0.input_layernorm.weight", "not finite"),
    ):
        spoilt = plain[name][1].copy()
        spoilt.reshape(-1)[5] = 0x7FC0
        packed_models.safetensors.write(source / "model.safetensors", plain | {name: ("BF16", spoilt)})
        with pytest.raises(BitNetError, match=message):
            convert(source, tmp_path / "t", quantization="ternary", ternarization=how, calibration=TEXT)
        assert not (tmp_path / "t").exists()


def test_what_needs_calibration_says_so(tmp_path: Path) -> None:
    source = packed_models.write(tmp_path / "m", "qwen3", trits=False)
    for how, what in ((Ternarization(alpha="auto"), "alpha auto"), (Ternarization("gptq"), "gptq")):
        with pytest.raises(UsageError, match=f"{what} needs calibration text"):
            convert(source, tmp_path / "t", quantization="ternary", ternarization=how)
    assert not (tmp_path / "t").exists()
