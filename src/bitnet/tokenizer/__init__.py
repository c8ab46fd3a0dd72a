"""Text <-> token ids, over the `tokenizers` library, with the three things that a language model's caller needs on top.

- Text is text: a special token typed by a user ("<|endoftext|>") is encoded as its characters, unless the caller asks for it to be parsed
  (the text of a chat template). Only the post-processor adds special tokens of its own (a BOS, usually).
- A tokenizer.json is untrusted input. The library raises bare `Exception` for most bad files and panics for some; both become one line.
- Streaming gives only complete UTF-8 characters, and the pieces joined equal the decoding of the whole.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import tokenizers

from bitnet.errors import BitNetError, FormatError

_STDERR = 2  # file descriptor
_JSON = "the JSON that the tokenizers library writes"
_stderr_lock = threading.Lock()
_Built = TypeVar("_Built")
_INCOMPLETE = "\ufffd"  # what the decoders give for bytes that are not (yet) a character


class Tokenizer:
    """A tokenizer that fits its model: every id it can produce is below `vocab_size`."""

    def __init__(self, library: tokenizers.Tokenizer, vocab_size: int, eos_ids: Iterable[int] = ()):
        self._library = library
        self.vocab_size = vocab_size  # of the model: rows of its embedding
        self.eos_ids: set[int] = set(eos_ids)
        encoding = library.encode("a")
        mask = encoding.special_tokens_mask
        self.prefix_ids: list[int] = encoding.ids[: mask.index(0)] if 0 in mask else []  # what the post-processor puts first: [BOS] or []
        self._byte_ids = _byte_fallback_ids(library)
        self._special_ids = {token for token, added in library.get_added_tokens_decoder().items() if added.special}
        self._bytewise = isinstance(library.decoder, tokenizers.decoders.ByteLevel)  # a text is its tokens' bytes, one after another
        self._whole: dict[int, str | None] = {}  # what `whole_text` has answered

    @classmethod
    def from_json(cls, data: bytes, vocab_size: int, eos_ids: Iterable[int] = (), where: str = "tokenizer.json") -> Tokenizer:
        """Reads the bytes of a tokenizer.json (`where`, in messages) for a model of `vocab_size` tokens.

        Raises `FormatError` when the bytes are not a tokenizer, when it cannot encode, and when it has an id >= `vocab_size`.
        """
        try:
            text = bytes(data).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{where} is not UTF-8 (byte {error.start}); expected {_JSON}") from None

        def build() -> Tokenizer:
            return cls(checked(tokenizers.Tokenizer.from_str(text), vocab_size, where), vocab_size, eos_ids)

        return guarded(build, f"{where} cannot be used", _JSON)

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return self._library.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, with the post-processor's special tokens (BOS) unless `add_special` is False.

        With `parse_special`, special tokens spelled out in `text` become their ids; ask for it only where every character is trusted.
        Lone surrogates (undecodable bytes of a command line) are read as U+FFFD. Raises `FormatError` if the tokenizer fails on this text.
        """
        with _one_line("the tokenizer cannot encode this text"):
            return self._encode(replace_surrogates(text), add_special, parse_special)[0]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of `text` without special tokens, and for each the number of characters of `text` consumed up to its end."""
        with _one_line("the tokenizer cannot encode this text"):
            return self._encode(replace_surrogates(text), False, False)

    def token(self, token: int) -> str | None:
        """The text by which the vocabulary has a token; None where there is no such id."""
        return self._library.id_to_token(token) if 0 <= token < self.vocab_size else None

    @property
    def special_tokens(self) -> list[str]:
        """The texts that `encode(parse_special=True)` reads as special tokens."""
        texts = (self._library.id_to_token(token) for token in self._special_ids)
        return [text for text in texts if text]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        with _one_line("the tokenizer cannot decode these ids"):
            return self._library.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """A decoder for one token after another, following `context` (the ids of a whole text: the prompt), whose own text is not given."""
        return TextStream(self, context)

    def ends_inside_bytes(self, token: int) -> bool:
        """Whether `token` is one byte of a byte-fallback vocabulary ("<0xE2>"): its text depends on the bytes that follow."""
        return token in self._byte_ids

    def has_text(self, token: int) -> bool:
        """Whether decoding takes notice of `token`: special ones and those that the tokenizer does not know are passed over."""
        return token not in self._special_ids and self._library.id_to_token(token) is not None

    def whole_text(self, token: int) -> str | None:
        """What `token` adds to a text whose last character is complete; None where that depends on the tokens around it."""
        if token not in self._whole:
            text = self.decode([token]) if self._bytewise else _INCOMPLETE
            self._whole[token] = None if _INCOMPLETE in text else text
        return self._whole[token]

    def _encode(self, text: str, add_special: bool, parse_special: bool) -> tuple[list[int], list[int]]:
        library = self._parsing_library if parse_special else self._library
        encoding = library.encode(text, add_special_tokens=add_special)
        return encoding.ids, [end for _, end in encoding.offsets]

    @cached_property
    def _parsing_library(self) -> tokenizers.Tokenizer:
        """A second library object over the same model (shared, not copied) that parses special tokens.

        The setting belongs to the object: to switch it to and fro would let one thread's user text be parsed under another's setting.
        """
        one = self._library
        other = tokenizers.Tokenizer(one.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if getattr(one, part) is not None:
                setattr(other, part, getattr(one, part))
        added = sorted(one.get_added_tokens_decoder().items())
        other.add_tokens([token for _, token in added])
        if sorted(other.get_added_tokens_decoder()) != [token for token, _ in added]:
            raise FormatError("the ids of the added tokens have gaps, which cannot be kept when special tokens are parsed")
        return other


class TextStream:
    """Decodes token by token. What `push(id)` and `flush()` give, joined, is what `decode(context + ids)` has beyond the context.

    Decoding only looks back to the last two points at which the text was complete, so a token costs the same however long the text is.
    One earlier point is needed because some decoders treat the first token of a text differently (they strip its leading space).
    Byte-level ones do not: there a token of whole characters that follows whole characters is always the same text, decoded once.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = [token for token in context if tokenizer.has_text(token)]  # since the earlier of the two points
        self._given = len(tokenizer.decode(self._ids))  # characters of decode(self._ids) already given
        self._boundary = 0  # index into _ids of the later point

    def push(self, token: int) -> str:
        """The text that has become complete with `token`; often all of the token's, sometimes none."""
        text = self._tokenizer.whole_text(token) if self._boundary == len(self._ids) else None
        if text is not None:
            self._ids, self._boundary, self._given = [], 0, 0
            return text
        if not self._tokenizer.has_text(token):
            return ""
        self._ids.append(token)
        return "" if self._tokenizer.ends_inside_bytes(token) else self._advance()

    def flush(self) -> str:
        """What is left at the end of the text: an unfinished character, as U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        piece, self._given = text[self._given :], max(self._given, len(text))
        return piece

    def _advance(self) -> str:
        text = self._tokenizer.decode(self._ids)
        complete = text.removesuffix(_INCOMPLETE)
        piece = complete[self._given :]
        self._given = max(self._given, len(complete))
        if piece and len(complete) == len(text):
            self._ids, self._boundary = self._ids[self._boundary :], len(self._ids) - self._boundary
            self._given = len(self._tokenizer.decode(self._ids))
        return piece


def eos_token_ids(config: dict[str, Any], generation_config: dict[str, Any], vocab_size: int) -> set[int]:
    """The ids that end a text: `eos_token_id` (an int, a list of ints, or null) of generation_config.json, else of config.json.

    Raises `FormatError` for anything else, and for ids outside the vocabulary.
    """
    found: Any = next((c["eos_token_id"] for c in (generation_config, config) if c.get("eos_token_id") is not None), [])
    ids = found if isinstance(found, list) else [found]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise FormatError(
                f"eos_token_id is {str(found)[:80]}; expected token ids from 0 to {vocab_size - 1} (config.json or generation_config.json)"
            )
    return set(ids)


def replace_surrogates(text: str) -> str:
    """`text` with lone surrogates, which no UTF-8 can hold, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _byte_fallback_ids(library: tokenizers.Tokenizer) -> set[int]:
    """Ids of the 256 tokens "<0x00>" to "<0xFF>" if the decoder joins them into characters, else none."""
    if library.decoder is None or b"ByteFallback" not in library.decoder.__getstate__():
        return set()
    found = (library.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return {token for token in found if token is not None}


def _largest_id(library: tokenizers.Tokenizer) -> int:
    """Of all tokens, -1 for none. Their texts together would be a dict of 50 MB where there are 128,000: so if n have the ids below n,
    as nearly always, those are only asked for."""
    model, n = library.model, library.get_vocab_size(with_added_tokens=False)
    if None not in map(model.id_to_token, range(n)):
        return max(n - 1, *library.get_added_tokens_decoder(), -1)
    return max(library.get_vocab(with_added_tokens=True).values())


def checked(library: tokenizers.Tokenizer, vocab_size: int, where: str) -> tokenizers.Tokenizer:
    """`library`, set up to encode every text whole, as text, always alike; raises `FormatError` if it has an id >= `vocab_size`."""
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    if getattr(library.model, "dropout", None):
        library.model.dropout = None  # a training-time option: it would make the encoding random
    tokens = library.get_vocab_size(with_added_tokens=True)
    if not tokens:
        raise FormatError(f"{where} has an empty vocabulary; expected at least one token")
    largest = max(_largest_id(library), *library.encode("").ids, *library.encode("a").ids, 0)
    if largest >= vocab_size:
        raise FormatError(
            f"tokenizer does not fit the vocabulary: its largest token id is {largest} ({tokens} tokens), the model has "
            f"{vocab_size} (ids 0 to {vocab_size - 1}); use the tokenizer.json that belongs to this model"
        )
    return library


def guarded(build: Callable[[], _Built], what: str, expected: str) -> _Built:
    """What `build` gives; whatever the library throws or prints meanwhile becomes a `FormatError` of one line that begins with `what`."""
    with _silent_panics(), _one_line(what, expected):
        return build()


@contextmanager
def _one_line(what: str, expected: str = _JSON) -> Iterator[None]:
    """Turns the library's exceptions and panics into a `FormatError` of one line."""
    try:
        yield
    except BitNetError:
        raise
    except BaseException as error:
        # A panic in Rust is a PanicException, which derives from BaseException and cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{what}: {reason}; expected {expected}") from None


@contextmanager
def _silent_panics() -> Iterator[None]:
    """Hides what a panicking thread prints: Rust writes a backtrace to file descriptor 2 before the exception reaches us."""
    with _stderr_lock:
        try:
            saved = os.dup(_STDERR)
        except OSError:  # stderr is closed
            yield
            return
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, _STDERR)
        os.close(sink)
        try:
            yield
        finally:
            os.dup2(saved, _STDERR)
            os.close(saved)
