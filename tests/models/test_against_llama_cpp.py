"""GGUF files that llama.cpp wrote, against llama.cpp's logits for them (made by tests/golden/make_gguf.py).

Each .npz holds `logits`, as llama.cpp answers for the file, and `exact`, its answer after turning the same weights into F32. Distances are
the norm of the difference by the norm, of the token where it is largest. An error relative to a product's result is at most that of the
logits if the product alone made them, and independent ones add in squares. Where they come from:

- `exact` against weights="f16": one rounding of a 2^-11th where our weights become f16 (q/k, v, o, gate/up, down of each of L layers;
  embedding and head) and where llama.cpp rounds queries, attention's weights, and gelu's argument and result to f16. What is off in
  queries and keys is so in the scores, and moves attention's weights by that times the score, which reaches 5 here:
  sqrt((7 + 2 * 25) L + 2) * 2^-11.
- `logits`: llama.cpp also rounds the input of an F16 matrix to f16 (2^-11), of a BF16 matrix to bf16 (2^-8), and of a block format to
  8 bits in blocks of 32 (Q8_0) or 256 (Q8_K). A step is s = max / 127, its error s / sqrt(12), and the largest of B Gaussian values about
  sqrt(2 ln 2B) times their spread, so a block is off by n(B) = sqrt(2 ln 2B / 12) / 127: 0.65 % for 32, 0.80 % for 256; into ffn_down,
  whose values are products, by up to twice that. Scores amplify as above: n sqrt((2 * 25 + 1 + 1 + 2 + 4) L + 1).
- weights="stored" adds ours, by the same formula for inputs of one step per token and for rows of int8 weights, the coarsest there are.
- bitnet: both quantize rows of 256 alike, but where one value falls to the other side of a rounding the next layer's do too, until the
  two are independent. llama.cpp computes SiLU there, so it is compared with SiLU, and with transformers for the relu(gate)^2 that models
  are trained with.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bitnet import weights as loading
from bitnet.files.hf import Checkpoint
from bitnet.models import Canonical, canonical, open_checkpoint
from bitnet.models.rope import Rope
from bitnet.weights import load_engine

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = sorted((GOLDEN / "gguf").glob("*.gguf"))
FLOATS = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}  # scheme -> largest relative rounding of what it is multiplied with
SCORE = 5  # the largest
# matrices that share an input -> how its error in squares counts
STAGES = {("attn_q", "attn_k", "attn_v"): 2 * SCORE**2 + 1, ("attn_output",): 1, ("ffn_gate", "ffn_up"): 2, ("ffn_down",): 4}
LOSSLESS = ("F32", "F16", "BF16", "Q8_0", "TQ1_0", "TQ2_0", "Q2_0")  # for weights of three values


def answer(file: Path, **options: object) -> np.ndarray:
    return answer_of(open_checkpoint(file), ids_of(file), **options)


def answer_of(checkpoint: Checkpoint, ids: list[int], **options: object) -> np.ndarray:
    engine = load_engine(checkpoint, threads=2, **options)  # type: ignore[arg-type]
    return engine.forward([(engine.sequence(), ids)], all_logits=True)


def ids_of(file: Path) -> list[int]:
    return np.load(file.with_suffix(".npz"))["ids"].tolist()


def expected(file: Path, what: str) -> np.ndarray:
    return np.load(file.with_suffix(".npz"))[what]


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float((np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max())


def noise(block: int) -> float:
    """Relative error of Gaussian values in 8 bits with one step per block."""
    return math.sqrt(2 * math.log(2 * block) / 12) / 127


AS_TRAINED = noise(256) * math.sqrt(2 * (2 * sum(STAGES.values()) + 1))  # bitnet's two layers, quantized here and there: 0.122


def exact_bound(checkpoint: Checkpoint) -> float:
    return math.sqrt((7 + 2 * SCORE**2) * checkpoint.config["num_hidden_layers"] + 2) * 2.0**-11


def llama_cpp_bound(checkpoint: Checkpoint, stored: bool) -> float:
    tensors, layers = checkpoint.tensors, checkpoint.config["num_hidden_layers"]
    stages = [([f"blk.{i}.{part}.weight" for part in parts], factor) for i in range(layers) for parts, factor in STAGES.items()]
    stages.append((["output.weight" if "output.weight" in tensors else "token_embd.weight"], 1))
    squares = exact_bound(checkpoint) ** 2
    for names, factor in stages:
        schemes, inputs = {tensors[name].scheme for name in names}, tensors[names[0]].shape[1]
        theirs = max(FLOATS[s] if s in FLOATS else noise(32 if s.endswith(("_0", "_1")) else 256) for s in schemes)
        integer = is_bitnet(checkpoint) or not schemes <= set(FLOATS)
        squares += factor * (theirs**2 + (2 * noise(inputs) ** 2 if stored and integer else 0))
    return math.sqrt(squares)


def with_silu(checkpoint: Checkpoint) -> Checkpoint:
    """As llama.cpp computes architecture `bitnet`."""
    return replace(checkpoint, config=checkpoint.config | {"hidden_act": "silu"}) if is_bitnet(checkpoint) else checkpoint


def is_bitnet(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.config["model_type"] == "bitnet")


def test_the_files_are_there() -> None:
    assert {"llama", "llama-linear", "llama-llama3", "llama-yarn", "qwen2", "qwen3", "qwen3-untied", "gemma3", "bitnet"} == {
        file.stem for file in FILES
    }


# Measured: 0.0003 to 0.0019, where the bounds are 0.0038 (one layer) to 0.0091 (gemma's six).
@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "bitnet"], ids=lambda f: f.stem)
def test_exact_path(file: Path) -> None:
    assert distance(answer(file, weights="f16"), expected(file, "exact")) <= exact_bound(open_checkpoint(file))


# Measured (bounds), f16 and stored: llama 0.034 0.049 (0.061 0.106)  qwen2 0.018 0.028 (0.072 0.137)  qwen3 0.030 0.039 (0.087 0.15)
# qwen3-untied 0.018 0.036 (0.051 0.092)  gemma3 0.037 0.046 (0.125 0.237)  bitnet stored 0.040 (0.151)
# llama-linear 0.0009 (0.005)  llama-llama3 0.0048 (0.030)  llama-yarn 0.0008 0.0004 (0.004)
@pytest.mark.parametrize("weights", ["f16", "stored"])
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_llama_cpp_agrees(file: Path, weights: str) -> None:
    checkpoint = with_silu(open_checkpoint(file))
    if is_bitnet(checkpoint) and weights == "f16":
        pytest.skip("a BitNet model runs as trained only")
    ours = answer_of(checkpoint, ids_of(file), weights=weights)
    assert distance(ours, expected(file, "logits")) <= llama_cpp_bound(checkpoint, weights == "stored")


def test_bitnet_as_trained() -> None:
    """relu(gate)^2 is what is read from the file; measured 0.043."""
    file = GOLDEN / "gguf" / "bitnet.gguf"
    assert distance(answer(file), expected(file, "exact")) <= AS_TRAINED


def changed(**fields: object) -> Callable[[Canonical], Canonical]:
    return lambda model: replace(model, config=replace(model.config, **fields))  # type: ignore[arg-type]


def without(*parts: str, **fields: object) -> Callable[[Canonical], Canonical]:
    """A model that has not these vectors."""

    def spoil(model: Canonical) -> Canonical:
        names = {ours: theirs for ours, theirs in model.names.items() if not ours.endswith(parts)}
        return replace(changed(**fields)(model), names=names)

    return spoil


# What reads as fluent noise when it goes wrong.
TRAPS: dict[str, tuple[str, Callable[[Canonical], Canonical]]] = {
    "rows of q and k not permuted": ("llama", changed(rope_interleaved=False)),
    "rows of q and k permuted": ("qwen3", changed(rope_interleaved=True)),
    "another activation": ("llama", changed(activation="relu2")),
    "biases missing": ("qwen2", without("_bias", biases=())),
    "norms of queries and keys missing": ("qwen3", without("q_norm", "k_norm", qk_norms=False)),
    "linear scaling ignored": ("llama-linear", changed(rope=Rope(1e4))),
    "llama3's divisors ignored": ("llama-llama3", changed(rope=Rope(1e4))),
    "yarn ignored": ("llama-yarn", changed(rope=Rope(1e4))),
    "yarn without its attention factor": ("llama-yarn", lambda m: changed(rope=replace(m.config.rope, attention_factor=1.0))(m)),
    "1 added to norms that have it": ("gemma3", changed(norm_offset=1.0)),
    "gelu taken for silu": ("gemma3", changed(activation="silu")),
    "embedding not scaled": ("gemma3", changed(embedding_scale=1.0)),
    "queries scaled by the width": ("gemma3", changed(attention_scale=128**-0.5)),
    "one rope for all layers": ("gemma3", changed(rope_local=None)),
    "no window": ("gemma3", changed(windowed=(False,) * 6)),
    "window one short": ("gemma3", changed(sliding_window=15)),
    "windows in every layer": ("gemma3", changed(windowed=(True,) * 6)),
    "norms after the products missing": ("gemma3", without("post_attn_norm", "post_ffn_norm", post_norms=False)),
    "norms of gemma's queries missing": ("gemma3", without("q_norm", "k_norm", qk_norms=False)),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_fails(monkeypatch: pytest.MonkeyPatch, trap: str) -> None:
    name, spoil = TRAPS[trap]
    file = GOLDEN / "gguf" / f"{name}.gguf"
    monkeypatch.setattr(loading, "canonical", lambda checkpoint: spoil(canonical(checkpoint)))
    assert distance(answer(file, weights="f16"), expected(file, "exact")) > 4 * exact_bound(open_checkpoint(file))


def test_the_wrong_activation_of_bitnet_fails() -> None:
    file = GOLDEN / "gguf" / "bitnet.gguf"
    checkpoint = open_checkpoint(file)
    assert distance(answer(file), expected(file, "logits")) > 2 * llama_cpp_bound(checkpoint, stored=True), (
        "relu^2 against llama.cpp's SiLU"
    )
    silu = answer_of(with_silu(checkpoint), ids_of(file))
    assert distance(silu, expected(file, "exact")) > 3 * AS_TRAINED, "SiLU against what models are trained with"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The generator of the stored files, which runs llama.cpp."""
    for module in ("llama_cpp", "gguf", "torch", "transformers"):
        pytest.importorskip(module, reason=f"{module} is not installed; it writes or runs the models to compare with")
    spec = importlib.util.spec_from_file_location("make_gguf", GOLDEN / "make_gguf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "Q2_0", "Q1_0")
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "bitnet")


