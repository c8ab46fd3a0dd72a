"""How many zeros `ternarize` makes, by alpha, and which alpha makes 32 % of them: of Gaussian weights, and of a model's linear layers.

    python benchmarks/zeros.py [MODEL ...]

A matrix's threshold is alpha * mean|W|, as `ternarize(weights, alpha)` has it. Of Gaussian weights with standard deviation d, mean|W| is
d sqrt(2 / pi), so the share is 2 Phi(alpha sqrt(2 / pi)) - 1 = erf(alpha / sqrt(pi)). Prints the table in Markdown.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitnet.convert.source import read
from bitnet.models import LINEARS, open_checkpoint
from bitnet.ternary import ternarize

ALPHAS = (0.05, 0.06, 0.065, 0.07, 0.08, 0.5, 0.7)
WANTED = 0.32
EDGES = np.linspace(0, 4, 40_001)  # of |W| / mean|W|: the alpha of WANTED is found to 1e-4


def main() -> None:
    print("| | " + " | ".join(map(str, ALPHAS)) + f" | alpha for {WANTED:.0%} |\n|" + "---|" * (len(ALPHAS) + 2))
    exact = [math.erf(alpha / math.sqrt(math.pi)) for alpha in ALPHAS]
    print(row("Gaussian, computed", exact, EDGES[np.searchsorted([math.erf(e / math.sqrt(math.pi)) for e in EDGES], WANTED)]))
    print(measured("Gaussian, 16 million drawn", iter([np.random.default_rng(0).normal(size=(4096, 4096)).astype(np.float32)])))
    for name in sys.argv[1:]:
        print(measured(Path(name).name, matrices(Path(name))))


def matrices(path: Path) -> Iterator[NDArray[np.float32]]:
    """The linear layers, one at a time."""
    for weight in read(open_checkpoint(path)).weights.values():
        if weight.kind in LINEARS:
            yield weight.values(0, weight.shape[0])


def measured(name: str, weights: Iterator[NDArray[np.float32]]) -> str:
    zeros, below, count = np.zeros(len(ALPHAS), np.int64), np.zeros(len(EDGES) - 1, np.int64), 0
    for w in weights:
        zeros += [int((ternarize(w, alpha) == 0).sum()) for alpha in ALPHAS]
        size = np.abs(w, dtype=np.float64)
        below += np.histogram(size / size.mean(), EDGES)[0]
        count += w.size
    return row(name, zeros / count, EDGES[1 + np.searchsorted(np.cumsum(below) / count, WANTED)])


def row(name: str, shares: list[float] | NDArray[np.float64], alpha: float) -> str:
    return f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + f" | {alpha:.3f} |"


if __name__ == "__main__":
    main()
