"""What goes wrong on the way: refused before the first step, or survived, and never at the cost of what was there."""

from __future__ import annotations

import csv
import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
pytest.importorskip("transformers", reason="transformers is not installed (extra [train])")
pytest.importorskip("peft", reason="peft is not installed (extra [train])")
yaml = pytest.importorskip("yaml", reason="pyyaml is not installed (extra [train])")

from mini_recipe import MINI, mini, stories, write_jsonl  # noqa: E402

from bitnet.errors import BitNetError, FormatError, UnsupportedModelError, UsageError  # noqa: E402
from bitnet.files.replacing import write_text  # noqa: E402
from bitnet.train import checkpoint, data, examples, loop  # noqa: E402
from bitnet.train.models import Base  # noqa: E402
from bitnet.train.parallel import Processes  # noqa: E402
from bitnet.train.prepare import Prepared  # noqa: E402
from bitnet.train.recipe import Recipe  # noqa: E402
from bitnet.train.run import run  # noqa: E402
from bitnet.transformer import TernaryTransformer  # noqa: E402

TIMES = {"seconds", "cpu_seconds"}


def of_base(trained: dict[str, Path], task: str, scheme: str = "ternary", **more: Any) -> Any:
    values = {"task": task, "base_model": str(trained["ternary"] / "model"), "training": dict(MINI["training"]), **more}
    return Recipe.parse(values if task == "lora" else {**values, "scheme": scheme}, task)


def logged(out: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader((out / "log.csv").open())]


class Cut(BaseException):
    """As if the process had died."""


def cut_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.save

    def cut(out: Path, done: int, state: dict[str, Any], good_step: int) -> Path:
        path = save(out, done, state, good_step)
        if done == step:
            raise Cut
        return path

    monkeypatch.setattr(loop, "save", cut)


def test_an_export_replaces_exports_only(trained: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text("{}")
    (project / "src" / "main.py").write_text("x")
    with pytest.raises(UsageError, match=r"project: is a folder of other things \(src\), which would be replaced"):
        run(mini(), corpus, tmp_path / "run", export=project)
    assert (project / "src" / "main.py").read_text() == "x"
    base = tmp_path / "base"
    shutil.copytree(trained["ternary"] / "model", base)
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="which is trained from; name another folder with --export"):
        run(of_base(trained, "heal", base_model=str(base)), corpus, tmp_path / "healed", export=base)
    assert (base / "model.safetensors").read_bytes() == before
    run(mini(steps=2), corpus, tmp_path / "other", export=base)
    assert (base / "model.safetensors").read_bytes() != before  # an export it was


def test_what_is_somebodys_stays(trained: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "log.csv").write_text("date,amount\n")
    with pytest.raises(UsageError, match=r"log\.csv: would be replaced, and .*foreign holds no run \(no recipe\.yaml\)"):
        run(mini(steps=2), corpus, tmp_path / "foreign")
    assert (tmp_path / "foreign" / "log.csv").read_text() == "date,amount\n"
    shutil.copytree(trained["fp16"] / "model", tmp_path / "theirs")
    (tmp_path / "theirs" / "loss.png").unlink()
    with pytest.raises(UsageError, match=r"theirs: holds a model that was not written by a training run"):
        run(mini(steps=2), corpus, tmp_path / "run", export=tmp_path / "theirs")


def test_a_base_that_cannot_be_trained_from(trained: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(trained["fp16"] / "tokenizer.json"))
    for name, vocab_size, said in (
        ("few", 200, r"few: its tokenizer has the token 299, the model's vocab_size is 200"),
        ("nan", 300, r"nan: model\.decoder\.layers\.0\.fc1\.weight holds NaN or infinity; the file is damaged"),
    ):
        model = transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=vocab_size, max_position_embeddings=64, **sizes))
        if name == "nan":
            torch.nn.init.constant_(model.model.decoder.layers[0].fc1.weight, float("nan"))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(FormatError, match=said):
            run(of_base(trained, "heal", base_model=str(tmp_path / name)), corpus, tmp_path / "run")


