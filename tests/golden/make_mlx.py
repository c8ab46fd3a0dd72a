"""Write what MLX makes of two-bit ternary weights: python tests/golden/make_mlx.py (needs mlx; 0.32.4 made the file here).

blocks/mlx_24x768.npz: `words` uint32 [24, 48], `scales` and `biases` float16 [24, 6] as they lie in a file, `trits` int8 [24, 768], and
`dense` float32 [24, 768], which is what MLX computes with: mx.dequantize(words, scales, biases, group_size=128, bits=2).
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

rng = np.random.default_rng(11)
trits = rng.integers(-1, 2, (24, 768)).astype(np.int8)
scales = rng.uniform(0.01, 2, (24, 6)).astype(np.float16)
codes = (trits + 1).astype(np.uint32).reshape(24, 48, 16)
words = np.zeros((24, 48), np.uint32)
for place in range(16):
    words |= codes[:, :, place] << np.uint32(2 * place)
dense = mx.dequantize(mx.array(words), mx.array(scales), mx.array(-scales), group_size=128, bits=2)
path = Path(__file__).parent / "blocks" / "mlx_24x768.npz"
np.savez_compressed(path, words=words, scales=scales, biases=-scales, trits=trits, dense=np.array(dense.astype(mx.float32)))
assert np.array_equal(np.array(dense.astype(mx.float32)), trits * np.repeat(scales, 128, axis=1).astype(np.float32))
print(f"{path}: {path.stat().st_size:,} bytes")
