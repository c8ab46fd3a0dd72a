"""The canonical model on a torch device: what `device="cuda"` and `device="mps"` run.

`TorchModel` and `TorchMatrix` stand where the native ones stand (bitnet/_native.pyi), so that loading and generation are the same code. The
forward pass is native/forward.cpp once more, in torch's float32, with the same roundings: int8 activations where weights are integers, keys
and values in f16. Logits agree; the bits are the native engine's alone. A ternary weight takes a byte. Made for agreement, not for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bitnet import ternary
from bitnet.errors import UsageError
from bitnet.machine import usable_cores
from bitnet.models import ModelConfig
from bitnet.train.layers import int8_rows

_QUANTIZE: dict[str, Callable[[NDArray[np.float32], int], tuple[NDArray[np.int8], NDArray[np.float32]]]] = {
    "int8": ternary.quantize_int8,
    "int4": ternary.quantize_int4,
    "fp4": ternary.quantize_fp4,
    "binary": ternary.quantize_binary,
}
_FLOATS: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<i2")}  # scheme -> what numpy holds
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu2": lambda gate: gate.relu().square(),
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
}


class FrozenLinear(nn.Module):
    """A linear layer whose weights no longer change, as the engine computes it (ternary.matmul_integer, but in one float32 sum).

    `weight` is floats [out, in], which meet the activations as they are, or int8 codes [out, in] with `scales` float32 [out, groups] of
    equal runs of inputs; these meet int8 activations, with a step per token or per `activation_group` inputs.
    """

    weight: Tensor
    scales: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def rows(self, ids: Tensor) -> Tensor:
        """The weights of some outputs, float32 [len(ids), in]: an embedding."""
        return self._scaled(self.weight[ids].float(), None if self.scales is None else self.scales[ids])

    def forward(self, x: Tensor, activation_group: int = 0) -> Tensor:
        """x float32 [tokens, in] -> float32 [tokens, out]."""
        weight, scales = self.weight.float(), self.scales
        if scales is None:
            return x @ weight.t()
        whole = scales.shape[1] == 1  # then the scale, and the step of a whole token, leave with the sum, which is one of integers
        if not whole:
            weight = self._scaled(weight, scales)
        if activation_group:
            padded = functional.pad(x, (0, -x.shape[1] % activation_group)).unflatten(1, (-1, activation_group))
            q, most = int8_rows(padded)
            y = (q * (most / 127.0)).flatten(1)[:, : x.shape[1]] @ weight.t()
            return y * scales[:, 0] if whole else y
        q, most = int8_rows(x)
        y = q @ weight.t()
        return (y * scales[:, 0] if whole else y) * (most / 127.0)

    @staticmethod
    def _scaled(weight: Tensor, scales: Tensor | None) -> Tensor:
        if scales is None:
            return weight
        size = ternary.group_size(weight.shape[1], scales.shape[1])
        return weight * scales.repeat_interleave(size, dim=1)[:, : weight.shape[1]]


def torch_device(name: str) -> torch.device:
    """The device "cuda", "cuda:N" or "mps". Raises `UsageError` where torch cannot use it, with what is missing."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("cpu")
    if device.type not in ("cuda", "mps"):
        raise UsageError(f"device is {name!r}; expected cpu, cuda, cuda:N or mps")
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError(
                f"device is {name!r}; torch {torch.__version__} finds no Apple GPU here (Metal needs a Mac with macOS 14 or later)"
            )
    elif not torch.backends.cuda.is_built():
        raise UsageError(f"device is {name!r}; torch {torch.__version__} is built without CUDA: install torch's build with it")
    elif not torch.cuda.is_available():
        raise UsageError(f"device is {name!r}; torch {torch.__version__} finds no GPU with a driver here (nvidia-smi shows what there is)")
    elif device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(f"device is {name!r}; this machine has {torch.cuda.device_count()}, from 'cuda:0' on")
    return device


