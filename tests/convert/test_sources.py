"""What a source says of its weights is followed, or refused in one line: by the converter as by the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import packed_models
import peft_adapters
import pytest

from bitnet.convert import convert
from bitnet.convert.quantize import ALPHAS
from bitnet.convert.source import read
from bitnet.convert.verify import differences
from bitnet.errors import BitNetError, FormatError, UnsupportedModelError
from bitnet.evaluate.perplexity import score_text
from bitnet.files import gguf, gguf_write, safetensors
from bitnet.models import LINEARS, ModelConfig, canonical, open_checkpoint
from bitnet.models.rope import Rope
from bitnet.ternary import ternarize
from bitnet.transformer import TernaryTransformer

Run = Callable[..., Any]


def with_tensors(path: Path, more: Mapping[str, np.ndarray]) -> Path:
    """A GGUF with float32 tensors added."""
    file = gguf.read(path)
    items = [
        gguf_write.Item(n, t.kind.name if t.kind else t.scheme, t.shape, lambda t=t: [np.frombuffer(t.data, np.uint8, t.nbytes, t.offset)])  # type: ignore[misc]
        for n, t in file.tensors.items()
    ]
    items += [gguf_write.Item(n, "f32", v.shape, lambda v=v: [v]) for n, v in more.items()]  # type: ignore[misc]
    head, order = gguf_write.layout(items, file.metadata)
    body = b"".join(b"".join(chunk.tobytes() for chunk in item.chunks()) + bytes(fill) for item, fill in order)
    target = path.with_name(f"more-{path.name}")
    target.write_bytes(head + body)
    return target


def refused(path: Path, target: Path, error: type[BitNetError], message: str) -> None:
    """That neither converter nor engine takes a source for what it is not."""
    for run in (lambda: convert(path, target), lambda: TernaryTransformer.from_pretrained(path)):
        with pytest.raises(error) as raised:
            run()
        assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not target.exists()


@pytest.mark.parametrize(("form", "quantization"), [("gguf-f32", None), ("gguf-q8_0", "int8")])
def test_a_scale_beside_weights_that_nothing_scales(tmp_path: Path, form: str, quantization: str | None) -> None:
    convert(packed_models.write(tmp_path / "m", "llama", trits=False), tmp_path / "m.gguf", format=form, quantization=quantization)
    path = with_tensors(tmp_path / "m.gguf", {"blk.0.attn_q.scale": np.array([2.5], np.float32)})
    refused(path, tmp_path / "out", UnsupportedModelError, "tensor 'blk.0.attn_q.scale': scales a weight that is stored as ")


def test_a_scale_beside_ternary_weights_counts_and_one_beside_none_is_a_stray(tmp_path: Path) -> None:
    convert(packed_models.write(tmp_path / "m", "llama"), tmp_path / "m.gguf", format="gguf-tq2_0")
    plain = read(open_checkpoint(tmp_path / "m.gguf")).weights["layers.0.q"].scales
    path = with_tensors(tmp_path / "m.gguf", {"blk.0.attn_q.scale": np.array([2.5], np.float32)})
    scaled = read(open_checkpoint(path)).weights["layers.0.q"].scales
    assert plain is not None and scaled is not None and np.array_equal(scaled, plain * np.float32(2.5))
    path = with_tensors(tmp_path / "m.gguf", {"blk.0.attn_x.scale": np.array([2.5], np.float32)})
    refused(path, tmp_path / "out", UnsupportedModelError, "tensors that such a model does not have (1, the first 'blk.0.attn_x.scale')")


@pytest.mark.parametrize(
    ("change", "trits", "message"),
    [
        ({"quantization_config": None}, True, "packed ternary, but config.json has no quantization_config that says so"),
        (
            {"linear_class": "autobitlinear", "quantization_mode": "offline"},
            False,
            "BF16 without a weight_scale; quantization_mode offline",
        ),
        ({"linear_class": "bitlinear", "quantization_mode": "online"}, False, "BF16 without a weight_scale; quantization_mode offline"),
    ],
)
def test_layers_that_are_not_stored_as_the_configuration_says(tmp_path: Path, change: dict[str, Any], trits: bool, message: str) -> None:
    source = packed_models.write(tmp_path / "m", "qwen3", trits=trits)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = None if "quantization_config" in change else {"quant_method": "bitnet", **change}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path / "out", FormatError, message)


def test_mlx_of_other_bits_is_called_by_its_name(tmp_path: Path) -> None:
    source = packed_models.write(tmp_path / "m", "qwen3", trits=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"group_size": 64, "bits": 4}}))
    refused(source, tmp_path / "out", UnsupportedModelError, "MLX's weights of 4 bits; of MLX's formats this build reads 2 bits")


def test_dynamic_rope_scaling_is_seen() -> None:
    """It shows only beyond the context that the model was trained for."""
    plain = ModelConfig("llama", 8, 64, 1, 1, 1, 64, 64, 32, 1e-5, Rope(1e4), "silu", True, 1.0)
    dynamic = replace(plain, rope=Rope(1e4, "dynamic", 4.0, 32))
    assert not differences(dynamic, dynamic) and len(differences(dynamic, plain)) == 1


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "the rope is scaled dynamically"),
    ("llama", {"rope_scaling": YARN | {"beta_slow": 2.0}}, "with beta_fast 32 and beta_slow 1, truncated, whatever the file says"),
    ("llama", {"rope_scaling": YARN | {"truncate": False}}, "this model has 32 and 1 without truncation"),
    ("qwen3", {"rope_scaling": LLAMA3}, "the model has rope scaled by llama3's rule, with which llama.cpp does not load it"),
    ("qwen3", {"attention_bias": True}, "the model has biases of q, k, v, o, with which"),
    ("qwen2", {"head_dim": 32}, "the model has 4 heads of 32, which is not its width of 256, with which"),
    ("gemma3_text", {"attention_bias": True}, "the model has biases of q, k, v, o, with which"),
    (
        "gemma3_text",
        {"rope_parameters": {"full_attention": YARN | {"attention_factor": 1.4}, "sliding_attention": {"rope_type": "default"}}},
        "llama.cpp uses yarn's attention factor of 1.4 in the windowed layers as well",
    ),
])  # fmt: skip
def test_what_llama_cpp_cannot_run_is_not_written_for_it(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    """Each was seen in llama.cpp: it did not load the file, or answered something else. In Hugging Face's layout the model goes through."""
    source = packed_models.write(tmp_path / "m", family, trits=False, **changes)
    with pytest.raises(UnsupportedModelError) as raised:
        convert(source, tmp_path / "m.gguf", format="gguf-f32")
    assert message in str(raised.value) and str(source) in str(raised.value) and "choose a Hugging Face layout" in str(raised.value)
    assert not (tmp_path / "m.gguf").exists()
    convert(source, tmp_path / "out", format="hf-dense-f32")
    assert np.array_equal(packed_models.logits(tmp_path / "out"), packed_models.logits(source))


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"head_dim": 32}, {"tie_word_embeddings": False}])
def test_bitnet_models_that_llama_cpp_does_not_load_say_so(tmp_path: Path, changes: dict[str, Any]) -> None:
    report = convert(packed_models.write(tmp_path / "m", "bitnet", **changes), tmp_path / "m.gguf")
    assert any(note.startswith("today's llama.cpp does not load this file, for the model has ") for note in report.notes)


