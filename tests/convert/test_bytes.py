"""The bytes that are written, against those of other programs (tests/golden/blocks), of `transformers`, and layouts element by element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_models import write

from bitnet.convert import FORMATS, gguf, hf
from bitnet.convert.source import Model, from_codes, read
from bitnet.errors import FormatError, UnsupportedModelError
from bitnet.files import safetensors
from bitnet.models import open_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "blocks"
SHARED = Path(__file__).parents[3] / "shared" / "golden"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Any one, for its configuration."""
    return read(open_checkpoint(write(tmp_path_factory.mktemp("any"))))


def written(model: Model, form: str, trits: np.ndarray, scales: np.ndarray) -> dict[str, bytes]:
    """The tensors that the weight of these trits becomes, by name."""
    weight = from_codes("layers.0.gate", trits.shape, "ternary", "test", lambda a, b: trits[a:b], scales)
    chosen = FORMATS[form]
    made: Any
    if chosen.container == "gguf":
        made = gguf.items(model, [weight], chosen)
    else:
        made = hf.items([weight], {"layers.0.gate": "gate.weight"}, chosen)
    return {item.name: b"".join(np.ascontiguousarray(chunk).tobytes() for chunk in item.chunks()) for item in made}


@pytest.mark.parametrize("folder", [GOLDEN, SHARED], ids=["stored", "shared"])
@pytest.mark.parametrize("kind", ["i2_s", "tq1_0", "tq2_0", "q2_0", "q1_0"])
def test_bytes_of_bitnet_cpp_and_llama_cpp(model: Model, folder: Path, kind: str) -> None:
    if not folder.is_dir():
        pytest.skip("the shared golden files are not beside this checkout")
    golden = np.load(folder / f"{kind}_24x768.npz")
    scale = np.full((1, 1), golden["scale"], np.float32)
    found = written(model, f"gguf-{kind}", golden["trits"], scale)
    raw = golden["bytes"].tobytes()
    assert found["blk.0.ffn_gate.weight"][: len(raw)] == raw and list(found) == ["blk.0.ffn_gate.weight"]


TRITS = np.random.default_rng(2).integers(-1, 2, (6, 256)).astype(np.int8)
SCALES = np.float32([[0.5, 0.25], [1, 2], [0.125, 4], [3, 1.5], [0.75, 6], [5, 7]])  # one for 128 inputs