def test_one_file_is_not_silently_another(corpus: Path, tmp_path: Path) -> None:
    name = next(iter(corpus.glob("*.txt"))).name
    shutil.copy(corpus / name, tmp_path / "mine.txt")
    with pytest.raises(UsageError, match=rf"mine\.txt: is one file, and training\.mixture names {name}; name their folder with --data"):
        run(mini(steps=2, mixture={name: 1.0}), tmp_path / "mine.txt", tmp_path / "run")


def test_activations_that_the_engine_does_not_have_are_said(corpus: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="quantization.activations is none, but the engine runs packed layers with int8 activations"):
        run(mini(steps=2, quantization={"activations": "none"}), corpus, tmp_path / "run")


def poison(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The loss of all steps but the first `after` is 5 nats higher."""
    plain, calls = loop._loss, 0

    def high(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(*arguments) + (5.0 if calls > after else 0.0)

    monkeypatch.setattr(loop, "_loss", high)


def test_divergence_names_and_keeps_a_checkpoint_from_before_it(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = mini(scheme="fp16", steps=90, checkpoint_every=5, decay_steps=60, divergence=1.0)
    poison(monkeypatch, 33)
    with pytest.raises(loop.TrainingStopped, match=r"step 40: the loss is .* above its best") as stopped:
        run(recipe, corpus, tmp_path / "run")
    best = min(logged(tmp_path / "run")[:3], key=lambda row: float(row["loss"]))
    good = tmp_path / "run" / f"checkpoint-{int(best['step']) - 10}.pt"
    assert f"last good checkpoint: {good}; remove the later ones, lower training.matrix_lr and vector_lr" in str(stopped.value)
    assert good.is_file() and len(checkpoint.saved(tmp_path / "run")) == 3

    def resume() -> None:
        for path in checkpoint.saved(tmp_path / "run"):
            if path != good:
                path.unlink()
        lower = mini(scheme="fp16", steps=90, checkpoint_every=5, decay_steps=60, divergence=1.0, matrix_lr=0.001)
        run(lower, corpus, tmp_path / "run")

    # what was best is known after a resume: all that comes now is above it
    with pytest.raises(loop.TrainingStopped, match=r"the loss is .* above its best") as stopped:
        resume()
    assert f"last good checkpoint: {good};" in str(stopped.value)
    monkeypatch.undo()
    resume()


def test_divergence_within_the_first_window_is_seen(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 3)
    with pytest.raises(loop.TrainingStopped, match=r"^step 10: the loss .* no good checkpoint\. Lower the learning rates and begin"):
        run(mini(scheme="fp16", steps=20, divergence=1.0), corpus, tmp_path / "run")
    with pytest.raises(loop.TrainingStopped, match="no good checkpoint"):  # nor is the one that is resumed from
        run(mini(scheme="fp16", steps=20, divergence=1.0), corpus, tmp_path / "run")


def test_floats_from_a_packed_base_are_what_it_computes_with(trained: dict[str, Path], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": "Who?", "completion": "Tim."}] * 4)
    packed = Base(str(trained["ternary"] / "model")).model
    tokens = torch.arange(20)[None]
    for scheme, more in (("fp16", {}), ("ternary", {"quantization": {"layers": "*.mlp.*", "activations": "none"}})):
        (tmp_path / scheme).mkdir()
        prepared = Prepared(of_base(trained, "instruct", scheme, **more), path, tmp_path / scheme, Processes())
        for name, module in packed.named_modules():
            if hasattr(module, "scales"):
                ours = prepared.model.get_submodule(name)
                codes = ours.weight if type(ours) is torch.nn.Linear else torch.mul(*ours.quantization.of(ours.weight))
                assert torch.allclose(codes, module.weight * module.scales, rtol=1e-6, atol=0), name
        # without int8 activations there is nothing else between the two
        theirs, ours = packed(input_ids=tokens).logits, prepared.model(input_ids=tokens).logits
        assert (ours - theirs).norm() < 0.047 * theirs.norm()


def test_the_log_of_a_resumed_run_is_the_uninterrupted_ones(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = mini(steps=24, checkpoint_every=7)
    run(recipe, corpus, tmp_path / "whole")
    cut_at(14, monkeypatch)
    with pytest.raises(Cut):
        run(recipe, corpus, tmp_path / "cut")
    monkeypatch.undo()
    with (tmp_path / "cut" / "log.csv").open("a") as file:  # a line broken off, and one of nonsense
        file.write("x,\0,z\n20,1.")
    run(recipe, corpus, tmp_path / "cut")
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert [row["tokens"] for row in logged(tmp_path / "cut")] == [str(128 * n) for n in (10, 20, 24)]


def test_a_complete_run_without_its_log_is_exported(corpus: Path, tmp_path: Path) -> None:
    run(mini(steps=2), corpus, tmp_path / "run")
    (tmp_path / "run" / "log.csv").unlink()
    run(mini(steps=2), corpus, tmp_path / "run")
    assert "2 steps" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert not (tmp_path / "run" / "model" / "loss.png").exists()


def test_a_text_of_one_long_line_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PIECE_CHARACTERS", 300)
    text = "".join(stories(40)).replace("\n", " ")
    (tmp_path / "a.txt").write_text(f"{text}One day, <|endoftext|>")
    assert max(len(piece) for piece, _ in data._documents_of(tmp_path / "a.txt")) <= 600
    tokenizer = data.train_tokenizer(stories(), 300)
    source = data.pack(tmp_path / "a.txt", tokenizer, [0], 0, tmp_path / "tokens")
    assert tokenizer.decode(source.tokens.tolist(), skip_special_tokens=True).startswith(text) and list(source.starts) == [0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization": {"sub_norm": True}}, "a sub-norm of its own has no place in a model's file"),
        ({"scheme": "binary", "model": {**MINI["model"], "intermediate_size": 44}}, "has 44 inputs; packed as binary they must be"),
        ({"quantization": {"scale": "row"}, "model": {**MINI["model"], "intermediate_size": 50}}, "has 50 inputs; packed as ternary"),
        (
            {"model": {**MINI["model"], "intermediate_size": 50}},
            "has 50 outputs; packed as transformers loads them they must be a multiple",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_before_it_is_trained(corpus: Path, tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(BitNetError, match=said):
        run(mini(**changes), corpus, tmp_path / "run")
    assert not {"log.csv", "recipe.yaml"} & set(os.listdir(tmp_path / "run"))  # so that another recipe may begin here
    (tmp_path / "run" / "tokenizer.made_of.json").unlink()  # as if somebody had put tokenizer.json there
    with pytest.raises(UsageError, match=r"tokenizer\.json: has 300 tokens, vocab_size is 299; raise it, or remove the file"):
        run(mini(vocab_size=299), corpus, tmp_path / "run")


def test_what_cannot_be_read_afterwards_is_refused_before(trained: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "none").mkdir()
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "a\tyes\nb\tno\n" * 20)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nc\tmaybe\n")
    table = of_base(trained, "classify")
    for recipe, texts, options, said in (
        (mini(), corpus, {"card": tmp_path / "latin.txt"}, "latin.txt: .*UTF-8"),
        (mini(), corpus, {"evaluation": [tmp_path / "latin.txt"]}, "latin.txt: .*UTF-8"),
        (mini(), corpus, {"evaluation": [tmp_path / "rows.jsonl"]}, r"rows\.jsonl: is no plain text"),
        (mini(), corpus, {"evaluation": [tmp_path / "none"]}, r"the folder holds no \.txt"),
        (of_base(trained, "lora"), corpus, {"evaluation": [corpus]}, "an adapter is not scored here"),
        (table, tmp_path, {}, "dev.tsv: label 'maybe' did not occur in the training rows"),
        (table, tmp_path, {"evaluation": [tmp_path / "none"]}, r"holds no dev\.tsv and no dev_matched\.tsv"),
        (table, tmp_path, {"evaluation": [tmp_path, tmp_path / "dev.tsv"]}, "a table is scored on one file of held-out rows"),
    ):
        with pytest.raises(BitNetError, match=said):
            run(recipe, texts, tmp_path / "run", **options)
        assert not (tmp_path / "run" / "log.csv").exists()
        shutil.rmtree(tmp_path / "run")


def test_mnlis_matched_rows_are_scored_and_a_missing_file_is_said(trained: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "a\tyes\nb\tno\n" * 20)
    with pytest.warns(UserWarning, match=r"no dev\.tsv, so no accuracy is measured"):
        run(of_base(trained, "classify"), tmp_path, tmp_path / "run", export=tmp_path / "elsewhere")
    (tmp_path / "dev_matched.tsv").write_text("sentence\tlabel\na\tyes\n")
    run(of_base(trained, "classify"), tmp_path, tmp_path / "run", export=tmp_path / "elsewhere")
    assert "Accuracy on dev_matched.tsv" in (tmp_path / "elsewhere" / "README.md").read_text()
    assert (tmp_path / "run" / "scores.json").is_file() and not (tmp_path / "scores.json").exists()


def test_labels_that_cannot_be_learned(trained: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "one.tsv").write_text("sentence\tlabel\na\tyes\n")
    with pytest.raises(UsageError, match=r"one\.tsv: every row has the label 'yes'; a classification needs two labels at least"):
        run(of_base(trained, "classify"), tmp_path / "one.tsv", tmp_path / "run")
    (tmp_path / "none.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(FormatError, match=r"none\.tsv: holds a header and no rows"):
        examples.Table.read(tmp_path / "none.tsv", None, None)
    tokenizer = TernaryTransformer.from_pretrained(trained["ternary"] / "model").tokenizer
    with pytest.raises(UsageError, match="context is 8; the label 'incomprehensibility' alone takes"):
        list(examples.Table(["a"], ["incomprehensibility"], ["incomprehensibility", "b"], ["text"]).rows(tokenizer, [0], 0, 8))


def test_conversations_of_several_files_are_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "Who?", "completion": "Tim."}])
    for task in ("instruct", "lora"):
        with pytest.raises(UsageError, match=r"from one file, and here are 2 \(a\.jsonl, b\.jsonl, \.\.\.\); name one with --data"):
            run(of_base(trained, task), tmp_path, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")


def test_conversations_longer_than_the_context(trained: dict[str, Path], tmp_path: Path) -> None:
    from bitnet.chat import ChatTemplate

    tokenizer = TernaryTransformer.from_pretrained(trained["ternary"] / "model").tokenizer
    template = ChatTemplate(examples.TEMPLATE, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    short, long = {"prompt": "Who?", "completion": "Tim."}, {"prompt": "Who? " * 100, "completion": "Tim."}
    tail = {"prompt": "Who?", "completion": "Tim. " * 100}
    path = write_jsonl(tmp_path / "chat.jsonl", [short, long, tail])
    with pytest.warns(UserWarning, match="of 3 conversations 2 are longer than the context of 64 tokens: 1 are cut, 1 have no answer"):
        rows = list(examples.conversations(path, tokenizer, template, 0, 64))
    assert len(rows) == 2 and len(rows[1][0]) == 65 and all(any(asked[1:]) for _, asked, _ in rows)
    with pytest.raises(FormatError, match="no answer begins within the context of 64 tokens"):
        list(examples.conversations(write_jsonl(tmp_path / "long.jsonl", [long]), tokenizer, template, 0, 64))


def test_other_texts_are_noticed(corpus: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    shutil.copytree(corpus, texts)
    run(mini(steps=2), texts, tmp_path / "run")
    os.utime(texts / "a.txt", (1, 1))  # another time is no other text
    run(mini(steps=2), texts, tmp_path / "run")
    (texts / "a.txt").write_text((texts / "a.txt").read_text().replace("park", "wood"))
    with pytest.raises(UsageError, match=r"run: a\.txt is not what this run was begun with; bring the text back"):
        run(mini(steps=2), texts, tmp_path / "run")


def test_a_flipped_bit_is_noticed_and_a_run_without_a_whole_checkpoint_stops(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(mini(), corpus, out)
    log = (out / "log.csv").read_bytes()
    newest, before = checkpoint.saved(out)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="cannot be read .*SHA-256"):
        state = checkpoint.newest(out)
    assert state is not None and state["step"] == 4
    torch.save({"a": 1}, before)  # a file of another kind
    with pytest.warns(UserWarning), pytest.raises(BitNetError, match="none of its 2 checkpoints can be read"):
        run(mini(), corpus, out)
    assert (out / "log.csv").read_bytes() == log


def test_a_disk_that_fills_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"a": torch.ones(1000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(BitNetError, match=r"checkpoint-2\.pt: cannot be written \(File too large\)"):
            checkpoint.save(tmp_path, 2, {"a": torch.ones(1000), "b": torch.ones(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = checkpoint.newest(tmp_path)
    assert (
        [path.name for path in tmp_path.iterdir()] == ["checkpoint-1.pt"]
        and found is not None
        and torch.equal(found["a"], torch.ones(1000))
    )


def test_a_full_disk_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint.save(tmp_path, 1, {"step": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BitNetError, match=r"checkpoint-2\.pt: cannot be written \(No space left on device\)"):
        checkpoint.save(tmp_path, 2, {"step": 2})
    assert checkpoint.newest(tmp_path) == {"step": 1}


def test_a_context_beyond_the_bases_is_refused(trained: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    training, new = {**MINI["training"], "batch_tokens": 1024}, {key: value for key, value in MINI.items() if key != "vocab_size"}
    for recipe, said in (
        (of_base(trained, "heal", context=128), "context is 128; .* has places for 64 tokens: lower context"),
        (of_base(trained, "lora", training={**training, "context": 65}), "training.context is 65; .* places for 64 tokens"),
        (of_base(trained, "heal", training={**training, "decay_context": 128}), "training.decay_context is 128; .* places for 64"),
        (
            Recipe.parse({**new, "task": "distil", "teacher": str(trained["fp16"] / "model"), "context": 128}, "distil"),
            "context is 128; .*fp16.* has places for 64",
        ),
    ):
        with pytest.raises(UsageError, match=said):
            run(recipe, corpus, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    assert Prepared(of_base(trained, "heal", training=training), corpus, tmp_path, Processes()).context == 64  # where it is left open


def test_a_base_that_only_transformers_runs(trained: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 300, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    config = transformers.OPTConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=0
    )
    base = tmp_path / "opt"
    transformers.OPTForCausalLM(config).save_pretrained(base)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(trained["fp16"] / "tokenizer.json"))
    tokenizer.save_pretrained(base)
    assert "1000000000000000019884624838656" in (base / "tokenizer_config.json").read_text()  # which stopped nothing
    with pytest.raises(UsageError, match="opt is of a family that only transformers runs; leave --eval out"):
        run(of_base(trained, "heal", base_model=str(base)), corpus, tmp_path / "run", evaluation=[corpus])
    with pytest.raises(UsageError, match=r"training\.context is 128; .*opt has places for 64 tokens"):
        long = {**MINI["training"], "context": 128}
        run(of_base(trained, "heal", base_model=str(base), training=long), corpus, tmp_path / "run")
    for changes in ({"scheme": "binary"}, {"quantization": {"scale": "row"}}, {"quantization": {"alphas": "article"}}):
        with pytest.raises(
            UnsupportedModelError, match="opt: is of a family that only transformers runs, and there ternary layers have one scale"
        ):
            run(of_base(trained, "heal", base_model=str(base), **changes), corpus, tmp_path / "other")
    assert not (tmp_path / "other" / "log.csv").exists()
    run(of_base(trained, "heal", base_model=str(base)), corpus, tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_damaged_files_of_a_run(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(mini(steps=2), corpus, out)
    model = (out / "model" / "model.safetensors").read_bytes()
    tokens = (out / "tokens" / "a.txt.tokens").read_bytes()
    tokenizer = (out / "tokenizer.json").read_text()
    for name in ("a.txt.tokens", "a.txt.json"):  # are made anew
        (out / "tokens" / name).write_bytes(b"{")
        run(mini(steps=2), corpus, out)
        assert (out / "tokens" / "a.txt.tokens").read_bytes() == tokens and (out / "model" / "model.safetensors").read_bytes() == model
    for name, said in (("tokenizer.json", "is no tokenizer"), ("recipe.yaml", "is damaged; remove it to go on by the recipe")):
        (out / name).write_bytes(b"")
        with pytest.raises(FormatError, match=said):
            run(mini(steps=2), corpus, out)
        if name == "tokenizer.json":
            write_text(out / name, tokenizer)
    (out / "recipe.yaml").unlink()  # as it was said
    run(mini(steps=2), corpus, out)
    assert (out / "model" / "model.safetensors").read_bytes() == model


def test_texts_that_are_none_are_named(corpus: Path, tmp_path: Path) -> None:
    for name, content, said in (
        ("a.txt", "grün".encode("latin-1"), r"a\.txt: is not UTF-8 text \(it holds the byte 0xfc\)"),
        ("b.jsonl", b'{"text": "a\\ud83d"}\n', r"b\.jsonl: line 1 is no JSON"),
        ("c.jsonl", b"[" * 100_000, r"c\.jsonl: line 1 is no JSON"),
        ("d.txt", b"so short", r"d\.txt: has \d+ tokens; a window takes 33"),
    ):
        (tmp_path / name).write_bytes(content)
        (tmp_path / "run").mkdir()
        shutil.copy(next(iter(corpus.glob("*.txt"))), tmp_path / "long.txt")
        recipe = mini(mixture={"long.txt": 1.0, name: 1e-9}, tokenizer_texts={"long.txt": 1.0})
        with pytest.raises(BitNetError, match=said):
            run(recipe, tmp_path, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + b"a\n")
    assert list(data.whole_documents(tmp_path / "bom.txt")) == ["a"]
    (tmp_path / "latin.tsv").write_bytes("sentence\tlabel\ngrün\tx\n".encode("latin-1"))
    with pytest.raises(FormatError, match=r"latin\.tsv: is not UTF-8"):
        examples.Table.read(tmp_path / "latin.tsv", None, None)
    (tmp_path / "stsb.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t3.2\n")
    with pytest.raises(FormatError, match=r"has scores \(a regression, as STS-B is\)"):
        examples.Table.read(tmp_path / "stsb.tsv", None, None)
    np.savez(tmp_path / "p", np.arange(9, dtype=np.uint16))
    (tmp_path / "p.npz").rename(tmp_path / "p.npy")
    with pytest.raises(FormatError, match=r"is an archive of arrays \(\.npz\)"):
        data.pack(tmp_path / "p.npy", data.train_tokenizer(stories(), 300), [0], 0, tmp_path / "tokens")


def test_fp16_of_an_adapter(trained: dict[str, Path], corpus: Path, tmp_path: Path, bitnet: Callable[..., Result]) -> None:
    config = tmp_path / "lora_config.yaml"
    config.write_text(yaml.safe_dump({"base_model": str(trained["fp16"] / "model"), "rank": 4, "training": MINI["training"]}))
    words = ["train", "--config", config, "--data", corpus, "--out", tmp_path / "run", "--quantization"]
    done = bitnet(*words, "fp16")
    assert done.exit_code == 0 and done.stdout.startswith(f"{tmp_path / 'run' / 'adapter'}: lora, fp16"), done.output
    from bitnet.files import safetensors

    tensors = safetensors.read(tmp_path / "run" / "adapter" / "adapter_model.safetensors").tensors
    row = next(t.dense() for name, t in tensors.items() if "lora_A" in name)[0]
    assert len(set(np.abs(row))) > 2  # floats, not a magnitude and 0
    bad = bitnet(*words, "binary")
    assert bad.exit_code == 2 and "A and B of an adapter are ternary or fp16, not binary" in bad.stderr


def test_targets_of_an_adapter_that_are_none(trained: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    for targets, said in (
        (["proj"], r"ends with \.proj; there are down_proj, gate_proj"),
        ([""], "ends with"),
        ([], "names none; there are"),
    ):
        with pytest.raises(UsageError, match=f"target_modules: .*{said}"):
            run(of_base(trained, "lora", target_modules=targets), corpus, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")


def test_a_step_has_one_window_at_least_and_a_device_is_known(corpus: Path, tmp_path: Path) -> None:
    recipe = Recipe.parse({**MINI, "training": {**MINI["training"], "context": None, "batch_tokens": 16}}, "mini")
    with pytest.raises(UsageError, match=r"training\.batch_tokens is 16, less than one window of 64 tokens"):
        run(recipe, corpus, tmp_path / "run")
    for device in ("foo", "meta"):
        with pytest.raises(UsageError, match=f"device is '{device}'; expected cpu, cuda, cuda:N or mps"):
            run(mini(), corpus, tmp_path / "other", device=device)
