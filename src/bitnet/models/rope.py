"""Rotary position embedding: how fast each pair of a head's dimensions turns.

Pair i of n = head_dim / 2 turns by theta^(-i/n) radians per position (RoFormer, arXiv:2104.09864). To reach longer contexts, models scale
it:
- linear (arXiv:2306.15595): every frequency divided by `factor`;
- dynamic: plain up to the length it was trained for. Where a longer context is asked for, theta grows with it, so that every pair turns as
  far over the whole as it would have turned over less: theta (factor n / trained - (factor - 1))^(d / (d - 2)), n the context that is asked
  for (transformers takes the length of the moment, and keeps keys that were rotated by another one);
- llama3: slow pairs (wavelength above original / low_freq_factor) divided by `factor`, fast ones kept, those between interpolated;
- yarn (arXiv:2309.00071): likewise, a ramp over the pairs that turn between beta_fast and beta_slow times within the original length; sine
  and cosine are multiplied by the attention factor, 0.1 ln(factor) + 1 unless given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import FormatError, UnsupportedModelError
from bitnet.files import shown
from bitnet.models.fields import integer, number

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Frequencies of one kind of layer."""

    theta: float
    kind: str = "default"  # one of KINDS
    factor: float = 1.0
    original_context: int = 0  # tokens; dynamic, llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: the ramp begins and ends at whole pairs
    attention_factor: float = 1.0  # multiplies sine and cosine
    reach: int = 0  # dynamic: tokens of the context that was asked for
    divisors: tuple[float, ...] = ()  # [head_dim / 2] that each frequency is divided by, where a file spells them out (GGUF's rope_freqs)

    def frequencies(self, head_dim: int) -> NDArray[np.float32]:
        """float32 [head_dim / 2], radians per position; in float32 and in this order, as models are trained."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        theta = self.theta
        if self.kind == "dynamic" and self.reach > self.original_context and head_dim > 2:
            theta *= (self.factor * self.reach / self.original_context - (self.factor - 1)) ** (head_dim / (head_dim - 2))
        plain: NDArray[np.float32] = np.asarray(np.float32(1) / np.power(np.float32(theta), exponents), np.float32)
        if self.divisors:
            plain = np.asarray(plain / np.array(self.divisors, np.float32), np.float32)
        scaled: NDArray[np.float32] = np.asarray(plain / np.float32(self.factor), np.float32)
        if self.kind == "linear":
            return scaled
        if self.kind == "llama3":
            wavelength = np.float32(2 * math.pi) / plain
            low, high = self.original_context / self.low_freq_factor, self.original_context / self.high_freq_factor
            smooth = (np.float32(self.original_context) / wavelength - self.low_freq_factor) / (
                self.high_freq_factor - self.low_freq_factor
            )
            between = (1 - smooth) * scaled + smooth * plain
            return np.asarray(np.where(wavelength > low, scaled, np.where(wavelength < high, plain, between)), np.float32)
        if self.kind == "yarn":
            first, last = (self._pair_turning(turns, head_dim) for turns in (self.beta_fast, self.beta_slow))
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            ramp = (np.arange(head_dim // 2, dtype=np.float32) - first) / (max(last - first, 0.001))
            keep = 1 - np.clip(ramp, 0, 1)
            return np.asarray(scaled * (1 - keep) + plain * keep, np.float32)
        return plain

    def _pair_turning(self, turns: float, head_dim: int) -> float:
        """The pair (a fraction of one, too) that turns so many times within the original context."""
        return head_dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


def read_rope(rope: Any, hf: dict[str, Any], where: str, default_theta: float) -> Rope:
    """The rope parameters of config.json: `rope` is rope_parameters or rope_scaling, and what it lacks stands in `hf` itself.

    Raises `UnsupportedModelError` for a kind that is none of KINDS, and for rope over a part of the head only.
    """
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise FormatError(f"{where}: rope parameters are {shown(repr(rope))}; expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope if rope.get("partial_rotary_factor") is not None else hf
    if kind not in KINDS:
        raise UnsupportedModelError(f"{where}: rope scaling {shown(repr(kind))}; this build computes {', '.join(KINDS)}")
    if number(partial, "partial_rotary_factor", where, default=1.0) != 1.0:
        raise UnsupportedModelError(
            f"{where}: rope covers a part of each head only (partial_rotary_factor); this build rotates whole heads"
        )
    theta = number(rope if rope.get("rope_theta") is not None else hf, "rope_theta", where, default=default_theta)
    if theta <= 1:
        raise FormatError(f"{where}: rope_theta is {theta}; expected a number above 1")
    if kind == "default":
        return Rope(theta)
    if kind == "dynamic":
        trained = integer(hf, "max_position_embeddings", where, default=2048)
        return Rope(theta, "dynamic", number(rope, "factor", where, default=1.0), trained)
    factor = number(rope, "factor", where)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    given = rope if rope.get("original_max_position_embeddings") is not None else {}
    longest = integer(hf, "max_position_embeddings", where, default=2048)
    original = integer(given, "original_max_position_embeddings", where, default=longest)
    if kind == "llama3":
        low, high = number(rope, "low_freq_factor", where), number(rope, "high_freq_factor", where)
        if high <= low:
            raise FormatError(f"{where}: high_freq_factor {high} is not above low_freq_factor {low}")
        return Rope(theta, "llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    fast, slow = number(rope, "beta_fast", where, default=32.0), number(rope, "beta_slow", where, default=1.0)
    attention = number(rope, "attention_factor", where, default=_yarn_attention_factor(rope, factor, where))
    attention *= number(rope, "attention_multiplier", where, default=1.0)  # llama.cpp's rope.scaling.attn_factor
    truncate = rope.get("truncate", True) is not False
    return Rope(theta, "yarn", factor, original, beta_fast=fast, beta_slow=slow, truncate=truncate, attention_factor=attention)


def _yarn_attention_factor(rope: dict[str, Any], factor: float, where: str) -> float:
    """What sine and cosine are multiplied by; DeepSeek's two mscales give it as a quotient."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(number(rope, "mscale", where)) / mscale(number(rope, "mscale_all_dim", where))
    return mscale(1.0)
