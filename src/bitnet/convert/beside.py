"""What stands beside the weights: the tokenizer and its settings, the chat template, generation_config.json; and files that are copied."""

from __future__ import annotations

from typing import Any

from bitnet.chat import find_template
from bitnet.convert import tokenizer
from bitnet.convert.formats import Format
from bitnet.convert.hf import json_text
from bitnet.errors import FormatError
from bitnet.files import PathLike, read_file, shown, system_errors
from bitnet.files.hf import MAX_TOKENIZER_BYTES
from bitnet.models import Checkpoint, ModelConfig
from bitnet.tokenizer import Tokenizer

FILES = {"chat_template": "chat_template.jinja"}  # the others are KEY.json
COPIED = ("tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")  # of folders, to others' use
_TOKENIZERS = COPIED[:2]  # which say by themselves what tokens are


def copies(checkpoint: Checkpoint, form: Format, tokenizer_json: PathLike | None) -> dict[str, bytes]:
    """The files of the source's tokenizer that go into a folder as they are: none if another tokenizer takes its place."""
    folder = checkpoint.path
    if not form.folder or tokenizer_json is not None or not folder.is_dir():
        return {}
    found = {}
    for path in (folder / name for name in COPIED):
        with system_errors(path, "read"):
            if path.is_file():
                found[path.name] = path.read_bytes()
    return found


def texts_of(
    checkpoint: Checkpoint, config: ModelConfig, form: Format, tokenizer_json: PathLike | None, notes: list[str]
) -> dict[str, Any]:
    """Of GGUF the keys of tokenizer and template, else the JSON texts by name. Raises FormatError for what no file of the form can hold."""
    where, vocab_size, stored = str(checkpoint.path), config.vocab_size, checkpoint.gguf_metadata
    template = find_template(checkpoint.tokenizer_config, checkpoint.chat_template, stored)
    raw = read_file(tokenizer_json, MAX_TOKENIZER_BYTES) if tokenizer_json is not None else checkpoint.tokenizer_json
    from_gguf = raw is None and stored.get("tokenizer.ggml.model", "no_vocab") != "no_vocab"
    if tokenizer_json is not None and raw is not None:
        Tokenizer.from_json(raw, vocab_size, where=shown(tokenizer_json))
    elif raw is not None and form.container != "gguf":
        _note_unusable(raw, vocab_size, where, notes)
    if raw is None and not from_gguf:
        notes.append(_without(checkpoint, form))
    if form.container == "gguf":
        chat = {} if template is None else {"tokenizer.chat_template": _utf8(template, f"{where}: chat_template")}
        if from_gguf:
            return {key: value for key, value in stored.items() if key.startswith("tokenizer.")} | chat
        if raw is None:
            ids = zip(("eos", "eot", "eom"), tokenizer.ends_of(checkpoint, vocab_size), strict=False)
            return {"tokenizer.ggml.model": "no_vocab", **{f"tokenizer.ggml.{name}_token_id": token for name, token in ids}} | chat
        source, ends = tokenizer.read(raw, vocab_size, checkpoint.config, checkpoint.generation_config)
        ends = tokenizer.ends_of(checkpoint, vocab_size) if stored else ends
        settings = _special_tokens(checkpoint, source) if stored else checkpoint.tokenizer_config
        keys, note = tokenizer.to_gguf(source, raw, settings, ends, where)
        notes += [note] if note is not None else []
        return keys | chat
    texts: dict[str, Any] = {}
    if from_gguf:
        raw, _ = tokenizer.to_json(stored, vocab_size, where)
    if stored:
        bos, ends = stored.get("tokenizer.ggml.bos_token_id"), tokenizer.ends_of(checkpoint, vocab_size)
        texts["generation_config"] = json_text({"bos_token_id": bos, "eos_token_id": ends or None})
    if stored and raw is not None:
        special = _special_tokens(checkpoint, Tokenizer.from_json(raw, vocab_size))
        texts["tokenizer_config"] = json_text({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    if checkpoint.generation_config:
        texts["generation_config"] = json_text(checkpoint.generation_config)
    if checkpoint.tokenizer_config:
        texts["tokenizer_config"] = json_text(checkpoint.tokenizer_config)
    if template is not None and not (checkpoint.tokenizer_config.get("chat_template") and checkpoint.chat_template is None):
        texts["chat_template"] = template
    if raw is not None:
        texts["tokenizer"] = raw.decode()
    return texts


def _note_unusable(raw: bytes, vocab_size: int, where: str, notes: list[str]) -> None:
    """Notes a tokenizer.json that only others can use. Raises FormatError for one that is no text."""
    try:
        Tokenizer.from_json(raw, vocab_size)
    except FormatError as error:
        try:
            raw.decode()
        except UnicodeDecodeError:
            raise FormatError(f"{where}: {error}; repair it, or name another one with --tokenizer") from None
        notes.append(f"the tokenizer is copied as it is, though this program cannot use it ({error})")


def _without(checkpoint: Checkpoint, form: Format) -> str:
    """What to say of a source without a tokenizer that this program reads."""
    folder = checkpoint.path
    others = [name for name in _TOKENIZERS if folder.is_dir() and (folder / name).is_file()]
    if not others:
        return "the source has no tokenizer, so the target has none; --tokenizer names one"
    how = "copied as they are" if form.folder else "left behind"
    return f"the source has no tokenizer.json, but {', '.join(others)}: {how}, for this program reads none of these; --tokenizer names one"


def _special_tokens(checkpoint: Checkpoint, written: Tokenizer) -> dict[str, str]:
    """The tokens whose ids a GGUF has, as the tokenizer that is written spells them."""
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
    ids = {name: checkpoint.gguf_metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    found = {name: written.token(token) for name, token in ids.items() if isinstance(token, int)}
    return {name: text for name, text in found.items() if text is not None}


def _utf8(text: str, where: str) -> str:
    """`text`. Raises FormatError for half of a surrogate pair, which JSON can spell and no other text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: holds half of a surrogate pair (character {error.start}), which no GGUF can; repair it") from None
    return text
