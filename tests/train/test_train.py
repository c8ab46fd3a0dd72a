"""From text to files that the engine runs, in miniature: every scheme and task; what resumes, what stops, what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [train])")
pytest.importorskip("peft", reason="peft is not installed (extra [train])")
yaml = pytest.importorskip("yaml", reason="pyyaml is not installed (extra [train])")

from mini_recipe import MINI, mini, stories, write_jsonl  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from bitnet.errors import FormatError, UsageError  # noqa: E402
from bitnet.packing import bf16_bits  # noqa: E402
from bitnet.ternary import quantize_int8  # noqa: E402
from bitnet.train import checkpoint, data, loop  # noqa: E402
from bitnet.train.layers import dequantized  # noqa: E402
from bitnet.train.models import Base  # noqa: E402
from bitnet.train.parallel import Processes  # noqa: E402
from bitnet.train.prepare import Prepared  # noqa: E402
from bitnet.train.recipe import Recipe  # noqa: E402
from bitnet.train.run import run  # noqa: E402
from bitnet.transformer import TernaryTransformer  # noqa: E402

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "gguf"
INT8_NOISE = 0.047  # derived in tests/models/test_against_transformers.py


def final(out: Path) -> dict[str, Any]:
    state = checkpoint.newest(out)
    assert state is not None
    return state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def in_torch(trained: Path, ids: list[int]) -> np.ndarray:
    """Logits of the run's last checkpoint in torch, float32 but for what the export rounds, [tokens, vocab]."""
    recipe = Recipe.load(trained / "recipe.yaml")
    from bitnet.train.layers import ternarize_model
    from bitnet.train.models import new_model

    model = new_model(recipe.model, recipe.vocab_size, recipe.context, recipe.seed)
    if recipe.scheme != "fp16":
        ternarize_model(model, quantization=recipe.quantization.quantization(recipe.scheme))
    values = final(trained)["model"]
    for name, p in model.named_parameters():
        plain = values[name]
        if recipe.scheme == "fp16":
            plain = plain.half().float()
        elif "proj" not in name:
            plain = torch.tensor((bf16_bits(plain.numpy()).astype(np.uint32) << 16).view(np.float32))
        p.data.copy_(plain)
    with torch.no_grad():
        found: np.ndarray = model.eval()(torch.tensor([ids])).logits[0].numpy()
    return found


@pytest.mark.parametrize("scheme", ["ternary", "binary", "fp16"])
def test_a_trained_checkpoint_is_what_the_engine_runs(trained: dict[str, Path], scheme: str) -> None:
    out = trained[scheme]
    engine = TernaryTransformer.from_pretrained(out / "model")
    ids = engine.tokenizer.encode(stories(1)[0])[:60]
    ours, theirs = engine.logits(ids), in_torch(out, ids)
    # int8 activations may round the other way where f16 keys and values differ; without them only f16's 2^-11 is left, times layers
    tolerance = 2.0**-8 if scheme == "fp16" else INT8_NOISE
    assert (np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max() < tolerance
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"]) and int(rows[-1]["tokens"]) == 60 * 256
    schemes = {"ternary": "ternary", "binary": "binary", "fp16": "f16"}
    from bitnet.models import open_checkpoint

    assert open_checkpoint(out / "model").tensors["model.layers.1.mlp.up_proj.weight"].scheme == schemes[scheme]
    assert (out / "model" / "loss.png").read_bytes().startswith(b"\x89PNG") and list((out / "tensorboard").iterdir())
    card = (out / "model" / "README.md").read_text()
    assert "| a.txt |" in card and card.count("| b.txt |") == 1  # held out
    assert f"scheme: {scheme}" in card and "60 steps" in card


@pytest.mark.parametrize(
    ("has", "changed", "chosen"),
    [
        ("avx512_bf16", {}, "eager"),
        ("avx512_bf16", {"bf16": False}, "sdpa"),
        ("avx512_bf16", {"compile": False}, "sdpa"),
        ("avx512_bf16", {"decay_context": 2048, "batch_tokens": 2048}, "sdpa"),
        ("avx512_bf16 amx_tile", {}, "sdpa"),
        ("", {}, "sdpa"),
    ],
)
def test_attention_as_this_cpu_computes_it_quickest(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: str, changed: dict[str, Any], chosen: str
) -> None:
    for instructions in ("avx512_bf16", "amx_tile"):
        found = instructions in has.split()
        monkeypatch.setattr(torch.cpu, f"_is_{instructions}_supported", lambda found=found: found)
    recipe = Recipe.parse({**MINI, "context": 4096, "training": {**MINI["training"], "compile": True, **changed}}, "mini")
    prepared = Prepared(recipe, corpus, tmp_path, Processes())
    assert prepared.model.config._attn_implementation == chosen
    tokens, targets = (torch.from_numpy(a) for a in prepared.batches(0))
    found = loop._loss(prepared.model, tokens, targets, 1, bf16=False)
    prepared.model.set_attn_implementation("sdpa")
    assert torch.allclose(found, loop._loss(prepared.model, tokens, targets, 1, bf16=False), rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "length", "vocab", "taught", "at_once"),
    [
        (16, 512, 4096, False, 16),
        (32, 256, 262144, False, 4),
        (31, 256, 262144, False, 4),
        (32, 256, 262144, True, 2),
        (1, 8192, 262144, False, 1),
    ],
)
def test_a_large_vocabulary_is_met_in_parts(rows: int, length: int, vocab: int, taught: bool, at_once: int) -> None:
    model = torch.nn.Module()
    model.config = transformers.LlamaConfig(vocab_size=vocab)
    assert loop.at_once(model, rows, length, taught) == at_once


