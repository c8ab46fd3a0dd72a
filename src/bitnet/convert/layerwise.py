"""A model over calibration text, one layer at a time: what a layer's weights become is chosen when its inputs are known.

A stage is a run of linear layers with the same inputs X [tokens, in]: q, k and v; o; gate and up; down; the head. For each the gram
X^T X / tokens is summed over the text, its layers are chosen, and the text goes on through what was chosen: so a layer is fitted to the
inputs that it will meet, those that the quantized layers before it leave (as GPTQ does, arXiv:2210.17323). In memory are the hidden states
of the text, one layer and one gram. Plain numpy in float32, after the graph of native/forward.cpp; keys and values stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.convert.source import F32, Model, Weight
from bitnet.errors import BitNetError, UsageError

Product = Callable[[F32, F32], F32]  # x [tokens, in], w [out, in] -> x w^T, float32 [tokens, out]
Rule = Callable[[Weight, F32], Weight]  # a layer as it is and its gram, float32 [in, in] -> the layer as it shall be
STAGES = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
_TOKENS = 2048  # of the text worked on at once, in whole sequences
_SMALLEST = 2  # tokens of a sequence


def plain_product(x: F32, w: F32) -> F32:
    """In float32, by numpy."""
    return np.asarray(x @ w.T, np.float32)


def sequences(ids: list[int], prefix: list[int], count: int, length: int, context: int) -> NDArray[np.int32]:
    """A text's tokens as int32 [sequences, tokens]: the first `count` runs of `length` tokens, each after `prefix` (BOS).

    A text of fewer tokens gives one shorter sequence. Raises UsageError for one of fewer than two tokens.
    """
    width = min(length, context) - len(prefix)
    if len(ids) < _SMALLEST or width < 1:
        raise UsageError(f"the calibration text has {len(ids)} tokens; expected at least {_SMALLEST}, {count * length:,} are better")
    width = min(width, len(ids))
    runs = [prefix + ids[at : at + width] for at in range(0, len(ids) - width + 1, width)]
    return np.array(runs[:count], np.int32)


def walk(
    model: Model, embedding: Weight, text: NDArray[np.int32], rule: Rule, product: Product = plain_product,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> F32:  # fmt: skip
    """Gives every linear layer to `rule`, in the model's order, with the gram of the inputs that it meets; an untied head, too.

    embedding: as it shall be; text: int32 [sequences, tokens]. Returns what the head is given, float32 [sequences, tokens, hidden].
    """
    c = model.config
    hidden = _looked_up(embedding, text) * np.float32(c.embedding_scale)
    for i in range(c.n_layers):
        _layer(_Layer(model, i, text.shape[1], product), hidden, rule)
        progress(i + 1, c.n_layers)
    norm = _vector(model.weights["final_norm"])
    for part in _parts(hidden):
        part[:] = _rms(part, norm, c.norm_eps)
    if not c.tied:
        rule(model.weights["head"], _gram(_parts(hidden), c.hidden_size, product))
    return hidden


def _layer(layer: _Layer, hidden: F32, rule: Rule) -> None:
    """`hidden` [sequences, tokens, hidden] through one layer, in place."""
    c = layer.config

    def choose(kinds: tuple[str, ...], inputs: Iterable[F32], size: int) -> None:
        gram = _gram(inputs, size, layer.product)
        for kind in kinds:
            chosen = rule(layer.stored(kind), gram)
            layer.dense[kind] = chosen.values(0, chosen.shape[0])

    attended = np.empty((*hidden.shape[:2], c.n_heads * c.head_dim), np.float32)
    choose(STAGES[0], (layer.normed(part, "attn_norm") for part in _parts(hidden)), c.hidden_size)
    for part, out in zip(_parts(hidden), _parts(attended), strict=True):
        out[:] = layer.attended(layer.normed(part, "attn_norm"))
    choose(STAGES[1], _parts(attended), attended.shape[2])
    for part, inputs in zip(_parts(hidden), _parts(attended), strict=True):
        part += layer.into_stream("o", inputs, "post_attn_norm")
    del attended
    choose(STAGES[2], (layer.normed(part, "ffn_norm") for part in _parts(hidden)), c.hidden_size)
    choose(STAGES[3], (layer.gated(layer.normed(part, "ffn_norm")) for part in _parts(hidden)), c.ffn_size)
    for part in _parts(hidden):  # gated again: to keep it would take more memory than all else
        part += layer.into_stream("down", layer.gated(layer.normed(part, "ffn_norm")), "post_ffn_norm")


class _Layer:
    """One layer's weights and what it computes; parts are [sequences, tokens, features]."""

    def __init__(self, model: Model, i: int, tokens: int, product: Product) -> None:
        self.config, self.product, self.model, self.i = model.config, product, model, i
        self.dense: dict[str, F32] = {}  # of the linear layers that are chosen, [out, in]
        c = model.config
        windowed = bool(c.windowed) and c.windowed[i]
        rope = (c.rope_local or c.rope) if windowed else c.rope
        angles = np.arange(tokens, dtype=np.float32)[:, None] * rope.frequencies(c.head_dim)
        self.cos, self.sin = (np.asarray(f(angles) * np.float32(rope.attention_factor), np.float32) for f in (np.cos, np.sin))
        behind = np.arange(tokens)[:, None] - np.arange(tokens)  # a key's positions before the query
        self.hidden_from = (behind < 0) | (behind >= c.sliding_window) if windowed else behind < 0

    def stored(self, kind: str) -> Weight:
        return self.model.weights[f"layers.{self.i}.{kind}"]

    def has(self, kind: str) -> bool:
        return f"layers.{self.i}.{kind}" in self.model.weights

    def normed(self, x: F32, kind: str) -> F32:
        """By the norm of this name, or as it is where the model has none of it."""
        return _rms(x, _vector(self.stored(kind)), self.config.norm_eps) if self.has(kind) else x

    def linear(self, kind: str, x: F32) -> F32:
        w = self.dense[kind]
        y = self.product(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], len(w))
        return y + _vector(self.stored(f"{kind}_bias")) if self.has(f"{kind}_bias") else y

    def into_stream(self, kind: str, x: F32, norm: str) -> F32:
        return self.normed(self.linear(kind, x), norm)

    def attended(self, x: F32) -> F32:
        """What o_proj is given."""
        c = self.config
        q, k, v = (self.linear(kind, x).reshape(*x.shape[:2], -1, c.head_dim) for kind in "qkv")
        q, k = self.turned(self.normed(q, "q_norm")), self.turned(self.normed(k, "k_norm"))
        out = np.empty(q.shape, np.float32)
        share = c.n_heads // c.n_kv_heads  # query heads of a key head
        for n in range(len(x)):  # a sequence at a time: its scores are [heads, tokens, tokens]
            for head in range(c.n_kv_heads):
                mine = slice(head * share, (head + 1) * share)
                scores = q[n, :, mine].swapaxes(0, 1) @ (k[n, :, head].T * np.float32(c.attention_scale))
                scores[:, self.hidden_from] = -np.inf
                scores -= scores.max(axis=-1, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(axis=-1, keepdims=True)
                out[n, :, mine] = (scores @ v[n, :, head]).swapaxes(0, 1)
        return self.normed(out.reshape(*x.shape[:2], -1), "attn_sub_norm")

    def turned(self, x: F32) -> F32:
        """Rope over pairs that are half a head apart; x [sequences, tokens, heads, head_dim]."""
        first, second = np.split(x, 2, axis=-1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def gated(self, x: F32) -> F32:
        """What down_proj is given."""
        gate = _ACTIVATIONS[self.config.activation](self.linear("gate", x))
        gate *= self.linear("up", x)
        return self.normed(gate, "ffn_sub_norm")


def _silu(x: F32) -> F32:
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-x)), np.float32)


