"""Pages that requests share: the same bits as without, never another's tokens, and no more memory than allowed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from bitnet import TernaryTransformer
from bitnet.engine import Engine, Sequence
from bitnet.errors import UsageError
from bitnet.kv import KvFormat
from bitnet.prefix_cache import PAGE_TOKENS, PrefixCache
from bitnet.shapes import SHAPES, Shape, random_adapter, random_engine
from bitnet.speculation import SIZES, Costs

VOCABULARY = 64
FORMATS = [KvFormat(), KvFormat(4, 4), KvFormat(8, 4, rotate=False)]


@pytest.fixture(scope="module", params=FORMATS, ids=lambda kv: kv.name)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    SHAPES["tiny"] = Shape(2, 32, 32, 2, 1, VOCABULARY, 16, context=4096)
    try:
        made = random_engine("tiny", threads=1, head="f16")
    finally:
        del SHAPES["tiny"]
    made.kv = request.param
    yield made


def page_bytes(engine: Engine) -> int:
    return PAGE_TOKENS * engine.kv_bytes_per_token


def tokens(n: int, seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(VOCABULARY, size=n)]


def read(engine: Engine, sequence: Sequence, prompt: list[int]) -> np.ndarray:
    """Logits after the prompt, of which the sequence may hold a part."""
    return engine.forward([(sequence, prompt[len(sequence) :])])[0]


def fresh(engine: Engine, prompt: list[int]) -> np.ndarray:
    return read(engine, engine.sequence(), prompt)


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 600])
@pytest.mark.parametrize("same", [0, 1, 100, 256, 300, 10_000])
def test_a_request_starts_where_an_earlier_one_agrees(engine: Engine, n: int, same: int) -> None:
    prefixes, first = PrefixCache(engine, 100 * page_bytes(engine)), tokens(600, 1)
    sequence = prefixes.begin(first)
    assert len(sequence) == 0
    before = read(engine, sequence, first)
    prefixes.keep(first, sequence)
    prompt = first[: min(same, n)] + [(t + 1) % VOCABULARY for t in first[min(same, n) : n]]
    second = prefixes.begin(prompt)
    assert len(second) == min(same, n - 1)
    assert np.array_equal(read(engine, second, prompt), fresh(engine, prompt))
    # neither disturbs the other: both go on
    for step in tokens(5, 2):
        first.append(step), prompt.append(step)
        assert np.array_equal(read(engine, sequence, first), fresh(engine, first))
        assert np.array_equal(read(engine, second, prompt), fresh(engine, prompt))
    assert np.array_equal(read(engine, prefixes.begin(first[:600]), first[:600]), before)


def test_pages_are_shared_and_counted_once(engine: Engine) -> None:
    prefixes, prompt = PrefixCache(engine, 100 * page_bytes(engine)), tokens(700, 1)
    for tail in range(5):
        request = prompt + tokens(3, 10 + tail)
        sequence = prefixes.begin(request)
        read(engine, sequence, request)
        prefixes.keep(request, sequence)
    assert len(prefixes) == 2 + 5 and prefixes.nbytes == 7 * page_bytes(engine)  # two whole pages, and five ends of the third
    longer = prompt + tokens(3, 10) + [1]
    sequence = prefixes.begin(longer)
    read(engine, sequence, longer)
    prefixes.keep(longer, sequence)
    prefixes.keep(longer[:-2], sequence)
    assert len(prefixes) == 7  # it took the place of the one that it goes on from
    prefixes.clear()
    assert len(prefixes) == prefixes.nbytes == len(prefixes.begin(prompt)) == 0


def test_a_conversation_goes_on_from_its_first_short_page(engine: Engine) -> None:
    prefixes, text = PrefixCache(engine, 2 * page_bytes(engine)), tokens(20, 1)
    for turn in range(4):  # each ends in the first page, whose only page the next one's takes the place of
        sequence = prefixes.begin(text)
        assert len(sequence) == (len(text) - 10 if turn else 0)
        assert np.array_equal(read(engine, sequence, text), fresh(engine, text))
        prefixes.keep(text, sequence)
        assert len(prefixes) == 1 and prefixes.nbytes == page_bytes(engine)
        text = text + tokens(10, 2 + turn)
    for seed in range(20):  # and makes room for others
        other = tokens(300 + seed, seed)
        sequence = prefixes.begin(other)
        assert np.array_equal(read(engine, sequence, other), fresh(engine, other))
        prefixes.keep(other, sequence)
        prefixes.keep(other[:0], sequence)
        assert prefixes.nbytes == len(prefixes) * page_bytes(engine) <= prefixes.budget_bytes


def test_all_pages_are_found_again(engine: Engine) -> None:
    random, budget = np.random.default_rng(5), 5
    prefixes, texts = PrefixCache(engine, budget * page_bytes(engine)), [tokens(n, 1) for n in (3, 250, 256, 300)]
    adapters = [None, random_adapter(engine, 4, seed=1)]
    for _ in range(150):
        text, adapter = texts[random.integers(len(texts))], adapters[random.integers(2)]
        text = text[: random.integers(1, len(text) + 1)] + tokens(int(random.integers(0, 40)), int(random.integers(3)))
        sequence = prefixes.begin(text, adapter)
        assert np.array_equal(read(engine, sequence, text), read(engine, engine.sequence(adapter), text))
        prefixes.keep(text, sequence)
        if random.integers(3) == 0:
            texts[random.integers(len(texts))] = text[:600]
        found, left = 0, list(prefixes._roots.values())
        while left:
            node = left.pop()
            found += len(node.children)
            left += node.children.values()
        assert found == len(prefixes) <= budget and prefixes.nbytes == found * page_bytes(engine)


def test_the_least_recently_used_leave_first(engine: Engine) -> None:
    prefixes = PrefixCache(engine, 5 * page_bytes(engine))
    texts = [tokens(2 * PAGE_TOKENS, seed) for seed in range(3)]

    def request(prompt: list[int]) -> int:
        sequence = prefixes.begin(prompt)
        known = len(sequence)
        assert np.array_equal(read(engine, sequence, prompt), fresh(engine, prompt))
        prefixes.keep(prompt, sequence)
        assert prefixes.nbytes == len(prefixes) * page_bytes(engine) <= prefixes.budget_bytes
        return known

    assert [request(texts[i]) for i in (0, 1, 0, 2)] == [0, 0, 511, 0]
    assert [len(prefixes.begin(text)) for text in texts] == [511, 256, 511]  # the far end of the second one left
    assert request(tokens(9 * PAGE_TOKENS, 4)) == 0
    assert [len(prefixes.begin(text)) for text in texts] == [0, 0, 0]
    assert len(prefixes.begin(tokens(9 * PAGE_TOKENS, 4))) == 5 * PAGE_TOKENS  # of one that is too long, its beginning


def test_what_was_computed_in_another_way_is_not_shared(engine: Engine) -> None:
    prefixes, prompt = PrefixCache(engine, 100 * page_bytes(engine)), tokens(300, 1)
    adapters = [random_adapter(engine, 4, seed=seed) for seed in (1, 2)]
    for adapter in (None, *adapters):
        sequence = prefixes.begin(prompt, adapter)
        assert len(sequence) == 0 and sequence.adapter is adapter
        read(engine, sequence, prompt)
        prefixes.keep(prompt, sequence)
    for adapter in (None, *adapters):
        sequence, alone = prefixes.begin(prompt, adapter), engine.sequence(adapter)
        assert len(sequence) == 299
        assert np.array_equal(read(engine, sequence, prompt), read(engine, alone, prompt))
    was = engine.kv
    engine.kv = KvFormat(8, 8)
    assert len(prefixes.begin(prompt)) == 0
    engine.kv = was
    assert len(prefixes.begin(prompt)) == 299
    engine.center_keys(prompt[:20])
    sequence = prefixes.begin(prompt)
    assert len(sequence) == (299 if engine.kv.key_bits == 16 else 0)
    assert np.array_equal(read(engine, sequence, prompt), fresh(engine, prompt))


def test_an_adapter_that_is_forgotten_leaves_no_page_and_no_weights(engine: Engine) -> None:
    prefixes, prompt = PrefixCache(engine, 100 * page_bytes(engine)), tokens(600, 1)
    adapters = [random_adapter(engine, 4, seed=seed) for seed in (1, 2)]
    for adapter in (None, *adapters):
        for text in (prompt, prompt[:300] + tokens(5, 2)):
            sequence = prefixes.begin(text, adapter)
            read(engine, sequence, text)
            prefixes.keep(text, sequence)
    del sequence
    assert len(prefixes) == 3 * 4
    prefixes.forget(adapters[0])
    assert len(prefixes) == 2 * 4 and prefixes.nbytes == 8 * page_bytes(engine)
    assert [len(prefixes.begin(prompt, adapter)) for adapter in (None, *adapters)] == [599, 0, 599]
    weights = weakref.ref(adapters[1])
    del adapter, adapters
    assert weights() is None and len(prefixes) == 2 * 4


def test_ten_thousand_requests_never_see_another_ones_tokens(engine: Engine) -> None:
    """Conversations that begin alike and differ in one token, the canary, here and there; some go on while others come."""
    rng, budget = np.random.default_rng(0), 24 * page_bytes(engine)
    prefixes = PrefixCache(engine, budget)
    texts: list[list[int]] = [tokens(700, seed) for seed in range(3)]
    for text in texts[:3]:
        for at in (0, 5, 255, 256, 300, 511, 512, 640):  # the same text with a canary
            texts.append([*text[:at], (text[at] + 1) % VOCABULARY, *text[at + 1 :]])
    assert len({fresh(engine, text).tobytes() for text in texts}) == len(texts)  # a canary shows, wherever it is
    lengths = (1, 3, 200, 256, 257, 400, 512, 513, 690, 700)
    alone: dict[tuple[int, int], Sequence] = {}  # computed once, without any sharing
    running: list[tuple[int, int, list[int], Sequence]] = []
    reused = 0
    for _ in range(10_000):
        if running and rng.random() < 0.3:  # one of those goes on, with a token of its own
            which, length, prompt, sequence = running[rng.integers(len(running))]
            prompt.append(int(rng.integers(VOCABULARY)))
        else:
            which, length = int(rng.integers(len(texts))), int(rng.choice(lengths))
            prompt = texts[which][:length] + [int(t) for t in rng.integers(4, size=rng.integers(1, 4))]
            sequence = prefixes.begin(prompt)
            reused += len(sequence) > 0
            running.append((which, length, prompt, sequence))
            if len(running) > 6:
                running.pop(int(rng.integers(len(running))))
        found = read(engine, sequence, prompt)
        prefixes.keep(prompt, sequence)
        if (which, length) not in alone:
            alone[which, length] = engine.sequence()
            engine.forward([(alone[which, length], texts[which][:length])])
        reference = alone[which, length]
        reference.truncate(length)
        assert np.array_equal(found, read(engine, reference, prompt))
        assert prefixes.nbytes <= budget
    assert reused > 5_000


def test_a_budget_below_a_page_is_refused(engine: Engine) -> None:
    one = page_bytes(engine)
    assert PrefixCache(engine, one).budget_bytes == one
    expected = f"prefix_cache_bytes is {one - 1}, and one page of 256 tokens takes {one} bytes in this model; expected at least that"
    with pytest.raises(UsageError, match=expected):
        PrefixCache(engine, one - 1)


class Collecting(list[int]):
    """Tokens in whose midst Python collects the garbage `litter`, as it may anywhere."""

    litter: type

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        cycle = self.litter()
        cycle.itself = cycle
        del cycle
        gc.collect(1)
        return super().__getitem__(key)


def test_a_finalizer_within_a_call_does_not_wait_for_it(engine: Engine) -> None:
    prefixes, prompt = PrefixCache(engine, 100 * page_bytes(engine)), tokens(300, 1)
    sequence, found, within = prefixes.begin(prompt), [], []
    read(engine, sequence, prompt)

    class Litter:
        def __del__(self) -> None:
            within.append(len(prefixes.begin(prompt)))
            prefixes.keep(tokens(300, 2), sequence)
            prefixes.clear()

    def calls() -> None:
        collecting = Collecting(prompt)
        collecting.litter = Litter
        prefixes.keep(collecting, sequence)
        found.append(prefixes.begin(collecting))

    thread = threading.Thread(target=calls, daemon=True)
    thread.start()
    thread.join(10)
    assert found and len(found[0]) == 299 and len(prefixes) == 2 and set(within) == {0} and len(within) >= 4
    assert np.array_equal(read(engine, found[0], prompt), fresh(engine, prompt))
    prefixes.clear()
    assert len(prefixes) == 0


def test_a_stream_that_nobody_holds_is_closed_at_once() -> None:
    model = TernaryTransformer.from_pretrained(threads=1)
    assert model.prefixes is not None
    gc.disable()
    try:
        stream = model.stream("Once upon a time", temperature=0)
        next(stream)
        assert len(model.prefixes) == 0
        del stream
        assert len(model.prefixes) == 1
    finally:
        gc.enable()


@pytest.mark.parametrize("bits", [16, 4])
def test_generations_of_one_model_share(bits: int) -> None:
    prompt = "Once upon a time, there was a little dog. " * 30
    one, without = (TernaryTransformer.from_pretrained(kv_bits=bits, threads=1, prefix_cache_bytes=budget) for budget in (None, 0))
    expected = [without.generate(prompt + end, seed=1, max_new_tokens=40) for end in ("", "The dog", "A cat")]
    found = [one.generate(prompt + end, seed=1, max_new_tokens=40) for end in ("", "The dog", "A cat")]
    assert [a.token_ids for a in found] == [b.token_ids for b in expected]
    reused, sizes = [a.reused_tokens for a in found], [a.timings["prompt_tokens"] for a in found]
    assert reused[0] == 0 and all(r > 0.95 * n for r, n in zip(reused[1:], sizes[1:], strict=True))
    assert [b.reused_tokens for b in expected] == [0, 0, 0] and without.prefixes is None
    stream = one.stream(prompt + "The dog", seed=1, max_new_tokens=40)  # one that is left early, and another in its midst
    assert next(stream) and one.generate(prompt + "The dog", seed=1, max_new_tokens=40).token_ids == expected[1].token_ids
    assert "".join([stream.generation.text, *stream]) == expected[1].text
    stream = one.stream(prompt + "A cat", seed=1)
    next(stream)
    del stream
    assert one.generate(prompt + "A cat", seed=1, max_new_tokens=40).token_ids == expected[2].token_ids


class Wild(Costs):
    """Forwards of any size take the time of one, so that whatever can be guessed is, and mostly wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.one_s, self.sizes = 1.0, [(size, 1.0) for size in SIZES]

    def record(self, tokens: int, seconds: float) -> None:
        pass


@pytest.mark.parametrize("pieces", range(1, 40, 3))
def test_a_stream_left_among_guesses_leaves_none_of_them(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """Whoever stops reading while guesses are in the cache does not hand them to the next request."""
    model = TernaryTransformer.from_pretrained("tinyllm-ternary-v2", threads=1)
    prompt = "Tom has a red ball. Tom has a red ball. Tom has a"
    whole = model.generate(prompt, max_new_tokens=48, temperature=0.9, seed=3, speculate=False)
    assert model.prefixes is not None
    model.prefixes.clear()
    monkeypatch.setattr(model, "_costs", Wild())
    stream = model.stream(prompt, max_new_tokens=48, temperature=0.9, seed=3, speculate=True)
    for _ in range(pieces):
        next(stream)
    stream.close()
    follow_up = model.tokenizer.encode(prompt) + whole.token_ids
    sequence = model.prefixes.begin(follow_up)
    assert len(sequence) >= len(model.tokenizer.encode(prompt)) - 1
    assert np.array_equal(read(model.engine, sequence, follow_up), fresh(model.engine, follow_up))
