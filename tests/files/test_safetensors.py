"""Our reader and writer against the official `safetensors` package, and against bytes laid out by hand."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors as official

from bitnet.errors import BitNetError, FormatError, UnsupportedModelError, UsageError
from bitnet.files import safetensors
from bitnet.files.tensor import DTYPES
from bitnet.packing import pack_hf

OFFICIAL_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip


def some_values(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.default_rng(len(dtype))
    form = DTYPES[dtype]
    if dtype == "BF16":
        return (generator.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if form.kind == "f":
        return generator.standard_normal(shape).astype(form)
    return generator.integers(0, 2 if dtype == "BOOL" else 100, shape).astype(form)


def official_file(path: Path, tensors: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str] | None = None) -> Path:
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, (_, array) in tensors.items()}  # kept until they are written
    if hasattr(official, "TensorSpec"):  # since 0.8
        parts = {
            n: official.TensorSpec(dtype=OFFICIAL_NAMES[tensors[n][0]], shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes)
            for n, a in arrays.items()
        }
    else:
        parts = {n: {"dtype": OFFICIAL_NAMES[tensors[n][0]], "shape": list(a.shape), "data": a.tobytes()} for n, a in arrays.items()}
    path.write_bytes(official.serialize(parts, metadata))
    return path


def raw_file(path: Path, header: str, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + data)
    return path


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 0, 3), (2, 3, 4, 5)])
def test_reads_what_the_official_package_writes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays = {f"t.{dtype}": (dtype, some_values(dtype, shape)) for dtype in DTYPES}
    file = safetensors.read(official_file(tmp_path / "a.safetensors", arrays, {"made": "elsewhere", "Ġ": "é😀\n"}))
    assert file.metadata == {"made": "elsewhere", "Ġ": "é😀\n"}
    assert file.tensors.keys() == arrays.keys()
    for name, (dtype, array) in arrays.items():
        tensor = file.tensors[name]
        assert (tensor.name, tensor.shape, tensor.dtype, tensor.scheme) == (name, shape, dtype, dtype.lower())
        assert tensor.nbytes == array.nbytes
        assert tensor.raw().dtype == array.dtype
        np.testing.assert_array_equal(tensor.raw(), array)
        if dtype.startswith("F8"):
            with pytest.raises(UnsupportedModelError, match=f"t.{dtype}'.*lists but does not compute with"):
                tensor.dense()
            continue
        dense = tensor.dense()
        assert dense.dtype == np.float32 and dense.shape == shape
        expected = (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array.astype(np.float32)
        np.testing.assert_array_equal(dense, expected)


def test_the_official_package_reads_what_we_write(tmp_path: Path) -> None:
    arrays = {f"t.{dtype}": (dtype, some_values(dtype, (3, 5))) for dtype in DTYPES}
    plain = {
        "scalar": np.float32(2.5).reshape(()),
        "empty": np.zeros((0, 4), np.int8),
        "turned": np.arange(12, dtype=np.float64).reshape(3, 4).T,
    }
    path = tmp_path / "b.safetensors"
    safetensors.write(path, {**arrays, **plain}, {"config": '{"a": "é\\n"}', "format": "pt"})

    there = dict(official.deserialize(path.read_bytes()))
    assert there.keys() == arrays.keys() | plain.keys()
    for name, (dtype, array) in {**arrays, "empty": ("I8", plain["empty"]), "turned": ("F64", plain["turned"])}.items():
        assert (there[name]["dtype"], there[name]["shape"]) == (dtype, list(array.shape))
        assert bytes(there[name]["data"]) == array.tobytes()
    with official.safe_open(path, "numpy") as file:
        assert file.metadata() == {"config": '{"a": "é\\n"}', "format": "pt"}
        assert file.get_tensor("scalar").shape == () and file.get_tensor("scalar") == 2.5
        np.testing.assert_array_equal(file.get_tensor("turned"), plain["turned"])

    ours = safetensors.read(path)
    assert all(t.raw().flags.aligned and t.offset % DTYPES[t.dtype].itemsize == 0 for t in ours.tensors.values())
    again = tmp_path / "c.safetensors"
    safetensors.write(again, dict(reversed({**plain, **arrays}.items())), {"format": "pt", "config": '{"a": "é\\n"}'})
    assert again.read_bytes() == path.read_bytes()


def test_big_endian_arrays_are_written_little_endian(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a", {"x": np.arange(4, dtype=">i4")})
    assert dict(official.deserialize((tmp_path / "a").read_bytes()))["x"]["data"] == np.arange(4, dtype="<i4").tobytes()


def test_any_order_and_spacing_of_the_header(tmp_path: Path) -> None:
    header = (
        ' { "a" : {"shape":[ 2 , 1 ], "data_offsets":\n[ 0 ,8 ] , "dtype" : "F32" } ,\t"__metadata__" : { } , "b\\u00e9\\ud83d\\ude00":\r\n'
    )
    header = header[1:] + '{"dtype":"U8","shape":[],"data_offsets":[8,9]} }   '
    file = safetensors.read(raw_file(tmp_path / "a", header, struct.pack("<2f", 1, 2) + b"\x07"))
    assert file.metadata == {} and list(file.tensors) == ["a", "bé😀"]
    np.testing.assert_array_equal(file.tensors["a"].dense(), [[1], [2]])
    assert file.tensors["bé😀"].dense() == 7


def test_no_tensors_at_all(tmp_path: Path) -> None:
    assert safetensors.read(raw_file(tmp_path / "a", "{}")).tensors == {}
    assert safetensors.read(raw_file(tmp_path / "b", '{"__metadata__":{"a":"b"}}')).metadata == {"a": "b"}


def test_values_are_views_of_the_file_and_copied_only_where_unaligned(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a", {"x": np.arange(1000, dtype=np.float32)})
    tensor = safetensors.read(tmp_path / "a").tensors["x"]
    assert np.shares_memory(tensor.dense(), tensor.raw()) and np.shares_memory(tensor.raw(), tensor.raw())
    assert not tensor.raw().flags.writeable
    odd = raw_file(tmp_path / "b", '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} ', struct.pack("<f", 5))
    value = safetensors.read(odd).tensors["x"].raw()
    assert value.flags.aligned and value[0] == 5


def test_rows_as_bytes_and_pages_given_back(tmp_path: Path) -> None:
    values = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    safetensors.write(tmp_path / "a", {"x": values})
    tensor = safetensors.read(tmp_path / "a").tensors["x"]
    rows = tensor.row_bytes(1000, 1024)
    assert np.array_equal(rows.view(np.float32), values[1000:]) and not rows.flags.writeable and np.shares_memory(rows, tensor.raw())

    def resident_kb() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        return sum(
            int(next(line for line in lines if line.startswith("Rss:")).split()[1]) for line in lines if line.endswith(str(tmp_path / "a"))
        )

    total = tensor.raw().sum()
    before = resident_kb()
    tensor.forget_pages()
    assert before > 4000 and resident_kb() < before - 3000
    assert tensor.raw().sum() == total  # they come back as they are touched


def test_float64_beyond_float32_is_infinite_and_silent(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a", {"x": np.array([1e300, -1e300, np.nan])})
    np.testing.assert_array_equal(safetensors.read(tmp_path / "a").tensors["x"].dense(), np.float32([np.inf, -np.inf, np.nan]))


# --- packed ternary -------------------------------------------------------------------------------------------------------------------

TRITS = np.random.default_rng(7).integers(-1, 2, (8, 6)).astype(np.int8)


def packed(scale: float = 4.0) -> dict[str, np.ndarray | tuple[str, np.ndarray]]:
    return {"l.weight": pack_hf(TRITS), "l.weight_scale": np.array([scale], np.float32), "norm.weight": np.ones(6, np.float32)}


def quantized(linear_class: str) -> str:
    return json.dumps({"quantization_config": {"quant_method": "bitnet", "linear_class": linear_class}})


@pytest.mark.parametrize(("linear_class", "expected"), [("bitlinear", 0.25), ("autobitlinear", 4.0), (None, 0.25)])
@pytest.mark.parametrize("place", ["metadata", "beside"])
def test_a_packed_weight_and_its_scale_are_ternary(tmp_path: Path, linear_class: str | None, expected: float, place: str) -> None:
    config = quantized(linear_class) if linear_class else '{"model_type": "llama"}'
    safetensors.write(tmp_path / "a", packed(), {"config": config} if place == "metadata" else None)
    if place == "beside":
        (tmp_path / "config.json").write_text(config)
    tensors = safetensors.read(tmp_path / "a").tensors
    weight = tensors["l.weight"]
    assert (weight.scheme, weight.dtype, weight.shape, weight.stored_shape, weight.nbytes) == ("ternary", "U8", (8, 6), (2, 6), 12)
    np.testing.assert_array_equal(weight.trits(), TRITS)
    np.testing.assert_array_equal(weight.scales(), np.float32([expected]))
    np.testing.assert_array_equal(weight.dense(), TRITS * np.float32(expected))
    assert weight.trits().dtype == np.int8 and weight.dense().dtype == weight.scales().dtype == np.float32
    assert (tensors["l.weight_scale"].scheme, tensors["norm.weight"].scheme) == ("f32", "f32")


def test_the_config_in_the_metadata_goes_before_the_one_beside(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a", packed(), {"config": quantized("autobitlinear")})
    (tmp_path / "config.json").write_text(quantized("bitlinear"))
    assert safetensors.read(tmp_path / "a").tensors["l.weight"].scales() == 4


def test_a_bf16_scale(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a", {**packed(), "l.weight_scale": ("BF16", np.array([0x4080], np.uint16))})  # 4.0
    assert safetensors.read(tmp_path / "a").tensors["l.weight"].scales() == np.float32(0.25)


def test_rows_are_padded_to_fours(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a", {"l.weight": pack_hf(TRITS[:5]), "l.weight_scale": np.float32([1])})
    weight = safetensors.read(tmp_path / "a").tensors["l.weight"]
    assert weight.shape == (8, 6)
    np.testing.assert_array_equal(weight.trits()[:5], TRITS[:5])


def test_bytes_without_a_scale_are_bytes(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a", {"l.weight": pack_hf(TRITS)})
    weight = safetensors.read(tmp_path / "a").tensors["l.weight"]
    assert (weight.scheme, weight.shape) == ("u8", (2, 6))
    for ask in (weight.trits, weight.scales):
        with pytest.raises(FormatError, match=r"'l.weight': is stored as u8; expected packed ternary weights with a weight_scale beside"):
            ask()


def test_a_code_of_three_and_a_scale_of_another_shape(tmp_path: Path) -> None:
    bytes_ = pack_hf(TRITS)
    bytes_[1, 2] |= 0x30
    safetensors.write(tmp_path / "a", {"l.weight": bytes_, "l.weight_scale": np.ones(8, np.float32)})
    weight = safetensors.read(tmp_path / "a").tensors["l.weight"]
    with pytest.raises(
        FormatError, match=r"a: tensor 'l.weight': byte \[1, 2\] is 0x[0-9A-F]{2}, which holds a code of 3; .*another layout$"
    ):
        weight.trits()
    with pytest.raises(FormatError, match=r"tensor 'l.weight_scale': has shape \[8\]; expected \[1\], one scale for the tensor$"):
        weight.scales()


def test_an_unknown_linear_class(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a", packed(), {"config": quantized("bitlinear2")})
    with pytest.raises(UnsupportedModelError, match="linear_class is 'bitlinear2'; expected bitlinear or autobitlinear"):
        safetensors.read(tmp_path / "a")


# --- writing --------------------------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.write(path, {"x": np.ones(3, np.float32)})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BitNetError, match=r"a.safetensors: cannot be written \(No space left on device\)"):
        safetensors.write(path, {"x": np.zeros(3, np.float32)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_file_being_read_stays_as_it_was_when_replaced(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a", {"x": np.ones(3, np.float32)})
    tensor = safetensors.read(tmp_path / "a").tensors["x"]
    safetensors.write(tmp_path / "a", {"x": np.zeros(1, np.float32)})
    np.testing.assert_array_equal(tensor.dense(), [1, 1, 1])


@pytest.mark.skipif(os.name != "posix", reason="file modes and symbolic links as POSIX has them")
def test_mode_follows_the_umask_and_a_link_its_target(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
        safetensors.write(tmp_path / "link", {"x": np.ones(3, np.float32)})
    finally:
        os.umask(mask)
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "real") == ["a"]
    assert stat.S_IMODE((tmp_path / "real" / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": np.ones(2, complex)}, r"tensor 'x': cannot write complex128 \[2\] as any dtype"),
        ({"x": ("BF16", np.ones(2, np.float32))}, r"tensor 'x': cannot write float32 \[2\] as BF16"),
        ({"x": ("F7", np.ones(2, np.float32))}, r"tensor 'x': cannot write float32 \[2\] as F7"),
        ({"__metadata__": np.ones(2, np.float32)}, r"tensor '__metadata__': cannot write"),
        ({"x": np.ones((1,) * 9, np.float32)}, r"tensor 'x': cannot write float32 \[1, 1, 1, 1, 1, 1, 1, 1, 1\]"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        safetensors.write(tmp_path / "a", tensors)
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder, pipe or device; expected a file to write"):
        safetensors.write(tmp_path, {})
    with pytest.raises(FormatError, match="no such file or folder"):
        safetensors.write(tmp_path / "none" / "a", {})
    with pytest.raises(UsageError, match="only texts"):
        safetensors.write(tmp_path / "a", {}, {"a": 1})  # type: ignore[dict-item]
    with pytest.raises(BitNetError, match=r"cannot be written .*surrogates not allowed"):
        safetensors.write(tmp_path / "a", {"\ud800": np.ones(1)})
    assert os.listdir(tmp_path) == []
