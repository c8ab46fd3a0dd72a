"""Every kernel of every instruction set that this CPU has, against ternary.py: equal, not close."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from bitnet import _native, ternary

ISAS = [name for name, state in _native.self_test().items() if state == "ok"]
SCHEMES = ["ternary", "binary", "int4", "fp4", "int8"]
FP4 = np.concatenate([-ternary.FP4_DOUBLED[:0:-1], ternary.FP4_DOUBLED])
# rows (ragged), inputs (from one block to 16384), groups of inputs, tokens (1 to 64)
GRID = [
    (1, 1, 1, 1),
    (16, 16, 1, 1),
    (15, 17, 1, 2),
    (40, 100, 1, 3),
    (33, 256, 2, 9),
    (100, 384, 3, 64),
    (16, 16384, 1, 3),
    (34, 2000, 1, 4),
    (17, 2048, 1, 5),
    (48, 4096, 32, 13),
    (20, 11008, 1, 1),
    (16, 16384, 128, 33),
    (18, 16384, 1, 7),
]


def inputs(kind: str, scheme: str, rows: int, cols: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes int8 [rows, cols], x float32 [tokens, cols])."""
    rng = np.random.default_rng([rows, cols, tokens])
    top = {"int4": 7, "fp4": 12, "int8": 127}.get(scheme, 1)
    if kind == "random":
        codes = rng.integers(-top, top + 1, (rows, cols))
        if scheme in ("binary", "fp4"):
            codes = rng.choice(FP4 if scheme == "fp4" else [-1, 1], (rows, cols))
        return codes.astype(np.int8), rng.normal(size=(tokens, cols)).astype(np.float32)
    sign = {"all plus": 1, "all minus": -1}.get(kind)
    if sign is None:  # alternating: the largest sums that cancel
        x = np.where(np.arange(cols) % 2, -5.0, 5.0)
        return np.where(np.arange(cols) % 2, -top, top).astype(np.int8)[None].repeat(rows, 0), np.float32(x)[None].repeat(tokens, 0)
    return np.full((rows, cols), top, np.int8), np.full((tokens, cols), 7.0 * sign, np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["random", "all plus", "all minus", "alternating"])
@pytest.mark.parametrize(("rows", "cols", "groups", "tokens"), GRID)
def test_integer_products_equal_the_reference(isa: str, scheme: str, kind: str, rows: int, cols: int, groups: int, tokens: int) -> None:
    codes, x = inputs(kind, scheme, rows, cols, tokens)
    scales = np.random.default_rng(rows).normal(size=(rows, groups)).astype(np.float32)
    expected = ternary.matmul_integer(codes, scales, *ternary.quantize_activations(x))
    for threads in (1, 2, 5):
        assert np.array_equal(_native.matmul_integer(isa, threads, scheme, codes, scales, x), expected)


def cuts_a_vector(scheme: str, step: int, cols: int, groups: int) -> bool:
    """Whether a step of the activations may begin within a vector of 32 binary weights, which is refused."""
    size = ternary.group_size(cols, groups)
    return scheme == "binary" and bool(step % 32 or size % 32) and cols > min(step, size)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("scheme", "group", "rows", "cols", "groups", "tokens"),
    [
        (scheme, group, *case)
        for scheme in SCHEMES
        for group in (16, 32, 48, 256)
        for case in GRID
        if not cuts_a_vector(scheme, group, case[1], case[2])
    ],
)
def test_grouped_activations_equal_the_reference(isa: str, scheme: str, group: int, rows: int, cols: int, groups: int, tokens: int) -> None:
    codes, x = inputs("random", scheme, rows, cols, tokens)
    scales = np.random.default_rng(rows).normal(size=(rows, groups)).astype(np.float32)
    expected = ternary.matmul_integer(codes, scales, *ternary.quantize_activations(x, group), group)
    assert np.array_equal(_native.matmul_integer(isa, 2, scheme, codes, scales, x, group), expected)


