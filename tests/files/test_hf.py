"""Folders and single files in Hugging Face layout, and their packing, against `transformers`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitnet.errors import FormatError
from bitnet.files import safetensors
from bitnet.files.hf import Checkpoint, open_checkpoint
from bitnet.packing import CODECS, pack_hf, unpack_hf

CONFIG = {"model_type": "bitnet", "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}}
TOKENIZER = '{"model": {"vocab": {"Ġ[{\\"\\\\": 0}}}'
TRITS = np.random.default_rng(3).integers(-1, 2, (8, 6)).astype(np.int8)
TENSORS = {"l.weight": pack_hf(TRITS), "l.weight_scale": np.float32([0.5]), "norm.weight": np.ones(6, np.float32)}


def check(checkpoint: Checkpoint, generation: dict[str, object]) -> None:
    assert checkpoint.config == CONFIG
    assert checkpoint.tokenizer_json == TOKENIZER.encode()
    assert checkpoint.generation_config == generation
    assert checkpoint.tensors.keys() == TENSORS.keys()
    np.testing.assert_array_equal(checkpoint.tensors["l.weight"].dense(), TRITS * np.float32(0.5))
    assert checkpoint.tensors["norm.weight"].scheme == "f32"


def write_texts(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(TOKENIZER, encoding="utf-8")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')


@pytest.mark.parametrize("name", ["model.safetensors", "weights.bin"])
def test_a_folder_and_the_file_in_it(tmp_path: Path, name: str) -> None:
    write_texts(tmp_path)
    safetensors.write(tmp_path / name, TENSORS)
    check(open_checkpoint(tmp_path / name), {"eos_token_id": [1, 2]})
    if name == "model.safetensors":
        check(open_checkpoint(str(tmp_path)), {"eos_token_id": [1, 2]})
        assert open_checkpoint(tmp_path).path == tmp_path


def test_a_single_file_is_complete_by_itself(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "one.safetensors", TENSORS, {"config": json.dumps(CONFIG), "tokenizer": TOKENIZER})
    check(open_checkpoint(tmp_path / "one.safetensors"), {})
    (tmp_path / "config.json").write_text("not JSON, and not looked at")
    check(open_checkpoint(tmp_path / "one.safetensors"), {})


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "one", TENSORS, {"config": json.dumps(CONFIG)})
    assert open_checkpoint(tmp_path / "one").tokenizer_json is None


def write_shards(folder: Path) -> None:
    """The weight and its scale lie in different shards; transformers splits them so where the limit falls."""
    write_texts(folder)
    safetensors.write(folder / "a.safetensors", {"l.weight": TENSORS["l.weight"]})
    safetensors.write(folder / "b.safetensors", {name: TENSORS[name] for name in ("l.weight_scale", "norm.weight")})
    weight_map = {"l.weight": "a.safetensors", "l.weight_scale": "b.safetensors", "norm.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    check(open_checkpoint(tmp_path), {"eos_token_id": [1, 2]})


def test_shards_as_links_into_a_cache(tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    write_shards(tmp_path / "snapshot")
    for shard in "ab":  # as huggingface_hub lays out its cache
        path = tmp_path / "snapshot" / f"{shard}.safetensors"
        path.rename(tmp_path / shard)
        path.symlink_to(f"../{shard}")
    check(open_checkpoint(tmp_path / "snapshot"), {"eos_token_id": [1, 2]})


def test_a_tensor_that_the_index_does_not_name_is_left_out(tmp_path: Path) -> None:
    write_shards(tmp_path)
    safetensors.write(
        tmp_path / "a.safetensors", {"l.weight": TENSORS["l.weight"], "rotary.inv_freq": np.ones(3), "norm.weight": np.ones(1)}
    )
    check(open_checkpoint(tmp_path), {"eos_token_id": [1, 2]})


def test_files_of_transformers_itself(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to save a model with")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to save a model with")
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    checkpoint = open_checkpoint(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() and checkpoint.config["num_hidden_layers"] == 2
    for name, value in model.state_dict().items():
        assert checkpoint.tensors[name].scheme == "bf16"
        np.testing.assert_array_equal(checkpoint.tensors[name].dense(), value.float().numpy())


# --- packing --------------------------------------------------------------------------------------------------------------------------


def test_the_example_in_the_documentation_of_transformers() -> None:
    bytes_ = np.array([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], np.uint8)
    trits = np.array([[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]], np.int8)
    np.testing.assert_array_equal(unpack_hf(bytes_), trits)
    np.testing.assert_array_equal(pack_hf(trits), bytes_)


@pytest.mark.parametrize("out", [*range(1, 14), 256])
def test_packing_equals_transformers(out: int) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: no pack_weights to compare with")
    bitnet = pytest.importorskip(
        "transformers.integrations.bitnet", reason="transformers is not installed: no pack_weights to compare with"
    )
    trits = np.random.default_rng(out).integers(-1, 2, (out, 37)).astype(np.int8)
    ours = pack_hf(trits)
    np.testing.assert_array_equal(ours, bitnet.pack_weights(torch.from_numpy(trits.copy())).numpy())
    assert ours.shape == (-(-out // 4), 37) and ours.dtype == np.uint8
    np.testing.assert_array_equal(unpack_hf(ours)[:out], trits)
    assert (unpack_hf(ours)[out:] == -1).all()


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (1, 300_000), (400_000, 1), (520, 1030)])
def test_shapes_beyond_one_chunk(shape: tuple[int, int]) -> None:
    trits = np.random.default_rng(1).integers(-1, 2, shape).astype(np.int8)
    np.testing.assert_array_equal(unpack_hf(pack_hf(trits))[: shape[0]], trits)
    turned = np.asfortranarray(pack_hf(trits))
    np.testing.assert_array_equal(unpack_hf(turned)[: shape[0]], trits)


@pytest.mark.parametrize("shift", [0, 2, 4, 6])
def test_every_place_of_a_three_is_found(shift: int) -> None:
    bytes_ = pack_hf(np.zeros((4 * 300, 1000), np.int8))
    bytes_[299, 999] |= 3 << shift
    with pytest.raises(ValueError, match=r"byte \[299, 999\] is 0x[0-9A-F]{2}, which holds a code of 3"):
        unpack_hf(bytes_)


def test_what_cannot_be_packed() -> None:
    for bad in (2, -2, 127, -128):
        with pytest.raises(ValueError, match="expected values of -1, 0 and \\+1"):
            pack_hf(np.array([[0, bad]], np.int8))
    with pytest.raises(ValueError, match="1 dimensions"):
        pack_hf(np.zeros(4, np.int8))
    with pytest.raises(ValueError, match=r"expected uint8 bytes \[R, in\], found int8 \[1, 1\]"):
        unpack_hf(np.zeros((1, 1), np.int8))
    assert CODECS["hf"] == (pack_hf, unpack_hf)


def test_the_stored_scale_is_refused_where_a_folder_has_no_config(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "model.safetensors", TENSORS)
    with pytest.raises(FormatError, match=r'has no config; expected .*config.json, or "config" in the metadata of the safetensors'):
        open_checkpoint(tmp_path)


def test_a_number_of_31_digits_as_transformers_writes_it(tmp_path: Path) -> None:
    """Where a tokenizer has no longest text: int(1e30), which is no 64-bit number."""
    write_texts(tmp_path)
    safetensors.write(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert open_checkpoint(tmp_path).tokenizer_config == {"model_max_length": int(1e30)}
