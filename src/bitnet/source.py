"""What a model's name stands for: the embedded one, a folder, a file, or one of the Hub; and the tokenizer and chat template it has."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet.chat import ChatTemplate, find_template
from bitnet.errors import FormatError, UsageError
from bitnet.files import shown
from bitnet.hub import fetch, is_hub_name
from bitnet.hub.remote import HubError
from bitnet.tokenizer import Tokenizer, eos_token_ids
from bitnet.tokenizer.gguf import ends_of_gguf, tokenizer_from_gguf

if TYPE_CHECKING:
    from bitnet.files.hf import Checkpoint

EMBEDDED_MODEL = "tinyllm-ternary-v2"


def embedded_models() -> list[str]:
    """Names of the models inside the package."""
    folder = resources.files("bitnet") / "embedded"
    return sorted(entry.name for entry in folder.iterdir() if (entry / "config.json").is_file()) if folder.is_dir() else []


def resolve(source: str | os.PathLike[str], revision: str | None = None, file: str | None = None) -> Path:
    """The folder or file that `source` names: an embedded model, else a path that exists, else "org/name" of the Hub, then downloaded.

    revision, file: of a model from the Hub. Raises `UsageError` if there is none, and what `bitnet.hub.fetch` raises.
    """
    text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(text, str) or not text.strip("\0 "):
        raise UsageError(f"model is {text!r}; expected a folder, a file, or an embedded model: {EMBEDDED_MODEL}")
    names = embedded_models()
    path = Path(str(resources.files("bitnet") / "embedded" / text)) if text in names else Path(text)
    try:
        if path.exists():
            if revision is not None or file is not None:
                raise UsageError(f"revision and file choose within a model of the Hub, and {text[:200]!r} is here; name the file itself")
            return path
    except (OSError, ValueError) as error:
        raise UsageError(f"model {text[:80]!r} cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    if isinstance(source, str) and is_hub_name(text):
        try:
            return fetch(text, revision, file)
        except HubError as error:
            if Path(text).parent.is_dir():  # more likely a path
                raise HubError(f"no folder or file {text!r}, and {error}", status=error.status, offline=error.offline) from None
            raise
    if text == EMBEDDED_MODEL:
        raise FormatError(f"the embedded model {text} is missing from this installation; reinstall bitnet-ternary")
    have = f"the embedded models are: {', '.join(names) or 'none in this installation'}"
    kind = "folder or file" if os.sep in text or "." in text else "folder, file or embedded model"
    raise UsageError(f"no {kind} named {text[:200]!r}; {have}")


def load_tokenizer(checkpoint: Checkpoint, vocab_size: int, override: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The checkpoint's tokenizer, or that of the file `override`. Raises `FormatError`, `UsageError` if the file cannot be read."""
    data, where = checkpoint.tokenizer_json, "tokenizer.json"
    if override is not None:
        if not isinstance(override, (str, os.PathLike)):
            raise UsageError(f"tokenizer is {override!r}; expected the path of a tokenizer.json")
        where = shown(override)
        try:
            data = Path(override).read_bytes()
        except (OSError, ValueError) as error:
            raise UsageError(f"tokenizer {os.fspath(override)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    elif checkpoint.gguf_metadata:
        found = tokenizer_from_gguf(checkpoint.gguf_metadata, vocab_size, str(checkpoint.path))
        whole = checkpoint.gguf_metadata.get("tokenizer.huggingface.json")  # where GGUF's own keys say less
        return Tokenizer.from_json(whole.encode(), vocab_size, found.eos_ids) if isinstance(whole, str) else found
    if data is None:
        raise FormatError(f"{checkpoint.path}: no tokenizer.json, neither beside the weights nor in their metadata; name one (--tokenizer)")
    if checkpoint.gguf_metadata:
        return Tokenizer.from_json(data, vocab_size, ends_of_gguf(checkpoint.gguf_metadata, vocab_size, str(checkpoint.path)), where)
    return Tokenizer.from_json(data, vocab_size, eos_token_ids(checkpoint.config, checkpoint.generation_config, vocab_size), where)


def load_chat_template(checkpoint: Checkpoint) -> ChatTemplate | None:
    """The checkpoint's own chat template, with the texts of its first and last token; None if it has none, for none is ever guessed."""
    source = find_template(checkpoint.tokenizer_config, checkpoint.chat_template, checkpoint.gguf_metadata)
    if source is None:
        return None

    def special(name: str) -> str | None:
        token: Any = checkpoint.tokenizer_config.get(f"{name}_token")
        number, texts = (checkpoint.gguf_metadata.get(f"tokenizer.ggml.{key}") for key in (f"{name}_token_id", "tokens"))
        if isinstance(number, int) and isinstance(texts, list) and 0 <= number < len(texts):
            token = texts[number]
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    return ChatTemplate(source, bos_token=special("bos"), eos_token=special("eos"), where=str(checkpoint.path))
