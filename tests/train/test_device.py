"""The model in torch against the native engine, on torch's CPU device: the same code runs on any other.

Tolerances as in models/test_against_transformers.py: keys and values that round the other way to f16, or activations to int8.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smoke
from click.testing import Result

from bitnet.engine import Engine
from bitnet.errors import UsageError
from bitnet.models import open_checkpoint
from bitnet.source import EMBEDDED_MODEL
from bitnet.transformer import TernaryTransformer
from bitnet.weights import load_engine

random_models = pytest.importorskip("random_models", reason="torch or transformers is not installed (extra [train])")
torch = random_models.torch
device = pytest.importorskip("bitnet.train.device")

IDS = np.random.default_rng(0).integers(0, 200, 100).tolist()
F16_FLIP = 2.0**-11
INT8_NOISE = 0.047
GOLDEN = Path(__file__).parent.parent / "golden" / "gguf"


def in_torch(path: Path, **options: Any) -> Engine:
    return load_engine(open_checkpoint(path), model_elsewhere=lambda c, group: device.TorchModel(c, torch.device("cpu"), group), **options)


def logits(engine: Engine) -> np.ndarray:
    return engine.forward([(engine.sequence(), [token % engine.config.vocab_size for token in IDS])], all_logits=True)


def compared(path: Path, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return logits(in_torch(path, **options)), logits(load_engine(open_checkpoint(path), threads=1, **options))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """The largest norm of a token's difference, by its norm."""
    return float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_dense_families(tmp_path: Path, family: str, dtype: str) -> None:
    random_models.save(getattr(random_models, family)(seed=1, dtype=getattr(torch, dtype)), tmp_path)
    ours, native = compared(tmp_path)
    assert np.abs(ours - native).max() <= F16_FLIP * np.abs(native).max()


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int8"},
        {"weights": "int8", "activation_group": 0, "head": "int8"},
        {"head": "int4"},
        {"weights": "int4"},
        {"weights": "fp4"},
        {"weights": "binary"},
        {"weights": "ternary"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_integer_weights(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    random_models.save(getattr(random_models, family)(seed=2), tmp_path)
    ours, native = compared(tmp_path, **options)
    assert relative(ours, native) <= INT8_NOISE


@pytest.mark.parametrize("options", [{}, {"head": "int8"}], ids=str)
def test_bitnet(tmp_path: Path, options: dict[str, Any]) -> None:
    random_models.save(random_models.bitnet(seed=3), tmp_path)
    ours, native = compared(tmp_path, **options)
    assert relative(ours, native) <= INT8_NOISE


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.gguf")), ids=lambda path: path.stem)
def test_gguf(path: Path) -> None:
    """Block formats, ternary in groups, interleaved and scaled rope."""
    ours, native = compared(path)
    assert relative(ours, native) <= INT8_NOISE


@pytest.mark.parametrize("missing", ["attn_sub_norm", "ffn_norm"])
def test_a_missing_norm_fails(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8_NOISE is small enough to see it."""
    random_models.save(random_models.bitnet(seed=3), tmp_path)
    norm = device.TorchModel._norm
    monkeypatch.setattr(device.TorchModel, "_norm", lambda self, name, x: x if name.endswith(missing) else norm(self, name, x))
    ours, native = compared(tmp_path)
    assert relative(ours, native) > 4 * INT8_NOISE


def test_chunks_batches_and_truncation(tmp_path: Path) -> None:
    """Float sums of other sizes differ in their last bits, no more."""
    random_models.save(random_models.gemma3_text(seed=5), tmp_path)
    engine = in_torch(tmp_path)
    whole = logits(engine)
    sequence, other = engine.sequence(), engine.sequence()
    near = F16_FLIP * np.abs(whole).max()
    for at in range(0, 100, 30):
        part = engine.forward([(sequence, IDS[at : at + 30]), (other, IDS[:1])], all_logits=True)
        assert np.abs(part[:-1] - whole[at : at + 30]).max() <= near
    sequence.truncate(40)
    assert len(sequence) == 40 and len(other) == 4
    assert np.abs(engine.forward([(sequence, IDS[40:])])[0] - whole[-1]).max() <= near
    with pytest.raises(UsageError, match="a sequence is in the batch twice"):
        engine.forward([(sequence, [1]), (sequence, [1])])


def test_from_pretrained_and_the_command(bitnet: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, with torch's CPU standing for a GPU."""
    monkeypatch.setattr(device, "torch_device", lambda name: torch.device("cpu"))
    model, native = TernaryTransformer.from_pretrained(device="cuda"), TernaryTransformer.from_pretrained()
    assert model.generate(smoke.PROMPT, temperature=0, max_new_tokens=len(smoke.STORY)).token_ids == smoke.STORY
    assert "".join(model.stream(smoke.PROMPT, seed=1, max_new_tokens=5))
    ids = model.tokenizer.encode("Once upon a time, there was a little fox who lived in the forest.")
    assert relative(model.logits(ids), native.logits(ids)) <= 0.014 * np.sqrt(24)  # six layers of four products
    done = bitnet("run", EMBEDDED_MODEL, "-p", smoke.PROMPT, "--temperature", 0, "-n", 3, "--device", "cuda", "--json")
    assert done.exit_code == 0 and '"isa": "cpu", "codec": "int8"' in done.stdout, done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_is_missing_is_said(bitnet: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> str:
        done = bitnet("run", "-p", "hello", "--device", name)
        assert done.exit_code == 2 and done.stderr.count("\n") == 1
        return str(done.stderr)

    if not torch.backends.mps.is_available():
        assert refused("mps").startswith(f"error: device is 'mps'; torch {torch.__version__} finds no Apple GPU here")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert refused("cuda").startswith(f"error: device is 'cuda'; torch {torch.__version__} is built without CUDA: install ")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert refused("cuda:1").startswith(f"error: device is 'cuda:1'; torch {torch.__version__} finds no GPU with a driver here")
    for name in ("torch", "bitnet.train.device", "bitnet.train.layers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refused("cuda") == "error: device is 'cuda', which needs torch: pip install 'bitnet-ternary[train]'; 'cpu' does without\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_cuda_agrees() -> None:
    ids = TernaryTransformer.from_pretrained().tokenizer.encode("Once upon a time, there was a little fox who lived in the forest.")
    ours, native = (TernaryTransformer.from_pretrained(device=where).logits(ids) for where in ("cuda", "cpu"))
    assert relative(ours, native) <= 0.014 * np.sqrt(24)
