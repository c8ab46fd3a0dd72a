"""What was written, in the programs that it was written for: `transformers`, and llama.cpp where it is installed.

Tolerances are those of test_against_transformers.py and test_against_llama_cpp.py, where they are derived: a rounding of int8 activations
that falls to the other side moves others; a wrong row order, scale, activation or norm is off by far more, as the last tests show.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import peft_adapters as made
import pytest
from packed_models import IDS, TEMPLATE, logits, tokenizer, write
from test_against_llama_cpp import GOLDEN, distance, exact_bound, llama_cpp_bound, with_silu

from bitnet.convert import convert
from bitnet.errors import UnsupportedModelError
from bitnet.files import safetensors
from bitnet.models import canonical, open_checkpoint
from bitnet.models.peft import read_adapter
from bitnet.transformer import TernaryTransformer
from bitnet.weights import load_engine

INT8_NOISE = 0.047  # test_against_transformers.py
FAMILIES = ["bitnet", "llama", "qwen2", "qwen3"]


def theirs(folder: Path) -> np.ndarray:
    random_models = pytest.importorskip("random_models", reason="torch or transformers is not installed (extra [train])")
    pytest.importorskip("accelerate", reason="accelerate is not installed; transformers needs it for BitNet")
    if "quantization_config" not in json.loads((folder / "config.json").read_text()):
        return random_models.logits(random_models.reload(folder), IDS)
    model = random_models.transformers.AutoModelForCausalLM.from_pretrained(folder)  # in the checkpoint's bf16: asked for float32 it fails
    random_models.torch.nn.Module.float(model)
    for name, tensor in safetensors.read(folder / "model.safetensors").tensors.items():
        if name.endswith("weight_scale"):  # which it has rounded to bf16
            model.get_submodule(name.removesuffix(".weight_scale")).weight_scale.fill_(float(tensor.dense()[0]))
    return random_models.logits(model, IDS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["hf", "hf-bitlinear"])
@pytest.mark.parametrize("start", ["hf", "gguf-q2_0"])
def test_transformers_runs_the_packed_folder_alike(tmp_path: Path, family: str, form: str, start: str) -> None:
    source = write(tmp_path / "source", family, num_hidden_layers=2)
    if start != "hf":
        convert(source, tmp_path / "m.gguf", format=start)
    start_path = source if start == "hf" else tmp_path / "m.gguf"
    report = convert(start_path, tmp_path / "out", format=form, allow_requantize=form == "hf-bitlinear")
    if family == "qwen2" and form == "hf":  # whose biases transformers scales in this form, which is said
        assert any("hf-bitlinear is the form that it runs right" in note for note in report.notes)
        assert distance(logits(tmp_path / "out"), theirs(tmp_path / "out")) > 4 * INT8_NOISE
        return
    assert distance(logits(tmp_path / "out"), theirs(tmp_path / "out")) <= INT8_NOISE
    assert distance(logits(tmp_path / "out"), logits(source)) <= INT8_NOISE


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_transformers_runs_the_dense_folder_alike(tmp_path: Path, family: str) -> None:
    """Float32 throughout: 2^-11 of the largest logit, where a rounding of the f16 cache falls to the other side."""
    source = write(tmp_path / "source", family, trits=False)
    convert(source, tmp_path / "m.gguf", format="gguf-bf16")
    convert(tmp_path / "m.gguf", tmp_path / "out", format="hf-dense-bf16")
    ours = logits(tmp_path / "out")
    assert np.abs(ours - theirs(tmp_path / "out")).max() <= 2.0**-11 * np.abs(ours).max()


def test_transformers_reads_the_tokenizer_and_its_template(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [train])")
    convert(write(tmp_path / "source", "qwen3"), tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the abacus", " two  spaces\n1999"):
        assert found.encode(text) == tokenizer().encode(text).ids
    assert (found.bos_token, found.eos_token) == ("<|begin|>", "<|end|>")
    assert found.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi\n"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id in (1, [1])


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The module that runs llama.cpp (tests/golden/make_gguf.py)."""
    for module in ("llama_cpp", "gguf", "torch", "transformers"):
        pytest.importorskip(module, reason=f"{module} is not installed; it runs the models to compare with")
    spec = importlib.util.spec_from_file_location("make_gguf", GOLDEN / "make_gguf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def silu_logits(path: Path) -> np.ndarray:
    engine = load_engine(with_silu(open_checkpoint(path)), threads=2)
    return engine.forward([(engine.sequence(), IDS)], all_logits=True)


@pytest.mark.full
@pytest.mark.parametrize("scale", ["f16", "f32"])
@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0", "q2_0"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "gemma3_text", "bitnet"])
def test_llama_cpp_gives_our_logits(maker: ModuleType, tmp_path: Path, family: str, kind: str, scale: str) -> None:
    """Scales that f16 does not hold stand beside the blocks where llama.cpp reads them, or are rounded. Measured: 0.01 to 0.04 of 0.15."""
    path = tmp_path / "m.gguf"
    convert(
        write(tmp_path / "source", family, scale=scale), path, format=f"gguf-{kind}", allow_requantize=family in ("qwen2", "gemma3_text")
    )
    assert distance(silu_logits(path), maker.logits(path, IDS)) <= llama_cpp_bound(open_checkpoint(path), stored=True)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
VARIANTS: dict[str, dict[str, Any]] = {
    "biases of attention": {"attention_bias": True},
    "biases of the feed-forward": {"mlp_bias": True},
    "heads of 32": {"head_dim": 32},
    "a head of its own": {"tie_word_embeddings": False},
    "the embedding as head": {"tie_word_embeddings": True},
    "one key for every query": {"num_key_value_heads": 4},
    "one key for all queries": {"num_key_value_heads": 1},
    "a window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    "an epsilon": {"rms_norm_eps": 0.01},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "yarn, attention factor 1": {"rope_parameters": YARN | {"attention_factor": 1.0}},
    "yarn, attention factor 1.5": {"rope_parameters": YARN | {"attention_factor": 1.5}},
    "yarn, betas": {"rope_parameters": YARN | {"beta_slow": 2.0}},
}
REFUSED = {
    "qwen2": {"heads of 32", "a window", "dynamic", "llama3", "yarn, betas"},
    "qwen3": {"biases of attention", "biases of the feed-forward", "a window", "dynamic", "llama3", "yarn, betas"},
    "llama": {"dynamic", "yarn, betas"},
}


@pytest.mark.full
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("family", REFUSED)
def test_llama_cpp_runs_every_variant_that_is_not_refused(maker: ModuleType, tmp_path: Path, family: str, name: str) -> None:
    """Float32 weights, three times the 32 tokens from where yarn scales. Measured: 0.0003 to 0.0008, where the bound is 0.0037."""
    ids, path = IDS * 4, tmp_path / "m.gguf"
    source = write(tmp_path / "source", family, trits=False, **VARIANTS[name])
    if name in REFUSED[family]:
        with pytest.raises(UnsupportedModelError, match="llama"):
            convert(source, path, format="gguf-f32")
        return
    convert(source, path, format="gguf-f32")
    engine = load_engine(open_checkpoint(path), threads=2)
    ours = engine.forward([(engine.sequence(), ids)], all_logits=True)
    assert distance(ours, maker.logits(path, ids)) <= exact_bound(open_checkpoint(path))


@pytest.mark.full
@pytest.mark.parametrize(
    ("scheme", "family"), [("ternary", "llama"), ("ternary", "qwen3"), ("int8", "llama"), ("int4", "qwen3"), ("fp16", "llama")]
)
def test_llama_cpp_runs_what_was_quantized_here(maker: ModuleType, tmp_path: Path, scheme: str, family: str) -> None:
    """Tables included: a ternary embedding and head as well."""
    path = tmp_path / "m.gguf"
    convert(write(tmp_path / "source", family, trits=False), path, quantization=scheme)
    assert distance(logits(path), maker.logits(path, IDS)) <= llama_cpp_bound(open_checkpoint(path), stored=True)


@pytest.mark.full
def test_llama_cpp_has_the_tokenizer_and_the_template(maker: ModuleType, tmp_path: Path) -> None:
    import llama_cpp

    convert(write(tmp_path / "source", "qwen3"), tmp_path / "m.gguf")
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    ours = TernaryTransformer.from_pretrained(tmp_path / "m.gguf").tokenizer
    for text in ("the abacus", " two  spaces\n1999 don't", "Grüße 日本"):
        assert model.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text, add_special=False)
    assert model.metadata["tokenizer.chat_template"] == TEMPLATE and model.token_eos() == 1


