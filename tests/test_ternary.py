"""The definitions, against what the papers and torch say."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import bitnet
from bitnet import ternary
from bitnet.errors import UsageError

WEIGHTS = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
floats = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3), elements=st.floats(-1e3, 1e3, width=32))


@settings(max_examples=60, deadline=None)
@given(floats, st.floats(0, 3))
def test_ternarize_keeps_signs_above_the_threshold(weights: np.ndarray, alpha: float) -> None:
    t = bitnet.ternarize(weights, alpha)
    assert t.shape == weights.shape and t.dtype == weights.dtype
    threshold = alpha * np.abs(weights.astype(np.float64)).mean()
    assert np.array_equal(t, np.sign(weights) * (np.abs(weights.astype(np.float64)) > threshold))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_ternarize_keeps_the_dtype(dtype: type) -> None:
    t = bitnet.ternarize(WEIGHTS.astype(dtype), alpha=0.5)
    assert t.dtype == dtype and set(np.unique(t)) == {-1, 0, 1}


def test_the_default_alpha_zeroes_about_three_percent_of_a_normal_matrix() -> None:
    # P(|z| <= 0.05 * sqrt(2/pi)) = 3.2 %; the standard error over a million samples is 0.02 %
    t = bitnet.ternarize(np.random.default_rng(1).normal(size=1_000_000))
    assert (t == 0).mean() == pytest.approx(0.0318, abs=0.001)


def test_ternarize_takes_torch_tensors() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        w = torch.tensor(WEIGHTS).to(dtype).requires_grad_()
        t = bitnet.ternarize(w, alpha=0.3)
        assert isinstance(t, torch.Tensor) and t.dtype == dtype and t.shape == w.shape
        expected = bitnet.ternarize(w.detach().double().numpy(), alpha=0.3)
        assert np.array_equal(t.double().numpy(), expected)


@pytest.mark.parametrize(
    ("weights", "alpha", "message"),
    [
        (WEIGHTS, -0.1, "alpha is -0.1; expected a finite number >= 0"),
        (WEIGHTS, float("nan"), "alpha is nan"),
        (WEIGHTS, "0.1", "alpha is '0.1'"),
        (np.zeros((0, 3), np.float32), 0.1, "the weights are empty (shape (0, 3))"),
        (np.array([1.0, np.inf], np.float32), 0.1, "NaN or infinity"),
        (np.array([1, 2, 3]), 0.1, "dtype int64; expected floating point"),
    ],
)
def test_ternarize_refuses(weights: np.ndarray, alpha: float, message: str) -> None:
    with pytest.raises(UsageError) as error:
        bitnet.ternarize(weights, alpha)
    assert message in str(error.value)


def test_importing_bitnet_and_ternarizing_imports_no_torch() -> None:
    code = (
        "import sys, numpy, bitnet, bitnet.transformer, bitnet.engine; bitnet.ternarize(numpy.ones(3)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=60, deadline=None)
@given(floats)
def test_absmean_is_the_threshold_of_one_half(weights: np.ndarray) -> None:
    trits, scale = ternary.absmean(weights)
    assert scale == np.float32(max(np.abs(weights).mean(dtype=np.float64), 1e-5))
    ratio = np.abs(weights) / scale
    clear = np.abs(ratio - 0.5) > 1e-6  # at the boundary the rounding of the ratio decides
    assert np.array_equal(trits[clear], (np.sign(weights) * (ratio > 0.5))[clear])


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 70)), elements=st.floats(-1e4, 1e4, width=32)))
def test_activations_are_within_half_a_step(x: np.ndarray) -> None:
    q, step = ternary.quantize_activations(x)
    assert q.dtype == np.int8 and step.shape == (len(x),)
    # float32: the products and quotients carry a few units of 2^-24 each, on values up to 127 steps
    assert np.all(np.abs(q * step[:, None].astype(np.float64) - x) <= step[:, None] * (0.5 + 127 * 2**-21))


def test_activations_round_half_to_even() -> None:
    q, step = ternary.quantize_activations(np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32))
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]] and step == [1.0]


def test_activations_equal_those_of_transformers() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    integrations = pytest.importorskip("transformers.integrations.bitnet", reason="transformers is not installed (extra [train])")
    x = np.random.default_rng(2).normal(size=(20, 300)).astype(np.float32)
    theirs = integrations.ActQuant.apply(torch.tensor(x)).numpy()
    q, step = ternary.quantize_activations(x)
    assert np.allclose(q * step[:, None], theirs, rtol=2**-21, atol=0)
    weights = integrations.WeightQuant.apply(torch.tensor(WEIGHTS)).numpy()
    trits, scale = ternary.absmean(WEIGHTS)
    assert np.array_equal(np.sign(weights), trits) and np.allclose(np.abs(weights).max(), scale, rtol=2**-21)


def test_int8_rows_are_within_half_a_step() -> None:
    w = WEIGHTS.copy()
    w[3] = 0
    codes, scales = ternary.quantize_int8(w)
    assert codes.min() >= -127 and np.all(codes[3] == 0)
    assert np.all(np.abs(codes * scales[:, None] - w) <= scales[:, None] * (0.5 + 127 * 2**-21))


def test_int4_weights_come_back_within_half_a_step() -> None:
    w = np.random.default_rng(4).normal(size=(5, 80)).astype(np.float32)
    w[3, 32:64] = 0
    codes, scales = ternary.quantize_int4(w)
    assert codes.shape == w.shape and scales.shape == (5, 3) and codes.dtype == np.int8 and scales.dtype == np.float32
    assert np.abs(codes).max() == 7 and np.all(codes[3, 32:64] == 0) and scales[3, 1] == 0
    assert np.array_equal(scales, scales.astype(np.float16))
    steps = scales.repeat(32, axis=1)[:, :80]
    # half a step, and 7 steps whose scale f16 rounded by up to 2^-11
    assert np.all(np.abs(codes * steps - w) <= steps * (0.5 + 7 * 2.0**-11 + 2.0**-20))


def test_integer_products_are_the_dense_ones() -> None:
    rng = np.random.default_rng(3)
    trits, x = rng.integers(-1, 2, (10, 64)).astype(np.int8), rng.normal(size=(3, 64)).astype(np.float32)
    scales = rng.random((10, 4)).astype(np.float32)
    q, step = ternary.quantize_activations(x)
    dense = (trits * scales.repeat(16, axis=1)).astype(np.float64)
    expected = (q * step[:, None].astype(np.float64)) @ dense.T
    assert np.allclose(ternary.matmul_integer(trits, scales, q, step), expected, rtol=1e-5, atol=1e-5)
    w = rng.normal(size=(10, 64)).astype(np.float32)
    assert np.allclose(ternary.matmul_dense(w, x), x.astype(np.float64) @ w.T, rtol=1e-5, atol=1e-5)
