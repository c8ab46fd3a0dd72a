"""Tokenizers from the metadata of a GGUF file, with the token ids that llama.cpp gives.

A GGUF file has no tokenizer.json but its parts (`tokenizer.ggml.*`): the tokens, their types, and the rules of one of two kinds.

- "gpt2": byte-level BPE. Regular expressions named by `tokenizer.ggml.pre` cut the text into words; in each, pairs are joined in the
  order of `tokenizer.ggml.merges`. The `tokenizers` library runs it.
- "llama": SentencePiece's BPE. Spaces become U+2581, and of all neighbours that together are a token, those with the highest score are
  joined first, the leftmost of equals. What is no token in the end is spelled in bytes ("<0xE2>"). `ScoredMerges` runs it: a list of merges
  for the library could only order the pairs, not their places, and so would differ where scores are equal or a token overlaps itself.

Before that, in both kinds, the text is cut at special tokens, the longest first: at user-defined ones always, at control tokens only when
the caller asks for it. Source: llama.cpp, src/llama-vocab.cpp. Where the two differ:
- There, control tokens and "<0x41>" can also grow out of merges of plain text; here they cannot, as in SentencePiece itself.
- Letters, marks and digits that came with Unicode 16 (about 4,400) are known here and not to llama.cpp of early 2026.
- Broken UTF-8 is read as U+FFFD for each bad byte. So does llama.cpp in byte-level kinds, except for overlong forms, which it believes;
  in the other kind it spells such bytes out, and sound characters after them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from bitnet.errors import BitNetError, FormatError, UnsupportedModelError
from bitnet.tokenizer import Tokenizer, checked, guarded
from bitnet.tokenizer.gguf_vocabulary import KEY, Fields, Vocabulary
from bitnet.tokenizer.scored_merges import SPACE, Encoded, ScoredMerges

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CL100K = (  # of OpenAI's cl100k_base; %s is how many digits make a word
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How `tokenizer.ggml.pre` cuts a text into words."""

    names: str
    patterns: tuple[str, ...]  # each cuts what the one before has left
    ignore_merges: bool = False  # a word that is a token is that token, reachable by merges or not
    add_bos: bool = False  # where the file does not say