@pytest.mark.parametrize("form", ["hf-dense-f32", "safetensors-dense-f32", "gguf-f32"])
def test_an_adapter_that_peft_saved_goes_along(tmp_path: Path, form: str) -> None:
    """PEFT's own answer before, ours after, and where the target is a folder for transformers PEFT's after, too."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    random_models = pytest.importorskip("random_models", reason="torch or transformers is not installed (extra [train])")
    base = random_models.save(random_models.llama(seed=11), tmp_path / "base")
    lora = peft.LoraConfig(
        r=8, lora_alpha=24, target_modules="all-linear", rank_pattern={"down_proj": 3}, alpha_pattern={r"layers\.[01]\..*_proj": 5},
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    random_models.torch.manual_seed(0)
    adapted = peft.get_peft_model(random_models.reload(base), lora).eval()
    adapted.save_pretrained(base / "style")
    ids = np.random.default_rng(0).integers(0, 200, 60).tolist()
    expected = random_models.logits(adapted, ids)
    target = tmp_path / ("out" + {"h": "", "s": ".bin", "g": ".gguf"}[form[0]])
    report = convert(base, target, format=form)
    assert any("kept, 21 matrices of rank 3, 8, read back and compared" in note for note in report.notes)
    places = [target / "style"] if target.is_dir() else [tmp_path / "style"]
    places += [tmp_path / "out-style-LoRA.gguf"] if form == "gguf-f32" else []
    engine = load_engine(open_checkpoint(target), threads=2)
    for place in places:
        ours = engine.forward([(engine.sequence(engine.adapter(read_adapter(place, engine.config).parts)), ids)], all_logits=True)
        assert np.abs(ours - expected).max() <= 2.0**-11 * np.abs(expected).max()  # test_peft.py
    alone = engine.forward([(engine.sequence(), ids)], all_logits=True)
    assert np.abs(alone - expected).max() > 16 * 2.0**-11 * np.abs(expected).max()
    if target.is_dir():
        again = peft.AutoPeftModelForCausalLM.from_pretrained(target / "style").eval()  # finds the base by its new name
        assert np.abs(random_models.logits(again, ids) - expected).max() <= 2.0**-20 * np.abs(expected).max()


@pytest.mark.full
@pytest.mark.parametrize("alphas", [{}, {"down_proj": 30.0}])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_llama_cpp_runs_base_and_adapter_alike(maker: ModuleType, tmp_path: Path, family: str, alphas: dict[str, float]) -> None:
    """Measured: 0.032 to 0.039, where the bounds are 0.106 and, of gemma3, 0.26."""
    base, path = write(tmp_path / "source", family), tmp_path / "m.gguf"
    config = canonical(open_checkpoint(base)).config
    made.write(base / "style", made.config_of(8, alpha_pattern=alphas), made.matrices(config, 8))
    convert(base, path, format="gguf-q2_0")
    engine = load_engine(open_checkpoint(path), threads=2)

    def ours(adapter: Path | None) -> np.ndarray:
        found = None if adapter is None else engine.adapter(read_adapter(adapter, engine.config).parts)
        return engine.forward([(engine.sequence(found), IDS)], all_logits=True)

    lora, bound = tmp_path / "m-style-LoRA.gguf", llama_cpp_bound(open_checkpoint(path), stored=True)
    theirs = maker.logits(path, IDS, lora)
    assert distance(ours(lora), theirs) <= bound
    assert distance(ours(tmp_path / "style"), theirs) <= bound
    assert distance(ours(None), theirs) > 2 * bound
    if family == "llama" and not alphas:  # rows of B as PEFT has them are seen
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bitnet.models.lora_gguf.by_pairs", lambda config, kind: False)
            convert(base, tmp_path / "wrong.gguf", format="gguf-q2_0")
        assert distance(ours(lora), maker.logits(path, IDS, tmp_path / "wrong-style-LoRA.gguf")) > 2 * bound


@pytest.mark.full
def test_what_is_written_wrong_is_seen(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of llama's queries and keys not by pairs; bitnet's relu^2, which llama.cpp does not compute."""
    source = write(tmp_path / "source", "llama")
    monkeypatch.setattr("bitnet.convert.gguf.permuted", lambda rows, head, by_pairs: rows)
    convert(source, tmp_path / "wrong.gguf", verify_written=False)
    bound = llama_cpp_bound(open_checkpoint(tmp_path / "wrong.gguf"), stored=True)
    assert distance(logits(source), maker.logits(tmp_path / "wrong.gguf", IDS)) > 2 * bound
    monkeypatch.undo()
    report = convert(write(tmp_path / "relu2"), tmp_path / "b.gguf")
    assert any("llama.cpp computes architecture bitnet with SiLU" in note for note in report.notes)
    assert distance(logits(tmp_path / "b.gguf"), maker.logits(tmp_path / "b.gguf", IDS)) > 2 * bound
