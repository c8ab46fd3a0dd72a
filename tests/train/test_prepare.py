"""What a run trains with: documents and what ends them, tokenizers, chat templates, and what is refused before the first step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mini_recipe import MINI, mini, stories, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
transformers = pytest.importorskip("transformers")

from bitnet.errors import UsageError  # noqa: E402
from bitnet.train import checkpoint, data, loop  # noqa: E402
from bitnet.train.layers import Quantization, TernaryEmbedding, TernaryLinear, ternarize_model  # noqa: E402
from bitnet.train.parallel import Processes  # noqa: E402
from bitnet.train.prepare import Prepared  # noqa: E402
from bitnet.train.recipe import Recipe  # noqa: E402
from bitnet.train.run import run  # noqa: E402
from bitnet.train.schedule import Schedule  # noqa: E402

TEMPLATE = "{% for m in messages %}<<{{ m.role }}>>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<<assistant>>{% endif %}"


def of_base(base: Path, task: str = "heal", **changes: Any) -> Recipe:
    training = {**MINI["training"], **changes.pop("training", {})}
    if task == "instruct":
        training = {k: v for k, v in training.items() if k not in ("batch_tokens", "context")} | {"batch_examples": 4}
    return Recipe.parse({"task": task, "base_model": str(base), "context": 64, **changes, "training": training}, "mini")


def prepared(recipe: Recipe, texts: Path, out: Path, processes: int = 1) -> Prepared:
    out.mkdir(exist_ok=True)
    return Prepared(recipe, texts, out, Processes(0, processes) if processes == 1 else _Alone(0, processes))


class _Alone(Processes):
    """One of many, without the others."""

    def wait(self) -> None:
        pass


@pytest.fixture(scope="module")
def own_tokenizer() -> Tokenizer:
    """<unk> 0, <s> 1, </s> 2; <s> stands before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(stories(50), trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture
def llama(tmp_path: Path, own_tokenizer: Tokenizer) -> Path:
    """A base that begins its texts with another token than it ends them with, and has a chat template."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, max_position_embeddings=64, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").write_text(own_tokenizer.to_str())
    (tmp_path / "llama" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (tmp_path / "llama" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "llama"


def test_a_document_is_followed_by_the_token_that_ends_a_text(llama: Path, corpus: Path, tmp_path: Path) -> None:
    found = prepared(of_base(llama), corpus, tmp_path / "run")
    (source,) = found.sources
    tokens, starts = np.array(source.tokens), np.array(source.starts)
    assert (found.begin, found.end) == ([1], 2) and len(starts) == 300
    assert np.array_equal(np.flatnonzero(tokens == 1), starts)
    assert np.array_equal(np.flatnonzero(tokens == 2), [*(starts[1:] - 1), len(tokens) - 1])


def test_a_tokenizer_that_comes_alone_says_which_token_ends_a_text(own_tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "tokenizer.json").write_text(own_tokenizer.to_str())
    run(mini(steps=2), corpus, out)
    assert json.loads((out / "model" / "tokenizer_config.json").read_text()) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert json.loads((out / "model" / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    plain = Tokenizer(models.BPE())
    plain.train_from_iterator(["ab"], trainers.BpeTrainer(vocab_size=10, show_progress=False))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "tokenizer.json").write_text(plain.to_str())
    with pytest.raises(UsageError, match=r"tokenizer\.json: has no token that ends a text; expected one of <\|endoftext\|>, </s>, "):
        prepared(mini(), corpus, tmp_path / "none")


def test_a_tokenizer_is_learned_anew_from_other_texts(corpus: Path, tmp_path: Path) -> None:
    """Unless a run goes on with it, or somebody put it there."""
    other, out = tmp_path / "other", tmp_path / "run"
    other.mkdir()
    (other / "a.txt").write_text("zwv zwvy zwvx quzz quzzy quzzle " * 200)
    prepared(mini(vocab_size=265), other, out)
    learned = (out / "tokenizer.json").read_text()
    prepared(mini(vocab_size=265), other, out)
    assert (out / "tokenizer.json").read_text() == learned
    found = prepared(mini(vocab_size=265), corpus, out)
    again = (out / "tokenizer.json").read_text()
    assert again != learned and found.tokenizer.to_str() == again
    (out / "tokenizer.json").write_text(learned)
    prepared(mini(vocab_size=265), corpus, out)
    assert (out / "tokenizer.json").read_text() == learned
    fresh = tmp_path / "fresh"
    run(mini(vocab_size=265, steps=2), other, fresh)
    os.utime(other / "a.txt", (1, 1))
    run(mini(vocab_size=265, steps=2), other, fresh)
    assert (fresh / "tokenizer.json").read_text() == learned


@pytest.mark.parametrize(("share", "times"), [(0.33, 10), (0.4, 12), (0.5, 15), (1.0, 30), (1.5, 45), (3.0, 90)])
def test_a_share_of_the_texts_for_the_tokenizer(
    share: float, times: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>\n".join(stories(30)))
    seen: list[str] = []
    learn = data.train_tokenizer
    monkeypatch.setattr(data, "train_tokenizer", lambda texts, size: seen.extend(texts) or learn(stories(), size))
    prepared(mini(tokenizer_texts={"a.txt": share}), tmp_path / "a.txt", tmp_path / "run")
    assert len(seen) == times and seen[0].startswith("Once upon a time")


def test_the_chat_template_of_a_base_goes_along(llama: Path, corpus: Path, tmp_path: Path) -> None:
    short = {"steps": 2, "checkpoint_every": 2, "decay_steps": 1}
    run(of_base(llama, training=short), corpus, tmp_path / "heal")
    assert (tmp_path / "heal" / "model" / "chat_template.jinja").read_text() == TEMPLATE
    run(of_base(llama, "grow", num_hidden_layers=2, training=short), corpus, tmp_path / "grow")
    assert (tmp_path / "grow" / "model" / "chat_template.jinja").read_text() == TEMPLATE


def test_the_chat_template_of_a_family_that_only_transformers_knows(tmp_path: Path, trained: dict[str, Path]) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
    base = tmp_path / "falcon"
    transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(base)
    shutil.copy(trained["fp16"] / "tokenizer.json", base)
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    talk = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once upon a time"}]}]
    rows = write_jsonl(tmp_path / "c.jsonl", talk * 8)
    found = prepared(of_base(base, "instruct", scheme="fp16"), rows, tmp_path / "run")
    assert found.template == TEMPLATE and "<<user>>hi<<assistant>>Once upon a time" in found.tokenizer.decode(found.sources[0].tokens)


def test_an_answer_after_a_prompt_that_holds_more_than_the_template_writes(llama: Path, tmp_path: Path) -> None:
    """An empty <think></think> that only the prompt has: the answer is learned as it stands."""
    (llama / "chat_template.jinja").write_text(TEMPLATE.replace("<<assistant>>{%", "<<assistant>><think></think>{%"))
    rows = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "hi", "completion": "Once"}] * 8)
    source = prepared(of_base(llama, "instruct", scheme="fp16"), rows, tmp_path / "run").sources[0]
    assert source.targets is not None
    asked = np.array(source.tokens[: source.starts[1]])[np.array(source.targets[: source.starts[1]])]
    assert Tokenizer.from_file(str(llama / "tokenizer.json")).decode(asked, skip_special_tokens=False) == "Once</s>"


def test_documents_of_broken_lines_and_of_windows_lines() -> None:
    book = (
        "The old man walked through the village until he came to the old well.\nThere was no one to be seen, so he sat down on a stone.\n"
    )
    assert data.documents(book * 20) == [(book * 20).strip()]
    long = "Once upon a time there was a cat. " * 5 + "\n"
    assert len(data.documents(long * 3)) == 3
    assert data.documents("One.\r\n<|endoftext|>\r\nTwo.\r\n\r\nStill two.\r\n<|endoftext|>\r\nThree.\r\n") == [
        "One.", "Two.\r\n\r\nStill two.", "Three.",
    ]  # fmt: skip
    assert data.documents("Long ago.\r\n\r\nThere was a cat.\r\n") == ["Long ago.\r\n\r\nThere was a cat."]


def test_windows_that_processes_cannot_share_are_refused_beforehand(corpus: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    training = {**MINI["training"], "context": 16, "decay_context": 64, "batch_tokens": 192}
    recipe = Recipe.parse({**MINI, "training": training}, "mini")
    with pytest.raises(UsageError, match=r"a step has 3 windows of 64 tokens for 2 processes; .* change training\.batch_tokens"):
        prepared(recipe, corpus, tmp_path / "run", 2)
    prepared(recipe, corpus, tmp_path / "run", 3)
    rows = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "hi", "completion": "Once"}] * 8)
    answers = of_base(trained["fp16"] / "model", "instruct", scheme="fp16")
    with pytest.raises(UsageError, match=r"a step has 4 examples for 3 processes; .* change training\.batch_examples"):
        prepared(answers, rows, tmp_path / "answers", 3)


def test_groups_that_do_not_divide_a_layer_are_refused_beforehand(trained: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    base, out = trained["fp16"] / "model", tmp_path / "run"
    with pytest.raises(UsageError, match=r"scale is 64, which does not divide model\.layers\.0\.self_attn\.q_proj's 32 inputs"):
        run(of_base(base, quantization={"scale": "group:64"}), corpus, out)
    run(of_base(base, quantization={"scale": "group:16"}, training={"steps": 2}), corpus, out)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Linear(48, 8))
    with pytest.raises(UsageError, match="scale is 32, which does not divide 1's 48 inputs"):
        ternarize_model(model, quantization=Quantization(scale=32))
    assert not any(isinstance(layer, TernaryLinear) for layer in model), "nothing is half changed"
    for make in (
        lambda: TernaryLinear(40, 8, quantization=Quantization(scale=16)),
        lambda: TernaryEmbedding(8, 40, quantization=Quantization(scale=16)),
    ):
        with pytest.raises(UsageError, match="scale is 16, which does not divide a layer's 40 inputs"):
            make()


def test_a_run_without_a_checkpoint_takes_another_recipe(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "optimizers", stop)
    with pytest.raises(KeyboardInterrupt):
        run(mini(seed=1), corpus, tmp_path / "run")
    monkeypatch.undo()
    run(mini(seed=2, steps=2), corpus, tmp_path / "run")
    assert Recipe.load(tmp_path / "run" / "recipe.yaml").seed == 2
    with pytest.raises(UsageError, match="this run was begun with seed 2, now it is 3"):
        run(mini(seed=3, steps=2), corpus, tmp_path / "run")


def test_an_adapter_goes_on_beside_its_own_base_only(trained: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(trained["ternary"] / "model", base)
    recipe = of_base(base, "lora", rank=2)
    run(recipe, corpus, out)
    checkpoint.saved(out)[0].unlink()
    run(recipe, corpus, out)
    shutil.rmtree(base)
    shutil.copytree(trained["fp16"] / "model", base)
    with pytest.raises(UsageError, match="base is another model than this run was begun with; bring it back"):
        run(recipe, corpus, out)


def test_embeddings_train_as_vectors_by_whatever_name() -> None:
    sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    muon, _ = loop.optimizers(model, Schedule())
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert found and all(name.startswith("transformer.h.0.") for name in found)


def test_weight_decay_that_only_the_decay_has(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any) -> Any:
        seen.append([group["weight_decay"] for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    training = {**MINI["training"], "optimizer": "adamw", "decay_weight_decay": 0.5}
    run(Recipe.parse({**MINI, "training": training}, "mini"), corpus, tmp_path / "run")
    assert seen[0::2] == [[0.0]] * 3 + [[0.5]] * 3 and seen[1::2] == [[0.0]] * 6  # matrices; embedding and norms


def test_keys_that_do_nothing_are_said(corpus: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    base = str(trained["fp16"] / "model")
    for values, key in (
        ({"task": "instruct", "training": {"batch_tokens": 64}}, r"training\.batch_tokens does nothing in task instruct"),
        ({"task": "classify", "training": {"snap": 0.1}}, r"training\.snap does nothing in task classify"),
        ({"task": "heal", "training": {"batch_examples": 4}}, r"training\.batch_examples does nothing in task heal"),
    ):
        with pytest.warns(UserWarning, match=key):
            Recipe.parse({"base_model": base, **values}, "mini")
    gates = {**MINI["training"], "gate_l1": 1.0}
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    folder = tmp_path / "falcon"
    transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    shutil.copy(trained["fp16"] / "tokenizer.json", folder)
    with pytest.raises(UsageError, match=r"training\.gate_l1 is 1; the model has no gate_proj"):
        prepared(of_base(folder, training=gates), corpus, tmp_path / "run")


def test_leftovers_of_a_card_that_was_being_written_are_no_other_things(corpus: Path, tmp_path: Path) -> None:
    run(mini(steps=2), corpus, tmp_path / "run")
    left = tmp_path / "run" / "model" / ".README.md.0123456789ab.bitnet-tmp"
    left.mkdir()
    (left / "name").write_text("README.md")
    run(mini(steps=2), corpus, tmp_path / "run")
    assert not left.exists()


def test_the_checkpoint_just_written_is_kept(tmp_path: Path) -> None:
    for step in (6, 8):
        (tmp_path / f"checkpoint-{step}.pt").write_bytes(b"damaged")
    checkpoint.save(tmp_path, 5, {"step": 5})
    assert (tmp_path / "checkpoint-5.pt").exists()