def test_merging_refuses_codes_of_two(tmp_path: Path) -> None:
    convert(packed_models.write(tmp_path / "m", "qwen3"), tmp_path / "m.gguf", format="gguf-q2_0")
    up = gguf.read(tmp_path / "m.gguf").tensors["blk.0.ffn_up.weight"]
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    raw[up.offset + 2] = 0xFF  # four codes of 3 after the first block's scale
    (tmp_path / "two.gguf").write_bytes(raw)
    config = canonical(open_checkpoint(tmp_path / "two.gguf")).config
    adapter = peft_adapters.write(tmp_path / "adapter", peft_adapters.config_of(4), peft_adapters.matrices(config, 4))
    with pytest.raises(UnsupportedModelError, match=r"ffn_up.weight': holds codes of 3, which stand for \+2 scales, and merging keeps"):
        convert(tmp_path / "two.gguf", tmp_path / "out.gguf", format="gguf-q2_0", merge_adapter=adapter)
    assert not (tmp_path / "out.gguf").exists()
    convert(tmp_path / "two.gguf", tmp_path / "out.gguf", format="gguf-q2_0")
    assert read(open_checkpoint(tmp_path / "out.gguf")).weights["layers.0.up"].codes(0, 1).max() == 2  # type: ignore[misc]


