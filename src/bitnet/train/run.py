"""One run of a recipe, from texts to a model that runs; started again with the same folder it goes on where it was.

The run's folder holds recipe.yaml (as it was begun), tokenizer.json, tokens/, log.csv, tensorboard/, checkpoints, and model/ or adapter/.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer

from bitnet.chat import ChatTemplate, find_template
from bitnet.errors import BitNetError, FormatError, UnsupportedModelError, UsageError
from bitnet.files.replacing import fcntl, write_text
from bitnet.source import resolve
from bitnet.train import data, examples, loop, parallel
from bitnet.train.gate_l1 import penalize_gates
from bitnet.train.layers import ternarize_model
from bitnet.train.models import Base, freeze, new_model, quickest_attention
from bitnet.train.recipe import CONTEXT, Recipe

_MAY_CHANGE = ("checkpoint_every", "micro_batch", "compile", "divergence", "matrix_lr", "vector_lr")  # of a run's recipe, when it goes on
_EXPORTED = {  # all that an export writes: what else a folder holds is somebody's
    "config.json", "generation_config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "README.md", "loss.png",
}  # fmt: skip
Report = Callable[[dict[str, Any]], None]


def run(
    recipe: Recipe,
    texts: Path,
    out: Path,
    export: Path | None = None,
    evaluation: Sequence[Path] = (),
    card: Path | None = None,
    device: str = "cpu",
    spread: str = "ddp",
    report: Report = lambda row: None,
) -> Path:
    """Tokens, training, export. Returns the folder of the model or adapter.

    `texts`: the recipe's files: a folder, or one file. `evaluation`: texts (folders of *.txt, files; of a table one place with held-out
    rows) on which what is exported is scored. `card`: text of the model card, with {placeholders}. `spread`: "ddp" or "fsdp", of many
    processes.
    """
    target = export or out / ("adapter" if recipe.task == "lora" else "model")
    processes = parallel.join(device)
    with _alone(out, processes.first):
        if processes.first:
            _check_target(recipe, target)
            _check_same(recipe, out)
        processes.wait()
        prepared = _Prepared(recipe, texts, out, processes)
        after = _After(recipe, prepared, evaluation, card)
        if processes.first and not (out / "recipe.yaml").exists():
            write_text(out / "recipe.yaml", yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True))
        loop.train(
            prepared.model, prepared.batches, prepared.schedule, out, recipe.seed,
            teacher=prepared.teacher, processes=processes, parallel=spread, report=report, compiled=prepared.compiled,
            texts={source.name: source.sha256 for source in prepared.sources},
        )  # fmt: skip
        whole = {n: parallel.whole(v) for n, v in prepared.model.state_dict().items()} if processes.count > 1 else None
        if processes.first:
            if spread == "fsdp" and whole is not None:  # a model that is not spread, to be written
                prepared = _Prepared(recipe, texts, out, parallel.Processes())
                prepared.model.load_state_dict(whole)
            _export(recipe, prepared, out, target, after)
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
        self.context = self._context(recipe)
        if not processes.first:
            processes.wait()  # the first process encodes, the others find what it wrote
        self.sources = self._sources(recipe, out)
        penalize_gates(self.model, self.schedule.gate_l1)
        if processes.first and processes.count > 1:
            processes.wait()
        self.compiled = self.schedule.compile and self.sources[0].targets is None and recipe.task != "lora"  # examples differ in length
        if self.compiled and processes.device.type == "cpu":
            longest = max(self.schedule.context or self.context, self.schedule.decay_context or 0)
            for model in [self.model] if self.teacher is None else [self.model, self.teacher.model]:
                quickest_attention(model, self.schedule.bf16, longest)
        if self.sources[0].targets is not None:
            self.batches = loop.examples(self.sources[0], self.schedule, self.context, recipe.seed)
        else:
            self.batches = loop.windows(self.sources, self.schedule, self.context, recipe.seed)

    def _context(self, recipe: Recipe) -> int:
        """Raises `UsageError` where the recipe asks for more tokens than base or teacher have places for."""
        models = [self.model] if self.teacher is None else [self.model, self.teacher.model]
        most = min(int(getattr(model.config, "max_position_embeddings", None) or sys.maxsize) for model in models)
        context = recipe.context or min(CONTEXT, most)
        for key, tokens in (
            ("context", context), ("training.context", self.schedule.context), ("training.decay_context", self.schedule.decay_context),
        ):  # fmt: skip
            if tokens is not None and tokens > most:
                raise UsageError(f"{key} is {tokens}; {recipe.teacher or recipe.base_model} has places for {most} tokens: lower {key}")
        return context

    def _files(self, recipe: Recipe, texts: Path) -> list[Path]:
        if not texts.exists():
            raise UsageError(f"{texts}: not found; --data names a folder of the recipe's texts, or one file")
        if recipe.task == "classify":
            found = texts / "train.tsv" if texts.is_dir() else texts
            if not found.is_file():
                raise UsageError(f"{found}: not found; a classification trains on the train.tsv of a GLUE folder, or a .tsv by name")
            return [found]
        wanted = list(recipe.training.mixture) if recipe.training.mixture else None
        elsewhere = next((name for name in wanted or () if Path(name).name != name), None)
        if elsewhere is not None:
            raise UsageError(f"training.mixture names {elsewhere}; expected the name of a file in {texts}, without folders")
        other = next((name for name in wanted or () if name != texts.name), None) if texts.is_file() else None
        if other is not None:
            raise UsageError(
                f"{texts}: is one file, and training.mixture names {other}; name their folder with --data, or add "
                "--set training.mixture=null --set training.decay_mixture=null"
            )
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
            self.tokenizer, self.begin, self.end = _read_tokenizer(saved), [0], 0
            if (size := self.tokenizer.get_vocab_size()) > recipe.vocab_size:
                raise UsageError(f"{saved}: has {size} tokens, vocab_size is {recipe.vocab_size}; raise it, or remove the file")
            vocab_size = recipe.vocab_size
        self.model = new_model(recipe.model, vocab_size, recipe.context or CONTEXT, recipe.seed, self.end or 0)
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
                        if int((number + 1) * share) > int(number * share) if 0.5 < share < 1 else number % every == 0:
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
            if recipe.task == "grow":
                base.grow(recipe.num_hidden_layers, recipe.context)
            article = recipe.quantization.alphas == "article"
            self._quantize(recipe, "article" if article else recipe.quantization.layers, () if article else ("lm_head",))

    def _quantize(self, recipe: Recipe, layers: str, keep: tuple[str, ...]) -> None:
        if recipe.scheme != "fp16":
            how = recipe.quantization.quantization(recipe.scheme)
            names = ternarize_model(self.model, layers, keep=keep, quantization=how, sub_norm=recipe.quantization.sub_norm)
            if how.activations == "none":
                warnings.warn(
                    "quantization.activations is none, but the engine runs packed layers with int8 activations: what is exported gives "
                    "somewhat other logits than in training",
                    stacklevel=2,
                )
            if self.base is not None and how.rule == "absmean" and recipe.quantization.alphas is None:
                self.base.make_masters(names)

    def _sources(self, recipe: Recipe, out: Path) -> list[data.Source]:
        folder, file = out / "tokens", self.files[0]
        if recipe.task == "classify":
            self.table = examples.Table.read(file, recipe.labels, recipe.columns)
            if len(self.table.words) < 2:
                raise UsageError(f"{file}: every row has the label {self.table.words[0]!r}; a classification needs two labels at least")
            ours, table = self.text_tokenizer(), self.table
            rows = lambda: table.rows(ours, self.begin, self.end, self.context)  # noqa: E731
            return [data.store(file, rows, self.tokenizer, folder, f"table {recipe.labels} {recipe.columns} {self.context}")]
        if recipe.task == "instruct" or (recipe.task == "lora" and any(map(_holds_conversations, self.files))):
            if len(self.files) > 1:
                raise UsageError(
                    f"{file.parent}: conversations are taken from one file, and here are {len(self.files)} ({self.files[0].name}, "
                    f"{self.files[1].name}, ...); name one with --data, or join them"
                )
            template, ours = self._template(), self.text_tokenizer()
            rows = lambda: examples.conversations(file, ours, template, self.end, self.context)  # noqa: E731
            return [data.store(file, rows, self.tokenizer, folder, f"conversations {self.context} {template.source}")]
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
            from bitnet.source import load_chat_template

            found = load_chat_template(checkpoint)
            if found is not None:
                self.template = find_template(checkpoint.tokenizer_config, checkpoint.chat_template, checkpoint.gguf_metadata)
                return found
        self.template = examples.TEMPLATE
        return ChatTemplate(examples.TEMPLATE, bos_token=self.special(self.begin), eos_token=self.special(self.end))


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing else
        raise FormatError(f"{path}: is no tokenizer ({str(error)[:100]}); bring it back, or name another folder with --out") from None


def _holds_conversations(file: Path) -> bool:
    if file.suffix != ".jsonl":
        return False
    with file.open(encoding="utf-8-sig") as lines, data.utf8(file):
        row = data.json_line(next((line for line in lines if line.strip()), "{}"), file, 1)
    return "messages" in row or "prompt" in row


class _After:
    """What is done with a trained model, all that can be refused before it is trained. Raises `BitNetError`, one line."""

    def __init__(self, recipe: Recipe, prepared: _Prepared, evaluation: Sequence[Path], card: Path | None) -> None:
        from bitnet.evaluate.perplexity import read_text
        from bitnet.train import export

        self.card = None if card is None else read_text(card, option="--card")
        self.texts: list[Path] = []
        self.held_out: tuple[str, examples.Table] | None = None
        runs = prepared.base is None or prepared.base.checkpoint is not None
        if recipe.task != "lora":
            layers, simple = export.check(prepared.model)
            if layers and not simple and not runs:
                raise UnsupportedModelError(
                    f"{recipe.base_model}: is of a family that only transformers runs, and there ternary layers have one scale for the "
                    "tensor: choose scheme ternary, quantization.scale tensor, and no alphas"
                )
        if evaluation and (recipe.task == "lora" or not runs):
            what = "an adapter is not scored here" if runs else f"{recipe.base_model} is of a family that only transformers runs"
            raise UsageError(f"--eval {evaluation[0]}: {what}; leave --eval out")
        if prepared.table is not None and not runs:
            what = f"{recipe.base_model} is of a family that only transformers runs"
            warnings.warn(f"{what}, so no accuracy is measured on held-out rows", stacklevel=2)
        if prepared.table is not None and runs:
            self.held_out = _held_out(recipe, prepared, evaluation)
        else:
            for place in evaluation:
                found = sorted(place.glob("*.txt")) if place.is_dir() else [place]
                if not found:
                    raise UsageError(f"--eval {place}: the folder holds no .txt; name one with held-out texts, or a file")
                self.texts += [path for path in found if path not in self.texts]
            for path in self.texts:
                if path.suffix in (".jsonl", ".npy", ".tsv"):
                    raise UsageError(f"--eval {path}: is no plain text, which is what is scored; write its documents into a .txt")
                read_text(path)


def _held_out(recipe: Recipe, prepared: _Prepared, evaluation: Sequence[Path]) -> tuple[str, examples.Table] | None:
    """(name, rows) of a table's held-out file: what --eval names, else dev.tsv, or MNLI's, beside the training rows."""
    assert prepared.table is not None
    if len(evaluation) > 1:
        raise UsageError(f"--eval {evaluation[1]}: a table is scored on one file of held-out rows, and {evaluation[0]} is named already")
    folder = evaluation[0] if evaluation else prepared.files[0].parent
    found = [folder] if folder.is_file() else [p for n in ("dev.tsv", "dev_matched.tsv") if (p := folder / n).is_file()]
    if not found:
        if evaluation:
            raise UsageError(f"--eval {folder}: holds no dev.tsv and no dev_matched.tsv; name a .tsv")
        warnings.warn(f"{folder}: no dev.tsv, so no accuracy is measured; name held-out rows with --eval", stacklevel=2)
        return None
    return found[0].name, examples.Table.read(found[0], recipe.labels, prepared.table.columns, prepared.table.words)


def _export(recipe: Recipe, prepared: _Prepared, out: Path, target: Path, after: _After) -> None:
    """Model or adapter, its tokenizer, the loss as a picture, and the card filled in from what was measured."""
    from bitnet.train import export

    rows = loop.read_log(out)
    last = rows[-1] if rows else dict.fromkeys(loop.COLUMNS, "nan")
    decay_start = max(0, recipe.training.steps - recipe.training.decay_steps)
    texts: dict[str, bytes] = {"loss.png": export.loss_picture(rows, decay_start)} if rows else {}
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
        "scheme": recipe.trained,
        "parameters": f"{sum(p.numel() for p in parameters):,}",
        "trained": f"{sum(p.numel() for p in parameters if p.requires_grad):,}",
        "bytes": f"{sum(f.stat().st_size for f in target.iterdir() if f.suffix in ('.safetensors', '.json')) / 1e6:.2f} MB",
        "seed": recipe.seed,
        "steps": f"{recipe.training.steps:,}",
        "tokens": f"{float(last['tokens']) / 1e6:.1f} million",
        "minutes": f"{float(last['seconds']) / 60:.0f}",
        "core_hours": f"{float(last['cpu_seconds']) / 3600:.1f}",
        "loss": last["loss"],
        "texts": "\n".join(f"- {s.name} ({len(s.tokens):,} tokens)" for s in prepared.sources),
        "scores": _scores(prepared, out, target, after),
    }
    write_text(target / "README.md", export.card(after.card, values, recipe.plain()))


def _what(recipe: Recipe) -> str:
    scheme = {"fp16": "in 16-bit floats", "binary": "of binary weights", "ternary": "of ternary weights"}[recipe.scheme]
    return {
        "pretrain": f"A language model {scheme}, trained from scratch.",
        "distil": f"A language model {scheme}, taught by {recipe.teacher}.",
        "heal": f"{recipe.base_model}, its layers made {recipe.scheme} and trained to bear it.",
        "lora": f"A low-rank adapter ({recipe.trained} factors of rank {recipe.rank}) for {recipe.base_model}.",
        "grow": f"{recipe.base_model}, with more layers or a longer context, trained further ({scheme}).",
        "instruct": f"{recipe.base_model}, trained to answer ({scheme}).",
        "classify": f"{recipe.base_model}, trained to name a label ({scheme}).",
    }[recipe.task]


def _scores(prepared: _Prepared, out: Path, target: Path, after: _After) -> str:
    """What the engine measures on what was exported, as Markdown; empty where there is nothing to measure on."""
    if after.held_out is not None:
        from bitnet.transformer import TernaryTransformer

        name, table = after.held_out
        right, count = examples.accuracy(TernaryTransformer.from_pretrained(target), table, prepared.begin, prepared.end, prepared.context)
        write_text(out / "scores.json", json.dumps({"file": name, "right": right, "rows": count}) + "\n")
        return f"Accuracy on {name}: {right / count:.1%} ({right} of {count} rows; words: {', '.join(table.words)})"
    from bitnet.train.export import score_table

    return score_table(target, after.texts) if after.texts else ""


def _check_same(recipe: Recipe, out: Path) -> None:
    """A run goes on with the recipe that it was begun with. Raises `UsageError` with the first key that differs."""
    path = out / "recipe.yaml"
    if not path.exists():
        log = out / "log.csv"
        if log.exists() and not log.read_bytes().startswith(",".join(loop.COLUMNS).encode()):
            raise UsageError(f"{log}: would be replaced, and {out} holds no run (no recipe.yaml); move it, or name another --out")
        return
    try:
        then = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        then = None
    if not isinstance(then, dict) or "training" not in then:
        raise FormatError(f"{path}: is damaged; remove it to go on by the recipe of --config, or name another folder with --out")
    for key, before, after in _differences(then, recipe.plain(), ""):
        if key.rpartition(".")[2] not in _MAY_CHANGE:
            raise UsageError(f"{out}: this run was begun with {key} {before!r}, now it is {after!r}; name another folder with --out")


def _differences(then: Any, now: Any, at: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from _differences(then.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif then != now:
        yield at, then, now


def _check_target(recipe: Recipe, target: Path) -> None:
    """Raises `UsageError` for a folder of other things, which would be replaced, and for the base; before anything is trained."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file; expected a folder to write the model into")
    names = {p.name for p in target.iterdir()} if target.is_dir() else set()
    if names and (names - _EXPORTED or not names & {"config.json", "adapter_config.json"}):
        other = min(names - _EXPORTED or names)
        raise UsageError(f"{target}: is a folder of other things ({other}), which would be replaced; name another with --export")
    if names and "loss.png" not in names:  # which every export has
        raise UsageError(f"{target}: holds a model that was not written by a training run (no loss.png); name another with --export")
    for source in filter(None, (recipe.base_model, recipe.teacher)):
        if names and resolve(source).resolve() in (target.resolve(), *(p.resolve() for p in target.iterdir())):
            raise UsageError(f"{target}: is {source}, which is trained from; name another folder with --export")
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