PRE_TOKENIZERS = (
    PreTokenizer("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    PreTokenizer("gpt-2 gpt2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo trillion granite-docling", (_GPT2,)),
    PreTokenizer("smollm starcoder refact command-r codeshell exaone minerva-7b", (r"\p{N}", _GPT2)),
    PreTokenizer("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2", (_CL100K % "{1,3}",), True, True),
    PreTokenizer("dbrx smaug-bpe chatglm-bpe glm4", (_CL100K % "{1,3}",)),
    PreTokenizer("qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan solar-open kormo f2llmv2 grok-2", (_CL100K % "",)),
)


@dataclass(frozen=True)
class _Kind:
    encode: Callable[[str], Encoded]  # of text without special tokens
    bytes_of: Callable[[str], bytes]  # of a plain token
    add_bos: bool  # where the file does not say
    space_prefix: bool


def tokenizer_from_gguf(metadata: Mapping[str, Any], vocab_size: int, where: str, eos_ids: Iterable[int] = ()) -> Tokenizer:
    """The tokenizer that `metadata` (a GGUF file's, by key) describes, for a model of `vocab_size` tokens; `where` names the file.

    Its `eos_ids` are the given ones, the file's end of text, turn and message, and every token of `END_TEXTS` in the vocabulary. A BOS is
    put first if the file says so or its kind does; never an EOS at the end, because what is encoded here is to be continued.
    Raises `UnsupportedModelError` for other kinds of tokenizers, `FormatError` for metadata that contradicts itself or `vocab_size`.
    """

    def build() -> Tokenizer:
        fields = Fields(metadata, where)
        vocabulary = Vocabulary.read(fields, vocab_size)
        name = fields.string("model")
        if name == "gpt2":
            library, kind = _byte_level(fields, vocabulary)
        elif name == "llama":
            library, kind = _sentencepiece(fields, vocabulary)
        else:
            raise UnsupportedModelError(
                f"{where}: {KEY}model is {name[:80]!a}; supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece's BPE); "
                f"use a model with one of them, or its folder with a tokenizer.json"
            )
        library.add_special_tokens([_added(vocabulary.tokens[token]) for token in np.flatnonzero(vocabulary.control)])
        prefix = []
        if fields.boolean("add_bos_token", kind.add_bos):
            bos = fields.token("bos_token_id", len(vocabulary.tokens), 1 if name == "llama" else None)
            if bos is None:
                raise FormatError(f"{where}: a BOS is to be added, but {KEY}bos_token_id is missing; expected the id of a token")
            prefix = [bos]
        return GgufTokenizer(checked(library, vocab_size, where), vocab_size, {*eos_ids, *vocabulary.ends}, prefix, vocabulary, kind)

    return guarded(build, f"{where}: the tokenizer cannot be used", f"tokens, types and merges that belong together ({KEY}*)")


def ends_of_gguf(metadata: Mapping[str, Any], vocab_size: int, where: str) -> list[int]:
    """The ids that end a text, the one called eos first; of a file without a vocabulary, or with one of a kind that is not read here, those
    that it names: they hold with another tokenizer, too."""
    ids = [metadata.get(f"{KEY}{name}_token_id") for name in ("eos", "eot", "eom")]
    named = list(dict.fromkeys(token for token in ids if isinstance(token, int) and 0 <= token < vocab_size))
    if metadata.get(f"{KEY}model", "no_vocab") == "no_vocab":
        return named
    try:
        found = tokenizer_from_gguf(metadata, vocab_size, where).eos_ids
    except BitNetError:
        return named
    return sorted(found, key=lambda token: (token != ids[0], token))


class GgufTokenizer(Tokenizer):
    """A tokenizer that cuts texts at special tokens as llama.cpp does, and reads and writes what lies between by its `kind`.

    Decoding joins the tokens' bytes, so that a character may come from tokens of any sort.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        vocab_size: int,
        eos_ids: Iterable[int],
        prefix_ids: list[int],
        vocabulary: Vocabulary,
        kind: _Kind,
    ):
        super().__init__(library, vocab_size, eos_ids)
        self.prefix_ids = prefix_ids
        self._byte_ids = set()
        self._vocabulary, self._kind = vocabulary, kind
        self._pieces: dict[int, bytes] = {}  # of the tokens met so far
        special = [(vocabulary.tokens[token], int(token)) for token in np.flatnonzero(vocabulary.control | vocabulary.user_defined)]
        special.sort(key=lambda pair: -len(pair[0].encode("utf-8")))
        self._user_defined = [pair for pair in special if not vocabulary.control[pair[1]]]
        self._all_special = special

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text = b"".join([self._piece(token, skip_special) for token in ids]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._kind.space_prefix else text

    def _piece(self, token: int, skip_special: bool) -> bytes:
        if not 0 <= token < len(self._vocabulary.tokens) or (skip_special and self._vocabulary.control[token]):
            return b""
        piece = self._pieces.get(token)
        if piece is None:
            text = self._vocabulary.tokens[token]
            plain = not (self._vocabulary.control[token] or self._vocabulary.user_defined[token])
            piece = self._pieces[token] = self._kind.bytes_of(text) if plain else text.encode("utf-8")
        return piece

    def _encode(self, text: str, add_special: bool, parse_special: bool) -> Encoded:
        ids = [*self.prefix_ids] if add_special else []
        ends = [0] * len(ids)
        for start, end, token in self._fragments(text, self._all_special if parse_special else self._user_defined):
            if token is not None:
                ids.append(token)
                ends.append(end)
            else:
                found, found_ends = self._kind.encode(text[start:end])
                ids += found
                ends += [start + consumed for consumed in found_ends]
        return ids, ends

    @staticmethod
    def _fragments(text: str, special: list[tuple[str, int]]) -> list[tuple[int, int, int | None]]:
        """(start, end, token) of the pieces of `text`; token is None for plain text."""
        fragments: list[tuple[int, int, int | None]] = [(0, len(text), None)] if text else []
        for token_text, token in special:
            if token_text in text:
                fragments = [part for fragment in fragments for part in _cut(text, fragment, token_text, token)]
        return fragments


def _byte_level(fields: Fields, vocabulary: Vocabulary) -> tuple[tokenizers.Tokenizer, _Kind]:
    name = fields.string("pre", "default")
    found = next((kind for kind in PRE_TOKENIZERS if name in kind.names.split()), None)
    if found is None:
        known = " ".join(kind.names for kind in PRE_TOKENIZERS)
        raise UnsupportedModelError(
            f"{fields.where}: {KEY}pre is {name[:80]!a}, which cuts texts in a way not known here; supported: {known}"
        )
    model = models.BPE(vocab=vocabulary.ids, merges=_merges(fields), ignore_merges=found.ignore_merges)
    library = tokenizers.Tokenizer(model)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in found.patterns]
    library.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_of = _byte_of_character()

    def encode(text: str) -> Encoded:
        encoding = library.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def bytes_of(text: str) -> bytes:
        return b"".join([byte_of.get(character) or character.encode("utf-8") for character in text])

    return library, _Kind(encode, bytes_of, found.add_bos, False)


def _byte_of_character() -> dict[str, bytes]:
    """GPT-2's alphabet: printable bytes are their own Latin-1 characters, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): bytes([byte]) for byte in printable} | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


def _merges(fields: Fields) -> list[tuple[str, str]]:
    merges = []
    for text in dict.fromkeys(fields.strings("merges")):  # of a merge that is listed twice, the first place counts
        space = text.find(" ", 1)
        if space < 0:
            raise FormatError(f"{fields.where}: the merge {text[:40]!a} ({KEY}merges) has no space; expected two tokens with one between")
        merges.append((text[:space], text[space + 1 :]))
    return merges


def _sentencepiece(fields: Fields, vocabulary: Vocabulary) -> tuple[tokenizers.Tokenizer, _Kind]:
    scores = fields.numbers("scores", len(vocabulary.tokens), "fiu").astype(np.float32)
    if not np.isfinite(scores).all():
        wrong = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise FormatError(f"{fields.where}: token {wrong} has the score {scores[wrong]} ({KEY}scores); expected finite numbers")
    space_prefix = fields.boolean("add_space_prefix", True)
    merges = ScoredMerges(vocabulary, scores.tolist(), space_prefix, fields.where)
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary.ids, merges=[]))  # knows the tokens, and encodes nothing
    byte_of = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}

    def bytes_of(text: str) -> bytes:
        return byte_of.get(text) or text.replace(SPACE, " ").encode("utf-8")

    return library, _Kind(merges.encode, bytes_of, True, space_prefix)


def _added(text: str) -> AddedToken:
    return AddedToken(text, normalized=False, special=True)


def _cut(text: str, fragment: tuple[int, int, int | None], token_text: str, token: int) -> Iterator[tuple[int, int, int | None]]:
    """`fragment` of `text`, cut at every `token_text` in it, from the left."""
    start, end, known = fragment
    if known is not None:
        yield fragment
        return
    while (found := text.find(token_text, start, end)) >= 0:
        if found > start:
            yield start, found, None
        start = found + len(token_text)
        yield found, start, token
    if start < end:
        yield start, end, None