class TorchMatrix:
    """A matrix that is being filled, in numpy: integer codes with their scales, or floats."""

    def __init__(self, model: TorchModel, scheme: str, rows: int, cols: int, n_groups: int = 1) -> None:
        self.scheme = scheme
        self.floats = np.empty((rows, cols), _FLOATS[scheme]) if scheme in _FLOATS else None
        self.codes = np.zeros((rows, cols), np.int8) if self.floats is None else None
        self.scales = np.zeros((rows, n_groups), np.float32)

    def set_scales(self, first_row: int, scales: NDArray[np.float32]) -> None:
        self.scales[first_row : first_row + len(scales)] = scales

    def fill_codes(self, first_row: int, codes: NDArray[np.int8]) -> None:
        assert self.codes is not None
        self.codes[first_row : first_row + len(codes)] = codes

    def fill_banded(self, bytes: NDArray[np.uint8]) -> bool:
        """False: nothing packed is read here, the loader then unpacks it."""
        return False

    def fill_two_bit(self, first_row: int, blocks: NDArray[np.uint8], **layout: int) -> bool:
        return False

    def fill_values(self, first_row: int, type: str, bytes: NDArray[np.uint8]) -> bool:
        """Rows of stored floats, quantized where this is a matrix of integers; False if one of them is not finite."""
        stored = np.ascontiguousarray(bytes).view(_FLOATS[type])
        rows = slice(first_row, first_row + len(stored))
        wide = (stored.astype(np.int32) << 16).view(np.float32) if type == "bf16" else stored.astype(np.float32)
        if not np.isfinite(wide).all():
            return False
        if self.floats is not None:
            self.floats[rows] = stored
        else:
            codes, scales = _QUANTIZE[self.scheme](wide, ternary.group_size(wide.shape[1], self.scales.shape[1]))
            self.fill_codes(first_row, codes)
            self.scales[rows] = scales.reshape(len(wide), -1)
        return True

    def layer(self, device: torch.device) -> FrozenLinear:
        if self.codes is not None:
            return FrozenLinear(torch.from_numpy(self.codes).to(device), torch.from_numpy(self.scales).to(device))
        weight = torch.from_numpy(self.floats)
        return FrozenLinear((weight.view(torch.bfloat16) if self.scheme == "bf16" else weight).to(device))


class TorchCache:
    """Keys and values of one sequence: for each layer a pair of f16 [n_kv_heads, tokens, head_dim]."""

    def __init__(self, c: ModelConfig, device: torch.device) -> None:
        empty = torch.empty((c.n_kv_heads, 0, c.head_dim), dtype=torch.float16, device=device)
        self.layers = [(empty, empty)] * c.n_layers

    def __len__(self) -> int:
        return self.layers[0][0].shape[1]

    def truncate(self, n: int) -> None:
        if not 0 <= n <= len(self):
            raise ValueError("a cache can only become shorter")
        self.layers = [(keys[:, :n], values[:, :n]) for keys, values in self.layers]


