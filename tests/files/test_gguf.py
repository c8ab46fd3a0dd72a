"""The GGUF reader and its block formats, against what other programs wrote and against the `gguf` package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import ARRAY, BOOL, F32, F64, I8, I16, I32, I64, STRING, U8, U16, U32, U64, array, file, healthy, pair, tensor, value

from bitnet.errors import FormatError, UnsupportedModelError
from bitnet.files import ggml, gguf
from bitnet.packing import BLOCKS

GOLDEN = Path(__file__).parents[1] / "golden" / "blocks"
IDS = {kind.name: number for number, kind in ggml.TYPES.items()}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["i2_s", "q1_0", "q2_0", "tq1_0", "tq2_0"])
def test_bytes_that_other_programs_wrote(tmp_path: Path, name: str) -> None:
    golden = np.load(GOLDEN / f"{name}_24x768.npz")
    raw, trits = golden["bytes"].tobytes(), golden["trits"]
    path = write(tmp_path / "x.gguf", file([], [tensor("w", (768, 24), IDS[name])], raw))
    found = gguf.read(path).tensors["w"]
    assert found.shape == (24, 768) and found.scheme == ("binary" if name == "q1_0" else "ternary")
    assert np.array_equal(found.trits(), trits)
    assert np.all(found.scales() == golden["scale"]) and found.scales().shape == (
        (1,) if name == "i2_s" else (24, 768 // BLOCKS[name].block)
    )
    assert np.array_equal(found.dense(), trits * np.float32(golden["scale"]))
    assert np.array_equal(found.dense_rows(5, 9), found.dense()[5:9])


@pytest.mark.parametrize("name", ["i2_s", "q1_0", "q2_0", "tq1_0", "tq2_0"])
def test_packing_gives_the_same_bytes(name: str) -> None:
    golden, codec = np.load(GOLDEN / f"{name}_24x768.npz"), BLOCKS[name]
    raw = golden["bytes"].reshape(-1)
    blocks = raw[: raw.size // codec.nbytes * codec.nbytes if name != "i2_s" else -ggml.I2_S_TAIL].reshape(-1, codec.nbytes)
    codes = golden["trits"].reshape(-1, codec.block)
    scales = None if codec.scale_at is None else np.full(len(codes), golden["scale"], np.float32)
    assert np.array_equal(codec.pack(codes, scales), blocks)


def test_i2_s_as_an_arm_build_wrote_it() -> None:
    """64 consecutive weights in 16 bytes: byte p holds weights p, 16 + p, 32 + p and 48 + p, the first in the highest bits."""
    blocks = np.random.default_rng(4).integers(0, 256, (3, 32)).astype(np.uint8)
    codes = BLOCKS["i2_s_arm"].unpack(blocks).reshape(-1, 64)
    for stretch, packed in zip(codes, blocks.reshape(-1, 16), strict=True):
        for p in range(16):
            assert [stretch[16 * k + p] + 1 for k in range(4)] == [packed[p] >> 6, packed[p] >> 4 & 3, packed[p] >> 2 & 3, packed[p] & 3]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_code_survives_a_round_trip(name: str) -> None:
    codec = BLOCKS[name]
    codes = np.random.default_rng(1).integers(-1, 2, (50, codec.block)).astype(np.int8)
    if name == "q1_0":
        codes = np.where(codes == 0, np.int8(1), codes)
    scales = None if codec.scale_at is None else np.linspace(0.5, 2, 50).astype(np.float16).astype(np.float32)
    blocks = codec.pack(codes, scales)
    assert np.array_equal(codec.unpack(blocks), codes)
    assert scales is None or np.array_equal(codec.scales(blocks), scales)


def test_ptq1_0_by_its_description() -> None:
    """Element by element, as the layout is described: no file of another program is at hand for this one."""
    block = np.random.default_rng(3).integers(0, 256, (1, 28)).astype(np.uint8)
    codes = BLOCKS["ptq1_0"].unpack(block)[0]

    def trit(byte: int, k: int) -> int:
        return ((byte * 3**k & 255) * 3 >> 8) - 1

    for e in range(128):
        if e < 80:
            expected = trit(int(block[0, e & 15]), e >> 4)
        elif e < 120:
            expected = trit(int(block[0, 16 + (e - 80 & 7)]), e - 80 >> 3)
        else:
            expected = trit(int(block[0, 24 + (e - 120 & 1)]), e - 120 >> 1)
        assert codes[e] == expected, e


@pytest.mark.parametrize("name", [*ggml.VALUES, "f16", "bf16", "f32", "f64", "i8", "i16", "i32"])
def test_values_equal_those_of_the_gguf_package(tmp_path: Path, name: str) -> None:
    quants = pytest.importorskip("gguf", reason="the gguf package, an oracle, is not installed").quants
    from gguf import GGMLQuantizationType

    kind, rng = ggml.TYPES[IDS[name]], np.random.default_rng(2)
    rows, columns = 7, 512
    raw = rng.integers(0, 256, (rows, columns // kind.block * kind.nbytes)).astype(np.uint8)
    found = gguf.read(write(tmp_path / "x.gguf", file([], [tensor("w", (columns, rows), IDS[name])], raw.tobytes()))).tensors["w"]
    with np.errstate(all="ignore"):
        if name in ggml.VALUES or name == "bf16":
            expected = quants.dequantize(raw, GGMLQuantizationType(IDS[name]))
        else:
            expected = raw.view({"f16": "<f2", "f32": "<f4", "f64": "<f8", "i8": "i1", "i16": "<i2", "i32": "<i4"}[name]).astype(np.float32)
    assert found.dense().dtype == np.float32 and np.array_equal(found.dense(), expected, equal_nan=True)
    for first, last in ((0, 1), (3, 7), (2, 2)):
        assert np.array_equal(found.dense_rows(first, last), expected[first:last], equal_nan=True)


def test_metadata_of_every_type(tmp_path: Path) -> None:
    numbers = {U8: 200, I8: -5, U16: 60000, I16: -300, U32: 4_000_000_000, I32: -7, U64: 1 << 63, I64: -(1 << 40)}
    pairs = [pair(f"n{kind}", value(kind, item)) for kind, item in numbers.items()]
    pairs += [
        pair("f32", value(F32, 0.5)),
        pair("f64", value(F64, 0.1)),
        pair("yes", value(BOOL, True)),
        pair("text", value(STRING, "ü\0\n")),
    ]
    pairs += [
        pair("texts", array(STRING, ["a", "", b"\xff\xfe", "日本"])),
        pair("flags", array(BOOL, [True, False])),
        pair("none", array(I32, [])),
    ]
    pairs += [pair("odd", array(F32, [1.5, 2.5]))]
    found = gguf.read(write(tmp_path / "x.gguf", file(pairs))).metadata
    assert [found[f"n{kind}"] for kind in numbers] == list(numbers.values())
    assert (found["f32"], found["f64"], found["yes"], found["text"]) == (0.5, 0.1, True, "ü\0\n")
    assert found["texts"] == ["a", "", "\ufffd\ufffd", "日本"]
    assert found["flags"].tolist() == [True, False] and found["none"].size == 0 and found["odd"].tolist() == [1.5, 2.5]


def test_metadata_equal_what_the_gguf_package_writes(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf", reason="the gguf package, an oracle, is not installed")
    writer = package.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["x", "yz"])
    writer.add_custom_alignment(64)
    weights = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("w", weights)
    writer.add_tensor("v", weights[0].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf.read(tmp_path / "x.gguf")
    assert found.metadata["general.architecture"] == "llama" and found.metadata["tokenizer.ggml.tokens"] == ["x", "yz"]
    assert found.tensors["w"].shape == (3, 4) and np.array_equal(found.tensors["w"].dense(), weights)
    assert found.tensors["v"].scheme == "f16" and np.array_equal(found.tensors["v"].dense(), weights[0])


def q2_0(block: int, rows: int, extra: int = 0) -> bytes:
    """Two Q2_0 tensors of `rows` x 256 in blocks of 64 or 128."""
    nbytes = rows * 256 // block * (18 if block == 64 else 34)
    padded = -(-nbytes // 32) * 32
    one = np.zeros((rows * 256 // block, nbytes * block // rows // 256), np.uint8)
    one[:, :2] = np.array([1.0], "<f2").view(np.uint8)
    one[:, 2:] = 0b10_01_00_10
    data = one.tobytes().ljust(padded, b"\0") + one.tobytes() + b"\0" * extra
    return file([], [tensor("a", (256, rows), 42), tensor("b", (256, rows), 42, padded)], data)


@pytest.mark.parametrize(("block", "rows"), [(64, 5), (128, 5), (64, 40), (128, 40)])
def test_q2_0_is_told_by_its_size(tmp_path: Path, block: int, rows: int) -> None:
    for extra in (0, 20):
        tensors = gguf.read(write(tmp_path / "x.gguf", q2_0(block, rows, extra))).tensors
        for found in tensors.values():
            assert found.scales().shape == (rows, 256 // block) and np.all(found.scales() == 1)
            assert np.array_equal(found.trits()[0, :4], [1, -1, 0, 1])


def test_q2_0_may_hold_plus_two(tmp_path: Path) -> None:
    block = np.array([0.5], "<f2").tobytes() + b"\xff" * 16
    found = gguf.read(write(tmp_path / "x.gguf", file([], [tensor("w", (64, 1), 42)], block))).tensors["w"]
    assert np.all(found.codes() == 2) and np.all(found.dense() == 1.0)
    with pytest.raises(FormatError, match="holds a code of 3, which stands for \\+2 scales"):
        found.trits()


@pytest.mark.parametrize("name", ["tq2_0", "i2_s"])
def test_a_code_that_stands_for_nothing_is_refused(tmp_path: Path, name: str) -> None:
    raw = np.full(66 if name == "tq2_0" else 96, 0xFF, np.uint8).tobytes()
    found = gguf.read(write(tmp_path / "x.gguf", file([], [tensor("w", (256, 1), IDS[name])], raw))).tensors["w"]
    with pytest.raises(FormatError, match="tensor 'w': holds a code of 3"):
        found.codes()


def test_what_is_only_listed_is_refused_when_asked_for(tmp_path: Path) -> None:
    found = gguf.read(write(tmp_path / "x.gguf", file([], [tensor("w", (256, 1), IDS["iq2_xxs"])], bytes(66)))).tensors["w"]
    assert found.scheme == "iq2_xxs" and found.nbytes == 66
    with pytest.raises(UnsupportedModelError, match="stored as iq2_xxs, which this build lists but does not compute with"):
        found.dense()


def test_the_file_that_mutations_begin_from_is_sound(tmp_path: Path) -> None:
    found = gguf.read(write(tmp_path / "x.gguf", healthy()))
    assert len(found.tensors) == 9 and len(found.metadata) == 11 and ARRAY == 9
    for each in found.tensors.values():
        assert each.dense().shape == each.shape
