"""Stored bytes into panels: the same memory, bit for bit, as the definitions in packing.py and ternary.py, one code at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitnet import _native, packing, ternary

PANEL_ROWS = 16
SHAPES = [(1, 1), (3, 5), (16, 16), (17, 33), (64, 64), (40, 100), (66, 1281), (130, 260), (256, 2560), (33, 5000)]
BLOCK_CODECS = [name for name, codec in packing.BLOCKS.items() if codec.two_bit()]


@pytest.fixture(scope="module", params=[1, 3], ids=["1 thread", "3 threads"])
def model(request: pytest.FixtureRequest) -> Any:
    return _native.Model(
        n_layers=1, vocab_size=4, hidden_size=4, ffn_size=4, n_heads=2, n_kv_heads=2, head_dim=2, max_context=8, norm_eps=1e-5,
        activation="silu", embedding_scale=1.0, attention_scale=1.0, rope_scale=1.0, sliding_window=0, windowed=[False],
        activation_group=0, sub_norms=False, post_norms=False, qk_norms=False, rope_interleaved=False, threads=request.param, isa="scalar",
    )  # fmt: skip


# scheme -> (what a code of each tile of 4 inputs counts in the byte, bias)
LAYOUTS = {
    "ternary": ((1, 4, 16, 64), 1),
    "ternary_base3": ((1, 3, 9, 27, 81), 1),
    "binary": ((1, 2, 4, 8, 16, 32, 64, 128), 1),
    "int4": ((1, 16), 8),
    "fp4": ((1, 16), 0),
    "int8": ((1,), 128),
}


def panels(scheme: str, codes: np.ndarray, groups: int = 1) -> bytes:
    """What kernels.h says of integer codes [rows, cols], with nothing but indexing; every group begins a vector."""
    rows, cols = codes.shape
    factors, bias = LAYOUTS[scheme]
    tiles = len(factors)
    size = ternary.group_size(cols, groups)
    parts = []
    for at in range(0, cols, size):
        part = codes[:, at : at + size]
        grid = np.zeros((-(-rows // PANEL_ROWS) * PANEL_ROWS, -(-part.shape[1] // (4 * tiles)) * 4 * tiles), np.uint8)
        numbers = (part.astype(np.int16) + bias).astype(np.uint8)
        if scheme == "binary":  # a bit is half the code
            numbers //= 2
        elif scheme == "fp4":  # E2M1: the sign, two bits of exponent, one of mantissa
            numbers = (np.searchsorted(ternary.FP4_DOUBLED, np.abs(part)) + 8 * (part < 0)).astype(np.uint8)
        grid[:rows, : part.shape[1]] = numbers
        tiled = grid.reshape(-1, PANEL_ROWS, grid.shape[1] // (4 * tiles), tiles, 4).transpose(
            0, 2, 3, 1, 4
        )  # panel, vector, tile, row, input
        joined = sum(tiled[:, :, tile].astype(np.int64) * factor for tile, factor in enumerate(factors))
        if scheme == "ternary_base3":
            joined += joined // 9 // 7
        parts.append(joined.astype(np.uint8))
    return np.concatenate(parts, axis=1).tobytes()


def scale_panels(scales: np.ndarray) -> bytes:
    rows, groups = scales.shape
    padded = np.zeros((-(-rows // PANEL_ROWS) * PANEL_ROWS, groups), np.float32)
    padded[:rows] = scales
    return padded.reshape(-1, PANEL_ROWS, groups).transpose(0, 2, 1).tobytes()


def random_trits(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng([rows, cols]).integers(-1, 2, (rows, cols)).astype(np.int8)


def in_two_runs(rows: int) -> list[tuple[int, int]]:
    cut = rows // 2 // PANEL_ROWS * PANEL_ROWS
    return [(0, cut), (cut, rows)] if cut else [(0, rows)]


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("scheme", LAYOUTS)
def test_codes(model: Any, scheme: str, rows: int, cols: int) -> None:
    rng = np.random.default_rng(cols)
    most = {"int8": 128, "int4": 8}.get(scheme, 0)
    codes = rng.integers(-most, most, (rows, cols)).astype(np.int8) if most else random_trits(rows, cols)
    if scheme in ("binary", "fp4"):
        values = [-1, 1] if scheme == "binary" else np.concatenate([-ternary.FP4_DOUBLED, ternary.FP4_DOUBLED])
        codes = rng.choice(values, (rows, cols)).astype(np.int8)
    groups = -(-cols // 64) if cols > 100 else 2 if cols > 48 else 1
    scales = rng.normal(size=(rows, groups)).astype(np.float32)
    matrix = _native.Matrix(model, scheme, rows, cols, groups)
    for first, last in in_two_runs(rows):
        matrix.fill_codes(first, codes[first:last])
        matrix.set_scales(first, scales[first:last])
    assert matrix.panels() == panels(scheme, codes, groups) and matrix.scales() == scale_panels(scales)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("scheme", ["ternary", "ternary_base3"])
def test_hugging_face_bytes(model: Any, scheme: str, rows: int, cols: int) -> None:
    trits = random_trits(rows, cols)
    matrix = _native.Matrix(model, scheme, rows, cols)
    packed = packing.pack_hf(trits)
    assert matrix.fill_banded(packed) and matrix.panels() == panels(scheme, trits)
    assert np.array_equal(packing.unpack_hf(packed)[:rows], trits)


@pytest.mark.parametrize("codec", BLOCK_CODECS)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (16, 3), (37, 11), (50, 7)])
@pytest.mark.parametrize("scheme", ["ternary", "ternary_base3"])
@pytest.mark.parametrize("grouped", [False, True])
def test_blocks_of_two_bits(model: Any, codec: str, rows: int, blocks: int, scheme: str, grouped: bool) -> None:
    format = packing.BLOCKS[codec]
    trits = random_trits(rows, blocks * format.block)
    stored = format.pack(trits.reshape(-1, format.block), np.full(rows * blocks, 0.5, np.float32)).reshape(rows, -1)
    groups = blocks if grouped else 1
    matrix, layout = _native.Matrix(model, scheme, *trits.shape, groups), format.two_bit()
    assert layout is not None
    for first, last in in_two_runs(rows):
        assert matrix.fill_two_bit(first, stored[first:last], **layout._asdict())
    assert matrix.panels() == panels(scheme, trits, groups)


def test_formats_that_native_code_reads() -> None:
    assert sorted(BLOCK_CODECS) == ["i2_s", "i2_s_arm", "q2_0", "q2_0_128", "tq2_0"]


@pytest.mark.parametrize("where", [(0, 0), (0, 63), (19, 1000), (63, 1299)])
def test_a_code_of_three_is_seen(model: Any, where: tuple[int, int]) -> None:
    packed = packing.pack_hf(random_trits(4 * 64 - 2, 1300))
    for bits in (0x03, 0x0C, 0x30, 0xC0):
        damaged = packed.copy()
        damaged[where] |= bits
        assert not _native.Matrix(model, "ternary", 4 * 64 - 2, 1300).fill_banded(damaged)
    for codec in BLOCK_CODECS:
        format = packing.BLOCKS[codec]
        trits = random_trits(20, 2 * format.block)
        stored = format.pack(trits.reshape(-1, format.block), np.ones(40, np.float32)).reshape(20, -1)
        layout = format.two_bit()
        assert layout is not None
        stored[19, layout.first_byte + format.block // 4 - 1] |= 0x30
        assert not _native.Matrix(model, "ternary", *trits.shape).fill_two_bit(0, stored, **layout._asdict())


def stored_values(kind: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bits as stored, the float32 that they mean)."""
    if kind == "f32":
        return values, values
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16), values.astype(np.float16).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def values(rows: int, cols: int) -> np.ndarray:
    """float32 [rows, cols]: of every size that f16 can hold, zeros, halves that round either way."""
    rng = np.random.default_rng([rows, cols])
    w = rng.normal(size=(rows, cols)) * 10.0 ** rng.integers(-7, 4, (rows, 1))
    w[rng.random((rows, cols)) < 0.05] = 0
    w[rows // 3] = np.resize(
        np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -5, -3.5, -2.5, -1.75, -1.25, -0.75, -0.25]), cols
    )  # ties of fp4
    w[rows // 2] = np.resize(np.arange(-127, 127.5, 0.5), cols)
    w[rows - 1] = 0 if rows > 1 else 1
    return w.astype(np.float32)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_values_as_they_are(model: Any, kind: str, rows: int, cols: int) -> None:
    bits, _ = stored_values(kind, values(rows, cols))
    matrix = _native.Matrix(model, kind, rows, cols)
    for first, last in in_two_runs(rows):
        assert matrix.fill_values(first, kind, bits[first:last].view(np.uint8))
    expected = np.zeros((-(-rows // PANEL_ROWS) * PANEL_ROWS, -(-cols // 4) * 4), bits.dtype)
    expected[:rows, :cols] = bits
    assert matrix.panels() == expected.reshape(-1, PANEL_ROWS, expected.shape[1]).transpose(0, 2, 1).tobytes()


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("group", [0, 32])
def test_values_quantized(model: Any, kind: str, group: int, rows: int, cols: int) -> None:
    bits, wide = stored_values(kind, values(rows, cols))
    codes, scales = ternary.quantize_int8(wide, group)
    matrix = _native.Matrix(model, "int8", rows, cols, -(-cols // group) if group else 1)
    for first, last in in_two_runs(rows):
        assert matrix.fill_values(first, kind, bits[first:last].view(np.uint8))
    assert matrix.panels() == panels("int8", codes, max(1, scales.size // rows)) and matrix.scales() == scale_panels(
        scales.reshape(rows, -1)
    )


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(("scheme", "group"), [("int4", 32), ("fp4", 32), ("binary", 0), ("binary", 16)])
def test_values_quantized_to_fewer_bits(model: Any, kind: str, scheme: str, group: int, rows: int, cols: int) -> None:
    bits, wide = stored_values(kind, values(rows, cols))
    codes, scales = getattr(ternary, f"quantize_{scheme}")(wide, group)
    groups = scales.shape[1]
    matrix = _native.Matrix(model, scheme, rows, cols, groups)
    for first, last in in_two_runs(rows):
        assert matrix.fill_values(first, kind, bits[first:last].view(np.uint8))
    assert matrix.panels() == panels(scheme, codes, groups) and matrix.scales() == scale_panels(scales)


def test_the_smallest_values_quantized(model: Any) -> None:
    """Scales so small that they are subnormal, zero, or have no finite reciprocal."""
    largest = np.float32([1e-36, 3e-38, 4e-37, 3e-43, 1e-45, 127e-45])
    w = (largest[:, None] * np.linspace(-1, 1, 64, dtype=np.float32)).astype(np.float32)
    with np.errstate(all="ignore"):
        codes, scales = ternary.quantize_int8(w)
    matrix = _native.Matrix(model, "int8", *w.shape)
    assert matrix.fill_values(0, "f32", w.view(np.uint8))
    assert matrix.panels() == panels("int8", codes) and matrix.scales() == scale_panels(scales[:, None])


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("scheme", ["as stored", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen(model: Any, kind: str, scheme: str, bad: float) -> None:
    for where in ((0, 0), (15, 64), (16, 3), (18, 68)):
        w = values(19, 69)
        w[where] = bad
        bits, _ = stored_values(kind, w)
        assert not _native.Matrix(model, kind if scheme == "as stored" else "int8", 19, 69).fill_values(0, kind, bits.view(np.uint8))


def test_bytes_may_lie_anywhere(model: Any) -> None:
    bits, _ = stored_values("bf16", values(32, 72))
    shifted = np.frombuffer(b"\0" + bits.tobytes(), np.uint8)[1:].reshape(32, -1)
    one, other = _native.Matrix(model, "bf16", 32, 72), _native.Matrix(model, "bf16", 32, 72)
    assert one.fill_values(0, "bf16", shifted) and other.fill_values(0, "bf16", bits.view(np.uint8)) and one.panels() == other.panels()


def test_what_would_corrupt_memory_is_refused(model: Any) -> None:
    matrix = _native.Matrix(model, "ternary", 40, 64)
    trits, block = np.zeros((16, 64), np.int8), {"codes": 64, "bytes": 18, "first_byte": 2, "run": 1, "descending": False}
    for call, message in [
        (lambda: matrix.fill_codes(8, trits), "runs of 16"),
        (lambda: matrix.fill_codes(-16, trits), "runs of 16"),
        (lambda: matrix.fill_codes(32, trits), "runs of 16"),
        (lambda: matrix.fill_codes(0, trits[:8]), "runs of 16"),
        (lambda: matrix.fill_codes(0, trits[:, :63].copy()), "another size"),
        (lambda: matrix.fill_codes(0, trits + np.int8(2)), "a weight is none of -1, 0, \\+1"),
        (lambda: _native.Matrix(model, "binary", 16, 64).fill_codes(0, trits), "a weight is none of -1, \\+1"),
        (lambda: _native.Matrix(model, "fp4", 16, 64).fill_codes(0, trits - np.int8(5)), "a weight is none of 0, 1, 2, 3, 4, 6, 8, 12"),
        (lambda: matrix.set_scales(0, np.ones((40, 2), np.float32)), "another size"),
        (lambda: matrix.fill_banded(np.zeros((9, 64), np.uint8)), "one row in four"),
        (lambda: matrix.fill_banded(np.zeros((10, 63), np.uint8)), "another size"),
        (lambda: matrix.fill_values(0, "f32", np.zeros((40, 256), np.uint8)), "another scheme"),
        (lambda: matrix.fill_two_bit(0, np.zeros((16, 17), np.uint8), **block), "another size"),
        (lambda: matrix.fill_two_bit(0, np.zeros((16, 18), np.uint8), **block | {"first_byte": 3}), "no such blocks"),
        (lambda: matrix.fill_two_bit(0, np.zeros((16, 18), np.uint8), **block | {"codes": 96}), "no such blocks"),
        (lambda: _native.Matrix(model, "bf16", 16, 16).fill_values(0, "f16", np.zeros((16, 32), np.uint8)), "another scheme"),
        (lambda: _native.Matrix(model, "bf16", 16, 16).fill_codes(0, trits), "another scheme"),
        (lambda: _native.Matrix(model, "ternary", 16, 65537), "1 to 65536 columns"),
        (lambda: model.set_matrix("embedding", matrix), "expected 4 x 4"),
        (lambda: model.set_matrix("embedding", matrix), "given away"),
        (lambda: matrix.fill_codes(0, trits), "given to a model"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