def test_parts_by_memory_are_those_of_micro_batch(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(mini(steps=2), corpus, tmp_path / "whole")
    by_hand = Recipe.parse({**MINI, "training": {**MINI["training"], "steps": 2, "micro_batch": 1}}, "mini")
    run(by_hand, corpus, tmp_path / "by hand")
    monkeypatch.setattr(loop, "LOGITS_BYTES", 1)
    run(mini(steps=2), corpus, tmp_path / "by memory")
    whole, hand, memory = (final(tmp_path / name)["model"] for name in ("whole", "by hand", "by memory"))
    assert all(torch.equal(hand[n], memory[n]) for n in hand) and not all(torch.equal(hand[n], whole[n]) for n in hand)


@pytest.mark.parametrize("scheme", ["ternary", "binary", "fp16"])
def test_the_same_greedy_tokens_in_torch_and_in_the_engine(trained: dict[str, Path], scheme: str, tmp_path: Path, corpus: Path) -> None:
    """Over 208 tokens, by windows. Where torch's likeliest two are closer than the tolerance, either will do."""
    engine = TernaryTransformer.from_pretrained(trained[scheme] / "model")
    compared = 0
    for seed in range(4):
        ids = engine.tokenizer.encode(stories(9)[seed * 2])[:10]
        told = engine.generate(engine.tokenizer.decode(ids[1:]), temperature=0, max_new_tokens=52).token_ids
        ids = engine.tokenizer.encode(engine.tokenizer.decode(ids[1:]))
        theirs = in_torch(trained[scheme], ids + told)[len(ids) - 1 : -1]
        for logits, token in zip(theirs, told, strict=True):
            best = np.sort(logits)[-2:]
            assert token == logits.argmax() or best[1] - logits[token] <= INT8_NOISE * np.linalg.norm(logits) / len(logits) ** 0.5
            compared += token == logits.argmax()
    assert compared >= 190


def test_the_three_schemes_start_alike_and_see_the_same_tokens(corpus: Path, tmp_path: Path) -> None:
    from bitnet.train.models import new_model

    for scheme in ("ternary", "binary", "fp16"):
        (tmp_path / scheme).mkdir()
    prepared = [Prepared(mini(scheme=s), corpus, tmp_path / s, Processes()) for s in ("ternary", "binary", "fp16")]
    start = new_model(MINI_SHAPE, 300, 64, 3).state_dict()
    for each in prepared:
        assert same(dict(each.model.state_dict()), dict(start))
        assert all(np.array_equal(a, b) for step in (0, 5) for a, b in zip(each.batches(step), prepared[0].batches(step), strict=True))


MINI_SHAPE = Recipe.parse(MINI, "mini").model


def test_a_resumed_run_is_the_uninterrupted_one(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = mini(scheme="ternary", blend_steps=3)
    run(recipe, corpus, tmp_path / "whole")
    save = checkpoint.save

    class Cut(BaseException):
        pass

    def cut(out: Path, step: int, state: dict[str, Any], good_step: int) -> Path:
        path = save(out, step, state, good_step)
        if step == 4:
            (out / "checkpoint-6.pt").write_bytes(b"PK half a checkpoint")  # as a failing disk would leave it
            raise Cut
        return path

    monkeypatch.setattr(loop, "save", cut)
    with pytest.raises(Cut):
        run(recipe, corpus, tmp_path / "cut")
    monkeypatch.setattr(loop, "save", save)
    with pytest.warns(UserWarning, match="cannot be read"):
        run(recipe, corpus, tmp_path / "cut")
    a, b = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"]) and a["step"] == b["step"] == 6
    logs = [list(csv.DictReader((tmp_path / n / "log.csv").open())) for n in ("whole", "cut")]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]] == ["6"]
    assert len(checkpoint.saved(tmp_path / "cut")) == checkpoint.KEPT and not list((tmp_path / "cut").glob(".*tmp"))
    models = [(tmp_path / n / "model" / "model.safetensors").read_bytes() for n in ("whole", "cut")]
    assert models[0] == models[1]


def test_dropout_resumes_too(trained: dict[str, Path], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"base_model": str(trained["ternary"] / "model"), "rank": 2, "lora_dropout": 0.3, "training": dict(MINI["training"])}
    recipe = Recipe.parse(values, "lora")
    run(recipe, corpus, tmp_path / "whole")
    run(recipe, corpus, tmp_path / "cut")
    for path in (tmp_path / "cut").glob("checkpoint-6.pt"):
        path.unlink()
    run(recipe, corpus, tmp_path / "cut")
    assert same(final(tmp_path / "whole")["model"], final(tmp_path / "cut")["model"])


