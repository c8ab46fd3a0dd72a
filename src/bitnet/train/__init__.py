"""Training (extra [train]): layers that compute as the engine will, and the recipes of `bitnet train`."""

from bitnet.train.layers import (
    BinaryLinear,
    PlainTernarySTE,
    Quantization,
    TernaryEmbedding,
    TernaryLinear,
    TernarySTE,
    ternarize_model,
)

__all__ = ["BinaryLinear", "PlainTernarySTE", "Quantization", "TernaryEmbedding", "TernaryLinear", "TernarySTE", "ternarize_model"]
