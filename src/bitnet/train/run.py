"""One run of a recipe, from texts to a model that runs; started again with the same folder it goes on where it was.

The run's folder holds recipe.yaml (as it was begun), tokenizer.json, tokens/, log.csv, tensorboard/, checkpoints, and model/ or adapter/.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer

from bitnet.chat import ChatTemplate, find_template
from bitnet.errors import BitNetError, UsageError
from bitnet.files.replacing import fcntl, write_text
from bitnet.train import data, examples, loop, parallel
from bitnet.train.gate_l1 import penalize_gates
from bitnet.train.layers import ternarize_model
from bitnet.train.models import Base, freeze, new_model
from bitnet.train.recipe import Recipe

_MAY_CHANGE = ("checkpoint_every", "micro_batch", "compile", "divergence")  # of a run's recipe, when it goes on
Report = Callable[[dict[str, Any]], None]


def run(
    recipe: Recipe,
    texts: Path,
    out: Path,
    export: Path | None = None,
    evaluation: Path | None = None,
    card: Path | None = None,
    device: str = "cpu",
    spread: str = "ddp",
    report: Report = lambda row: None,
) -> Path:
    """Tokens, training, export. Returns the folder of the model or adapter.

    `texts`: the recipe's files: a folder, or one file. `evaluation`: texts (a folder of *.txt, or a file; of a table its held-out rows) on
    which what is exported is scored. `card`: text of the model card, with {placeholders}. `spread`: "ddp" or "fsdp", of many processes.
    """
    target = export or out / ("adapter" if recipe.task == "lora" else "model")
    processes = parallel.join(device)
    with _alone(out, processes.first):
        if processes.first:
            _check_same(recipe, out)
            _check_target(target)
        processes.wait()
        prepared = _Prepared(recipe, texts, out, processes)
        loop.train(
            prepared.model, prepared.batches, prepared.schedule, out, recipe.seed,
            teacher=prepared.teacher, processes=processes, parallel=spread, report=report, compiled=prepared.compiled,
        )  # fmt: skip
        whole = {n: parallel.whole(v) for n, v in prepared.model.state_dict().items()} if processes.count > 1 else None
        if processes.first:
            if spread == "fsdp" and whole is not None:  # a model that is not spread, to be written
                prepared = _Prepared(recipe, texts, out, parallel.Processes())
                prepared.model.load_state_dict(whole)
            _export(recipe, prepared, out, target, evaluation, card)
        processes.wait()
    parallel.leave(processes)
    return target


class _Prepared:
    """Model, tokenizer and batches of a recipe."""

    def __init__(self, recipe: Recipe, texts: Path, out: Path, processes: parallel.Processes) -> None:
        self.teacher: loop.Teacher | None = None
        self.base: Base | None = None
        self.table: examples.Table | None = None
        self.template: str | None = None
        self.schedule = recipe.training
        self.files = self._files(recipe, texts)
        if recipe.task in ("pretrain", "distil"):
            self._new(recipe, out, processes)
        else:
            self._from_base(recipe)
        self.context = min(recipe.context, int(getattr(self.model.config, "max_position_embeddings", recipe.context)))
        if not processes.first:
            processes.wait()  # the first process encodes, the others find what it wrote
        self.sources = self._sources(recipe, out)
        penalize_gates(self.model, self.schedule.gate_l1)
        if processes.first and processes.count > 1:
            processes.wait()
        self.compiled = self.schedule.compile and self.sources[0].targets is None and recipe.task != "lora"  # examples differ in length
        if self.sources[0].targets is not None:
            self.batches = loop.examples(self.sources[0], self.schedule, self.context, recipe.seed)
        else:
            self.batches = loop.windows(self.sources, self.schedule, self.context, recipe.seed)

    def _files(self, recipe: Recipe, texts: Path) -> list[Path]:
        if not texts.exists():
            raise UsageError(f"{texts}: not found; --data names a folder of the recipe's texts, or one file")
        if recipe.task == "classify":
            found = texts / "train.tsv" if texts.is_dir() else texts
            if not found.is_file():
                raise UsageError(f"{found}: not found; a classification trains on the train.tsv of a GLUE folder, or a .tsv by name")
            return [found]
        wanted = list(recipe.training.mixture) if recipe.training.mixture else None
        return data.files_of(texts, wanted, (".jsonl",) if recipe.task == "instruct" else data.TEXTS)

    def _new(self, recipe: Recipe, out: Path, processes: parallel.Processes) -> None:
        assert recipe.model is not None
        if recipe.teacher is not None:
            teacher = Base(recipe.teacher)
            freeze(teacher.model)
            self.teacher = loop.Teacher(teacher.model, recipe.teacher_share, recipe.temperature)
            self.tokenizer, self.begin, self.end = teacher.tokenizer, teacher.begin, teacher.end
            vocab_size = int(teacher.model.config.vocab_size)
        else:
            saved = out / "tokenizer.json"
            if processes.first and not saved.exists():
                write_text(saved, self._learn_tokenizer(recipe).to_str())
            processes.wait()
            self.tokenizer, self.begin, self.end = Tokenizer.from_file(str(saved)), [0], 0
            vocab_size = recipe.vocab_size
        self.model = new_model(recipe.model, vocab_size, recipe.context, recipe.seed, self.end or 0)
        self._quantize(recipe, "*", ("lm_head",))

    def _learn_tokenizer(self, recipe: Recipe) -> Tokenizer:
        shares = recipe.tokenizer_texts or {f.name: 1.0 for f in self.files}
        files = data.files_of(self.files[0].parent, shares)
        if any(f.suffix == ".npy" for f in files):
            raise UsageError(
                "packed tokens need their tokenizer: put tokenizer.json into the run's folder, or name texts in tokenizer_texts"
            )

        def documents() -> Iterator[str]:
            for file, share in zip(files, shares.values(), strict=True):
                times, every = (int(share), 1) if share >= 1 else (1, round(1 / max(share, 1e-9)))
                for _ in range(times):
                    for number, text in enumerate(data.whole_documents(file)):
                        if number % every == 0:
                            yield text

        return data.train_tokenizer(documents(), recipe.vocab_size)

    def _from_base(self, recipe: Recipe) -> None:
        assert recipe.base_model is not None
        base = self.base = Base(recipe.base_model, packed=recipe.task == "lora")
        self.model, self.tokenizer, self.begin, self.end = base.model, base.tokenizer, base.begin, base.end
        if recipe.task == "lora":
            from bitnet.train.lora import add_adapter

            freeze(self.model)
            torch.manual_seed(recipe.seed)
            self.model = add_adapter(self.model, recipe, recipe.base_model)
        else:
            article = recipe.quantization.alphas == "article"
            self._quantize(recipe, "article" if article else recipe.quantization.layers, () if article else ("lm_head",))

    def _quantize(self, recipe: Recipe, layers: str, keep: tuple[str, ...]) -> None:
        if recipe.scheme != "fp16":
            how = recipe.quantization.quantization(recipe.scheme)
            ternarize_model(self.model, layers, keep=keep, quantization=how, sub_norm=recipe.quantization.sub_norm)

    def _sources(self, recipe: Recipe, out: Path) -> list[data.Source]:
        folder, file = out / "tokens", self.files[0]
        if recipe.task == "classify":
            self.table = examples.Table.read(file, recipe.labels, recipe.columns)
            ours, table = self.text_tokenizer(), self.table
            rows = lambda: table.rows(ours, self.begin, self.end, self.context)  # noqa: E731
            return [data.store(file, rows, self.tokenizer, folder, f"table {recipe.labels} {recipe.columns} {self.context}")]
        if recipe.task == "instruct" or (recipe.task == "lora" and _holds_conversations(file)):
            template, ours = self._template(), self.text_tokenizer()
            rows = lambda: examples.conversations(file, ours, template, self.end)  # noqa: E731
            return [data.store(file, rows, self.tokenizer, folder, f"conversations {template.source}")]
        return [data.pack(f, self.tokenizer, self.begin, folder) for f in self.files]

    def text_tokenizer(self) -> Any:
        from bitnet.tokenizer import Tokenizer as Ours

        return Ours(self.tokenizer, int(self.model.config.vocab_size), [] if self.end is None else [self.end])

    def special(self, ids: list[int] | int | None) -> str:
        first = ids[0] if isinstance(ids, list) and ids else ids
        return str(self.tokenizer.id_to_token(first)) if isinstance(first, int) else ""

    def _template(self) -> ChatTemplate:
        checkpoint = self.base.checkpoint if self.base else None
        if checkpoint is not None:
            from bitnet.transformer import load_chat_template

            found = load_chat_template(checkpoint)
            if found is not None:
                self.template = find_template(checkpoint.tokenizer_config, checkpoint.chat_template, checkpoint.gguf_metadata)
                return found
        self.template = examples.TEMPLATE
        return ChatTemplate(examples.TEMPLATE, bos_token=self.special(self.begin), eos_token=self.special(self.end))


def _holds_conversations(file: Path) -> bool:
    if file.suffix != ".jsonl":
        return False
    with file.open(encoding="utf-8") as lines:
        row = data.json_line(next((line for line in lines if line.strip()), "{}"), file, 1)
    return "messages" in row or "prompt" in row


def _export(recipe: Recipe, prepared: _Prepared, out: Path, target: Path, evaluation: Path | None, card: Path | None) -> None:
    """Model or adapter, its tokenizer, the loss as a picture, and the card filled in from what was measured."""
    from bitnet.train import export

    rows = export.read_log(out)
    decay_start = max(0, recipe.training.steps - recipe.training.decay_steps)
    texts: dict[str, bytes] = {"loss.png": export.loss_picture(rows, decay_start)}
    if recipe.task == "lora":
        from bitnet.train.lora import export_adapter

        export_adapter(prepared.model, target, texts)
    else:
        texts["tokenizer.json"] = prepared.tokenizer.to_str().encode()
        tokens = {"bos_token": prepared.special(prepared.begin), "eos_token": prepared.special(prepared.end)}
        texts["tokenizer_config.json"] = (json.dumps({k: v for k, v in tokens.items() if v}, ensure_ascii=False) + "\n").encode()
        if prepared.template is not None:
            texts["chat_template.jinja"] = prepared.template.encode()
        export.export_model(prepared.model, target, texts)
    parameters = list(prepared.model.parameters())
    values = {
        "name": recipe.name,
        "what": _what(recipe),
        "task": recipe.task,
        "scheme": recipe.scheme,
        "parameters": f"{sum(p.numel() for p in parameters):,}",
        "trained": f"{sum(p.numel() for p in parameters if p.requires_grad):,}",
        "bytes": f"{sum(f.stat().st_size for f in target.iterdir() if f.suffix in ('.safetensors', '.json')) / 1e6:.2f} MB",
        "seed": recipe.seed,
        "steps": f"{int(rows[-1]['step']):,}",
        "tokens": f"{int(rows[-1]['tokens']) / 1e6:.1f} million",
        "minutes": f"{float(rows[-1]['seconds']) / 60:.0f}",
        "loss": rows[-1]["loss"],
        "texts": "\n".join(f"- {s.name} ({len(s.tokens):,} tokens)" for s in prepared.sources),
        "scores": _scores(recipe, prepared, target, evaluation),
    }
    write_text(target / "README.md", export.card(card.read_text(encoding="utf-8") if card else None, values, recipe.plain()))


def _what(recipe: Recipe) -> str:
    scheme = {"fp16": "in 16-bit floats", "binary": "of binary weights", "ternary": "of ternary weights"}[recipe.scheme]
    return {
        "pretrain": f"A language model {scheme}, trained from scratch.",
        "distil": f"A language model {scheme}, taught by {recipe.teacher}.",
        "heal": f"{recipe.base_model}, its layers made {recipe.scheme} and trained to bear it.",
        "lora": f"A low-rank adapter ({recipe.quantize} factors of rank {recipe.rank}) for {recipe.base_model}.",
        "instruct": f"{recipe.base_model}, trained to answer ({scheme}).",
        "classify": f"{recipe.base_model}, trained to name a label ({scheme}).",
    }[recipe.task]


def _scores(recipe: Recipe, prepared: _Prepared, target: Path, evaluation: Path | None) -> str:
    """What the engine measures on what was exported, as Markdown; empty where there is nothing to measure on."""
    from bitnet.train.export import score_table

    if recipe.task == "classify" and prepared.table is not None:
        held_out = evaluation or prepared.files[0].with_name("dev.tsv")
        if not held_out.is_file():
            return ""
        from bitnet.transformer import TernaryTransformer

        table = examples.Table.read(held_out, recipe.labels, recipe.columns, prepared.table.words)
        right, count = examples.accuracy(TernaryTransformer.from_pretrained(target), table, prepared.begin)
        write_text(target.parent / "scores.json", json.dumps({"file": held_out.name, "right": right, "rows": count}) + "\n")
        return f"Accuracy on {held_out.name}: {right / count:.1%} ({right} of {count} rows; words: {', '.join(table.words)})"
    if evaluation is None or recipe.task == "lora":
        return ""
    return score_table(target, sorted(evaluation.glob("*.txt")) if evaluation.is_dir() else [evaluation])


def _check_same(recipe: Recipe, out: Path) -> None:
    """A run goes on with the recipe that it was begun with. Raises `UsageError` with the first key that differs."""
    path, now = out / "recipe.yaml", recipe.plain()
    if path.exists():
        then = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, before, after in _differences(then, now, ""):
            if key.rpartition(".")[2] not in _MAY_CHANGE:
                raise UsageError(f"{out}: this run was begun with {key} {before!r}, now it is {after!r}; name another folder with --out")
        return
    write_text(path, yaml.safe_dump(now, sort_keys=False, allow_unicode=True))


def _differences(then: Any, now: Any, at: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from _differences(then.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif then != now:
        yield at, then, now


def _check_target(target: Path) -> None:
    """Raises `UsageError` for a folder of other things, which would be replaced; before anything is trained."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file; expected a folder to write the model into")
    if target.is_dir() and any(target.iterdir()) and not any((target / n).is_file() for n in ("config.json", "adapter_config.json")):
        raise UsageError(f"{target}: is a folder of other things, which would be replaced; name another with --export")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{target}: there is no folder {target.absolute().parent}; make it first")


@contextmanager
def _alone(out: Path, first: bool) -> Iterator[None]:
    """One run at a time in a folder. Raises `BitNetError` where another one works there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be made ({error.strerror}); name another folder with --out") from None
    if fcntl is None or not first:
        yield
        return
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BitNetError(f"{out}: another run is at work in this folder; wait for it, or name another with --out") from None
        yield
    finally:
        os.close(lock)