def test_kill_9_loses_an_interval_at_most(corpus: Path, tmp_path: Path) -> None:
    """At whatever moment: the folder never holds a checkpoint that cannot be read, and the same command ends as if nothing had been."""
    config = tmp_path / "mini.yaml"
    config.write_text(yaml.safe_dump({**MINI, "training": {**MINI["training"], "steps": 40, "checkpoint_every": 1}}))
    command = [sys.executable, "-m", "bitnet", "train", "--config", str(config), "--data", str(corpus), "--out"]
    child = subprocess.Popen([*command, str(tmp_path / "run")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not checkpoint.saved(tmp_path / "run") and child.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    reached = [int(p.stem.split("-")[1]) for p in checkpoint.saved(tmp_path / "run")]
    assert reached and all(torch.load(p, weights_only=True)["step"] for p in checkpoint.saved(tmp_path / "run"))
    recipe = Recipe.load(config)
    run(recipe, corpus, tmp_path / "run")
    run(recipe, corpus, tmp_path / "whole")
    assert same(final(tmp_path / "run")["model"], final(tmp_path / "whole")["model"])


@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_nan_stops_with_step_layer_and_checkpoint(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    from bitnet.train.layers import TernaryLinear

    calls = 0
    forward = TernaryLinear.forward

    def poisoned(self: Any, x: Any) -> Any:
        nonlocal calls
        y = forward(self, x)
        calls += self.out_features == 48
        if self.out_features == 48 and calls > 14:  # gate and up of two layers, four a step: in the fourth step
            return y * float("nan") if where == "weights" else y + (y - y.detach()) * float("inf")
        return y

    monkeypatch.setattr(TernaryLinear, "forward", poisoned)
    with pytest.raises(loop.TrainingStopped) as stopped:
        run(mini(), corpus, tmp_path / "run")
    said = str(stopped.value)
    assert said.startswith("step 4: ") and "mlp." in said.split("first not finite: ")[1] and said.count("\n") == 0
    assert f"last good checkpoint: {tmp_path / 'run' / 'checkpoint-2.pt'}" in said
    assert all(torch.isfinite(v).all() for v in final(tmp_path / "run")["model"].values())


def test_divergence_stops(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(loop.TrainingStopped, match=r"step \d+: the loss is .* above its best; largest weight .* in "):
        run(mini(scheme="fp16", steps=200, matrix_lr=10.0, divergence=0.02, decay_steps=1, checkpoint_every=500), corpus, tmp_path / "run")


def test_a_second_run_in_the_folder_is_refused(corpus: Path, tmp_path: Path) -> None:
    run(mini(steps=2), corpus, tmp_path / "run")
    with pytest.raises(UsageError, match=r"this run was begun with training\.steps 2, now it is 4"):
        run(mini(steps=4), corpus, tmp_path / "run")
    import fcntl

    lock = os.open(tmp_path / "run" / ".lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(Exception, match="another run is at work in this folder"):
        run(mini(steps=2), corpus, tmp_path / "run")
    os.close(lock)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is a folder of other things"):
        run(mini(steps=2), corpus, tmp_path / "other", export=tmp_path / "mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{**: 1", "is no YAML"),
        ("- a", "is list; expected keys and values"),
        ("taks: pretrain", "unknown key taks; did you mean task?"),
        (
            "task: pretrian",
            "task is 'pretrian'; expected one of pretrain, distil, heal, grow, lora, instruct, classify; did you mean pretrain?",
        ),
        ("scheme: ternery", "scheme is 'ternery'; expected one of fp16, binary, ternary; did you mean ternary?"),
        ("training: {stpes: 5}", "unknown key training.stpes; did you mean training.steps?"),
        ("training: {steps: many}", "training.steps is 'many'; expected a whole number"),
        ("training: {steps: 0}", "training.steps is 0; expected at least 1"),
        ("training: {steps: true}", "training.steps is True; expected a whole number"),
        ("training: {matrix_lr: -1e-3}", "training.matrix_lr is -0.001; expected above 0 and at most 10"),
        ("training: 5", "training is 5; expected keys and values"),
        ("model: {hidden_size: 30, num_attention_heads: 4}", "did you mean|is missing|multiple"),
        ("context: 64\ntraining: {context: 128}", "training.context is 128, above the model's context of 64"),
        ("training: {mixture: {}}", "training.mixture is {}; expected names and their values"),
        ("rank: 4", "task lora needs base_model"),
        ("teacher: x", "task distil makes a new model, whose shape is missing"),
        ("task: heal\nbase_model: x\nscheme: fp16", "task heal makes layers ternary or binary"),
        ("task: grow\nbase_model: x", "task grow needs num_hidden_layers, context, or both"),
        ("num_hidden_layers: 0\nbase_model: x", "num_hidden_layers is 0; expected at least 1 and at most 1,000"),
        ("lora_dropout: 1.5\nrank: 4\nbase_model: x", "lora_dropout is 1.5; expected at least 0 and at most 0.99"),
        ("rank: 4\nquantize: int4\nbase_model: x", "quantize is 'int4'; expected one of ternary, none"),
        ("quantization: {scale: groups}", "scale is 'groups'; expected tensor, row"),
        ("quantization: {scale: 32}", "did you mean group:32?"),
        ("quantization: {scale: rows}", "did you mean row?"),
        ("training: {steps: 6, blend_steps: 6}", "training.blend_steps is 6; expected less than the 6 steps"),
        ("name: a\nname: b\ncontext: 8", "line 2: is no YAML (the key name is there twice)"),
        ("task: [a]", "task is ['a']; expected text"),
        ("temperature: " + "9" * 400, "temperature is inf; expected at least 0.01 and at most 1,000"),
        ("name: " + "[" * 5000, "is no YAML"),
        ('name: "a\x07"', "is no YAML (unacceptable character #x0007"),
        ("seed: 1" + "0" * 24, "expected at least 0 and at most 9,223,372,036,854,775,807"),
        ("training: {batch_tokens: 1" + "0" * 20 + "}", "expected at least 1 and at most 1,000,000,000"),
        ("tokenizer_texts: {a: 1.0e+300}", "tokenizer_texts.a is 1e+300; expected above 0 and at most 1,000"),
        ("matrix_lr: 1", "unknown key matrix_lr; did you mean training.matrix_lr?"),
        ("lerning_rate: 1", "did you mean training.matrix_lr?"),
        ("base_model: x\nr: 8", "unknown key r; did you mean rank?"),
        ("model: {layers: 2}", "unknown key model.layers; did you mean model.num_hidden_layers?"),
        (
            "scheme: binary\ncontext: 64\nquantization: {rule: threshold}",
            "quantization.rule does nothing with scheme binary, whose weights are signs",
        ),
        ("task: classify\nbase_model: x\ntraining: {mixture: {a.txt: 1}}", "training.mixture does nothing in task classify"),
        ("tokenizer_texts: {a.txt: 0}", "tokenizer_texts.a.txt is 0.0; expected above 0"),
        ("rank: 4\ntask: pretrain\ncontext: 64", "rank does nothing in task pretrain, which takes scheme,"),
        ("base_model: x\nrank: 4\nscheme: fp16", "scheme does nothing in task lora, which takes base_model, rank, alpha, quantize,"),
        ("quantization: {layers: '*.mlp.*'}", "quantization.layers does nothing in task pretrain"),
        (
            "task: distil\nteacher: x\nvocab_size: 512\nmodel: " + str(MINI["model"]).replace("'", ""),
            "vocab_size does nothing in task distil, which takes scheme,",
        ),
        ("base_model: x\nquantization: {alphas: article, rule: threshold}", "quantization.alphas says what quantization.rule would"),
        ("base_model: x\nscheme: binary\nquantization: {alphas: article}", "quantization.alphas are of ternary layers"),
        ("training: {mixture: {a: 1.0e+308, b: 1.0e+308}}", "training.mixture sums to inf; expected finite weights, at least one above 0"),
        ("task: !!bool maybe", "is no YAML"),
        ("training: {steps: !!int ''}", "is no YAML"),
        ("seed: 0x1" + "f" * 5000, "seed has more than 300 digits"),
        ('name: "a\\ud800"', "which cannot be written as UTF-8; expected text"),
        ("base_model: x\nlabels: {0: no, 1: yes}", "labels.0 is False, as YAML reads yes and no; expected text: put it in quotes"),
        ("base_model: x\nlabels: {0: a, 1: a}", "expected two or more, each with a word of its own"),
        ("base_model: x\nlabels: {0: a}", "expected two or more, each with a word of its own"),
    ],
)
def test_a_bad_recipe_costs_one_line(tmp_path: Path, text: str, said: str) -> None:
    import re

    path = tmp_path / "bad.yaml"
    model = "" if any(k in text for k in ("model:", "teacher", "- a", "{**")) else "\nmodel: " + str(MINI["model"]).replace("'", "")
    path.write_text(text + (model if "\n" not in text or "context" in text else ""))
    with pytest.raises(UsageError) as error:
        Recipe.load(path)
    line = str(error.value)
    assert line.startswith(str(path)) and "\n" not in line
    assert said in line or re.search(said, line), line


@pytest.mark.parametrize("name", ["./a.txt", "sub/a.txt"])
def test_texts_of_a_mixture_are_files_of_the_folder(corpus: Path, tmp_path: Path, name: str) -> None:
    (corpus / "sub").mkdir(exist_ok=True)
    (corpus / "sub" / "a.txt").write_text("text")
    with pytest.raises(UsageError, match=rf"training.mixture names {name}; expected the name of a file in {corpus}, without folders"):
        Prepared(mini(mixture={"a.txt": 1.0, name: 1.0}), corpus, tmp_path, Processes())


def test_a_damaged_log_keeps_its_whole_rows(tmp_path: Path) -> None:
    rows = [f"{step},5.0,1.0,0.3,{step * 10},2.0,3.0" for step in range(10, 100, 10)]
    lines = [",".join(loop.COLUMNS), *rows]
    lines[2] = lines[2].replace(",", ',"', 1)
    lines[4] = "x" * 200_000
    lines[6] = lines[6][:9]
    (tmp_path / "log.csv").write_bytes("\r\n".join(lines).encode() + b"\xff\0")
    assert [row["step"] for row in loop.read_log(tmp_path)] == ["10", "30", "50", "70", "80"]


def test_changes_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "mini.yaml"
    path.write_text(yaml.safe_dump(MINI))
    recipe = Recipe.load(path, ["scheme=binary", "training.checkpoint_every=7", "training.matrix_lr=1e-3", "quantization.scale=row"])
    assert (recipe.scheme, recipe.training.checkpoint_every, recipe.training.matrix_lr) == ("binary", 7, 0.001)
    for change, said in (
        ("scheme", "expected KEY=VALUE"),
        ("training.stps=1", "did you mean training.steps"),
        ("seed.x=1", "has no keys"),
        ("x=[", "the value is no YAML"),
    ):
        with pytest.raises(UsageError, match=said):
            Recipe.load(path, [change])


def test_every_recipe_in_the_folder_is_one() -> None:
    found = {path.stem: Recipe.load(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))}
    assert {r.task for r in found.values()} == {"pretrain", "distil", "heal", "grow", "lora", "instruct", "classify"}
    assert found["twins"].training.context == found["twins"].context == 512


def test_documents_and_windows() -> None:
    assert data.documents("a\n<|endoftext|>\nb\n\nc\n<|endoftext|>\n") == ["a", "b\n\nc"]
    run_together = "Once upon a time, a.\n\nThen b.\nOne day, c.\n\nOne day, still c.\nOnce upon a time, d."
    assert data.documents(run_together) == ["Once upon a time, a.\n\nThen b.", "One day, c.\n\nOne day, still c.", "Once upon a time, d."]
    text = "<|endoftext|>\n".join(stories())
    tokenizer = data.train_tokenizer([text], 300)
    source = data.encode("a.txt", text, tokenizer)
    assert np.array_equal(np.flatnonzero(source.tokens == 0), source.starts) and len(source.starts) == 300
    windows = data.sample_windows([source], np.ones(1), 200, 50, 1.0, np.random.default_rng(0))
    assert windows.shape == (200, 50) and (windows[:, 0] == 0).mean() > 0.9  # all but those that the end of the text holds back
    with pytest.raises(UsageError, match="vocabulary of"):
        data.train_tokenizer(["ab"], 300)
    with pytest.raises(UsageError, match=r"are not there: gone\.txt"):
        data.read_sources(Path("."), ["gone.txt"])


def test_text_jsonl_and_packed_tokens_give_the_same_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = stories(50)
    (tmp_path / "a.txt").write_text("<|endoftext|>\n".join(docs))
    write_jsonl(tmp_path / "a.jsonl", [{"text": d.strip("\n")} for d in docs])
    tokenizer = data.train_tokenizer(docs, 300)
    whole = data.encode("a", (tmp_path / "a.txt").read_text(), tokenizer)
    monkeypatch.setattr(data, "_BATCH_CHARACTERS", 500)  # several batches
    text, lines = (data.pack(tmp_path / f"a.{kind}", tokenizer, [0], 0, tmp_path / "tokens") for kind in ("txt", "jsonl"))
    np.save(tmp_path / "p.npy", whole.tokens.astype(np.uint16))
    packed = data.pack(tmp_path / "p.npy", tokenizer, [0], 0, tmp_path / "tokens")
    for source in (text, lines, packed):
        assert np.array_equal(source.tokens, whole.tokens)
    assert np.array_equal(text.starts, whole.starts) and isinstance(text.tokens, np.memmap) and isinstance(packed.tokens, np.memmap)
    (tmp_path / "a.txt").write_text("other")
    assert len(data.pack(tmp_path / "a.txt", tokenizer, [0], 0, tmp_path / "tokens").starts) == 1  # encoded anew
    for name, content, said in (
        ("b.jsonl", b'{"text": 1}\n', 'line 1 has no "text"'),
        ("c.jsonl", b'{"text": "a"}\n{', "line 2 is no JSON"),
        ("d.npy", b"nothing", "is no array of numpy"),
        ("e.txt", b"\n\n", "holds no text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=said):
            data.pack(tmp_path / name, tokenizer, [0], 0, tmp_path / "tokens")
    np.save(tmp_path / "f.npy", np.array([5, 300], np.uint16))
    with pytest.raises(FormatError, match="holds token 300; the vocabulary has 300"):
        data.pack(tmp_path / "f.npy", tokenizer, [0], 0, tmp_path / "tokens")


def test_long_documents_are_encoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PIECE_CHARACTERS", 300)
    (tmp_path / "a.txt").write_text("<|endoftext|>\n".join(["".join(stories(40)), "the end\n"]))
    tokenizer = data.train_tokenizer(stories(), 300)
    source = data.pack(tmp_path / "a.txt", tokenizer, [0], 0, tmp_path / "tokens")
    assert len(source.starts) == 2 and source.tokens[0] == 0 and (source.tokens == 0).sum() == 2
    assert tokenizer.decode(source.tokens[: source.starts[1]].tolist()).split() == "".join(stories(40)).split()


def test_every_example_is_seen_once_in_a_pass() -> None:
    tokens, starts = np.arange(1, 31, dtype=np.uint16), np.arange(0, 30, 3)
    source = data.Source("x", tokens, starts, 0, np.tile([False, False, True], 10))
    seen = [data.sample_examples(source, 4, step, 8, seed=1) for step in range(5)]
    firsts = np.concatenate([t[:, 0] for t, _ in seen])
    assert sorted(firsts[:10]) == sorted(firsts[10:]) == list(range(1, 31, 3)) and list(firsts[:10]) != list(firsts[10:])
    t, wanted = seen[0]
    assert t.shape == (4, 32) and all((row[row != data.IGNORED] == x[0] + 2).all() for x, row in zip(t, wanted, strict=True))


def test_distil_from_a_teacher_of_either_kind(trained: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    import random_models

    from bitnet.convert import convert

    folder, gguf = tmp_path / "teacher", tmp_path / "teacher.gguf"
    random_models.llama(seed=1, vocab_size=300, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    (folder / "tokenizer.json").write_text((trained["fp16"] / "tokenizer.json").read_text())
    convert(folder, gguf, format="gguf-f32")
    losses = []
    for teacher in (folder, gguf):
        out = tmp_path / f"from-{teacher.name}"
        run(mini(task="distil", vocab_size=None, teacher=str(teacher), teacher_share=1.0, steps=40, checkpoint_every=40), corpus, out)
        losses.append([float(r["loss"]) for r in csv.DictReader((out / "log.csv").open())])
        TernaryTransformer.from_pretrained(out / "model").generate("Once", max_new_tokens=2)
    assert losses[0][-1] < 0.7 * losses[0][0] and np.allclose(losses[0], losses[1], rtol=0.02)


def test_the_distillation_loss_is_zero_for_the_teacher_itself(trained: dict[str, Path]) -> None:
    base = Base(str(trained["fp16"] / "model"))
    tokens = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    teacher = loop.Teacher(base.model.eval(), 1.0, 2.0)
    assert abs(float(loop._distil_loss(base.model, tokens, tokens, 40, True, teacher))) < 1e-5
    half = float(loop._distil_loss(base.model, tokens, tokens, 40, True, loop.Teacher(base.model, 0.25, 1.0)))
    assert half == pytest.approx(0.75 * float(loop._loss(base.model, tokens, tokens, 40)), rel=1e-5)


@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_heal(trained: dict[str, Path], corpus: Path, tmp_path: Path, scheme: str) -> None:
    """An FP16 model whose layers become ternary loses much; a short training brings much of it back."""
    values = {"task": "heal", "scheme": scheme, "base_model": str(trained["fp16"] / "model"), "context": 32, "seed": 1}
    values["training"] = {**MINI["training"], "steps": 60, "blend_steps": 10, "decay_steps": 20, "batch_tokens": 256, "matrix_lr": 0.005}
    if scheme == "ternary":
        values["quantization"] = {"alphas": "article"}
    run(Recipe.parse(values, "heal"), corpus, tmp_path / "run")
    from bitnet.convert import Ternarization, convert
    from bitnet.evaluate.perplexity import score_text

    text = "".join(stories(20))
    if scheme == "ternary":
        convert(trained["fp16"] / "model", tmp_path / "cut.gguf", format="gguf-i2_s", quantization="ternary",
                ternarization=Ternarization("absmean"), allow_requantize=True)  # fmt: skip
        before = score_text(TernaryTransformer.from_pretrained(tmp_path / "cut.gguf"), text).bits_per_byte
    else:
        before = score_text(TernaryTransformer.from_pretrained(trained["fp16"] / "model", weights="binary"), text).bits_per_byte
    after = score_text(TernaryTransformer.from_pretrained(tmp_path / "run" / "model"), text).bits_per_byte
    assert after < 0.9 * before


@pytest.mark.parametrize("scheme", ["ternary", "binary", "fp16"])
def test_a_grown_model_begins_with_the_logits_of_its_base(trained: dict[str, Path], corpus: Path, tmp_path: Path, scheme: str) -> None:
    """Two layers become five and 64 places 128; trained for six steps of 128 tokens, it runs in the engine, past 64 tokens, as in torch."""
    values = {k: v for k, v in MINI.items() if k not in ("model", "vocab_size")}
    values |= {"task": "grow", "scheme": scheme, "base_model": str(trained[scheme] / "model"), "num_hidden_layers": 5, "context": 128}
    grow, same = (Recipe.parse({**values, "num_hidden_layers": n}, "grow") for n in (5, 2))
    begun, base = (Prepared(recipe, corpus, tmp_path / "begun", Processes()).model for recipe in (grow, same))
    tokens = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(0))
    assert torch.equal(begun(tokens).logits, base(tokens).logits)
    engine = TernaryTransformer.from_pretrained(trained[scheme] / "model").logits(tokens[0].tolist())
    assert np.linalg.norm(base(tokens[:1]).logits[0].detach().numpy() - engine) < INT8_NOISE * np.linalg.norm(engine)

    run(grow, corpus, tmp_path / "run")
    state = final(tmp_path / "run")
    learned = [n for n, p in begun.named_parameters() if p.requires_grad and not torch.equal(p, state["model"][n])]
    assert len(learned) == len(list(begun.parameters()))  # copies too: every matrix and every norm has moved
    grown = TernaryTransformer.from_pretrained(tmp_path / "run" / "model")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["max_position_embeddings"]) == (5, 128)
    begun.load_state_dict(state["model"], strict=False)
    long = torch.randint(0, 300, (1, 120), generator=torch.Generator().manual_seed(1))
    theirs, ours = begun.eval()(long).logits[0].detach().numpy(), grown.logits(long[0].tolist())
    assert np.linalg.norm(theirs - ours) < INT8_NOISE * np.linalg.norm(theirs)


def test_a_model_grows_evenly_or_says_why_not(trained: dict[str, Path]) -> None:
    base = Base(str(trained["fp16"] / "model"))
    names = [layer.self_attn.q_proj.weight for layer in base.model.model.layers]
    base.grow(5, None)
    layers = base.model.model.layers
    assert [next(i for i, w in enumerate(names) if torch.equal(w, layer.self_attn.q_proj.weight)) for layer in layers] == [0, 0, 0, 1, 1]
    assert [bool(layer.mlp.down_proj.weight.any()) for layer in layers] == [True, False, False, True, False]
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(5)) and base.model.config.max_position_embeddings == 64
    with pytest.raises(
        UsageError, match="nothing grows, it has 5 layers already and room for the context: raise num_hidden_layers or context"
    ):
        base.grow(5, 64)
    with pytest.raises(UsageError, match=r"num_hidden_layers is 3; .* has 5, and growing takes none away: raise it"):
        base.grow(3, None)
    base.model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UsageError, match=r"context is 256; .* has 64 places, and only unscaled rope has more: lower it"):
        base.grow(None, 256)
    base.model.model.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(5)])
    with pytest.raises(UsageError, match="cannot grow; expected a decoder"):
        base.grow(6, None)


FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "bitnet")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_grows(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers become seven; what the copies add once they are not zero, the engine computes as well."""
    import random_models

    from bitnet.models import open_checkpoint
    from bitnet.source import EMBEDDED_MODEL, resolve
    from bitnet.train.export import export_model
    from bitnet.weights import load_engine

    embedded = Tokenizer.from_file(str(resolve(EMBEDDED_MODEL) / "tokenizer.json"))
    monkeypatch.setattr("bitnet.train.models._tokenizer", lambda *_: embedded)  # these have none of their own
    folder = random_models.save(getattr(random_models, family)(seed=1), tmp_path / "base")
    base, grown = Base(str(folder), packed=False), Base(str(folder), packed=False)
    assert base.model.config.num_hidden_layers == 3
    grown.grow(7, None)
    ids = [(7 * i) % 200 for i in range(90)]
    with torch.no_grad():
        theirs = (b.model.eval()(input_ids=torch.tensor([ids])).logits[0] for b in (base, grown))
        assert torch.equal(*theirs)
        for p in grown.model.parameters():
            if not p.any():
                p.normal_(0, 0.02)
        wanted = grown.model(input_ids=torch.tensor([ids])).logits[0].numpy()
    export_model(grown.model, tmp_path / "grown", {})
    engine = load_engine(open_checkpoint(tmp_path / "grown"))
    ours = engine.forward([(engine.sequence(), ids)], all_logits=True)
    assert engine.config.n_layers == 7 and np.linalg.norm(ours - wanted) < INT8_NOISE * np.linalg.norm(wanted)


@pytest.mark.parametrize("source", [*FAMILIES, *sorted(GOLDEN.glob("*.gguf"))], ids=lambda s: getattr(s, "stem", s))
def test_a_base_in_torch_is_what_the_engine_runs(tmp_path: Path, source: Any) -> None:
    """Every family and format that training can start from; packed layers packed.

    bitnet.gguf's table is Q6_K, int8 in the engine: 0.4 % off, which the int8 steps of random layers make 3 % of the logits (a table off by
    0.1 % at random makes 2.8 %). So torch gets the engine's table there, and what is left meets the tolerance of all others.
    """
    import random_models

    from bitnet.models import open_checkpoint
    from bitnet.train.models import _as_transformers
    from bitnet.weights import load_engine

    if isinstance(source, str):
        random_models.save(getattr(random_models, source)(seed=1), tmp_path)
        source = tmp_path
    model, _ = _as_transformers(open_checkpoint(source), packed=True)
    engine = load_engine(open_checkpoint(source))
    if source.stem == "bitnet":
        table = model.get_input_embeddings().weight
        codes, scales = quantize_int8(table.detach().numpy(), 32)
        table.data = dequantized(torch.from_numpy(codes).float(), torch.from_numpy(scales))
    ids = [(7 * i) % min(200, engine.config.vocab_size) for i in range(40)]
    ours = engine.forward([(engine.sequence(), ids)], all_logits=True)
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert (np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max() < INT8_NOISE


def test_packed_masters_ternarize_to_themselves(trained: dict[str, Path]) -> None:
    from bitnet import ternary

    packed, dense = Base(str(trained["ternary"] / "model")), Base(str(trained["ternary"] / "model"), packed=False)
    assert len(dense.scales) == 14 and not packed.scales
    for name, module in packed.model.named_modules():
        if name in dense.scales:  # until they are to be masters, they are what the codes stand for
            assert torch.equal(dense.model.get_submodule(name).weight, dequantized(module.weight, module.scales))
    dense.make_masters(list(dense.scales))
    for name in dense.scales:
        frozen, trits_and_scale = packed.model.get_submodule(name), ternary.absmean(dense.model.get_submodule(name).weight.detach().numpy())
        assert np.array_equal(trits_and_scale[0], frozen.weight.numpy())
        assert np.isclose(trits_and_scale[1], frozen.scales.item(), rtol=1e-6)


@pytest.mark.parametrize("base", ["ternary", "fp16"])
def test_ternary_lora_as_the_article_prints_it(trained: dict[str, Path], tmp_path: Path, bitnet: Callable[..., Result], base: str) -> None:
    config = tmp_path / "lora_config.yaml"
    config.write_text(f'base_model: "{trained[base] / "model"}"\nrank: 4\nalpha: 8\nquantize: "ternary"\nlora_dropout: 0.05\n')
    (tmp_path / "t.txt").write_text("<|endoftext|>\n".join(f"{s.strip()} The end of it.\n" for s in stories(100)))
    out = tmp_path / "run"
    steps = ["--set", "training.steps=80", "--set", "context=32", "--set", "training.batch_tokens=512", "--set", "training.decay_steps=10"]
    done = bitnet("train", "--config", config, "--data", tmp_path / "t.txt", "--out", out, "--ternary", *steps)
    assert done.exit_code == 0, done.output
    from bitnet.files import safetensors

    tensors = safetensors.read(out / "adapter" / "adapter_model.safetensors").tensors
    for name, tensor in tensors.items():
        rows = tensor.dense()
        assert all(len({*np.abs(row)} - {0}) <= 1 for row in rows), name  # ternary: one magnitude in a row
    assert len(tensors) == 28 and any(t.dense().any() for n, t in tensors.items() if "lora_B" in n)
    losses = [float(r["loss"]) for r in csv.DictReader((out / "log.csv").open())]
    assert losses[-1] < losses[0] - 0.1
    state = final(out)["model"]
    assert set(state) == {n.replace(".weight", ".default.weight") for n in tensors}  # of the base nothing is kept
    # the engine gives what torch trained
    engine = TernaryTransformer.from_pretrained(trained[base] / "model", adapter=out / "adapter")
    from bitnet.train.lora import add_adapter

    model = add_adapter(Base(str(trained[base] / "model")).model, Recipe.load(config), "")
    model.load_state_dict(state, strict=False)
    ids = engine.tokenizer.encode(stories(1)[0])[:40]
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor([ids])).logits[0].numpy()
    ours, bare = engine.logits(ids), engine.logits(ids, adapter=None)
    off = (np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max()
    assert off < (2.0**-8 if base == "fp16" else INT8_NOISE) and np.linalg.norm(bare - theirs) > 5 * np.linalg.norm(ours - theirs)


def test_peft_loads_the_adapter(trained: dict[str, Path], tmp_path: Path, corpus: Path) -> None:
    import peft

    base = trained["fp16"] / "model"
    run(Recipe.parse({"base_model": str(base), "rank": 2, "training": MINI["training"]}, "lora"), corpus, tmp_path / "run")
    loaded = peft.PeftModel.from_pretrained(Base(str(base)).model, tmp_path / "run" / "adapter")
    engine = TernaryTransformer.from_pretrained(base, adapter=tmp_path / "run" / "adapter")
    ids = engine.tokenizer.encode("Once upon a time")
    with torch.no_grad():
        theirs = loaded.eval()(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert np.abs(engine.logits(ids) - theirs).max() < 2.0**-8 * np.abs(theirs).max()


CHAT = [
    [{"role": "user", "content": f"What does {n} do?"}, {"role": "assistant", "content": f"{n} likes to {v}."},
     {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "They were happy."}]
    for n in ("Tim", "Lily", "Sam", "Mia") for v in ("play", "run", "sing")
]  # fmt: skip


def test_instructions_learn_answers_only(trained: dict[str, Path], tmp_path: Path) -> None:
    from bitnet.chat import ChatTemplate
    from bitnet.train import examples

    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": m} for m in CHAT])
    engine = TernaryTransformer.from_pretrained(trained["ternary"] / "model")
    template = ChatTemplate(examples.TEMPLATE, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    ids, asked, _ = next(examples.conversations(path, engine.tokenizer, template, 0))
    answers = engine.tokenizer.decode([i for i, a in zip(ids, asked, strict=True) if a])
    assert answers.replace("<|endoftext|>", "|") in (
        " Tim likes to play.|\n They were happy.|\n",
        " Tim likes to play.\n They were happy.\n",
    )
    assert engine.tokenizer.decode([i for i, a in zip(ids, asked, strict=True) if not a]).count("?") == 2
    values = {"task": "instruct", "base_model": str(trained["ternary"] / "model"), "context": 64,
              "training": {**MINI["training"], "steps": 240, "decay_steps": 80, "checkpoint_every": 120}}  # fmt: skip
    run(Recipe.parse(values, "instruct"), path, tmp_path / "run")
    tuned = TernaryTransformer.from_pretrained(tmp_path / "run" / "model")
    assert tuned.chat_template is not None
    answer = tuned.generate([{"role": "user", "content": "What does Lily do?"}], temperature=0, max_new_tokens=20)
    assert " likes to " in answer.text and answer.finish_reason == "stop"  # it answers, and ends
    spoken = '{"messages": [{"role": "assistant", "content": "x"}]}'
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": CHAT[0]}) + f"\n{spoken}\n")
    refusing = ChatTemplate(
        "{{ raise_exception('users begin') if messages[0].role != 'user' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(FormatError, match=r"bad.jsonl: line 2: the assistant speaks first, which not every template allows; "):
        list(examples.conversations(tmp_path / "bad.jsonl", engine.tokenizer, refusing, 0))
    for bad, said in (('{"a": 1}', "expected"), ('{"messages": [{"role": "user", "content": "x"}]}', "no message of the role assistant")):
        (tmp_path / "bad.jsonl").write_text(bad)
        with pytest.raises(FormatError, match=said):
            list(examples.conversations(tmp_path / "bad.jsonl", engine.tokenizer, template, 0))


@pytest.mark.parametrize("scheme", ["fp16", "binary", "ternary"])
def test_a_table_in_gluess_format(trained: dict[str, Path], tmp_path: Path, bitnet: Callable[..., Result], scheme: str) -> None:
    """200 rows of fixture, of which 40 are held out; the label is a word, and there is no head."""
    values = {"task": "classify", "scheme": scheme, "base_model": str(trained["fp16"] / "model"), "context": 64,
              "labels": {0: "sad", 1: "happy"},
              "training": {**MINI["training"], "steps": 250, "decay_steps": 100, "checkpoint_every": 125}}  # fmt: skip
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(values))
    lines = (Path(__file__).parent / "sentiment.tsv").read_text().splitlines()
    assert len(lines) == 201
    (tmp_path / "train.tsv").write_text("\n".join(lines[:161]) + "\n")
    (tmp_path / "dev.tsv").write_text("\n".join([lines[0], *lines[161:]]) + "\n")
    done = bitnet("train", "--config", config, "--data", tmp_path, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    share = float(card.split("Accuracy on dev.tsv: ")[1].split("%")[0])
    assert share >= 75, card.split("## Texts")[0]  # of 40 rows; chance gets there once in a thousand times


def test_glue_files_of_other_kinds(tmp_path: Path) -> None:
    from bitnet.train.examples import Table

    kinds = {
        "cola": "gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tRode sailors the.\n",
        "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\tHe \"said so.\tSo he said.\n",
        "mnli": "index\tsentence1\tsentence2\tgold_label\n0\tA man.\tA person.\tentailment\n",
        "qnli": "index\tquestion\tsentence\tlabel\n0\tWho?\tHim.\tnot_entailment\r\n",
    }  # fmt: skip
    found = {}
    for name, text in kinds.items():
        (tmp_path / name).write_text(text)
        found[name] = Table.read(tmp_path / name, None, None)
    assert found["cola"].prompts[0] == "sentence: The sailors rode.\nlabel:" and found["cola"].answers == ["1", "0"]
    assert found["mrpc"].prompts == ['#1 String: He "said so.\n#2 String: So he said.\nlabel:'] and found["mnli"].answers == ["entailment"]
    assert found["qnli"].prompts == ["question: Who?\nsentence: Him.\nlabel:"] and found["qnli"].words == ["not_entailment"]
    for text, said in (
        ("a\tb\n1\t2\n", "has no column label"),
        ("sentence\tlabel\nx\n", "have not the 2 columns"),
        ("x\tlabel\n1\t2\n", "has no column sentence"),
    ):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(FormatError, match=said):
            Table.read(tmp_path / "bad", None, None)


class _Speller:
    """A model of one letter a token, which finds what the prompt's third character begins likely, and an end only where that ends."""

    def __init__(self, words: dict[str, str]) -> None:
        self.tokenizer, self.words, self.longest = self, words, 0

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        return [ord(c) for c in text]

    def logits(self, ids: list[int]) -> np.ndarray:
        self.longest = max(self.longest, len(ids))
        text = "".join(map(chr, ids))
        prompt, _, said = text.rpartition("label:")
        wanted = f" {self.words[prompt.strip()[-1]]}\0"
        found = np.zeros((len(ids), 128), np.float32)
        for i in range(len(said) + 1):
            if i < len(wanted) and said[:i] == wanted[:i]:
                found[len(ids) - len(said) - 1 + i if i <= len(said) else -1, ord(wanted[i])] = 9.0
        return found


