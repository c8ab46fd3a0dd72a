"""What a run trains with: model, tokenizer and batches of a recipe, everything about them that can be refused before the first step."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from bitnet.chat import ChatTemplate
from bitnet.errors import FormatError, UsageError
from bitnet.files.replacing import write_text
from bitnet.train import checkpoint, data, examples, loop, parallel
from bitnet.train.gate_l1 import penalize_gates
from bitnet.train.layers import ternarize_model
from bitnet.train.models import Base, begin_of, end_of, fingerprint, freeze, new_model, quickest_attention
from bitnet.train.recipe import CONTEXT, Recipe

_MADE_OF = "tokenizer.made_of.json"  # beside a learned tokenizer.json: from what


class Prepared:
    """Model, tokenizer and batches of a recipe."""

    def __init__(self, recipe: Recipe, texts: Path, out: Path, processes: parallel.Processes) -> None:
        self.teacher: loop.Teacher | None = None
        self.base: Base | None = None
        self.table: examples.Table | None = None
        self.template: str | None = None
        self.beside: dict[str, str] = {}  # name -> fingerprint of the model that stays as it is: an adapter's base, a teacher
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
        if not penalize_gates(self.model, self.schedule.gate_l1) and self.schedule.gate_l1:
            raise UsageError(f"training.gate_l1 is {self.schedule.gate_l1:g}; the model has no gate_proj whose gates it weighs: remove it")
        if processes.first and processes.count > 1:
            processes.wait()
        self.compiled = self.schedule.compile and self.sources[0].targets is None and recipe.task != "lora"  # examples differ in length
        if self.compiled and processes.device.type == "cpu":
            longest = max(self.schedule.context or self.context, self.schedule.decay_context or 0)
            for model in [self.model] if self.teacher is None else [self.model, self.teacher.model]:
                quickest_attention(model, self.schedule.bf16, longest)
        if self.sources[0].targets is not None:
            self.batches = loop.examples(self.sources[0], self.schedule, self.context, recipe.seed, processes.count)
        else:
            self.batches = loop.windows(self.sources, self.schedule, self.context, recipe.seed, processes.count)

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
            self.beside = {recipe.teacher: fingerprint(teacher.model)}
            self.teacher = loop.Teacher(teacher.model, recipe.teacher_share, recipe.temperature)
            self.tokenizer, self.begin, self.end = teacher.tokenizer, teacher.begin, teacher.end
            vocab_size = int(teacher.model.config.vocab_size)
        else:
            saved = out / "tokenizer.json"
            if processes.first:
                self._learn_tokenizer(recipe, saved)
            processes.wait()
            self.tokenizer = _read_tokenizer(saved)
            self.end = end_of(self.tokenizer, str(saved))
            self.begin = begin_of(self.tokenizer) or [self.end]
            if (size := self.tokenizer.get_vocab_size()) > recipe.vocab_size:
                raise UsageError(f"{saved}: has {size} tokens, vocab_size is {recipe.vocab_size}; raise it, or remove the file")
            vocab_size = recipe.vocab_size
        end = self.end or 0
        begin = self.begin[0] if self.begin else end
        self.model = new_model(recipe.model, vocab_size, recipe.context or CONTEXT, recipe.seed, begin, end)
        self._quantize(recipe, "*", ("lm_head",))

    def _learn_tokenizer(self, recipe: Recipe, saved: Path) -> None:
        """Writes the run's tokenizer.json, unless it is there: the user's, or learned from the same texts, or by a run that goes on."""
        shares = recipe.tokenizer_texts or {f.name: 1.0 for f in self.files}
        made_of, known = _made_of(saved), None
        if not saved.exists() or (made_of is not None and not checkpoint.saved(saved.parent)):
            files = data.files_of(self.files[0].parent, shares)
            if any(f.suffix == ".npy" for f in files):
                raise UsageError(
                    "packed tokens need their tokenizer: put tokenizer.json into the run's folder, or name texts in tokenizer_texts"
                )
            texts = {f.name: [share, f.stat().st_size, f.stat().st_mtime_ns] for f, share in zip(files, shares.values(), strict=True)}
            known = {"vocab_size": recipe.vocab_size, "texts": texts}
        if known is None or known == made_of:
            return

        def documents() -> Iterator[str]:
            for file, share in zip(files, shares.values(), strict=True):
                for number, text in enumerate(data.whole_documents(file)):
                    yield from repeat(text, math.ceil((number + 1) * share) - math.ceil(number * share))

        learned = data.train_tokenizer(documents(), recipe.vocab_size).to_str()
        saved.unlink(missing_ok=True)
        write_text(saved.parent / _MADE_OF, json.dumps({"sha256": _sha256(learned.encode()), "made_of": known}) + "\n")
        write_text(saved, learned)

    def _from_base(self, recipe: Recipe) -> None:
        assert recipe.base_model is not None
        base = self.base = Base(recipe.base_model, packed=recipe.task == "lora")
        self.model, self.tokenizer, self.begin, self.end = base.model, base.tokenizer, base.begin, base.end
        self.template = base.template
        if recipe.task == "lora":
            from bitnet.train.lora import add_adapter

            freeze(self.model)
            self.beside = {recipe.base_model: fingerprint(self.model)}
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
        return [data.pack(f, self.tokenizer, self.begin, self.end, folder) for f in self.files]

    def text_tokenizer(self) -> Any:
        from bitnet.tokenizer import Tokenizer as Ours

        return Ours(self.tokenizer, int(self.model.config.vocab_size), [] if self.end is None else [self.end])

    def special(self, ids: list[int] | int | None) -> str:
        first = ids[0] if isinstance(ids, list) and ids else ids
        return str(self.tokenizer.id_to_token(first)) if isinstance(first, int) else ""

    def _template(self) -> ChatTemplate:
        """The base's own, or a plain one, which is exported."""
        if self.base is not None and self.base.checkpoint is not None and self.template is not None:
            from bitnet.source import load_chat_template

            found = load_chat_template(self.base.checkpoint)
            assert found is not None
            return found
        self.template = self.template or examples.TEMPLATE
        return ChatTemplate(self.template, bos_token=self.special(self.begin), eos_token=self.special(self.end))


def _made_of(saved: Path) -> Any:
    """What a tokenizer was learned from; None of one that somebody put there, or that is not there."""
    try:
        found = json.loads((saved.parent / _MADE_OF).read_text())
        return found["made_of"] if found["sha256"] == _sha256(saved.read_bytes()) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