@pytest.mark.full
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_type_of_every_family(maker: ModuleType, tmp_path: Path, family: str, kind: str) -> None:
    """Written, quantized and run by llama.cpp here and now."""
    if family == "bitnet" and kind == "Q1_0":
        pytest.skip("BitNet's weights are not binary")
    changes = maker.GEMMA | {"hidden_size": 256} if family == "gemma3_text" else maker.SIZES
    changes |= {"head_dim": 64} if family != "bitnet" else {}
    changes |= maker.TIED if family in ("bitnet", "qwen2") else {}
    table = "Q8_0" if kind in ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0") else kind
    case = maker.Case(family, (kind,), changes, table, table, seed=2)
    file = tmp_path / "model.gguf"
    theirs = maker.make(case, file, maker.token_ids(1))
    checkpoint, ids = with_silu(open_checkpoint(file)), theirs["ids"].tolist()
    assert distance(answer_of(checkpoint, ids), theirs["logits"]) <= llama_cpp_bound(checkpoint, stored=True)
    if kind in LOSSLESS and family == "bitnet":
        assert distance(answer_of(open_checkpoint(file), ids), theirs["exact"]) <= AS_TRAINED
    elif family != "bitnet":
        exact = answer_of(checkpoint, ids, weights="f16")
        assert distance(exact, theirs["exact"]) <= exact_bound(checkpoint)
        assert distance(exact, theirs["logits"]) <= llama_cpp_bound(checkpoint, stored=False)
