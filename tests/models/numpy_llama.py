"""A llama forward pass in plain numpy and float64, straight from llama2.c's file: nothing of it is shared with the engine.

It keeps llama2.c's interleaved rope and row order, so that it also checks the reordering in the converter.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


class NumpyLlama:
    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self.dim, hidden, self.layers, self.heads, self.kv_heads, self.vocab, self.context = struct.unpack("<7i", data[:28])
        values, at = np.frombuffer(data, "<f4", offset=28).astype(np.float64), 0

        def take(*shape: int) -> np.ndarray:
            nonlocal at
            n = int(np.prod(shape))
            at += n
            return values[at - n : at].reshape(shape)

        d, kv, n = self.dim, self.dim // self.heads * self.kv_heads, self.layers
        self.embedding = take(self.vocab, d)
        self.norm1, self.wq, self.wk, self.wv, self.wo = take(n, d), take(n, d, d), take(n, kv, d), take(n, kv, d), take(n, d, d)
        self.norm2, self.w1, self.w2, self.w3 = take(n, d), take(n, hidden, d), take(n, d, hidden), take(n, hidden, d)
        self.norm = take(d)

    @staticmethod
    def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def rope(self, x: np.ndarray) -> np.ndarray:
        """x [tokens, heads, head_dim], neighbours rotated."""
        size = x.shape[-1]
        angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        out = np.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return out

    def logits(self, ids: list[int], cache: type = np.float64) -> np.ndarray:
        """float64 [tokens, vocab]; keys and values are rounded to the dtype `cache`."""
        n, size = len(ids), self.dim // self.heads
        x = self.embedding[ids]
        future = np.triu(np.full((n, n), -np.inf), 1)
        for i in range(self.layers):
            h = self.rms(x, self.norm1[i])
            q = self.rope((h @ self.wq[i].T).reshape(n, self.heads, size))
            k = self.rope((h @ self.wk[i].T).reshape(n, self.kv_heads, size)).repeat(self.heads // self.kv_heads, 1)
            v = (h @ self.wv[i].T).reshape(n, self.kv_heads, size).repeat(self.heads // self.kv_heads, 1)
            k, v = k.astype(cache).astype(np.float64), v.astype(cache).astype(np.float64)
            scores = q.swapaxes(0, 1) @ k.transpose(1, 2, 0) / np.sqrt(size) + future  # [heads, queries, keys]
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            x = x + (p @ v.swapaxes(0, 1)).swapaxes(0, 1).reshape(n, -1) @ self.wo[i].T
            h = self.rms(x, self.norm2[i])
            gate = h @ self.w1[i].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ self.w3[i].T)) @ self.w2[i].T
        return self.rms(x, self.norm) @ self.embedding.T
