"""Makes tokenizer_*.json.gz: small vocabularies of each kind that a GGUF file can hold, and llama.cpp's ids of 1,000 strings for each.

    python tests/golden/make_tokenizers.py BOOKS.txt     # any public-domain English text of some megabytes
    # needs tokenizers, sentencepiece, gguf, llama-cpp-python (0.3.36 made the files here); two minutes

tokenizer_strings.json.gz: the strings, in the order of `strings()`; bytes that are no UTF-8 are lone surrogates (surrogateescape).
tokenizer_KIND.json.gz: {"metadata": the tokenizer.ggml.* of the file, "ids": [1,000 lists], "parsed": [1,000 lists]}: neither has a BOS
added, "parsed" has special tokens parsed. The byte-level kinds were given the broken bytes themselves, the SentencePiece kinds U+FFFD for
each of them: llama.cpp spells such bytes out together with the sound characters after them, and this package reads U+FFFD.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from bitnet.tokenizer import replace_surrogates
from bitnet.tokenizer.gguf import PRE_TOKENIZERS

HERE = Path(__file__).parent
PROSE = [
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Größenwahn, Ärger & Öl: 5 €!",
    "Voix ambiguë d’un cœur qui, au zéphyr, préfère les jattes de kiwis. Où ça ? À l'école…",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío; ¿añoraba a su querido cachorro? ¡Sí!",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Москва — столица России.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Καλημέρα κόσμε!",
    "我能吞下玻璃而不伤身体。机器学习模型使用三值权重，内存减少了很多。",
    "いろはにほへと ちりぬるを。私はガラスを食べられます。カタカナとﾊﾝｶｸ、１２３。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "أنا قادر على أكل الزجاج و هذا لا يؤلمني. ١٢٣٤٥",
    "אני יכול לאכול זכוכית וזה לא מזיק לי.",
    "मैं काँच खा सकता हूँ और मुझे उससे कोई चोट नहीं पहुंचती। १२३",
    "ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ ๔๕๖",
    "Tôi có thể ăn thủy tinh mà không hại gì. Đường phố Hà Nội.",
    "Ég get etið gler án þess að meiða mig. Þórður æfði.",
    "Pchnąć w tę łódź jeża lub ośm skrzyń fig. Dość!",
    "Možete jesti staklo? Čćžšđ ǅ ǈ ǋ. İstanbul'da ışık, ĞÜŞÖÇ.",
]
CODE = [
    "def f(x: int) -> list[str]:\n    return [str(i) for i in range(x) if i % 2 == 0]\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i] * b[i];  // dot\n}\r\n",
    '{"key": [1, 2.5e-10, null, true], "s": "a\\n\\u00e9"}',
    "SELECT * FROM users WHERE id >= 1000 AND name LIKE '%o''Neil%';",
    '<div class="x"><p>Hello &amp; bye</p></div><!-- c -->',
    "$ ls -la | grep '^d' >> out.txt 2>&1 && echo ${HOME}/x",
    "\\begin{equation} \\sum_{i=1}^{n} x_i^2 \\end{equation}",
    "fn main() -> Result<(), Box<dyn Error>> { let x = &mut vec![0u8; 1_000]; Ok(()) }",
]
EMOJI = ["😀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "❤️", "✨", "🦊", "1️⃣", "☃", "🤷‍♀️", "🧑🏿‍🚀"]
SPACES = " \t\n\r\v\f\u00a0\u1680\u2003\u2009\u2028\u202f\u3000\ufeff\u200b\x85"
CONTRACTIONS = [
    "I'm", "you're", "he's", "we've", "they'll", "don't", "I'D", "WE'RE", "it'S", "'tis", "o'clock", "'LL", "''s", "'ſ", "d'être", "l'été",
    "rock'n'roll", "'Ve'rE",
]  # fmt: skip
SPECIAL = [
    "<|begin|>", "<|eot_id|>", "<s>", "</s>", "<unk>", "<tool>", "</tool>", "<|fim_prefix|>", "  ", "\n\n\n", "<0x41>", "<0xE2>", "<tool>x",
]  # fmt: skip


def strings(books: str) -> list[str]:
    """1,000 strings; lone surrogates stand for bytes that are no UTF-8."""
    pick = random.Random(1)
    found = [
        "", " ", "  ", "\n", "\n\n", " \n ", "a", " a", "a ", "\u2581", "\u2581a b", "a\u2581", "\x00", "\x00a\x7f", "\ufffd", "'", "''",
        "an unmergeable 文 word",
    ]  # fmt: skip
    found += [*PROSE, *CODE, *EMOJI, *CONTRACTIONS, *SPECIAL, " ".join(CONTRACTIONS), "".join(EMOJI), "".join(SPECIAL)]
    found += [character * count for character in " \n\ta=-0.é文" for count in (2, 3, 4, 5, 7, 8, 9, 16, 17, 33)]

    def snippet() -> str:
        start = pick.randrange(len(books) - 100)
        return books[start : start + pick.randrange(5, 60)]

    def unicode_noise() -> str:
        planes = [(0, 0x250), (0x250, 0x3000), (0x3000, 0xA000), (0xA000, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0x20, 0x7F)]
        return "".join(chr(pick.randrange(*pick.choice(planes))) for _ in range(pick.randrange(1, 20)))

    def broken() -> str:
        whole = pick.choice([*PROSE, *EMOJI, snippet()]).encode()
        start = pick.randrange(len(whole))
        data = bytearray(whole[start : start + pick.randrange(1, 30)])
        for _ in range(pick.randrange(0, 3)):
            data.insert(pick.randrange(len(data) + 1), pick.randrange(0x80, 0x100))
        return data.decode("utf-8", "surrogateescape")

    def prose() -> str:
        text = pick.choice(PROSE)
        start = pick.randrange(len(text))
        return text[start : start + pick.randrange(3, 40)]

    def code() -> str:
        text = pick.choice(CODE)
        start = pick.randrange(len(text))
        return text[start:] + pick.choice(CODE)[: pick.randrange(40)]

    def numbers() -> str:
        parts = ["".join(pick.choice("0123456789") for _ in range(pick.randrange(1, 14))) for _ in range(pick.randrange(1, 5))]
        return pick.choice(["", " ", "-", "$"]) + pick.choice([" ", ".", ",", "", " + ", "٣", "Ⅷ", "½", "²"]).join(parts)

    def whitespace() -> str:
        words = [pick.choice(["a", "the", "x1", ".", "é", "文", "", "'s", "!?"]) for _ in range(pick.randrange(1, 6))]
        return "".join(w + "".join(pick.choice(SPACES) for _ in range(pick.randrange(0, 5))) for w in words)

    def control() -> str:
        return "".join(pick.choice(["a", " ", "b", chr(pick.randrange(0x20)), chr(pick.randrange(0x7F, 0xA0))]) for _ in range(12))

    def special() -> str:
        return "".join(pick.choice([*SPECIAL, "a", " ", "the end", "<", "|>", "文"]) for _ in range(pick.randrange(1, 7)))

    def mixed() -> str:
        return "".join(pick.choice([snippet, prose, numbers, whitespace, lambda: pick.choice(EMOJI)])() for _ in range(3))

    def apostrophes() -> str:
        return pick.choice(["", " ", "\n", "4"]).join(pick.choice([*CONTRACTIONS, "'", "A", "’s", "_x"]) for _ in range(5))

    makers = [
        snippet, snippet, unicode_noise, unicode_noise, broken, prose, prose, code, numbers, whitespace, control, special, mixed,
        apostrophes,
    ]  # fmt: skip
    while len(found) < 1000:
        found.append(makers[len(found) % len(makers)]())
    return found[:1000]


def byte_level(pre: str, books: str) -> dict[str, Any]:
    """The metadata of a byte-level BPE trained with the words that `pre` makes."""
    kind = next(k for k in PRE_TOKENIZERS if pre in k.names.split())
    library = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.patterns]
    library.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=1800, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    library.train_from_iterator([books[:1_000_000], *(PROSE + CODE + CONTRACTIONS) * 12], trainer)
    model = json.loads(library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    if "19" not in tokens:  # a merge that the words of this kind never allow
        tokens.append("19")
        model["merges"].append(["1", "9"])
    added = ["<|begin|>", "<|eot_id|>", "<|fim_prefix|>", "<tool>", "</tool>", "  ", "\n\n\n", "[PAD0]", "[PAD1]"]
    types = [1] * len(tokens) + [3, 3, 4, 4, 4, 4, 4, 5, 5]
    metadata = {
        "model": "gpt2", "pre": pre, "tokens": tokens + added, "token_type": types,
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": len(tokens), "eos_token_id": len(tokens) + 1,
    }  # fmt: skip
    if kind.ignore_merges:  # words that no merges reach: the kind's own switch must find them
        metadata["tokens"][-2:] = ["Ġunmergeable", "Ġ文".replace("文", "æĸĩ")]
        metadata["token_type"][-2:] = [1, 1]
    if pre == "default":
        del metadata["pre"]  # a missing name means this kind
    return metadata


def scored(books: str, ties: bool) -> dict[str, Any]:
    """The metadata of a SentencePiece BPE with bytes. With `ties`, many tokens share a score, and no space is put first."""
    file = io.BytesIO()
    sentences = [line for line in books[:600_000].split("\n") if line] + (PROSE + CODE) * 12
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=file, model_type="bpe", vocab_size=1800, byte_fallback=True,
        character_coverage=0.998, user_defined_symbols=["<tool>", "</tool>", "▁▁", "\n\n\n"], control_symbols=["<|begin|>", "<|eot_id|>"],
        normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2, split_digits=True,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    count = model.get_piece_size()
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6)]
    types = [next((kind for test, kind in kinds if test(i)), 1) for i in range(count)]
    pieces = [model.id_to_piece(i) for i in range(count)]
    scores = [float(np.float32(model.get_score(i))) for i in range(count)]
    for token, text in enumerate(pieces):
        if text in ("<tool>", "</tool>", "▁▁", "\n\n\n"):
            types[token], pieces[token] = 4, text.replace("▁", " ")
    if ties:
        scores = [float(round(score / 40) * 40) for score in scores]
    metadata = {
        "model": "llama",
        "tokens": pieces,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return metadata | ({"add_space_prefix": False, "add_bos_token": False} if ties else {})


def write_gguf(path: Path, metadata: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in metadata.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def ask(metadata: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """llama.cpp's ids of `texts`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_gguf(path, metadata)
        model = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
        broken = metadata["model"] == "gpt2"
        data = [text.encode("utf-8", "surrogateescape") if broken else replace_surrogates(text).encode() for text in texts]
        return {
            "metadata": metadata,
            "ids": [model.tokenize(d, add_bos=False, special=False) for d in data],
            "parsed": [model.tokenize(d, add_bos=False, special=True) for d in data],
        }


def write(name: str, value: object) -> None:
    data = json.dumps(value, separators=(",", ":")).encode()
    (HERE / f"tokenizer_{name}.json.gz").write_bytes(gzip.compress(data, 9, mtime=0))


if __name__ == "__main__":
    books = Path(sys.argv[1]).read_text(encoding="utf-8")[:3_000_000]
    texts = strings(books)
    write("strings", texts)
    for pre in ("gpt-2", "llama-bpe", "qwen2", "default"):
        write(pre, ask(byte_level(pre, books), texts))
    write("llama", ask(scored(books, ties=False), texts))
    write("llama-ties", ask(scored(books, ties=True), texts))
