"""SentencePiece's BPE, whose merges are ordered by scores and then by place: what the tokenizers library's lists of merges cannot say."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from bitnet.errors import FormatError
from bitnet.tokenizer.gguf_vocabulary import Vocabulary

SPACE = "\u2581"  # LOWER ONE EIGHTH BLOCK, SentencePiece's visible space

Encoded = tuple[list[int], list[int]]  # ids, and for each the number of characters consumed up to its end


class ScoredMerges:
    """SentencePiece's BPE over characters: of all neighbours that together are a token, join those with the highest score first.

    A text can be cut in two wherever its two characters stand side by side in no token, because then no join reaches across. The short
    pieces that this gives (words, mostly) are encoded once and remembered.
    """

    _TABLE_BITS = 22
    _MEMORY_PIECES = 1 << 16
    _MEMORY_CHARACTERS = 32

    def __init__(self, vocabulary: Vocabulary, scores: list[float], space_prefix: bool, where: str):
        self._space_prefix = space_prefix
        tokens = vocabulary.tokens
        self._ids = {tokens[token]: int(token) for token in np.flatnonzero(vocabulary.mergeable)}
        self._costs = [-score for score in scores]
        self._bytes = [vocabulary.ids.get(f"<0x{byte:02X}>", vocabulary.unknown) for byte in range(256)]
        if None in self._bytes:
            raise FormatError(f"{where}: neither the 256 tokens <0x00> to <0xFF> nor an unknown token; expected one or the other")
        self._joined = np.zeros(1 << self._TABLE_BITS, dtype=bool)  # by _pairs(): whether some token may hold this pair of characters
        self._fill_joined(list(self._ids))
        self._remembered: dict[str, Encoded] = {}

    def encode(self, text: str) -> Encoded:
        prefix = 1 if self._space_prefix else 0
        text = SPACE * prefix + text.replace(" ", SPACE)
        cuts = np.flatnonzero(~self._joined[self._pairs(text)]) + 1
        ids: list[int] = []
        ends: list[int] = []
        start = 0
        for cut in [*cuts.tolist(), len(text)]:
            found, found_ends = self._encode_piece(text[start:cut])
            ids += found
            ends += [start - prefix + end for end in found_ends]
            start = cut
        return ids, [max(end, 0) for end in ends]

    def _encode_piece(self, piece: str) -> Encoded:
        encoded = self._remembered.get(piece)
        if encoded is None:
            encoded = self._merge(piece)
            if len(piece) <= self._MEMORY_CHARACTERS:
                if len(self._remembered) >= self._MEMORY_PIECES:
                    self._remembered = {}
                self._remembered[piece] = encoded
        return encoded

    def _merge(self, text: str) -> Encoded:
        """Joins in order of (score, place) with a heap; a symbol is named by its first character."""
        ids, costs, size = self._ids, self._costs, len(text)
        end = list(range(1, size + 1))  # of the symbol, which is also where the next begins; 0 if it has become part of another
        previous = list(range(-1, size - 1))  # the symbol before
        heap = [(costs[ids[text[i : i + 2]]], i, i + 2) for i in range(size - 1) if text[i : i + 2] in ids]
        heapify(heap)
        while heap:
            _, left, stop = heappop(heap)
            middle = end[left]
            if not middle or middle == size or end[middle] != stop:
                continue  # one of the two has been joined to something else since
            end[left], end[middle] = stop, 0
            if stop < size:
                previous[stop] = left
                token = ids.get(text[left : end[stop]])
                if token is not None:
                    heappush(heap, (costs[token], left, end[stop]))
            if left > 0:
                token = ids.get(text[previous[left] : stop])
                if token is not None:
                    heappush(heap, (costs[token], previous[left], stop))
        found: list[int] = []
        ends: list[int] = []
        start = 0
        while start < size:
            stop = end[start]
            token = ids.get(text[start:stop])
            spelled = [token] if token is not None else self._spell(text[start:stop])
            found += spelled
            ends += [stop] * len(spelled)
            start = stop
        return found, ends

    def _spell(self, character: str) -> list[int]:
        return [token for byte in character.encode("utf-8") if (token := self._bytes[byte]) is not None]

    @classmethod
    def _pairs(cls, text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """uint32 [len(text) - 1]: a hash of each two neighbouring characters. Pairs that share one only make a piece longer."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        return (codes[:-1] * np.uint32(0x9E3779B1) + codes[1:] * np.uint32(0x85EBCA6B)) >> np.uint32(32 - cls._TABLE_BITS)

    def _fill_joined(self, tokens: list[str]) -> None:
        many = 4096  # at a time, to bound the memory that this takes
        for start in range(0, len(tokens), many):
            texts = tokens[start : start + many]
            inner = np.ones(sum(map(len, texts)), dtype=bool)
            inner[np.cumsum([len(text) for text in texts]) - 1] = False  # the last of one and the first of the next
            self._joined[self._pairs("".join(texts))[inner[:-1]]] = True