class TorchModel:
    """The model of `config` on `device`, without weights."""

    Matrix = TorchMatrix
    codec = "int8"  # how ternary layers lie in memory, too

    def __init__(self, config: ModelConfig, device: torch.device, activation_group: int = 0) -> None:
        self.config, self.device, self.activation_group = config, device, activation_group
        self.isa, self.threads = str(device), usable_cores()  # threads: of the loading
        self.linears: dict[str, FrozenLinear] = {}
        self.vectors: dict[str, Tensor] = {}  # norms and biases
        self._window = config.windowed or (False,) * config.n_layers

    def set_matrix(self, name: str, matrix: TorchMatrix) -> None:
        self.linears[name] = matrix.layer(self.device)

    def set_vector(self, name: str, values: NDArray[np.float32]) -> None:
        self.vectors[name] = torch.tensor(values, device=self.device)

    def check_complete(self) -> None:
        """Nothing to do: the loader sets what models.canonical has found."""

    @property
    def weight_bytes(self) -> int:
        return self._bytes(self.linears)

    @property
    def weight_bytes_per_token(self) -> int:
        skipped = "embedding" if "head" in self.linears else ""  # of which a token reads one row
        return self._bytes(name for name in self.linears if name != skipped)

    def _bytes(self, linears: Iterable[str]) -> int:
        buffers = [b for name in linears for b in self.linears[name].buffers()]
        return sum(b.numel() * b.element_size() for b in (*buffers, *self.vectors.values()))

    def cache(self, adapter: Any = None, *, key_bits: int = 16, value_bits: int = 16, **_: Any) -> TorchCache:
        if adapter is not None or min(key_bits, value_bits) < 16:
            raise UsageError(
                f"{'an adapter' if adapter is not None else 'a quantized KV cache'} is for device='cpu'; leave it out with {self.isa!r}"
            )
        return TorchCache(self.config, self.device)

    @torch.inference_mode()
    def forward(self, batch: Sequence[tuple[TorchCache, NDArray[np.int32]]], all_logits: bool = False) -> NDArray[np.float32]:
        """As the native model's. Sequences run one after another; all caches grow at the end, or none if it is interrupted."""
        if len({id(cache) for cache, _ in batch}) < len(batch):
            raise ValueError("a sequence is in the batch twice")
        done = [self._sequence(cache, ids, all_logits) for cache, ids in batch]
        for (cache, _), (_, layers) in zip(batch, done, strict=True):
            cache.layers = layers
        found: NDArray[np.float32] = torch.cat([logits for logits, _ in done]).cpu().numpy()
        return found

    def _sequence(self, cache: TorchCache, ids: NDArray[np.int32], all_logits: bool) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(logits [tokens or 1, vocab], the cache's layers with these tokens)."""
        c = self.config
        positions = np.arange(len(cache), len(cache) + len(ids))
        turns = [self._turns(positions, windowed) for windowed in (False, True)]
        masks = [self._mask(positions, windowed) for windowed in (False, True)]
        x = self.linears["embedding"].rows(torch.tensor(ids, dtype=torch.int64, device=self.device)) * c.embedding_scale
        layers = []
        for i, windowed in enumerate(self._window):
            at = f"layers.{i}."
            h = self._norm(at + "attn_norm", x)
            q, k, v = (self._linear(at + part, h).unflatten(1, (-1, c.head_dim)) for part in "qkv")  # [tokens, heads, head_dim]
            if c.qk_norms:
                q, k = self._norm(at + "q_norm", q), self._norm(at + "k_norm", k)
            q, k = (self._rotated(heads, *turns[windowed]) for heads in (q, k))
            keys, values = (torch.cat((old, new.transpose(0, 1).half()), 1) for old, new in zip(cache.layers[i], (k, v), strict=True))
            layers.append((keys, values))
            h = self._attention(q, keys, values, masks[windowed])
            h = self._linear(at + "o", self._norm(at + "attn_sub_norm", h) if c.sub_norms else h)
            x = x + (self._norm(at + "post_attn_norm", h) if c.post_norms else h)
            h = self._norm(at + "ffn_norm", x)
            h = _GATES[c.activation](self._linear(at + "gate", h)) * self._linear(at + "up", h)
            h = self._linear(at + "down", self._norm(at + "ffn_sub_norm", h) if c.sub_norms else h)
            x = x + (self._norm(at + "post_ffn_norm", h) if c.post_norms else h)
        h = self._norm("final_norm", x if all_logits else x[-1:])
        return self._linear("embedding" if c.tied else "head", h), layers

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y: Tensor = self.linears[name](x, self.activation_group)
        bias = self.vectors.get(f"{name}_bias")
        return y if bias is None else y + bias

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * self.vectors[name]

    def _turns(self, positions: NDArray[np.int64], windowed: bool) -> tuple[Tensor, Tensor]:
        """Cosine and sine, [tokens, 1, head_dim / 2]; the angle in float32, as models are trained."""
        c = self.config
        rope = c.rope_local or c.rope if windowed else c.rope
        angles = (positions.astype(np.float32)[:, None] * rope.frequencies(c.head_dim)).astype(np.float64)
        scale = np.float32(1.0 if windowed else c.rope.attention_factor)
        cosine, sine = (torch.from_numpy(of(angles).astype(np.float32) * scale)[:, None].to(self.device) for of in (np.cos, np.sin))
        return cosine, sine

    def _rotated(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        a, b = (x[..., ::2], x[..., 1::2]) if self.config.rope_interleaved else x.chunk(2, -1)
        turned = (a * cosine - b * sine, b * cosine + a * sine)
        return torch.stack(turned, -1).flatten(-2) if self.config.rope_interleaved else torch.cat(turned, -1)

    def _mask(self, positions: NDArray[np.int64], windowed: bool) -> Tensor:
        """Which keys a token sees, [tokens, keys]."""
        behind = positions[:, None] - np.arange(positions[-1] + 1)
        return torch.from_numpy((behind >= 0) & (behind < (self.config.sliding_window if windowed else len(behind[0])))).to(self.device)

    def _attention(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """q [tokens, n_heads, head_dim] over the cache's keys and values -> [tokens, n_heads * head_dim]."""
        c = self.config
        k, v = (kept.float().repeat_interleave(c.n_heads // c.n_kv_heads, 0) for kept in (keys, values))
        scores = q.transpose(0, 1) @ k.transpose(1, 2) * c.attention_scale
        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return mixed.transpose(0, 1).flatten(1)