def test_a_label_that_begins_another_one_and_texts_that_are_too_long(tmp_path: Path) -> None:
    from bitnet.train.examples import Table, accuracy

    (tmp_path / "dev.tsv").write_text(
        "sentence\tlabel\n" + "".join(f"{'y' * 40} {x}\t{word}\n" for x, word in (("a", "1"), ("b", "10")) * 3)
    )
    table, model = Table.read(tmp_path / "dev.tsv", None, None), _Speller({"a": "1", "b": "10"})
    assert accuracy(model, table, [1], 0, 30) == (6, 6) and model.longest == 30
    assert table.columns == ["sentence"]
    (tmp_path / "other.tsv").write_text("text\tlabel\nx\t1\n")
    with pytest.raises(FormatError, match="has no column sentence; it has text, label"):
        Table.read(tmp_path / "other.tsv", None, table.columns, table.words)


def test_the_command_line(corpus: Path, tmp_path: Path, bitnet: Callable[..., Result]) -> None:
    config = tmp_path / "mini.yaml"
    config.write_text(yaml.safe_dump({**MINI, "training": {**MINI["training"], "steps": 2}}))
    done = bitnet("train", "--config", config, "--data", corpus, "--out", tmp_path / "run", "--quantization", "ternary", "--json")
    assert done.exit_code == 0 and '"step": 2' in done.stdout.splitlines()[-1]
    again = bitnet("train", "--config", config, "--data", corpus, "--out", tmp_path / "run")
    assert again.exit_code == 0 and again.stdout.endswith("complete\n")
    for words, said in (
        (["--config", tmp_path / "no.yaml"], "not found"),
        (["--config", config], "nothing to train on: add --data"),
        (["--config", config, "--data", tmp_path / "no"], "not found"),
        (["--config", config, "--data", corpus, "--set", "training.stps=2"], "did you mean training.steps?"),
    ):
        bad = bitnet("train", *words, "--out", tmp_path / "other")
        assert bad.exit_code == 2 and said in bad.stderr and bad.stderr.count("\n") == 1, bad.output
    if not torch.cuda.is_available():
        bad = bitnet("train", "--config", config, "--data", corpus, "--out", tmp_path / "other", "--device", "cuda")
        assert bad.exit_code == 2 and bad.stderr.startswith("error: device is 'cuda'; torch")


