"""Sampling against a slow definition, its ranges, and its determinism."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bitnet.errors import BitNetError, UsageError
from bitnet.sampling import Sampler, Sampling, largest, penalize


def definition(logits: np.ndarray, s: Sampling) -> dict[int, float]:
    """Probability of each token that is left, by a full sort."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = {i: math.exp((float(logits[i]) - float(logits[order[0]])) / s.temperature) for i in order}
    order = order[: s.top_k or len(order)]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if s.top_p < 1 and kept and mass >= s.top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    kept = [i for i in kept if weights[i] >= s.min_p]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_p=1.0, seed=1),
        Sampling(temperature=0.7, top_p=0.6, seed=2),
        Sampling(temperature=1.3, top_k=5, top_p=1.0, seed=3),
        Sampling(temperature=1.3, top_k=5, top_p=0.8, min_p=0.1, seed=4),
        Sampling(temperature=1.0, top_p=1.0, min_p=0.2, seed=5),
    ],
)
def test_frequencies_are_those_of_the_definition(sampling: Sampling) -> None:
    logits = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    expected = definition(logits, sampling)
    sampler, n = Sampler(sampling), 4000
    counts = np.bincount([sampler.pick(logits) for _ in range(n)], minlength=40)
    assert set(np.flatnonzero(counts)) <= set(expected)
    for token, p in expected.items():
        # Six standard deviations of a binomial count: a right sampler fails once in 10^8 tokens, and the seeds are fixed.
        assert abs(counts[token] - n * p) <= 6 * math.sqrt(n * p * (1 - p)) + 1e-9


def test_a_nucleus_wider_than_the_first_candidates_equals_the_full_sort() -> None:
    logits = (0.1 * np.random.default_rng(1).standard_normal(5000)).astype(np.float32)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=0)
    z = logits.astype(np.float64)
    found, _ = Sampler(sampling)._candidates(z, np.exp(z - z.max()))
    assert found.tolist() == list(definition(logits, sampling))


@given(npst.arrays(np.float64, st.integers(1, 60), elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0])), st.integers(1, 70))
def test_largest_breaks_ties_by_id(logits: np.ndarray, count: int) -> None:
    assert largest(logits, count).tolist() == sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:count]


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(Sampling(temperature=0)).pick(np.float32([1, 3, 3, 2])) == 1


@settings(max_examples=30)
@given(st.integers(0, 2**70))
def test_the_same_seed_gives_the_same_tokens(seed: int) -> None:
    logits = np.random.default_rng(2).standard_normal((20, 300)).astype(np.float32)
    a, b = Sampler(Sampling(seed=seed)), Sampler(Sampling(seed=seed))
    assert [a.pick(row) for row in logits] == [b.pick(row) for row in logits]


def test_without_a_seed_runs_differ() -> None:
    logits = np.zeros(1000, np.float32)
    draws = {tuple(sampler.pick(logits) for _ in range(8)) for sampler in (Sampler(Sampling(top_p=1.0)) for _ in range(3))}
    assert len(draws) == 3  # two equal ones: once in 10^24


def test_a_very_small_temperature_is_greedy_and_not_nan() -> None:
    assert Sampler(Sampling(temperature=5e-324)).pick(np.float32([0, 1e30, -1e30])) == 1


def test_repetition_penalty_divides_positive_and_multiplies_negative() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.0])
    assert penalize(logits, [0, 1, 1, 3], 2.0).tolist() == [1.0, -4.0, 1.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0]
    assert Sampler(Sampling(temperature=0, repetition_penalty=3.0)).pick(np.float32([2.0, 1.0]), history=[0]) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    with pytest.raises(BitNetError, match=r"not finite \((nan|-?inf) for token 2\); the weights are damaged"):
        Sampler(Sampling(temperature=temperature)).pick(np.float32([0, 1, bad, 3]))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "temperature is -0.1; expected a number >= 0 (0 is greedy)"),
        ("temperature", math.nan, "temperature is nan; expected a number >= 0 (0 is greedy)"),
        ("temperature", math.inf, "temperature is inf; expected a number >= 0 (0 is greedy)"),
        ("temperature", "hot", "temperature is 'hot'; expected a number >= 0 (0 is greedy)"),
        ("top_p", 0.0, "top_p is 0.0; expected a number above 0, at most 1 (1 is off)"),
        ("top_p", 1.5, "top_p is 1.5; expected a number above 0, at most 1 (1 is off)"),
        ("top_p", math.nan, "top_p is nan; expected a number above 0, at most 1 (1 is off)"),
        ("top_k", -1, "top_k is -1; expected an integer >= 0 (0 is off)"),
        ("top_k", 1.5, "top_k is 1.5; expected an integer >= 0 (0 is off)"),
        ("min_p", -0.5, "min_p is -0.5; expected a number from 0 to 1 (0 is off)"),
        ("min_p", 2, "min_p is 2; expected a number from 0 to 1 (0 is off)"),
        ("repetition_penalty", 0, "repetition_penalty is 0; expected a number from 1e-6 to 1e6 (1 is off)"),
        ("repetition_penalty", 1e308, "repetition_penalty is 1e+308; expected a number from 1e-6 to 1e6 (1 is off)"),
        ("seed", -1, "seed is -1; expected an integer >= 0, or none for a fresh one"),
    ],
)
def test_ranges(name: str, value: object, expected: str) -> None:
    with pytest.raises(UsageError) as error:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert str(error.value) == expected
