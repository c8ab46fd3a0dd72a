"""Speculation changes nothing but the time: the same tokens, the same distribution, never dearer than its allowance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import definition
from test_transformer import BOS, TOKENIZER, VOCAB, FakeSequence

from bitnet import generation, speculation
from bitnet.errors import UsageError
from bitnet.generation import GenerationStream
from bitnet.sampling import Sampling
from bitnet.shapes import random_adapter
from bitnet.speculation import SIZES, Costs, Lookup, Speculation
from bitnet.transformer import TernaryTransformer

A = TOKENIZER.encode("abcd", add_special=False)


class Free(Costs):
    """Forwards of any size take the time of one, so that whatever can be guessed is."""

    def __init__(self) -> None:
        super().__init__()
        self.one_s, self.sizes = 1.0, [(size, 1.0) for size in SIZES]

    def record(self, tokens: int, seconds: float) -> None:
        pass


class Chain:
    """An engine whose logits depend on the last two tokens alone, and whose forwards take `cost(tokens)` on a clock of their own."""

    isa, codec, threads, weight_bytes_per_token = "scalar", "t2", 1, 1000

    def __init__(self, script: Sequence[int] = (), sharpness: float = 3.0, max_context: int = 1000, cost: Any = lambda n: 1.0):
        self.config = SimpleNamespace(vocab_size=VOCAB, max_context=max_context)
        self.script, self.sharpness, self.cost = list(script), sharpness, cost
        self.now = 0.0
        self.calls: list[int] = []

    def sequence(self, adapter: Any = None) -> FakeSequence:
        return FakeSequence()

    def row(self, last: Sequence[int], length: int) -> np.ndarray:
        if self.script:  # what stands there in the script, whatever came before
            row = np.zeros(VOCAB, np.float32)
            row[self.script[length % len(self.script)]] = self.sharpness
            return row
        row = np.full(VOCAB, -100.0, np.float32)
        row[A] = np.random.default_rng([int(t) for t in last]).standard_normal(len(A)) * self.sharpness
        row[BOS] = row[A].max() - 5  # now and then the text ends
        return row

    def forward(self, batch: list[tuple[FakeSequence, Sequence[int]]], all_logits: bool = False) -> np.ndarray:
        ((sequence, ids),) = batch
        self.calls.append(len(ids))
        self.now += self.cost(len(ids))
        rows = []
        for token in ids:
            sequence.append(int(token))
            assert len(sequence) <= self.config.max_context
            rows.append(self.row(sequence[-2:], len(sequence)))
        return np.stack(rows if all_logits else rows[-1:])


def stream(
    engine: Any, prompt: Sequence[int], costs: Costs | None, sampling: Sampling, n: int = 40, stops: Sequence[str] = ()
) -> GenerationStream:
    return GenerationStream(engine, TOKENIZER, list(prompt), max_new_tokens=n, sampling=sampling, stops=stops, load_s=0.0, costs=costs)


def outcome(s: GenerationStream) -> tuple[list[str], list[int], str | None]:
    pieces = list(s)
    return pieces, s.generation.token_ids, s.generation.finish_reason


@given(st.lists(st.integers(0, 3), max_size=80), st.integers(0, 40))
def test_the_match_is_the_longest_there_is(ids: list[int], prompt: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "_CHAIN", 1000)
        lookup = Lookup(ids[:prompt])
        for n in range(min(prompt, len(ids)), len(ids) + 1):
            if n > len(lookup.ids):
                lookup.push(ids[n - 1])
            text = ids[:n]
            assert lookup.ids == text and 0 <= lookup.source < max(1, n)
            ends = [e for e in range(2, n) if text[e - 2 : e] == text[n - 2 :]]
            longest = max((next(k for k in range(e + 1) if k == e or text[e - 1 - k] != text[n - 1 - k]) for e in ends), default=0)
            assert lookup.matched == min(longest, 32) if ends else lookup.matched < 2
            if lookup.source:
                assert text[lookup.source - lookup.matched : lookup.source] == text[n - lookup.matched :]
                guesses = lookup.guesses(50)
                assert guesses == [(text + guesses)[lookup.source + i] for i in range(50)]  # as a copy that reads what it wrote


def test_after_a_replaced_token_what_followed_it_is_guessed() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 1, 2, 3])
    lookup.push(9)  # where 4 was guessed
    assert (lookup.matched, lookup.guesses(2)) == (0, [5, 6])
    lookup.push(5)
    assert (lookup.matched, lookup.guesses(1)) == (1, [6])
    lookup.push(7), lookup.push(7)
    assert lookup.source == 0  # two wrong ones: no guess


SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(temperature=0, repetition_penalty=1.3),
    Sampling(temperature=0.5, seed=1),
    Sampling(temperature=1.0, top_p=1.0, seed=2),
    Sampling(temperature=1.2, top_k=3, top_p=0.9, min_p=0.05, repetition_penalty=1.1, seed=3),
]


@settings(max_examples=150)
@given(
    st.text("abcd", min_size=1, max_size=40), st.sampled_from(SAMPLINGS), st.integers(1, 60),
    st.lists(st.text("abcd", min_size=1, max_size=4), max_size=2), st.sampled_from([0.5, 3.0, 10.0]), st.sampled_from([70, 1000]),
)  # fmt: skip
def test_the_same_tokens_with_and_without(
    prompt: str, sampling: Sampling, n: int, stops: list[str], sharpness: float, context: int
) -> None:
    ids = TOKENIZER.encode(prompt + prompt[:8])
    alone, guessing = (Chain(sharpness=sharpness, max_context=context) for _ in range(2))
    expected, found = stream(alone, ids, None, sampling, n, stops), stream(guessing, ids, Free(), sampling, n, stops)
    assert outcome(found) == outcome(expected)
    done, tokens = found.generation.speculated, len(found.generation.token_ids)
    assert expected.generation.speculated is None and done is not None
    assert done.drafted == sum(guessing.calls[1:]) - done.forwards  # a forward feeds one token that stands, and its guesses
    assert done.accepted <= done.drafted and len(guessing.calls) <= len(alone.calls)
    assert sum(guessing.calls) <= sum(alone.calls) + done.drafted and tokens <= n


def test_what_is_held_of_a_sequence_is_what_stands() -> None:
    engine = Chain(TOKENIZER.encode("abcdabcx", add_special=False), sharpness=50)
    held: list[FakeSequence] = []
    engine.sequence = lambda adapter=None: held.append(FakeSequence()) or held[-1]  # type: ignore[method-assign,func-returns-value]
    prompt = TOKENIZER.encode("abcdabcxabcdabc")
    found = stream(engine, prompt, Free(), Sampling(temperature=0), n=60)
    for _ in found:
        pass
    fed = [*prompt, *found.generation.token_ids]
    assert held[0] == fed[: len(held[0])] and len(held[0]) == len(fed) - 1
    done = found.generation.speculated
    assert done is not None and 0 < done.accepted < done.drafted


def test_tokens_that_end_a_text_are_not_fed() -> None:
    guesses = Speculation(Free(), ends={7}).draft([1, 2, 3, 7, 4, 1, 2], 20)
    assert guesses == [3]
    assert Speculation(Free(), ends={3}).draft([1, 2, 3, 7, 4, 1, 2], 20) == []


def test_sampled_text_has_the_distribution_of_the_definition() -> None:
    """Texts of four tokens after a prompt that repeats, against the product of their probabilities, and with guesses against without."""
    prompt, sampling, n = TOKENIZER.encode("aabacadbbcbdccddaab"), Sampling(temperature=0.9, top_p=0.97), 4000
    engine = Chain(sharpness=1.0)
    counts, drafted, accepted = (Counter(), Counter()), 0, 0
    for which, costs in enumerate((Free(), None)):
        for i in range(n):
            s = stream(engine, prompt, costs, Sampling(temperature=0.9, top_p=0.97, seed=2 * i + which), n=4)  # no seed serves both
            counts[which][tuple(outcome(s)[1])] += 1
            if (done := s.generation.speculated) is not None:
                drafted, accepted = drafted + done.drafted, accepted + done.accepted
    assert n < drafted and 0.1 * drafted < accepted < 0.9 * drafted  # right ones and wrong ones

    expected: dict[tuple[int, ...], float] = {}

    def follow(text: tuple[int, ...], p: float) -> None:
        if len(text) == 4:
            expected[text] = p
            return
        for token, q in definition(engine.row([*prompt, *text][-2:], 0), sampling).items():
            if token == BOS:
                expected[text] = expected.get(text, 0.0) + p * q
            else:
                follow((*text, token), p * q)

    follow((), 1.0)
    assert abs(sum(expected.values()) - 1) < 1e-9
    for found in counts:
        assert set(found) <= set(expected)
        for text, p in expected.items():  # six standard deviations of a binomial count, as for the sampler itself
            assert abs(found[text] - n * p) <= 6 * math.sqrt(n * p * (1 - p)) + 1e-9, text
    # Both are as likely from one distribution: chi-square over the texts that are common enough, the others together as one more.
    common = [text for text, p in expected.items() if n * p >= 10]
    rows = np.array([[*(found[text] for text in common), n - sum(found[text] for text in common)] for found in counts], np.float64)
    means = rows.mean(axis=0)
    statistic, freedom = float((((rows - means) ** 2) / np.maximum(means, 1e-9)).sum()), rows.shape[1] - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)  # mean and standard deviation of chi-square


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The engine's own time instead of the machine's."""
    here = SimpleNamespace(engine=None)
    monkeypatch.setattr(generation.time, "perf_counter", lambda: here.engine.now)
    return here


