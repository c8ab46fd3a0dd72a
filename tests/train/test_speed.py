"""What a run says of its speed: the arithmetic as torch itself counts it, and the share of a rate that was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from click.testing import Result
from mini_recipe import stories
from torch.utils.flop_counter import FlopCounterMode

from bitnet.train import loop
from bitnet.train.layers import ternarize_model
from bitnet.train.speed import operations_per_token, peak_operations

LENGTH = 64


def llama(tied: bool) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def counted(model: torch.nn.Module, backward: bool = True) -> float:
    """Operations a token, as torch counts its own matrix products."""
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros((1, LENGTH), dtype=torch.int64)).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / LENGTH


@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_those_that_torch_counts(tied: bool) -> None:
    """Which multiplies every query with every key, also those that are masked, where half of them are counted here."""
    model = llama(tied)
    future = 4 * 2 * (4 * 32) * LENGTH / 2
    found = operations_per_token(model, LENGTH)
    assert found + 3 * future == counted(model)
    assert operations_per_token(model, LENGTH, trains=False) + future == counted(model, backward=False)
    ternarize_model(model)
    assert operations_per_token(model, LENGTH) == found


def test_weights_that_do_not_train_have_no_gradient_of_their_own() -> None:
    model = llama(tied=False)
    before, torchs, up = operations_per_token(model, LENGTH), counted(model), model.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr]
    up.requires_grad_(False)
    assert before - operations_per_token(model, LENGTH) == torchs - counted(model) == 2 * up.numel()


def test_the_peak_is_a_rate() -> None:
    assert 1e9 < peak_operations(torch.device("cpu"), bf16=False) < 1e15


def test_the_last_line_states_tokens_a_second_and_the_share_of_the_peak(
    tmp_path: Path, bitnet: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "peak_operations", lambda device, bf16: 1e9)
    (tmp_path / "text.txt").write_text("".join(stories()))
    recipe = {
        "task": "pretrain", "name": "mini", "scheme": "ternary", "vocab_size": 300, "context": 64,
        "model": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
        "training": {
            "steps": 12, "batch_tokens": 128, "context": 32, "warmup_steps": 2, "decay_steps": 3, "checkpoint_every": 12, "compile": False,
        },
    }  # fmt: skip
    (tmp_path / "mini.yaml").write_text(json.dumps(recipe))
    done = bitnet("train", "--config", tmp_path / "mini.yaml", "--data", tmp_path / "text.txt", "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    said, found = done.stdout.splitlines()[0], json.loads(done.stdout.splitlines()[-1])
    speed, share = int(found["tokens_per_second"]), float(found["share_of_peak"])
    config = SimpleNamespace(**recipe["model"])
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 300 * 32
    attention = 3 * 4 * config.num_hidden_layers * 32 * 32 / 2
    assert share == pytest.approx(speed * (6 * weights + attention) / 1e9, rel=1e-2)
    assert f"loss {found['loss']} after 12 steps; {speed:,} tokens/s, {share:.1%} of the rate of a large matrix product here" in said