def as_stored(values: np.ndarray, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """(as they are stored in f32, f16 or bf16, the same widened to float32)."""
    w = values.astype(np.float32)
    if scheme == "f16":
        return w.astype(np.float16), w.astype(np.float16).astype(np.float32)
    if scheme == "bf16":
        bits = (w.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    return w, w


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scheme", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(1, 1, 1), (16, 4, 1), (33, 64, 5), (20, 1001, 9), (17, 2048, 64)])
def test_dense_products_equal_the_reference(isa: str, scheme: str, rows: int, cols: int, tokens: int) -> None:
    rng = np.random.default_rng([rows, cols])
    values, x = rng.normal(size=(rows, cols)), rng.normal(size=(tokens, cols)).astype(np.float32)
    if scheme == "f16":
        values.flat[: min(4, values.size)] = np.array([65504, 6e-8, -6.1e-5, 0])[: values.size]  # largest, subnormals, zero
    stored, w = as_stored(values, scheme)
    assert np.array_equal(_native.matmul_dense(isa, 2, scheme, stored, x), ternary.matmul_dense(w, x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("rows", "cols", "rank", "tokens"),
    [(1, 1, 4, 1), (16, 16, 8, 1), (33, 100, 4, 5), (70, 2048, 8, 3), (20, 1001, 12, 70), (3000, 40, 64, 2)],
)
@pytest.mark.parametrize("largest", [(32767, 32767), (127, 128), (1, 1), (1, 32767)])  # 8 bits where those are enough
def test_low_rank_updates_equal_the_reference(isa: str, rows: int, cols: int, rank: int, tokens: int, largest: tuple[int, int]) -> None:
    rng = np.random.default_rng([rows, cols])
    sides = zip(largest, ((rank, cols), (rows, rank)), strict=True)
    a, b = (rng.integers(-most, most + 1, size=shape).astype(np.int16) for most, shape in sides)
    values = a.astype(np.float32), b.astype(np.float32)
    scales = (1e-9 * rng.normal(size=rank)).astype(np.float32)
    x = rng.normal(size=(tokens, cols)).astype(np.float32)
    expected = ternary.low_rank(*values, scales, x)
    for threads in (1, 3):
        assert np.array_equal(_native.low_rank(isa, threads, a, b, scales, x), expected)
    exact = (x.astype(np.float64) @ values[0].T.astype(np.float64) * scales) @ values[1].T.astype(np.float64)
    # each product and sum is rounded by 2^-24 of itself, of which at most cols + rank + 6 meet in one value
    sizes = (np.abs(x) @ np.abs(values[0].T) * np.abs(scales)) @ np.abs(values[1].T)
    # and A x, before it meets B, by half a step: 1 / 32766 of the largest of four
    fours = np.abs(x.astype(np.float64) @ values[0].T * scales).reshape(tokens, -1, 4)
    rounded = np.repeat(fours.max(axis=2), 4, axis=1) / 32766 @ np.abs(values[1].T)
    assert (np.abs(expected - exact) <= (cols + rank + 6) * 2.0**-24 * sizes + rounded * (1 + 1e-4)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_activations_equal_the_reference(isa: str) -> None:
    rng = np.random.default_rng(5)
    for cols in (1, 15, 16, 17, 300):
        x = np.concatenate(
            [
                rng.normal(size=(6, cols)),
                np.zeros((1, cols)),  # the smallest step
                np.full((1, cols), 1e-7),
                rng.normal(size=(1, cols)) * 1e30,
                np.arange(cols)[None] - cols / 2 + 0.5,  # halves
            ]
        ).astype(np.float32)
        q, step = _native.quantize(isa, x)
        expected_q, expected_step = ternary.quantize_activations(x)
        assert np.array_equal(q, expected_q) and np.array_equal(step, expected_step)


def test_the_environment_chooses_the_instruction_set() -> None:
    def chosen(value: str) -> str:
        code = "from bitnet import _native; print(_native.choose_isa()[0])"
        return subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"BITNET_ISA": value}, capture_output=True, text=True
        ).stdout.strip()

    assert [chosen(isa) for isa in ISAS] == ISAS
    assert chosen("") == ISAS[0] and chosen("mmx") == ""


@pytest.mark.parametrize(
    ("codes", "scales", "x", "message"),
    [
        (np.full((4, 4), 2, np.int8), np.ones((4, 1), np.float32), np.ones((1, 4), np.float32), "a weight is none of -1, 0, \\+1"),
        (np.ones((4, 40), np.int8), np.ones((4, 40), np.float32), np.ones((1, 40), np.float32), "a multiple of 16"),
        (np.ones((4, 4), np.int8), np.ones((3, 1), np.float32), np.ones((1, 4), np.float32), "differ in their rows"),
        (np.ones((4, 4), np.int8), np.ones((4, 1), np.float32), np.ones((1, 5), np.float32), "differ in their inputs"),
        (np.ones((1, 65537), np.int8), np.ones((1, 1), np.float32), np.ones((1, 65537), np.float32), "1 to 65536 columns"),
    ],
)
def test_what_would_be_wrong_is_refused(codes: np.ndarray, scales: np.ndarray, x: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.matmul_integer("scalar", 1, "ternary", codes, scales, x)


def test_activation_steps_that_cut_a_vector_are_refused() -> None:
    codes, scales, x = np.ones((4, 96), np.int8), np.ones((4, 1), np.float32), np.ones((1, 96), np.float32)
    for scheme, step, inputs in (("binary", 48, 32), ("ternary_base3", 32, 20)):
        with pytest.raises(ValueError, match=f"a step of the activations ends within a vector of {inputs} weights"):
            _native.matmul_integer("scalar", 1, scheme, codes, scales, x, step)


def test_codes_that_a_scheme_has_not_are_refused() -> None:
    x, scales = np.ones((1, 4), np.float32), np.ones((4, 1), np.float32)
    for scheme, code, known in (
        ("binary", 0, "-1, \\+1"),
        ("fp4", 5, "0, 1, 2, 3, 4, 6, 8, 12"),
        ("fp4", 13, "0, 1, 2"),
        ("int4", 8, "-8 to 7"),
    ):
        with pytest.raises(ValueError, match=f"a weight is none of {known}"):
            _native.matmul_integer("scalar", 1, scheme, np.full((4, 4), code, np.int8), scales, x)