def seconds(clock: SimpleNamespace, script: Sequence[int], cost: Any, costs: Costs | None, n: int) -> float:
    clock.engine = Chain(script, sharpness=50, max_context=5000, cost=cost)
    s = stream(clock.engine, TOKENIZER.encode("abcd"), costs, Sampling(temperature=0), n=n)
    assert len(outcome(s)[1]) == n
    return clock.engine.now


REPEATING = list(np.random.default_rng(0).integers(1, VOCAB, size=60))
PROSE = list(np.random.default_rng(1).choice(A, size=1000))  # every two and three of four letters come again, and nothing follows from them


def test_cheap_guesses_pay_where_the_text_repeats(clock: SimpleNamespace) -> None:
    cost = lambda n: 1 + 0.05 * (n - 1)  # noqa: E731
    alone, guessing = (seconds(clock, REPEATING, cost, costs, 600) for costs in (None, Costs()))
    assert guessing < alone / 4


@pytest.mark.parametrize("dear", [1.0, 1.5])
@pytest.mark.parametrize("script", [REPEATING, PROSE])
def test_it_stops_where_it_loses(clock: SimpleNamespace, script: Sequence[int], dear: float) -> None:
    """Forwards that take as long as their tokens one after another, or longer: what is lost is what may be, and one forward."""
    cost = lambda n: 1 + dear * (n - 1)  # noqa: E731
    alone, guessing = (seconds(clock, script, cost, costs, 900) for costs in (None, Costs()))
    assert guessing <= 1.04 * alone + 2 + SIZES[-1] * (dear - 1)
    cheap = lambda n: 1 + 0.2 * (n - 1)  # noqa: E731
    alone, guessing = (seconds(clock, PROSE, cheap, costs, 900) for costs in (None, Costs()))
    assert guessing <= 1.03 * alone


