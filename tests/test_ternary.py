"""The definitions, against what the papers and torch say."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

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


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_ternarize_keeps_the_dtype(dtype: str | type) -> None:
    t = bitnet.ternarize(WEIGHTS.astype(dtype), alpha=0.5)
    assert t.dtype == dtype and set(np.unique(t)) == {-1, 0, 1}
    single = bitnet.ternarize(np.array(-2, dtype))
    assert isinstance(single, np.ndarray) and single.dtype == dtype and single.shape == () and single == -1


def test_the_default_alpha_zeroes_about_three_percent_of_a_normal_matrix() -> None:
    # P(|z| <= 0.05 * sqrt(2/pi)) = 3.2 %; the standard error over a million samples is 0.02 %
    t = bitnet.ternarize(np.random.default_rng(1).normal(size=1_000_000))
    assert (t == 0).mean() == pytest.approx(0.0318, abs=0.001)


@pytest.mark.filterwarnings("error")
def test_what_ternarize_cannot_keep_its_word_for() -> None:
    assert bitnet.ternarize(np.array([1.0, -1.0, 0.1]), alpha=np.float16(0.5)).tolist() == [1, -1, 0]
    with pytest.raises(UsageError, match="of at most 64 bits"):
        bitnet.ternarize(np.ones(3, np.longdouble))
    with pytest.raises(UsageError, match="are a masked array; expected a plain one"):
        bitnet.ternarize(np.ma.masked_array([1.0, 2.0], [True, False]))


@pytest.mark.filterwarnings("error")
def test_ternarize_takes_what_overflows_in_a_sum() -> None:
    assert bitnet.ternarize(np.array([1e308, 1e308, -1e308, 1e300])).tolist() == [1, 1, -1, 0]
    assert bitnet.ternarize(np.full(1000, 6e4, np.float16)).tolist() == [1] * 1000


def test_ternarize_takes_float8_and_refuses_meta() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        found = bitnet.ternarize(torch.tensor([0.5, -0.5, 0.0, 0.01]).to(dtype), alpha=0.5)
        assert found.dtype == dtype and found.float().tolist() == [1, -1, 0, 0]
    with pytest.raises(UsageError, match=r"of dtype torch\.float8_e8m0fnu; expected floating point that holds -1, 0 and 1"):
        bitnet.ternarize(torch.ones(3).to(torch.float8_e8m0fnu))
    with pytest.raises(UsageError, match="are on torch's device meta, which holds no values; load them first"):
        bitnet.ternarize(torch.ones(3, device="meta"))
    with pytest.raises(UsageError, match=r"a tensor of layout torch\.sparse_coo; expected a dense one"):
        bitnet.ternarize(torch.eye(3).to_sparse())


def test_ternarize_takes_torch_tensors() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    mine = type("Mine", (torch.Tensor,), {"__module__": "elsewhere"})
    assert isinstance(bitnet.ternarize(torch.ones(3).as_subclass(mine)), mine)
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
        (WEIGHTS, True, "alpha is True"),
        (WEIGHTS, 10**400, "expected a finite number >= 0"),
        ([[1.0], [1.0, 2.0]], 0.1, "lists of different lengths"),
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


FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_fp4_weights_become_the_nearest_value() -> None:
    w = np.random.default_rng(5).normal(size=(5, 80)).astype(np.float32)
    w[3, 32:64] = 0
    codes, scales = ternary.quantize_fp4(w)
    assert codes.shape == w.shape and scales.shape == (5, 3) and codes.dtype == np.int8 and scales.dtype == np.float32
    assert np.array_equal(scales, scales.astype(np.float16)) and scales[3, 1] == 0 and np.all(codes[3, 32:64] == 0)
    values = np.concatenate([-FP4_VALUES[:0:-1], FP4_VALUES])
    assert set(np.unique(np.abs(codes) / 2)) == set(FP4_VALUES)
    for row in (0, 3):
        for k in range(80):
            unit = 2 * float(scales[row, k // 32])
            nearest = np.abs(values * unit - w[row, k]).min()
            # the reciprocal of the scale and its product are rounded to 24 bits, on values up to 6 units
            assert abs(codes[row, k] / 2 * unit - w[row, k]) <= nearest + 6 * unit * 2.0**-22


def test_fp4_ties_go_to_the_even_code() -> None:
    between = (FP4_VALUES[1:] + FP4_VALUES[:-1]) / 2
    w = np.float32([[*FP4_VALUES, *between, *-between, -6, 6, 1e-9, -1e-9]])  # the scale is 0.5 exactly
    codes, scales = ternary.quantize_fp4(w)
    assert scales.tolist() == [[0.5]]
    even = FP4_VALUES[[0, 2, 2, 4, 4, 6, 6]]
    assert (codes[0] / 2).tolist() == [*FP4_VALUES, *even, *-even, -6, 6, 0, 0]


def test_binary_weights_are_signs_and_the_best_scale_for_them() -> None:
    w = np.random.default_rng(6).normal(size=(4, 75)).astype(np.float32)
    w[1, :3] = 0.0, -0.0, 1e-30
    for group in (0, 32):
        codes, scales = ternary.quantize_binary(w, group)
        assert scales.shape == (4, 3 if group else 1) and codes.dtype == np.int8 and scales.dtype == np.float32
        assert np.array_equal(codes, np.where(w < 0, -1, 1)) and codes[1, :3].tolist() == [1, 1, 1]
        for number, at in enumerate(range(0, 75, group or 75)):
            part, best = w[:, at : at + (group or 75)].astype(np.float64), scales[:, number, None].astype(np.float64)
            assert np.allclose(best[:, 0], np.abs(part).mean(axis=1), rtol=2**-23)

            def error(scale: np.ndarray, part: np.ndarray = part) -> np.ndarray:
                return ((part - np.where(part < 0, -1, 1) * scale) ** 2).sum(axis=1)

            assert np.all(error(best) < error(best * 1.01)) and np.all(error(best) < error(best * 0.99))


@settings(max_examples=200, deadline=None)
@given(*[st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)] * 3)
def test_fused_multiply_adds_round_once(a: float, b: float, c: float) -> None:
    found = ternary.fused_multiply_add(np.float32(a), np.float32(b), np.float32(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    below, above = np.nextafter(found, np.float32(-np.inf)), np.nextafter(found, np.float32(np.inf))
    off = abs(Fraction(float(found)) - exact)
    for other in (below, above):
        there = abs(Fraction(float(other)) - exact)
        assert off < there or (off == there and found.view(np.int32) % 2 == 0)


def test_fused_multiply_adds_where_rounding_twice_would_fail() -> None:
    a, b = np.float32(1 + 2**-12), np.float32(1 + 2**-12)  # a * b = 1 + 2^-11 + 2^-24, halfway between two float32
    assert ternary.fused_multiply_add(a, b, np.float32(2**-60)) == np.float32(1 + 2**-11 + 2**-23)
    assert ternary.fused_multiply_add(a, b, np.float32(-(2**-60))) == np.float32(1 + 2**-11)
    assert ternary.fused_multiply_add(a, b, np.float32(0)) == np.float32(1 + 2**-11)


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