@pytest.mark.parametrize("kind", ["pq2_0", "ptq1_0"])
def test_the_bonsai_formats_element_by_element(model: Model, kind: str) -> None:
    raw = np.frombuffer(written(model, f"gguf-{kind}", TRITS, SCALES)["blk.0.ffn_gate.weight"], np.uint8)
    blocks = raw.reshape(12, -1)

    def trit(byte: int, k: int) -> int:
        return ((byte * 3**k & 255) * 3 >> 8) - 1

    for block, trits, scale in zip(blocks, TRITS.reshape(12, 128), SCALES.reshape(-1), strict=True):
        assert len(block) == (34 if kind == "pq2_0" else 28)
        assert (
            block[:2].tobytes() == np.float16(scale).tobytes() if kind == "pq2_0" else block[26:].tobytes() == np.float16(scale).tobytes()
        )
        for e in range(128):
            if kind == "pq2_0":
                found = (int(block[2 + e // 4]) >> 2 * (e % 4) & 3) - 1
            elif e < 80:
                found = trit(int(block[e & 15]), e >> 4)
            else:
                found = trit(int(block[16 + (e & 7)]), e - 80 >> 3) if e < 120 else trit(int(block[24 + (e & 1)]), e - 120 >> 1)
            assert found == trits[e], e


def test_mlx_element_by_element(model: Model) -> None:
    """w = scale * code + bias, codes of 2 bits in 32-bit words, the first in the lowest bits; the bias is -scale."""
    found = written(model, "mlx", TRITS, SCALES)
    words = np.frombuffer(found["gate.weight"], "<u4").reshape(6, 16)
    scales, biases = (np.frombuffer(found[f"gate.{part}"], "<f2").reshape(6, 2).astype(np.float32) for part in ("scales", "biases"))
    for row in range(6):
        for column in range(256):
            code = int(words[row, column // 16]) >> 2 * (column % 16) & 3
            value = scales[row, column // 128] * code + biases[row, column // 128]
            assert value == TRITS[row, column] * SCALES[row, column // 128]


def test_mlx_computes_with_what_is_written(model: Model, tmp_path: Path) -> None:
    """Of stored words, scales and biases, MLX's own values (golden/make_mlx.py); ours, read and written, are the same."""
    golden = np.load(GOLDEN / "mlx_24x768.npz")
    found = written(model, "mlx", golden["trits"], golden["scales"].astype(np.float32))
    for part, name in (("words", "gate.weight"), ("scales", "gate.scales"), ("biases", "gate.biases")):
        assert found[name] == golden[part].tobytes()
    safetensors.write(tmp_path / "x", {"gate.weight": golden["words"], "gate.scales": golden["scales"], "gate.biases": golden["biases"]})
    tensor = safetensors.read(tmp_path / "x").tensors["gate.weight"]
    assert np.array_equal(tensor.dense(), golden["dense"]) and np.array_equal(tensor.dense_rows(3, 9), golden["dense"][3:9])
    assert np.array_equal(tensor.trits(), golden["trits"]) and list(safetensors.read(tmp_path / "x").tensors) == ["gate.weight"]


def test_other_two_bit_weights_of_mlx_are_refused(tmp_path: Path) -> None:
    golden = np.load(GOLDEN / "mlx_24x768.npz")
    tensors = {"g.weight": golden["words"], "g.scales": golden["scales"], "g.biases": golden["biases"] * np.float16(1.5)}
    safetensors.write(tmp_path / "x", tensors)
    with pytest.raises(UnsupportedModelError, match=r"'g.biases': is not -scale everywhere, so these are no ternary weights"):
        safetensors.read(tmp_path / "x").tensors["g.weight"].scales()


@pytest.mark.parametrize("rows", [8, 6, 5])
def test_packed_bytes_of_transformers(model: Model, rows: int) -> None:
    integration = pytest.importorskip("transformers.integrations.bitnet", reason="transformers is not installed (extra [train])")
    torch = pytest.importorskip("torch")
    trits = np.random.default_rng(3).integers(-1, 2, (rows, 256)).astype(np.int8)
    found = written(model, "hf", trits, np.full((1, 1), 0.1, np.float32))
    if rows % 4 == 0:  # transformers' own packing wants whole fours, or pads by rows of its own
        assert found["gate.weight"] == integration.pack_weights(torch.tensor(trits)).numpy().tobytes()
    unpacked = integration.unpack_weights(
        torch.frombuffer(bytearray(found["gate.weight"]), dtype=torch.uint8).reshape(-1, 256), torch.float32
    )
    assert np.array_equal(unpacked.numpy()[:rows], trits)
    assert np.frombuffer(found["gate.weight_scale"], np.float32) == np.float32(0.1)


@pytest.mark.parametrize(
    "form", ["hf", "hf-bitlinear", "mlx", "gguf-tq1_0", "gguf-tq2_0", "gguf-i2_s", "gguf-ptq1_0", "gguf-q2_0", "gguf-pq2_0"]
)
def test_twice_the_scale_goes_where_two_bits_have_it(model: Model, form: str) -> None:
    """Q2_0's code of 3."""
    trits = np.random.default_rng(3).integers(-1, 3, (8, 256)).astype(np.int8)
    if form in ("gguf-q2_0", "gguf-pq2_0"):
        assert written(model, form, trits, np.full((1, 1), 0.5, np.float32))
        return
    with pytest.raises(FormatError, match=r"^test: holds codes of 3, which stand for \+2 scales and are not ternary; gguf-q2_0 and dense"):
        written(model, form, trits, np.full((1, 1), 0.5, np.float32))


def test_the_gguf_package_reads_the_file(tmp_path: Path, model: Model) -> None:
    """An independent reader: names, shapes, types, values and metadata."""
    package = pytest.importorskip("gguf", reason="the gguf package, an oracle, is not installed")
    from bitnet.convert import convert

    convert(write(tmp_path / "source", "llama"), tmp_path / "m.gguf", format="gguf-tq1_0")
    reader = package.GGUFReader(tmp_path / "m.gguf")
    source = read(open_checkpoint(tmp_path / "source"))
    tensors = {t.name: t for t in reader.tensors}
    gate = tensors["blk.0.ffn_gate.weight"]
    assert gate.tensor_type.name == "TQ1_0" and gate.shape.tolist() == [256, 512]
    assert np.array_equal(package.quants.dequantize(gate.data, gate.tensor_type), source.weights["layers.0.gate"].values(0, 512))
    assert tensors["token_embd.weight"].tensor_type.name == "BF16" and tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    fields = {key: reader.get_field(key).contents() for key in ("general.architecture", "general.file_type", "llama.rope.freq_base")}
    assert fields == {"general.architecture": "llama", "general.file_type": 36, "llama.rope.freq_base": 10000.0}
    assert reader.get_field("tokenizer.ggml.tokens").contents()[:2] == ["<|begin|>", "<|end|>"]
    assert reader.get_field("tokenizer.chat_template").contents().startswith("{% for m in messages %}")