def test_it_comes_back_when_the_text_repeats_again(clock: SimpleNamespace) -> None:
    cost = lambda n: 1 + 0.1 * (n - 1)  # noqa: E731
    script = [*PROSE[:600], *REPEATING * 10]
    costs = Costs()
    first, both = (seconds(clock, script, cost, Costs() if n == 500 else costs, n) for n in (500, 1100))
    assert both - first < 100 + (1100 - 600) / 3


def test_costs_are_what_is_measured() -> None:
    costs = Costs()
    assert costs.sizes == []
    for seconds in (9.0, 1.0, 1.1):  # the first touches memory
        costs.record(1, seconds)
    assert costs.one_s == 1.0
    for seconds in (5.0, 2.0, 2.0):
        costs.record(4, seconds)
    sizes = dict(costs.sizes)
    assert sizes[4] == 2.0 and sizes[3] < 2.0 < sizes[6] < sizes[32]
    costs.record(4, 1000.0)  # something else ran
    assert dict(costs.sizes)[4] <= 2.2
    for _ in range(60):
        costs.record(4, 3.0)
    assert dict(costs.sizes)[4] == pytest.approx(3.0, rel=0.01)
    for _ in range(16 * 10):
        costs.record(1, 1.0)
    assert 0.75 * 3.0 <= dict(costs.sizes)[4] < 0.95 * 3.0  # to be tried again


