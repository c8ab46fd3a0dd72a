"""Tokenizers from tokenizer.json to GGUF's metadata and back, proved on texts.

Neither format says all that the other does, so what was made is tried: it is written only if it gives the same ids as the source on
texts of many kinds and on the vocabulary's own tokens.

- Byte-level BPE: GGUF has a name for the expressions that cut a text into words; of the known ones that is taken which gives the same ids.
- SentencePiece's BPE: GGUF has a score for each token, tokenizer.json a list of merges. A token's score is the place of its first merge;
  and merges are all the ways to put a token together from two, those of higher scores first.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from bitnet.errors import UnsupportedModelError
from bitnet.files import shown
from bitnet.models import Checkpoint
from bitnet.tokenizer import Tokenizer, eos_token_ids
from bitnet.tokenizer.gguf import PRE_TOKENIZERS, ends_of_gguf, tokenizer_from_gguf
from bitnet.tokenizer.gguf_vocabulary import BYTE, CONTROL, CONTROL_TEXTS, KEY, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from bitnet.tokenizer.scored_merges import SPACE

TEXTS = (
    "Once upon a time, there wasn't a fox in 1999; he'd 3,141 friends & 27 foes!", "a", " a", "  a", "\n", "\n\n  x\n",
    "\t\tif x == 0:\n\t\t\treturn", "I'm we're YOU'LL they've it'S", "1 12 123 1234 12345 1234567890", "x1y22z333",
    "...!?!? --> <= >= == ~~ ^^ || $$ ++", "(a)[b]{c}<d>'e'\"f\"", "Grüße aus Köln, naïve café, señor Œuvre", "Привет, как дела? Ещё раз.",
    "日本語のテキスト、そして漢字。", "한국어 문장입니다", "العربية و עברית", "हिन्दी में १२३४", "و ١٢٣٤٥", "１２３ ๔๕๖ ⅣⅤ ①②",
    "“quoted” — dashes – and… ¿qué? ¡sí! 5 € £3 §7 ©®™", "ħello ŋ ɐ ʃ ᵃ ʰ", "ǅ ǈ ǋ ªº", "😀 emoji 👩‍👩‍👧‍👦 🇩🇪",
    "a\u00a0b\u2003c\u200bd", "http://example.org/a_b?c=d&e=f#g", "snake_case CamelCase kebab-case", "x²+y³=½",
    "tabs\tand\r\nlines\r\n\r\n end ",
    "   leading and trailing   ", "AAAaaa", "don't DON'T Don'T", "\u2581already\u2581there", "100%", "#1 @you",
)  # fmt: skip
SAMPLED = 2000  # tokens of the vocabulary that are tried as texts
MIXED = 2000  # texts put together at random of what expressions tell apart
MOST_DIFFERENT = 0.005  # of all those
HUGGING_FACE = "tokenizer.huggingface.json"  # GGUF's key for the text of a tokenizer.json
_PARTS = (
    *"abzABZéßñÑħǅʰªжЖش日한अกिּ0123456789٣३５²½Ⅳ'’.,;:!?()[]{}<>=+^~|$€-_/\\@#%&*\"", "'s", "'S", "'t", "'ll", "'LL", "'re", "'ve", "'m",
    "'d", " ", " ", " ", " ", "  ", "\n", "\r\n", "\n\n", "\t", "\u00a0", "\u3000", "\u2581", "\u200d", "😀", "the", "ing", "12", "1999",
)  # fmt: skip


def to_gguf(source: Tokenizer, raw: bytes, settings: Mapping[str, Any], ends: list[int], where: str) -> tuple[dict[str, Any], str | None]:
    """(the keys of a tokenizer.json (`raw`, read as `source`) for a model of source.vocab_size tokens, what to know of them or None).

    settings: tokenizer_config.json; ends: the ids that end a text, the most usual first. Where GGUF's nearest kind gives
    other ids on a few odd texts, tokenizer.json itself is among the keys. Raises UnsupportedModelError where no kind comes near.
    """
    described = json.loads(raw)
    model = described.get("model", {})
    kind = model.get("type", "BPE" if "merges" in model else None)  # which older files leave out
    if kind != "BPE":
        raise UnsupportedModelError(f"{where}: the tokenizer is {shown(kind)}; to GGUF this build converts BPE only")
    added = {token["id"]: token for token in described.get("added_tokens", [])}
    texts = {number: text for text, number in model["vocab"].items()} | {number: token["content"] for number, token in added.items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(source.vocab_size)]
    fallback = bool(model.get("byte_fallback"))
    types = np.full(len(tokens), NORMAL, np.int32)
    for i, text in enumerate(tokens):
        if i in added:
            types[i] = CONTROL if added[i].get("special") else USER_DEFINED
        elif i not in texts:
            types[i] = UNUSED
        elif fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[i] = BYTE
    unknown = model.get("unk_token")
    if unknown in texts.values():
        types[tokens.index(unknown)] = UNKNOWN
    found: dict[str, Any] = {f"{KEY}tokens": tokens, f"{KEY}token_type": types}
    found |= _special_ids(source, tokens, settings, ends, unknown)
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges", [])]
    if fallback:
        candidates = [
            {f"{KEY}model": "llama", f"{KEY}pre": "default", f"{KEY}scores": _scores(tokens, pairs), f"{KEY}add_space_prefix": p}
            for p in (True, False)
        ]
    else:
        merges = {f"{KEY}model": "gpt2", f"{KEY}merges": [" ".join(pair) for pair in pairs]}
        ignoring = bool(model.get("ignore_merges"))
        kinds = sorted(PRE_TOKENIZERS, key=lambda kind: (kind.ignore_merges != ignoring, kind.names == "default"))
        candidates = [merges | {f"{KEY}pre": kind.names.split()[0]} for kind in kinds]
    texts_tried, best = _texts(source), None
    for candidate in candidates:
        keys = candidate | found
        made = tokenizer_from_gguf(keys, source.vocab_size, where)
        if lost := sorted(set(ends) - made.eos_ids):
            raise UnsupportedModelError(
                f"{where}: {len(ends)} ids end a text, and GGUF names three: {lost} would not; keep the Hugging Face layout"
            )
        different = _differences(source, made, texts_tried)
        if best is None or len(different) < len(best[1]):
            best = keys, different
        if not different:
            return keys, None
    assert best is not None
    keys, different = best
    if len(different) > MOST_DIFFERENT * len(texts_tried) or set(different) & set(TEXTS):
        raise UnsupportedModelError(
            f"{where}: none of GGUF's kinds of tokenizers gives the ids that this tokenizer.json gives (the first differs on"
            f" {different[0]!a}); keep the Hugging Face layout, or name another file with --tokenizer"
        )
    return keys | {HUGGING_FACE: raw.decode()}, (
        f"GGUF's nearest kind of tokenizer ({keys[f'{KEY}pre']}) gives other ids than tokenizer.json on {len(different)} of "
        f"{len(texts_tried)} texts (the first: {different[0]!a}); this program goes by tokenizer.json, which is in the file"
    )


def _special_ids(source: Tokenizer, tokens: list[str], settings: Mapping[str, Any], ends: list[int], unknown: Any) -> dict[str, Any]:
    if len(source.prefix_ids) > 1:
        raise UnsupportedModelError(f"the tokenizer puts {len(source.prefix_ids)} tokens before a text; GGUF has a place for one")

    def named(key: str) -> int | None:
        token = settings.get(f"{key}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        return tokens.index(text) if isinstance(text, str) and text in tokens else None

    bos = source.prefix_ids[0] if source.prefix_ids else named("bos")
    ids = {"bos": bos, "padding": named("pad"), "unknown": tokens.index(unknown) if unknown in tokens else None}
    eos = [*dict.fromkeys([*([named("eos")] if named("eos") in ends else []), *ends])]
    ids |= dict(zip(("eos", "eot", "eom"), eos, strict=False))
    found: dict[str, Any] = {f"{KEY}{name}_token_id": token for name, token in ids.items() if token is not None}
    return found | {f"{KEY}add_bos_token": bool(source.prefix_ids)}


def _scores(tokens: list[str], pairs: list[tuple[str, ...]]) -> Any:
    """float32 [tokens]: minus the place of the first merge that gives the token; single characters are never joined to."""
    place: dict[str, int] = {}
    for at, pair in enumerate(pairs):
        place.setdefault("".join(pair), at)
    return np.array([-float(place.get(text, 0 if len(text) < 2 else len(pairs))) for text in tokens], np.float32)


def to_json(metadata: Mapping[str, Any], vocab_size: int, where: str) -> tuple[bytes, Tokenizer]:
    """(tokenizer.json, the tokenizer that it is made from) of a GGUF's metadata. Raises UnsupportedModelError where ids would differ."""
    source = tokenizer_from_gguf(metadata, vocab_size, where)
    if isinstance(text := metadata.get(HUGGING_FACE), str):
        return text.encode(), source
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(metadata[f"{KEY}tokens"])]
    ids = {text: i for i, text in enumerate(tokens)}
    types = metadata.get(f"{KEY}token_type", np.full(len(tokens), NORMAL))
    if metadata[f"{KEY}model"] == "gpt2":
        kind = next(k for k in PRE_TOKENIZERS if metadata.get(f"{KEY}pre", "default") in k.names.split())
        merges = [(text[: (at := text.find(" ", 1))], text[at + 1 :]) for text in dict.fromkeys(metadata[f"{KEY}merges"])]
        library = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=kind.ignore_merges))
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.patterns]
        library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        library.decoder = decoders.ByteLevel()
    else:
        library = _sentencepiece(metadata, tokens, ids, types)
    special = set(source.special_tokens)  # with those that are so by their text, whatever the file says
    user = (tokens[i] for i in range(len(tokens)) if types[i] == USER_DEFINED)
    library.add_tokens([AddedToken(text, normalized=False) for text in user if text not in special])
    library.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in tokens if text in special])
    if source.prefix_ids:
        bos = tokens[source.prefix_ids[0]]
        library.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, source.prefix_ids[0])]
        )
    raw = library.to_str().encode()
    different = _differences(source, Tokenizer.from_json(raw, vocab_size), _texts(source))
    if different:
        raise UnsupportedModelError(
            f"{where}: a tokenizer.json made of this file's vocabulary would give other ids ({different[0]!a}); name one: --tokenizer"
        )
    return raw, source


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], ids: dict[str, int], types: Any) -> tokenizers.Tokenizer:
    scores = np.asarray(metadata[f"{KEY}scores"], np.float64)
    ways = []
    for i, text in enumerate(tokens):
        if types[i] in (NORMAL, USER_DEFINED, UNUSED):
            halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
            ways += [(-scores[i], ids[left], ids[right], (left, right)) for left, right in halves if left in ids and right in ids]
    ways.sort(key=lambda way: way[:3])
    unknown = next((tokens[i] for i in range(len(tokens)) if types[i] == UNKNOWN), None)
    library = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=[way[3] for way in ways], byte_fallback=True, fuse_unk=True, unk_token=unknown)
    )
    prefix = bool(metadata.get(f"{KEY}add_space_prefix", True))
    library.normalizer = normalizers.Sequence([*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return library


def _texts(source: Tokenizer) -> list[str]:
    """What is tried: texts of many kinds, and an even sample of the vocabulary.

    Without tokens that GGUF makes control tokens by their text, and without decomposed characters: tokenizer.json may compose them first,
    and llama.cpp does not.
    """
    step = max(1, len(source) // SAMPLED)
    sample = (source.decode([i]) for i in range(0, len(source), step))
    rng = random.Random(0)
    mixed = ("".join(rng.choices(_PARTS, k=rng.randint(2, 16))) for _ in range(MIXED))
    mixed = (text for text in mixed if unicodedata.is_normalized("NFC", text))
    return [*TEXTS, *mixed, *(text for text in sample if text and "\ufffd" not in text and text not in CONTROL_TEXTS)]


def _differences(one: Tokenizer, other: Tokenizer, texts: list[str]) -> list[str]:
    """The texts that the two read differently."""
    if one.prefix_ids != other.prefix_ids:
        return texts
    return [text for text in texts if one.encode(text, add_special=False) != other.encode(text, add_special=False)]


def read(data: bytes, vocab_size: int, config: dict[str, Any], generation: dict[str, Any]) -> tuple[Tokenizer, list[int]]:
    """(a tokenizer.json, the ids that end a text, in the order in which the model names them)."""
    found: Any = next((c["eos_token_id"] for c in (generation, config) if c.get("eos_token_id") is not None), [])
    ends = eos_token_ids(config, generation, vocab_size)
    named = found if isinstance(found, list) else [found]
    return Tokenizer.from_json(data, vocab_size, ends), [token for token in named if token in ends]


def ends_of(checkpoint: Checkpoint, vocab_size: int) -> list[int]:
    """The ids that end a text, the one called eos first where a GGUF names it."""
    if checkpoint.gguf_metadata:
        return ends_of_gguf(checkpoint.gguf_metadata, vocab_size, str(checkpoint.path))
    return sorted(eos_token_ids(checkpoint.config, checkpoint.generation_config, vocab_size))