def _gelu_tanh(x: F32) -> F32:
    return np.asarray(0.5 * x * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x))), np.float32)


_ACTIVATIONS: dict[str, Callable[[F32], F32]] = {"silu": _silu, "gelu_tanh": _gelu_tanh, "relu2": lambda x: np.square(np.maximum(x, 0))}


def _rms(x: F32, weight: F32, eps: float) -> F32:
    return np.asarray(x * (1 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(eps))) * weight, np.float32)


def _vector(weight: Weight) -> F32:
    return np.asarray(weight.values(0, weight.shape[0]) + np.float32(weight.offset), np.float32)


def _gram(inputs: Iterable[F32], size: int, product: Product) -> F32:
    """X^T X / tokens, float32 [in, in]."""
    total, tokens = np.zeros((size, size), np.float32), 0
    for part in inputs:
        columns = part.reshape(-1, size).T
        total += product(columns, columns)
        tokens += columns.shape[1]
    if not np.isfinite(total).all():
        raise BitNetError(
            "the calibration text gives a layer inputs that are not finite; the model is damaged, or it is no model of this text"
        )
    return np.asarray(total / np.float32(tokens), np.float32)


def _parts(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """[sequences, tokens, ...] in runs of whole sequences."""
    step = max(1, _TOKENS // values.shape[1])
    return (values[at : at + step] for at in range(0, len(values), step))


def _looked_up(embedding: Weight, text: NDArray[np.int32]) -> F32:
    """The rows of these tokens, float32 [sequences, tokens, hidden]; the table is read in runs, and never whole."""
    out = np.empty((*text.shape, embedding.shape[1]), np.float32)
    for first, last in embedding.spans():
        here = (text >= first) & (text < last)
        if here.any():
            out[here] = embedding.values(first, last)[text[here] - first]
    return out