@pytest.mark.parametrize("speculate", ["yes", None, 1])
def test_other_values_are_refused(speculate: Any) -> None:
    model = TernaryTransformer(Chain(), TOKENIZER)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as error:
        model.generate("a", speculate=speculate)
    assert str(error.value) == f"speculate is {speculate!r}; expected True, False or 'auto'"


REPEATS = "The little fox saw a red ball. The little fox said: I want the red ball. The little fox saw a red ball. "


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 0.7, "seed": 1}, {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.1}]
)
def test_the_embedded_model_says_the_same(sampling: dict[str, Any], threads: int) -> None:
    model = TernaryTransformer.from_pretrained(threads=threads)
    model._costs = Free()
    prompt = REPEATS * 8  # the page of keys and values that holds 256 tokens ends among the new ones
    alone = model.generate(prompt, max_new_tokens=100, speculate=False, **sampling)
    found = model.generate(prompt, max_new_tokens=100, **sampling)
    assert found.token_ids == alone.token_ids and found.text == alone.text and alone.speculated is None
    assert found.speculated is not None and found.speculated.accepted > 0
    assert found.speculated.drafted > found.speculated.accepted or sampling["temperature"] == 0


def test_adapters_say_the_same() -> None:
    model = TernaryTransformer.from_pretrained(threads=2)
    model.adapters["one"], model._costs = random_adapter(model.engine, 8, seed=1), Free()
    asked: dict[str, Any] = {"adapter": "one", "max_new_tokens": 100, "temperature": 0}
    alone, found = model.generate(REPEATS * 8, speculate=False, **asked), model.generate(REPEATS * 8, **asked)
    assert found.token_ids == alone.token_ids and found.speculated is not None and found.speculated.accepted > 0
    assert not np.array_equal(model.logits([1, 2], adapter="one"), model.logits([1, 2]))


def test_windows_of_attention(tmp_path: Any) -> None:
    random_models = pytest.importorskip("random_models", reason="torch or transformers is not installed (extra [train])")
    from bitnet.models import open_checkpoint
    from bitnet.weights import load_engine

    engine = load_engine(open_checkpoint(random_models.save(random_models.gemma3_text(seed=1), tmp_path)), threads=2)
    assert engine.config.sliding_window and any(engine.config.windowed)
    prompt = [5, 6, 7, 8, 9, 10] * 8
    texts = []
    for costs in (None, Free()):
        s = GenerationStream(
            engine,
            TOKENIZER,
            list(prompt),
            max_new_tokens=60,
            sampling=Sampling(temperature=1.0, seed=4),
            stops=(),
            load_s=0.0,
            costs=costs,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(TOKENIZER), "stream", lambda self, ids: SimpleNamespace(push=lambda t: "x", flush=lambda: ""))
            texts.append(outcome(s)[1])
    assert texts[0] == texts[1] and len(texts[0]) > 10
