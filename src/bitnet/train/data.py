"""From files to training batches, in memory that does not grow with them.

A text file is UTF-8 whose documents are separated by a line `<|endoftext|>`; one without such lines is one document, or stories that begin
at their openings (`_OPENINGS`). A .jsonl file has a document in each line's "text"; a .npy file is packed tokens already, one-dimensional
uint16 or uint32. Texts are encoded once, document by document, into a file of tokens in the run's folder, and from there they are mapped.
Each document is preceded by the token that begins a text, and followed by the one that ends a text where that is another, so that a model
learns both to begin a document and to end one.
Windows are cut at random places, or, with probability `snap`, at the start of the document if it is near. Examples (examples.py), which
have a beginning and an end, are drawn whole, in an order that is shuffled anew for every pass over them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bitnet.errors import FormatError, UsageError
from bitnet.files.replacing import new_file, write_text

END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # target of a token that is not to be predicted, as torch's cross_entropy has it
TEXTS = (".txt", ".jsonl", ".npy")
PIECE_CHARACTERS = 1 << 20  # of a longer document, encoded at once: it is cut at a line's end, a longer line within
_BATCH_CHARACTERS = 1 << 22

# Some story collections lost their separators: a story then begins on the line right after another paragraph, without
# the empty line that parts paragraphs, and with one of the genre's openings. Their lines are whole paragraphs: in a text whose lines are
# broken at some width such a line may stand within a paragraph.
_BROKEN_AT = range(50, 101)  # characters of most lines, and hardly one is longer, where a text's lines are broken
_OPENINGS = ("Once upon a time", "Once there", "One day", "One sunny", "There once", "There was", "Once,", "In a ")


@dataclass
class Source:
    """One corpus file as tokens."""

    name: str
    tokens: NDArray[Any]  # uint16 or uint32 [tokens], mapped from a file
    starts: NDArray[np.int64]  # [documents], index of each document's first token
    text_bytes: int
    targets: NDArray[np.bool_] | None = None  # [tokens], of examples: whether this token is to be predicted
    sha256: str = ""  # of the tokens of a file


def documents(text: str) -> list[str]:
    """Split a corpus into its documents; a file of stories without separators is split at their openings."""
    found = [""]
    for piece, begins in _pieces(_lines(StringIO(text, newline="\n")), _marks(_lines(StringIO(text, newline="\n")))):
        if begins:
            found.append("")
        found[-1] += piece
    return [document.strip("\r\n") for document in found if document.strip()]


@contextmanager
def utf8(path: Path) -> Iterator[None]:
    """Turns what is no UTF-8 into one line about the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not UTF-8 text (it holds the byte {error.object[error.start]:#x}); save it as UTF-8") from None


def _lines(file: IO[str]) -> Iterator[str]:
    """The file's lines; of one longer than PIECE_CHARACTERS, parts."""
    while line := file.readline(PIECE_CHARACTERS):
        yield line


def _marks(lines: Iterable[str]) -> tuple[str, ...]:
    """What lines that begin a document begin with: the separator, if one line has it; openings, unless lines are broken; else nothing."""
    before, count, broken, longer = "\n", 0, 0, 0
    for line in lines:
        if before.endswith("\n") and line.startswith(END_OF_TEXT):
            return (END_OF_TEXT,)
        size = len(line.strip())
        count, broken, longer = count + (size > 0), broken + (size in _BROKEN_AT), longer + (size >= _BROKEN_AT.stop)
        before = line
    return () if 2 * broken > count and 10 * longer < count else _OPENINGS


def _pieces(lines: Iterable[str], marks: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """(a piece of a document, whether it begins one), in order. `marks`: what `_marks` found in the same lines."""
    held: list[str] = []
    size, begins, before = 0, True, "\n"
    separated = END_OF_TEXT in marks
    for line in lines:
        ends = line.startswith(marks) and before.endswith("\n") and (separated or before.strip("\r\n") != "")
        if ends or size > PIECE_CHARACTERS:
            if held:
                yield "".join(held), begins
                begins = False
            held, size, begins = [], 0, begins or ends
        line = line.removeprefix(END_OF_TEXT).lstrip("\r\n") if ends and separated else line
        held.append(line)
        size, before = size + len(line), line
    if held:
        yield "".join(held), begins


def _documents_of(path: Path) -> Iterator[tuple[str, bool]]:
    """The pieces of a file's documents, without the empty lines around a document."""
    with path.open(encoding="utf-8-sig", newline="\n") as file, utf8(path):
        if path.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _field(line, path, number), True
            return
        marks = _marks(_lines(file))
        file.seek(0)
        for piece, begins in _pieces(_lines(file), marks):
            text = piece.strip("\r\n") if len(piece) <= PIECE_CHARACTERS else piece
            if text:
                yield text, begins


def whole_documents(path: Path) -> Iterator[str]:
    """A file's documents, one at a time; very long ones in pieces."""
    for text, _ in _documents_of(path):
        yield text


def _field(line: str, path: Path, number: int) -> str:
    row = json_line(line, path, number)
    if not isinstance(row.get("text"), str):
        raise FormatError(f'{path}: line {number} has no "text"; expected {{"text": "..."}}, a document a line')
    return str(row["text"])


def json_line(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # an escape may be half of a character, which is no text
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: line {number} is no JSON ({error}); expected an object a line") from None
    if not isinstance(row, dict):
        raise FormatError(f"{path}: line {number} is {type(row).__name__}; expected an object")
    return row


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` tokens; id 0 is end-of-text, which also begins every encoded text."""
    tok = Tokenizer(models.BPE())
    digits_apart = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits_apart, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if tok.get_vocab_size() != vocab_size:
        raise UsageError(
            f"the text yields a vocabulary of {tok.get_vocab_size()} tokens, vocab_size is {vocab_size}; lower it, or add text"
        )
    tok.post_processor = processors.TemplateProcessing(f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
    return tok


def encode(name: str, text: str, tokenizer: Tokenizer) -> Source:
    """Encode every document of `text` in memory; each starts with the token that the tokenizer adds."""
    encoded = [np.array(e.ids, np.uint32) for e in tokenizer.encode_batch(documents(text))]
    starts = np.concatenate([[0], np.cumsum([len(e) for e in encoded])[:-1]])
    return Source(name, np.concatenate(encoded), starts.astype(np.int64), len(text.encode()))


def pack(path: Path, tokenizer: Tokenizer, begin: list[int], end: int | None, folder: Path) -> Source:
    """The file's tokens, mapped: encoded into `folder` unless that was done before. `begin`: ids that precede each document; `end`: the
    id that ends one, which follows it unless the next one's `begin` is the same."""
    if path.suffix == ".npy":
        return _packed(path, tokenizer.get_vocab_size(with_added_tokens=True))

    closing = [] if end is None or begin[-1:] == [end] else [end]

    def encoded() -> Iterator[tuple[list[int], None, bool]]:
        opened = False
        for ids, begins in pieces():
            if begins and opened:
                yield closing, None, False
            yield ids, None, begins
            opened = True
        if opened:
            yield closing, None, False

    def pieces() -> Iterator[tuple[list[int], bool]]:
        batch: list[tuple[str, bool]] = []
        size = 0
        for text, begins in _documents_of(path):
            batch.append((text, begins))
            size += len(text)
            if size > _BATCH_CHARACTERS:
                yield from _encoded(batch, tokenizer, begin)
                batch, size = [], 0
        yield from _encoded(batch, tokenizer, begin)

    return store(path, encoded, tokenizer, folder, f"text {begin} {closing}")


def _encoded(batch: list[tuple[str, bool]], tokenizer: Tokenizer, begin: list[int]) -> Iterator[tuple[list[int], bool]]:
    for encoding, (_, begins) in zip(tokenizer.encode_batch([t for t, _ in batch], add_special_tokens=False), batch, strict=True):
        yield (begin + encoding.ids if begins else encoding.ids), begins


def _packed(path: Path, vocab_size: int) -> Source:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FormatError(f"{path}: is no array of numpy ({error}); expected one-dimensional uint16 or uint32 tokens") from None
    if not isinstance(tokens, np.ndarray):
        raise FormatError(f"{path}: is an archive of arrays (.npz); expected one array of uint16 or uint32 tokens, by numpy.save")
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32) or not len(tokens):
        raise FormatError(f"{path}: has {tokens.dtype} {list(tokens.shape)}; expected one-dimensional uint16 or uint32 tokens")
    most, digest = 0, hashlib.sha256()
    for at in range(0, len(tokens), 1 << 24):
        most = max(most, int(tokens[at : at + (1 << 24)].max()))
        digest.update(tokens[at : at + (1 << 24)].tobytes())
    if most >= vocab_size:
        raise FormatError(f"{path}: holds token {most}; the vocabulary has {vocab_size}: it was packed with another tokenizer")
    return Source(path.name, tokens, np.zeros(1, np.int64), 0, None, digest.hexdigest())


def store(path: Path, rows: Any, tokenizer: Tokenizer, folder: Path, kind: str) -> Source:
    """Write what `rows()` gives, (ids, which of them are targets or None, whether they begin something), to files, and map them.

    What stands in `folder` already is taken if it is whole and was made of this very file by this tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    at, stat = folder / path.name, path.stat()
    wide = tokenizer.get_vocab_size(with_added_tokens=True) > 1 << 16
    made_of = {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, "kind": kind, "tokenizer": _fingerprint(tokenizer), "wide": wide}
    meta, dtype = Path(f"{at}.json"), np.dtype("<u4" if wide else "<u2")
    found = _stored(at, made_of)
    if found is None:
        starts: list[int] = []
        masked, count, digest = False, 0, hashlib.sha256()
        with new_file(f"{at}.tokens") as tokens, new_file(f"{at}.targets") as targets, new_file(f"{at}.starts") as index:
            for ids, wanted, begins in rows():
                if begins:
                    starts.append(count)
                content = np.asarray(ids, dtype).tobytes()
                tokens.write(content)
                digest.update(content)
                if wanted is not None:
                    masked = True
                    targets.write(np.asarray(wanted, np.bool_).tobytes())
                count += len(ids)
                if len(starts) > 1 << 20:
                    _write(index, starts)
                    starts = []
            _write(index, starts)
        if not count:
            raise FormatError(f"{path}: holds no text")
        sizes = {part: Path(f"{at}.{part}").stat().st_size for part in ("tokens", "targets", "starts")}
        found = {"made_of": made_of, "masked": masked, "sizes": sizes, "sha256": digest.hexdigest()}
        write_text(meta, json.dumps(found) + "\n")
    every = np.memmap(f"{at}.tokens", dtype, "r")
    asked = np.memmap(f"{at}.targets", np.bool_, "r") if found["masked"] else None
    return Source(path.name, every, np.memmap(f"{at}.starts", "<i8", "r"), stat.st_size, asked, found["sha256"])


def _stored(at: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of the files at `at`; None where they are not whole, or of another origin."""
    try:
        found: dict[str, Any] = json.loads(Path(f"{at}.json").read_text())
        whole = all(Path(f"{at}.{part}").stat().st_size == size for part, size in found["sizes"].items())
        return found if whole and found["made_of"] == made_of and found["sha256"] and "masked" in found else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # not there, or damaged
        return None


def _write(file: IO[bytes], starts: list[int]) -> None:
    file.write(np.asarray(starts, "<i8").tobytes())


def _fingerprint(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def check_length(source: Source, length: int) -> None:
    """Raises `UsageError` where no window of `length` tokens can be drawn."""
    if len(source.tokens) <= length:
        raise UsageError(f"{source.name}: has {len(source.tokens)} tokens; a window takes {length}: lower the context, or add text")


def sample_windows(
    sources: list[Source], weights: NDArray[np.float64], batch: int, length: int, snap: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """int64 [batch, length] windows; source i is drawn with probability weights[i]."""
    out = np.empty((batch, length), np.int64)
    for row, which in enumerate(rng.choice(len(sources), size=batch, p=weights)):
        source = sources[which]
        check_length(source, length)
        at = int(rng.integers(0, len(source.tokens) - length))
        if rng.random() < snap:
            start = int(source.starts[np.searchsorted(source.starts, at, side="right") - 1])
            if at - start < 2 * length:  # a book's beginning is not worth more than its middle
                at = min(start, len(source.tokens) - length)
        out[row] = source.tokens[at : at + length]
    return out


def sample_examples(source: Source, batch: int, step: int, context: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(tokens, targets), int64 [batch, longest]: examples `step * batch` and on of the passes over all of them, each in its own order.

    Cut at `context` tokens and padded with IGNORED targets; no longer than the longest, rounded up to 32.
    """
    count, rows = len(source.starts), []
    ends = source.starts
    order: tuple[int, NDArray[np.int64]] | None = None
    for number in range(step * batch, (step + 1) * batch):
        if order is None or order[0] != number // count:
            order = number // count, np.random.default_rng((seed, number // count)).permutation(count)
        which = int(order[1][number % count])
        end = int(ends[which + 1]) if which + 1 < count else len(source.tokens)
        rows.append(slice(int(ends[which]), min(end, int(ends[which]) + context + 1)))
    longest = -(-max(row.stop - row.start - 1 for row in rows) // 32) * 32
    tokens, targets = np.zeros((batch, longest), np.int64), np.full((batch, longest), IGNORED, np.int64)
    for i, row in enumerate(rows):
        ids = source.tokens[row].astype(np.int64)
        tokens[i, : len(ids) - 1] = ids[:-1]
        asked = np.ones(len(ids), np.bool_) if source.targets is None else source.targets[row]
        targets[i, : len(ids) - 1] = np.where(asked[1:], ids[1:], IGNORED)
    return tokens, targets


def files_of(data: Path, names: Iterable[str] | None, suffixes: tuple[str, ...] = TEXTS) -> list[Path]:
    """The files that `names` calls for in the folder `data`, or, without names, `data` itself or all files in it with these suffixes."""
    if names:
        folder = data if data.is_dir() else data.parent
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise UsageError(f"{data}: the recipe's text files are not there: {', '.join(missing)}")
        return [folder / n for n in names]
    if data.is_file():
        return [data]
    found = sorted(p for p in data.iterdir() if p.suffix in suffixes and p.is_file()) if data.is_dir() else []
    if not found:
        raise UsageError(f"{data}: no file or folder with {', '.join(suffixes)} files; name what to train on with --data")
    return found


def read_sources(folder: Path, names: list[str]) -> dict[str, str]:
    """The texts of the recipe's files; a missing one is an error that names it."""
    return {path.name: path.read_text(encoding="utf-8") for path in files_of(folder, names)}
