"""gemma-3-270m as Q4_K_M, the real file, against llama.cpp's logits for it over 4 x 256 teacher-forced positions of WikiText-2.

Stored are the 32 largest logits of each position and the logsumexp of all, so the probabilities p of the listed tokens L are exact. With R
and Q the mass that llama.cpp and we give to the others,

    sum over L of p ln(p / q) + R ln(R / Q)

is the divergence of the two distributions with the others counted as one token: never above KL(p || q) (the log-sum inequality), and equal
to it where the two rank the others alike. By llama.cpp's full logits it is 0.0047 by default where the whole is 0.0067.

How near can one come? llama.cpp gives the stored logits to the bit, but for the same batch only: token by token, llama.cpp (0.3.36 of
llama-cpp-python, same file, machine and flags) has the same likeliest token as itself at 94.3 % of the positions, KL 0.0041; with flash
attention at 94.2 %, with weights repacked at 94.0 %, with the same weights as F32 at 95.3 %. The order of a float sum moves a value
across a rounding to 8 bits, that moves more of them in the next product, and after a few layers the noise of quantizing is all there. What
is left is how close two tokens are: at 10 % of the positions the two likeliest are within 0.1 nats, at 18 % within 0.2. So we ask for
llama.cpp's agreement with itself, less two deviations of so many draws: overall, and where its likeliest token leads by 0.2 nats.

| measured                             | top-1  | where the lead > 0.1 | > 0.2  | KL     |
|--------------------------------------|--------|----------------------|--------|--------|
| llama.cpp, token by token            | 94.3 % | 98.1 %               | 99.3 % | 0.0041 |
| ours, f16 weights                    | 94.6 % | 98.4 %               | 99.6 % | 0.0033 |
| ours, int8, one step per 32 (default)| 94.6 % | 97.7 %               | 99.4 % | 0.0047 |
| one step per 64 inputs               | 93.2 % | 96.9 %               | 99.2 % | 0.0060 |
| default, head int8 per row           | 91.7 % | 95.8 %               | 98.5 % | 0.0073 |
| one step per token                   | 87.0 % | 91.1 %               | 94.3 % | 0.0253 |

One step per token fails for its activations: into down_proj the largest is 25 times their root mean square (10 to 20 elsewhere).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bitnet.engine import Engine
from bitnet.models import open_checkpoint
from bitnet.weights import load_engine

LEAD = 0.2  # nats
# llama.cpp's agreement with itself less 2 sqrt(p (1 - p) / n)
LEAST = 0.943 - 0.015  # n = 1,024
LEAST_WHERE_CLEAR = 0.993 - 0.006  # n = 844


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> Path:
    folder = shared_data.parent / "golden"
    if not (folder / "gemma-3-270m-q4_k_m.llama.cpp-logits.npz").is_file():
        pytest.skip(f"no logits to compare with: {folder} lacks gemma-3-270m-q4_k_m.llama.cpp-logits.npz")
    return folder


@dataclass(frozen=True)
class Agreement:
    kl: float  # nats, mean
    same: np.ndarray  # bool [positions]: the likeliest token is
    lead: np.ndarray  # nats [positions]: of llama.cpp's likeliest token over its second


def agreement(engine: Engine, golden: Path) -> Agreement:
    stored = np.load(golden / "gemma-3-270m-q4_k_m.llama.cpp-logits.npz")
    kls, same, leads = [], [], []
    for i in range(4):
        listed, total = stored[f"top_ids_{i}"].astype(np.int64), stored[f"logsumexp_{i}"].astype(np.float64)
        theirs = stored[f"top_logits_{i}"].astype(np.float64) - total[:, None]
        logits = engine.forward([(engine.sequence(), stored[f"ids_{i}"].tolist())], all_logits=True)
        most = logits.max(1, keepdims=True)
        ours = np.take_along_axis(logits, listed, 1) - most - np.log(np.exp(logits - most).sum(1, keepdims=True, dtype=np.float64))
        p, rest, our_rest = np.exp(theirs), 1 - np.exp(theirs).sum(1), 1 - np.exp(ours).sum(1)
        kls.append((p * (theirs - ours)).sum(1) + rest * np.log(np.maximum(rest, 1e-9) / np.maximum(our_rest, 1e-9)))
        same.append(logits.argmax(1) == listed[:, 0])
        leads.append(theirs[:, 0] - theirs[:, 1])
    return Agreement(float(np.concatenate(kls).mean()), np.concatenate(same), np.concatenate(leads))


@pytest.fixture(scope="module")
def default(gemma_path: Path) -> Engine:
    return load_engine(open_checkpoint(gemma_path))


def check(found: Agreement, kl: float) -> None:
    clear = found.lead > LEAD
    assert len(clear) == 1024 and clear.sum() == 844
    assert found.kl <= kl
    assert found.same.mean() >= LEAST
    assert found.same[clear].mean() >= LEAST_WHERE_CLEAR


def test_default(default: Engine, golden: Path) -> None:
    check(agreement(default, golden), kl=0.01)


@pytest.mark.full
def test_exact_path(gemma_path: Path, golden: Path) -> None:
    check(agreement(load_engine(open_checkpoint(gemma_path), weights="f16"), golden), kl=0.005)


@pytest.mark.full
def test_one_step_per_token_fails(gemma_path: Path, golden: Path) -> None:
    """What was measured wrong is seen to be: the thresholds tell 0.025 nats from 0.005."""
    found = agreement(load_engine(open_checkpoint(gemma_path), activation_group=0), golden)
    assert found.kl > 0.01 and found.same.mean() < LEAST


def test_greedy(default: Engine, golden: Path) -> None:
    """Along llama.cpp's greedy continuations we take the same token, or one that is close. Measured: 308 of 320, at most 0.34 short."""
    stored = json.loads((golden / "gemma-3-270m-q4_k_m.llama.cpp.json").read_text())["greedy"]
    short, whole = [], 0
    for case in stored:
        ids, continuation = case["ids"], np.array(case["greedy"])
        logits = default.forward([(default.sequence(), [*ids, *case["greedy"][:-1]])], all_logits=True)[len(ids) - 1 :]
        behind = logits.max(1) - logits[np.arange(len(continuation)), continuation]
        short.append(behind)
        whole += bool((behind == 0).all())
    behind = np.concatenate(short)
    assert (behind == 0).mean() >= LEAST and behind.max() <= 1.0
    assert whole >= 3, "continuations equal to the last token; 5 of 10 measured"