# ---- latent weights


def with_latent(folder: Path, of: str, online: bool = False, family: str = "qwen3") -> tuple[Path, dict[str, np.ndarray]]:
    """(a packed model, or one of masters that are ternarized at load, with latent weights beside the layers named so; those)."""
    source = packed_models.write(folder, family, trits=not online)
    if online:
        config = json.loads((source / "config.json").read_text())
        said = {"quant_method": "bitnet", "quantization_mode": "online", "linear_class": "autobitlinear"}
        (source / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    stored = safetensors.read(source / "model.safetensors").tensors
    raw = {
        name: (t.dtype, t.raw()) if t.dtype == "BF16" else t.raw()
        for name, t in safetensors.read_stored(source / "model.safetensors").tensors.items()
    }
    rng = np.random.default_rng(3)
    latent = {n: (0.05 * rng.standard_normal(t.shape)).astype(np.float32) for n, t in stored.items() if n.endswith(f"{of}.weight")}
    beside = {name.replace(".weight", ".latent_weight"): values for name, values in latent.items()}
    safetensors.write(source / "model.safetensors", raw | beside)
    return source, latent


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("of", ["_proj", "up_proj"])
def test_latent_weights_of_some_layers_leave_the_others_what_they_are(tmp_path: Path, of: str, online: bool) -> None:
    source, latent = with_latent(tmp_path / "m", of, online)
    report = convert(source, tmp_path / "out", quantization="ternary")
    assert f"took the latent weights of {len(latent)} layers, which the checkpoint has beside those that it runs" in report.notes
    before, after = (read(open_checkpoint(path)).weights for path in (source, tmp_path / "out"))
    for name, weight in before.items():
        kind = weight.kind
        if weight.codes is None or after[name].codes is None:
            continue
        made = latent.get(canonical(open_checkpoint(source)).names[name])
        found = after[name].codes(0, weight.shape[0])  # type: ignore[misc]
        assert np.array_equal(found, weight.codes(0, weight.shape[0]) if made is None else ternarize(made, ALPHAS[kind])), name
        if made is None:
            assert np.array_equal(after[name].scales, weight.scales), name  # type: ignore[arg-type]


def test_a_model_with_latent_weights_runs_and_is_copied_without_them(tmp_path: Path, bitnet: Run) -> None:
    source, _ = with_latent(tmp_path / "m", "_proj")
    plain = packed_models.write(tmp_path / "plain", "qwen3")
    assert np.array_equal(packed_models.logits(source), packed_models.logits(plain))
    kinds = {row["kind"]: row["parameters"] for row in json.loads(bitnet("inspect", source, "--json").stdout.splitlines()[-1])["tensors"]}
    assert kinds["latent"] == 0 and "other" not in kinds
    report = convert(source, tmp_path / "out")
    assert report.notes == ["the latent weights of 7 layers are not written, only those that the checkpoint runs"]
    assert np.array_equal(packed_models.logits(tmp_path / "out"), packed_models.logits(plain))


def test_latent_weights_with_calibration_and_perplexity(tmp_path: Path, bitnet: Run) -> None:
    """What is measured before is the model that the checkpoint runs; what is quantized, its latent weights."""
    pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    source, _ = with_latent(tmp_path / "m", "_proj")
    (tmp_path / "text.txt").write_text("the abacus and the table " * 40)
    text = tmp_path / "text.txt"
    options = ["--sequence-length", "32", "--sequences", "2", "--calibration", text, "--evaluate", text, "--json"]
    done = bitnet("convert", source, "-o", tmp_path / "out", "--ternary", "--alpha", "auto", *options)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    before = score_text(TernaryTransformer.from_pretrained(source), text.read_text())
    assert found["evaluation"]["before"]["perplexity"] == pytest.approx(before.perplexity, rel=1e-6)
    assert found["evaluation"]["after"]["perplexity"] != found["evaluation"]["before"]["perplexity"]
    assert [row["name"] for row in found["layers"] if row["output_error"] is not None] == [f"layers.0.{kind}" for kind in LINEARS]
