"""Quantized keys and values: the kernels of every instruction set against kv.py, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet import _native, kv

ISAS = [name for name, state in _native.self_test().items() if state == "ok"]
SHAPES = [(1, 16, 0, 1), (15, 32, 16, 2), (64, 64, 64, 1), (100, 64, 0, 4), (257, 128, 64, 8), (700, 96, 48, 3), (600, 256, 64, 13)]


def rows(positions: int, head_dim: int, seed: int) -> np.ndarray:
    """Normal numbers with a few large channels, as keys have them, a row of zeros, and one below what f16 scales hold."""
    rng = np.random.default_rng([positions, head_dim, seed])
    x = rng.normal(size=(positions, head_dim)).astype(np.float32)
    x[:, 3] *= 30
    x[positions // 2] = 0
    x[positions // 3] *= np.float32(1e-9)
    return x


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", [1, 2, 8, 16, 64, 256])
def test_hadamard_equals_the_reference(isa: str, block: int) -> None:
    x = rows(7, 256, 0)
    y = _native.hadamard(isa, x, block)
    assert np.array_equal(y, kv.hadamard(x, block))
    # orthonormal, symmetric: twice is the identity, up to log2(block) + 1 roundings of 2^-24 of the block's norm in each of the two
    error = np.abs(kv.hadamard(y, block) - x).reshape(7, -1, block).max(axis=2)
    assert (error <= 2 * 9 * 2.0**-24 * np.linalg.norm(x.reshape(7, -1, block), axis=2)).all()


def test_hadamard_is_the_matrix() -> None:
    h = np.array([[1.0]])
    for _ in range(4):
        h = np.block([[h, h], [h, -h]])
    assert np.allclose(kv.hadamard(np.eye(16, dtype=np.float32), 16), h / 4, atol=1e-7)
    assert [kv.hadamard_block(n) for n in (64, 128, 96, 80, 12)] == [64, 128, 32, 16, 4]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("positions", "head_dim", "group", "queries"), SHAPES)
def test_scores_equal_the_reference(isa: str, bits: int, positions: int, head_dim: int, group: int, queries: int) -> None:
    keys, q = rows(positions, head_dim, 1), rows(queries, head_dim, 2)
    found = _native.kv_scores(isa, bits, group, keys, q, 0.125)[:, :positions]
    codes, scales = kv.quantize_kv(keys, bits, group)
    assert np.array_equal(found, kv.kv_scores(codes, scales, q, 0.125))
    # each key is off by half a step at most, each query by half of its own
    steps = np.repeat(scales, head_dim // scales.shape[1], axis=1) / 2
    q_step = np.abs(q).max(axis=1, keepdims=True) / 254
    bound = (np.abs(q) + q_step) @ steps.T + q_step * np.abs(keys).sum(axis=1) + 2.0**-10 * (np.abs(q) @ np.abs(keys).T)
    assert (np.abs(found - q @ keys.T * 0.125) <= 0.125 * bound + 1e-6).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("positions", "head_dim", "group", "queries"), SHAPES)
def test_weighed_values_equal_the_reference(isa: str, bits: int, positions: int, head_dim: int, group: int, queries: int) -> None:
    values = rows(positions, head_dim, 3)
    rng = np.random.default_rng(positions)
    weights = np.zeros((queries, -(-positions // 16) * 16), np.float32)
    weights[:, :positions] = np.exp(rng.normal(size=(queries, positions)) * 4)
    weights[-1, : positions // 2] = 0  # what a window hides
    found = _native.kv_weigh(isa, bits, group, values, weights)
    codes, scales = kv.quantize_kv(values, bits, group)
    assert np.array_equal(found, kv.kv_weigh(codes, scales, weights[:, :positions]))
    exact = weights[:, :positions].astype(np.float64) @ kv.dequantize_kv(codes, scales).astype(np.float64)
    # a weight is off by half of 1 / 16256 of the largest in its run, times a code of up to 127 or 7; sums round by less than that
    top = {8: 127, 4: 7}[bits]
    assert (np.abs(found - exact) <= positions * top * (weights.max() * scales.max()) / 16256).all()


def test_a_code_is_the_nearest_in_every_group() -> None:
    x = rows(40, 128, 4)
    for bits, top in ((8, 127), (4, 7)):
        codes, scales = kv.quantize_kv(x, bits, 64)
        assert codes.shape == (40, 128) and scales.shape == (40, 2) and np.abs(codes).max() == top
        half_steps = np.repeat(scales, 64, axis=1) / 2
        assert (np.abs(kv.dequantize_kv(codes, scales) - x) <= half_steps * (1 + 2.0**-9) + 2.0**-24).all()