def test_bitnet_trainer_is_the_same_command(corpus: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from bitnet.cli.train import trainer

    config = tmp_path / "mini.yaml"
    config.write_text(yaml.safe_dump({**MINI, "training": {**MINI["training"], "steps": 2}}))
    done = CliRunner().invoke(trainer, ["--config", str(config), "--data", str(corpus), "--out", str(tmp_path / "run"), "--ternary"])
    assert done.exit_code == 0 and (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize("scale", ["row", "group:16"])
def test_scales_of_rows_and_groups_are_exported_as_they_are(corpus: Path, tmp_path: Path, scale: str) -> None:
    recipe = mini(quantization={"scale": scale, "rule": "threshold", "alpha": 0.6}, steps=20)
    run(recipe, corpus, tmp_path / "run")
    engine = TernaryTransformer.from_pretrained(tmp_path / "run" / "model")
    ids = engine.tokenizer.encode(stories(1)[0])[:60]
    ours, theirs = engine.logits(ids), in_torch(tmp_path / "run", ids)
    assert (np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max() < INT8_NOISE


def test_bf16_rounds_half_to_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -3.1415927, 1e-40, 0.0], np.float32)
    expected = torch.tensor(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bf16_bits(values), expected)


def test_the_tokenizer_is_the_runs_own(trained: dict[str, Path]) -> None:
    own = Tokenizer.from_file(str(trained["ternary"] / "tokenizer.json"))
    assert own.to_str() == Tokenizer.from_file(str(trained["ternary"] / "model" / "tokenizer.json")).to_str()
