"""Loading: what the config says must be what the tensors are. And the engine's own refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet import _native, packing, ternary, weights
from bitnet.engine import BASE3_ISAS, Engine, chosen_codec
from bitnet.errors import BitNetError, FormatError, UnsupportedModelError, UsageError
from bitnet.evaluate.accuracy import losses
from bitnet.files import safetensors
from bitnet.models import Canonical, Checkpoint, canonical, open_checkpoint
from bitnet.shapes import SHAPES, random_adapter, random_engine
from bitnet.weights import load_engine

CONFIG: dict[str, Any] = {
    "model_type": "bitnet",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
}
LINEARS = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
NORMS = {"input_layernorm": 32, "post_attention_layernorm": 32, "self_attn.attn_sub_norm": 32, "mlp.ffn_sub_norm": 48}


def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {
        "model.embed_tokens.weight": rng.normal(size=(60, 32)).astype(np.float32),
        "model.norm.weight": np.ones(32, np.float32),
    }
    for i in range(2):
        for name, size in NORMS.items():
            found[f"model.layers.{i}.{name}.weight"] = np.ones(size, np.float32)
        for name, shape in LINEARS.items():
            found[f"model.layers.{i}.{name}.weight"] = packing.pack_hf(rng.integers(-1, 2, shape).astype(np.int8))
            found[f"model.layers.{i}.{name}.weight_scale"] = np.array([0.2], np.float32)
    return found


def write(folder: Path, config: dict[str, Any] | None = None, weights: dict[str, Any] | None = None) -> Path:
    safetensors.write(folder / "model.safetensors", tensors() if weights is None else weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def load(folder: Path, **kwargs: Any) -> Engine:
    return load_engine(open_checkpoint(folder), threads=1, **kwargs)


def test_a_packed_model_loads(tmp_path: Path) -> None:
    engine = load(write(tmp_path))
    assert engine.codec in ("t2", "b3") and engine.config.sub_norms and engine.config.head_dim == 8
    logits = engine.forward([(engine.sequence(), [1, 2, 3])], all_logits=True)
    assert logits.shape == (3, 60) and logits.dtype == np.float32 and np.isfinite(logits).all()
    # 32 x 32 trits: two panels of 2 vectors of 64 bytes, and the one scale 16 times; so for the others, the norms, the f32 embedding
    inputs = {"t2": 16, "b3": 20}[engine.codec]
    vectors = sum(-(-rows // 16) * 64 * -(-cols // inputs) + 64 for rows, cols in LINEARS.values())
    assert engine.weight_bytes_per_token == 2 * (vectors + 4 * sum(NORMS.values())) + 4 * 32 + 4 * 4 + 64 * 4 * 32


def test_a_head_in_int8_is_that_of_the_reference(tmp_path: Path) -> None:
    stored, int8 = load(write(tmp_path)), load(tmp_path, head="int8")
    codes, scales = ternary.quantize_int8(tensors()["model.embed_tokens.weight"])
    exact = write_dense_embedding(tmp_path, codes * scales[:, None])
    a, b = (e.forward([(e.sequence(), [7])]) for e in (int8, exact))
    # the same embedding; int8 also rounds the head's activations: 32 of them, each by at most half of 1/127 of the largest
    assert np.abs(a - b).max() <= 32 * 0.5 / 127 * np.abs(b).max()
    assert not np.array_equal(a, stored.forward([(stored.sequence(), [7])]))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
@pytest.mark.parametrize("head", ["stored", "int8"])
def test_the_runs_of_rows_in_which_a_table_comes_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, head: str
) -> None:
    table = tensors()["model.embed_tokens.weight"].astype({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype])
    write(tmp_path, weights=tensors() | {"model.embed_tokens.weight": table})
    whole = load(tmp_path, head=head)
    monkeypatch.setattr(weights, "_CHUNK", 32 * 32)  # 32 rows of 60
    monkeypatch.setattr(weights, "_MAPPED_BYTES", 1)
    parts = load(tmp_path, head=head)
    a, b = (e.forward([(e.sequence(), [1, 33, 59])], all_logits=True) for e in (whole, parts))
    assert np.array_equal(a, b)


def test_a_head_in_int4_is_that_of_the_reference(tmp_path: Path) -> None:
    int4 = load(write(tmp_path), head="int4")
    codes, scales = ternary.quantize_int4(tensors()["model.embed_tokens.weight"])
    exact = write_dense_embedding(tmp_path, codes * scales)  # 32 inputs: one group
    a, b = (e.forward([(e.sequence(), [7])]) for e in (int4, exact))
    assert int4.head == "int4" and exact.head == "stored"
    assert np.abs(a - b).max() <= 32 * 0.5 / 127 * np.abs(b).max()  # as for int8


def test_codecs_give_the_same_bits(tmp_path: Path) -> None:
    write(tmp_path)
    t2, b3 = (load(tmp_path, codec=codec) for codec in ("t2", "b3"))
    assert (t2.codec, b3.codec) == ("t2", "b3") and load(tmp_path).codec == ("b3" if t2.isa in BASE3_ISAS else "t2")
    ids = [3, 1, 4, 1, 5]
    one, other = (e.forward([(e.sequence(), ids)], all_logits=True) for e in (t2, b3))
    assert np.array_equal(one, other)
    shapes = [random_engine("article-12x512", threads=1, head="int4", codec=codec) for codec in ("t2", "b3")]
    assert [(e.codec, e.head) for e in shapes] == [("t2", "int4"), ("b3", "int4")]


@pytest.mark.parametrize(
    ("expected", "codec", "isa", "groups"),
    [
        ("b3", "auto", "amx", {}),
        ("b3", "auto", "avx512vbmi", {}),
        ("b3", "auto", "amx", {"scale_group": 128}),
        ("t2", "auto", "avx512vnni", {}),
        ("t2", "auto", "avx2", {}),
        ("t2", "auto", "scalar", {}),
        ("t2", "auto", "amx", {"activation_group": 32}),
        ("t2", "auto", "amx", {"scale_group": 64}),
        ("t2", "t2", "amx", {}),
        ("b3", "b3", "scalar", {"scale_group": 64}),
    ],
)
def test_the_rule_for_codecs(expected: str, codec: str, isa: str, groups: dict[str, int]) -> None:
    assert chosen_codec(codec, isa, **groups) == expected


@pytest.mark.parametrize("isa", [name for name, state in _native.self_test().items() if state == "ok"])
def test_the_rule_follows_the_instruction_set(tmp_path: Path, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_ISA", isa)
    engines = load(write(tmp_path)), random_engine("article-12x512", threads=1)
    assert [e.codec for e in engines] == ["b3" if isa in ("amx", "avx512vbmi") else "t2"] * 2


def test_base_3_has_one_activation_step_per_token(tmp_path: Path) -> None:
    checkpoint, model = unquantized(write(tmp_path))
    for group in (0, 32):
        auto = load_engine(checkpoint, model=model, threads=1, activation_group=group)
        assert auto.codec == ("t2" if group else chosen_codec("auto", auto.isa)) and auto.activation_group == group
    with pytest.raises(UsageError, match=r"^codec is 'b3' and activation_group 32; base-3 weights meet activations with one step"):
        load_engine(checkpoint, model=model, threads=1, activation_group=32, codec="b3")
    b3 = load_engine(checkpoint, model=model, threads=1, codec="b3")
    with pytest.raises(UsageError, match=r"^activation_group is 32; base-3 weights meet .* load the model with codec='t2'$"):
        b3.activation_group = 32
    b3.activation_group = 0
    assert b3.activation_group == 0 and np.isfinite(b3.forward([(b3.sequence(), [1, 2])])).all()
    t2 = load_engine(checkpoint, model=model, threads=1, codec="t2")
    t2.activation_group = 32
    assert t2.activations == "int8 per 32 inputs"


def unquantized(folder: Path) -> tuple[Checkpoint, Canonical]:
    """The model as a file of packed ternary weights that says nothing of int8 activations, as GGUF files of other families do."""
    checkpoint = open_checkpoint(folder)
    return replace(checkpoint, layout="gguf"), replace(canonical(checkpoint), quantization=None)


def test_what_integer_activations_cost_ternary_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, model = unquantized(write(tmp_path))
    for module in ("evaluate.accuracy", "weights"):
        monkeypatch.setattr(f"bitnet.{module}.canonical", lambda _: model)
    exact, *others = losses(checkpoint, list(range(20)), threads=1)
    runs = load_engine(checkpoint, threads=1)
    assert [(loss.weights, loss.default) for loss in others] == [(runs.codec, True), *[("t2", False)] * 3] and not exact.default
    assert others[0].weight_bytes_per_token == runs.weight_bytes_per_token
    assert [loss.activations for loss in others] == ["int8 per token", *(f"int8 per {g} inputs" for g in (128, 64, 32))]
    assert all(0 < loss.kl < 1 for loss in others)


def test_a_codec_is_for_ternary_layers(tmp_path: Path) -> None:
    dense = {name: value for name, value in tensors().items() if not name.endswith("_scale") and "sub_norm" not in name}
    dense = {n: np.ones(LINEARS[n[15:-7]], np.float32) if n[15:-7] in LINEARS else v for n, v in dense.items()}
    config = {**CONFIG, "model_type": "llama", "hidden_act": "silu", "quantization_config": None}
    with pytest.raises(UsageError, match="has no ternary layers in this way to run it; codec 'b3' is for them"):
        load(write(tmp_path, config, dense), codec="b3")


def write_dense_embedding(folder: Path, values: np.ndarray) -> Engine:
    (folder / "dense").mkdir()
    return load(write(folder / "dense", weights=tensors() | {"model.embed_tokens.weight": values.astype(np.float32)}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "mamba"}, UnsupportedModelError, "model_type is 'mamba'; this build runs bitnet, gemma3_text, llama, qwen2, qwen3"),
        ({"model_type": None}, UnsupportedModelError, "model_type is None"),
        ({"model_type": ["bitnet"]}, UnsupportedModelError, "model_type is ['bitnet']"),
        ({"num_attention_heads": 0}, FormatError, "num_attention_heads is 0; expected an integer from 1"),
        ({"num_attention_heads": -4}, FormatError, "num_attention_heads is -4"),
        ({"num_attention_heads": 2.5}, FormatError, "num_attention_heads is 2.5"),
        ({"num_attention_heads": True}, FormatError, "num_attention_heads is True"),
        ({"num_attention_heads": "4"}, FormatError, "num_attention_heads is '4'"),
        ({"num_key_value_heads": 3}, FormatError, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, FormatError, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"head_dim": 7}, FormatError, "head_dim is 7; rope needs an even number"),
        ({"hidden_size": 64}, FormatError, "configuration makes it"),
        ({"vocab_size": 61}, FormatError, "'model.embed_tokens.weight' has shape [60, 32]; the model's configuration makes it [61, 32]"),
        ({"intermediate_size": 44}, FormatError, "configuration makes it"),
        ({"num_hidden_layers": 3}, FormatError, "tensor 'model.layers.2."),
        ({"num_hidden_layers": 10**9}, FormatError, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": None}, FormatError, "num_hidden_layers is None"),
        ({"max_position_embeddings": 0}, FormatError, "max_position_embeddings is 0"),
        ({"rms_norm_eps": "small"}, FormatError, "rms_norm_eps is 'small'"),
        ({"rms_norm_eps": -1.0}, FormatError, "rms_norm_eps is -1.0"),
        ({"rope_theta": 0}, FormatError, "rope_theta is 0"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "hidden_act is 'gelu'; for bitnet this build runs relu2, silu"),
        ({"hidden_act": ["relu2"]}, UnsupportedModelError, "hidden_act is ['relu2']"),
        ({"attention_bias": True}, FormatError, "tensor 'model.layers.0.self_attn.q_proj.bias' and 7 more not found"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4}},
            UnsupportedModelError,
            "rope scaling 'longrope'; this build computes default",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, FormatError, "factor is None"),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}, FormatError, "is not above low"),
        ({"rope_theta": 1e300}, FormatError, "rope_theta is 1e+300"),
        ({"rope_scaling": "linear"}, FormatError, "rope parameters are 'linear'; expected an object"),
        ({"rope_parameters": {"partial_rotary_factor": []}}, FormatError, "partial_rotary_factor is []"),
        ({"tie_word_embeddings": False}, FormatError, "tensor 'lm_head.weight' not found"),
        ({"quantization_config": None}, FormatError, "packed ternary, but config.json has no quantization_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "quant_method 'gptq'"),
        ({"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}}, UnsupportedModelError, "use_rms_norm"),
        (
            {"quantization_config": {"quant_method": "bitnet", "quantization_mode": "later"}},
            UnsupportedModelError,
            "quantization_mode 'later'",
        ),
        (
            {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": "head"}},
            UnsupportedModelError,
            "not a list of names",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], error: type[BitNetError], message: str) -> None:
    write(tmp_path, config=CONFIG | change)
    with pytest.raises(error) as raised:
        load(tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "tensor 'model.layers.1.mlp.up_proj.weight' not found"),
        ("model.layers.1.mlp.up_proj.weight_scale", None, "is packed (U8) but has no model.layers.1.mlp.up_proj.weight_scale beside it"),
        ("model.layers.1.mlp.up_proj.weight_scale", np.array([np.nan], np.float32), "gives a scale of nan"),
        ("model.layers.1.mlp.up_proj.weight_scale", np.array([1, 2], np.float32), "expected [1]"),
        (
            "model.layers.1.mlp.up_proj.weight",
            np.zeros((12, 33), np.uint8),
            "has shape [48, 33]; the model's configuration makes it [48, 32]",
        ),
        ("model.layers.1.mlp.up_proj.weight", np.full((12, 32), 255, np.uint8), "a code of 3"),
        ("model.layers.1.mlp.up_proj.weight", np.zeros((48, 32), np.float32), "F32 without a weight_scale; quantization_mode offline"),
        ("model.embed_tokens.weight", np.full((60, 32), np.inf, np.float32), "holds NaN or infinity"),
        ("model.embed_tokens.weight", np.zeros((60, 32), np.int32), "stored as i32; this build computes with f32"),
        ("model.norm.weight", np.ones((32, 1), np.float32), "has shape [32, 1]"),
        ("model.norm.weight", np.full(32, np.nan, np.float32), "holds NaN or infinity"),
        (
            "model.layers.0.self_attn.q_proj.bias",
            np.zeros(32, np.float32),
            "has biases (1, the first 'model.layers.0.self_attn.q_proj.bias')",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, name: str, value: np.ndarray | None, message: str) -> None:
    changed = {k: v for k, v in (tensors() | {name: value}).items() if v is not None}
    write(tmp_path, weights=changed)
    with pytest.raises(BitNetError) as raised:
        load(tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_rows_that_are_no_multiple_of_four(tmp_path: Path) -> None:
    """Packed rows come in fours; what pads them is cut off."""
    config = CONFIG | {"intermediate_size": 46}
    weights = tensors()
    rng = np.random.default_rng(9)
    for i in range(2):
        for name, shape in (("gate_proj", (46, 32)), ("up_proj", (46, 32)), ("down_proj", (32, 46))):
            weights[f"model.layers.{i}.mlp.{name}.weight"] = packing.pack_hf(rng.integers(-1, 2, shape).astype(np.int8))
        weights[f"model.layers.{i}.mlp.ffn_sub_norm.weight"] = np.ones(46, np.float32)
    engine = load(write(tmp_path, config, weights))
    assert np.isfinite(engine.forward([(engine.sequence(), [1])])).all()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([[]], "expected one or more integer token ids"),
        ([[60]], "token ids run from 60 to 60; the vocabulary has 0 to 59"),
        ([[-1, 3]], "token ids run from -1 to 3"),
        ([[1.5]], "expected one or more integer token ids"),
        ([[0] * 65], "0 + 65 tokens; the model's context is 64"),
        ([], "the batch is empty"),
    ],
)
def test_forward_refuses(tmp_path: Path, batch: list[list[Any]], message: str) -> None:
    engine = load(write(tmp_path))
    with pytest.raises(UsageError) as error:
        engine.forward([(engine.sequence(), ids) for ids in batch])
    assert message in str(error.value)


def test_a_sequence_twice_in_a_batch_or_of_another_model_is_refused(tmp_path: Path) -> None:
    engine = load(write(tmp_path))
    sequence = engine.sequence()
    with pytest.raises(UsageError, match="in the batch twice"):
        engine.forward([(sequence, [1]), (sequence, [2])])
    assert len(sequence) == 0
    other = random_engine("article-12x512", threads=1)
    with pytest.raises(UsageError, match="a cache of another model"):
        other.forward([(sequence, [1])])


def test_truncating_forgets(tmp_path: Path) -> None:
    engine = load(write(tmp_path))
    sequence = engine.sequence()
    first = engine.forward([(sequence, [5, 6])])
    engine.forward([(sequence, [7, 8, 9])])
    sequence.truncate(1)
    assert len(sequence) == 1 and np.array_equal(engine.forward([(sequence, [6])]), first)
    with pytest.raises(ValueError, match="only become shorter"):
        sequence.truncate(3)


def test_a_full_context_takes_no_token(tmp_path: Path) -> None:
    engine = load(write(tmp_path))
    sequence = engine.sequence()
    engine.forward([(sequence, [1] * 64)])
    with pytest.raises(UsageError, match="64 \\+ 1 tokens; the model's context is 64"):
        engine.forward([(sequence, [1])])
    sequence.truncate(63)
    for token in (60, -1):
        with pytest.raises(UsageError, match=f"token ids run from {token} to {token}; the vocabulary has 0 to 59"):
            engine.forward([(sequence, [token])])
    engine.forward([(sequence, [59])])


def test_random_shapes() -> None:
    engine = random_engine("article-12x512", threads=2, codec="t2")
    logits = engine.forward([(engine.sequence(), [1, 2, 3])])
    assert logits.shape == (1, 32000) and np.isfinite(logits).all() and logits.std() > 0
    s = SHAPES["article-12x512"]
    trits = s.layers * s.width * (2 * s.heads + 2 * s.kv_heads) * s.head_dim + s.layers * 3 * s.width * s.ffn
    # two bits a trit and a byte for each of the head's, and 1 to 2 % of scales and norms
    assert 1 < engine.weight_bytes_per_token / (trits / 4 + s.vocab * s.width) < 1.02
    with pytest.raises(UsageError, match="no shape is called 'big'"):
        random_engine("big")


def test_a_model_larger_than_the_memory_is_refused_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.machine.available_memory_bytes", lambda: 1000)
    with pytest.raises(BitNetError, match=r"needs 0\.0 GB of memory, 0\.0 GB are available"):
        load(write(tmp_path))


def test_any_number_of_threads_gives_the_same_bits_and_then_sleeps() -> None:
    logits = []
    for threads in (1, 2, 8):
        engine = random_engine("article-12x512", threads=threads)
        logits.append(engine.forward([(engine.sequence(), list(range(40)))]))
        time.sleep(0.1)  # the workers stop spinning
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.03  # of 0.3 s on each of their cores
    assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])


def test_a_sequence_is_left_alone_while_a_pass_runs_on_it() -> None:
    engine = random_engine("article-12x512", threads=1)
    sequence = engine.sequence()
    running = threading.Thread(target=lambda: engine.forward([(sequence, [2] * 2000)]))
    running.start()
    begun = False
    while running.is_alive() and not begun:
        try:
            sequence.pages()
        except ValueError:
            begun = True
    for change in (lambda: sequence.truncate(0), lambda: sequence.share([], 0), lambda: engine.forward([(sequence, [3])])):
        with pytest.raises((ValueError, UsageError), match="a forward pass runs on this sequence; wait for its end"):
            change()
    running.join()
    assert begun and len(sequence) == 2000
    sequence.truncate(1)
    assert len(sequence) == len(sequence.pages()) == 1


def test_an_adapters_sequence_is_of_its_own_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(SHAPES["article-12x512"], layers=1, heads=1, kv_heads=1, ffn=64, vocab=64)
    for width in (64, 1024):
        monkeypatch.setitem(SHAPES, f"{width}", replace(small, width=width))
    narrow, wide = (random_engine(name, threads=1) for name in ("64", "1024"))
    with pytest.raises(UsageError, match="a cache of another model"):
        narrow.forward([(wide.sequence(random_adapter(wide, 4)), [1] * 20)])


def test_fewer_threads_than_asked_for_do_the_work() -> None:
    """Where the system gives no more: here for want of room for their stacks."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc, which tells how much room there is")
    program = """
import resource
from bitnet import _native
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20), -1))
print(len(_native.read_bandwidths(1 << 20, 500, 2)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
