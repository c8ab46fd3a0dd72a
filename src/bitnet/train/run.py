"""One run of a recipe, from texts to a model that runs; started again with the same folder it goes on where it was.

The run's folder holds recipe.yaml (as it was begun), tokenizer.json and what it was learned from, tokens/, log.csv, tensorboard/,
checkpoints, and model/ or adapter/.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bitnet.errors import BitNetError, FormatError, UnsupportedModelError, UsageError
from bitnet.files.replacing import fcntl, remove_leftovers, write_text
from bitnet.source import resolve
from bitnet.train import checkpoint, examples, loop, parallel
from bitnet.train.prepare import Prepared
from bitnet.train.recipe import Recipe

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
        prepared = Prepared(recipe, texts, out, processes)
        after = _After(recipe, prepared, evaluation, card)
        if processes.first and not (checkpoint.saved(out) and (out / "recipe.yaml").exists()):
            write_text(out / "recipe.yaml", yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True))
        loop.train(
            prepared.model, prepared.batches, prepared.schedule, out, recipe.seed,
            teacher=prepared.teacher, processes=processes, parallel=spread, report=report, compiled=prepared.compiled,
            texts={source.name: source.sha256 for source in prepared.sources}, beside=prepared.beside,
        )  # fmt: skip
        whole = {n: parallel.whole(v) for n, v in prepared.model.state_dict().items()} if processes.count > 1 else None
        if processes.first:
            if spread == "fsdp" and whole is not None:  # a model that is not spread, to be written
                prepared = Prepared(recipe, texts, out, parallel.Processes())
                prepared.model.load_state_dict(whole)
            _export(recipe, prepared, out, target, after)
        processes.wait()
    parallel.leave(processes)
    return target


class _After:
    """What is done with a trained model, all that can be refused before it is trained. Raises `BitNetError`, one line."""

    def __init__(self, recipe: Recipe, prepared: Prepared, evaluation: Sequence[Path], card: Path | None) -> None:
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
                read_text(path, option="--eval")


def _held_out(recipe: Recipe, prepared: Prepared, evaluation: Sequence[Path]) -> tuple[str, examples.Table] | None:
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


def _export(recipe: Recipe, prepared: Prepared, out: Path, target: Path, after: _After) -> None:
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


def _scores(prepared: Prepared, out: Path, target: Path, after: _After) -> str:
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
    """A run that has a checkpoint goes on with the recipe that it was begun with. Raises `UsageError` with the first key that differs."""
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
    for key, before, after in _differences(then, recipe.plain(), "") if checkpoint.saved(out) else ():
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
    if target.is_dir():
        remove_leftovers(target)
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
