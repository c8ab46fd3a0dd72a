"""The model inside the package: its size, its files and its scores, and that every machine tells the same story."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from bitnet import _native
from bitnet.engine import chosen_codec
from bitnet.evaluate.perplexity import read_text, score_text
from bitnet.files import safetensors
from bitnet.source import EMBEDDED_MODEL
from bitnet.transformer import TernaryTransformer

FOLDER = Path(str(resources.files("bitnet") / "embedded" / EMBEDDED_MODEL))
SCORED = re.compile(r"^\| (\S+\.txt) \| [\d,]+ \| (\d\.\d+) \| ([\d.]+)% \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def model() -> TernaryTransformer:
    return TernaryTransformer.from_pretrained(EMBEDDED_MODEL)


def test_what_ships() -> None:
    names = {p.name for p in FOLDER.iterdir()}
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == model | {"README.md", "loss.png"}
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 8_000_000
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "loss.png" in card and "Data and rights" in card and "seed" in card and "{" not in card.replace("{-1, 0, +1}", "")
    assert len(SCORED.findall(card)) == 4


def test_sizes(model: TernaryTransformer) -> None:
    c = model.engine.config
    assert (c.architecture, c.activation, c.sub_norms, c.tied) == ("bitnet", "relu2", True, True)
    assert (c.head_dim, c.max_context, c.vocab_size) == (64, 1024, 4096)
    assert c.hidden_size % 256 == 0 and c.ffn_size % 256 == 0
    layer = c.hidden_size * c.head_dim * 2 * (c.n_heads + c.n_kv_heads) + 3 * c.hidden_size * c.ffn_size
    assert 10e6 <= c.vocab_size * c.hidden_size + c.n_layers * layer <= 30e6
    assert model.engine.codec == chosen_codec("auto", model.engine.isa)


def story(isa: str, threads: int, *options: str) -> dict:
    command = [sys.executable, "-m", "bitnet", "run", "-p", "Once upon a time", "-n", "60", "--threads", str(threads), "--json", *options]
    done = subprocess.run(command, env=os.environ | {"BITNET_ISA": isa}, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("options", [["--temperature", "0"], ["--seed", "5"]])
def test_the_same_story_on_every_instruction_set_and_number_of_threads(options: list[str]) -> None:
    isas = [name for name, state in _native.self_test().items() if state == "ok"]
    told = [story(isa, threads, *options) for isa in isas for threads in (1, 2)]
    assert {t["isa"] for t in told} == set(isas)
    assert all(t["token_ids"] == told[0]["token_ids"] and t["text"] == told[0]["text"] for t in told)
    assert len(told[0]["text"].split()) > 20


def test_transformers_loads_the_folder_and_agrees(model: TernaryTransformer) -> None:
    random_models = pytest.importorskip("random_models", reason="torch or transformers is not installed (extra [train])")
    pytest.importorskip("accelerate", reason="accelerate is not installed; transformers needs it for BitNet")
    text = "Once upon a time, there was a little fox who lived in the forest. One day, the fox met a bear and said"
    ids = model.tokenizer.encode(text)
    assert ids == random_models.transformers.AutoTokenizer.from_pretrained(FOLDER)(text).input_ids
    reference = random_models.transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
    random_models.torch.nn.Module.float(reference)  # its own float() refuses for quantized models
    for name, tensor in safetensors.read(FOLDER / "model.safetensors").tensors.items():
        if name.endswith("weight_scale"):  # transformers loads the whole model in bf16 and rounds the scales with it
            reference.get_submodule(name.removesuffix(".weight_scale")).weight_scale.fill_(float(tensor.dense()[0]))
    ours, theirs = model.logits(ids), random_models.logits(reference, ids)
    # int8 rounding that goes the other way: 1.4 % for each of four products in line, in each layer (tests/models derives it)
    noise = 0.014 * np.sqrt(4 * model.engine.config.n_layers)
    assert (np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max() <= noise
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.9


def test_the_card_says_what_is_measured(model: TernaryTransformer, shared_data: Path) -> None:
    card = {name: (float(bits), float(share)) for name, bits, share in SCORED.findall((FOLDER / "README.md").read_text(encoding="utf-8"))}
    score = score_text(model, read_text(shared_data / "eval" / "fairytales-val.txt"))
    bits, share = card["fairytales-val.txt"]
    assert round(score.bits_per_byte, 3) == bits and round(100 * score.next_token_accuracy, 1) == share


def test_the_tokenizer_keeps_every_text(model: TernaryTransformer) -> None:
    for text in ("Once upon a time", " spaces  and\n\nlines\t", "naïve café — “quotes” 🙂 日本語 12345", "<|endoftext|> is text here"):
        ids = model.tokenizer.encode(text)
        assert ids[0] == 0 and 0 not in ids[1:] and model.tokenizer.decode(ids) == text
