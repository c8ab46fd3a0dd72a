"""The loop that turns a prompt into text: prefill in chunks, pick a token, decode it, until something ends it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict

from bitnet.sampling import Sampler, Sampling
from bitnet.speculation import Costs, Speculated, Speculation

if TYPE_CHECKING:
    from bitnet.engine import Adapter, Engine
    from bitnet.engine import Sequence as Cache
    from bitnet.prefix_cache import PrefixCache
    from bitnet.tokenizer import Tokenizer

PREFILL_CHUNK = 512  # prompt tokens per forward call
FinishReason = Literal["stop", "length"]


class Timings(TypedDict):
    """Seconds and rates of one generation. A rate is None where nothing was measured (a single token has no decoding rate)."""

    load_s: float  # of the model, before this generation
    prompt_tokens: int
    prefill_tok_s: float | None  # of the tokens that no earlier generation had read
    time_to_first_token_s: float | None  # from the start of the generation to the first picked token
    generated_tokens: int
    decode_tok_s: float | None  # tokens after the first, over the time spent on them (not on whoever reads the stream)
    ms_per_token: float | None


@dataclass(frozen=True)
class Generation:
    """A generated text. `finish_reason`: "stop" (end of text or a stop string), "length", None if it was interrupted."""

    text: str
    token_ids: list[int] = field(repr=False)  # without the end-of-text token
    finish_reason: FinishReason | None
    timings: Timings = field(repr=False)
    reused_tokens: int = field(default=0, repr=False)  # of the prompt, that an earlier generation had read
    speculated: Speculated | None = field(default=None, repr=False)  # None where nothing was to be guessed


class StopFilter:
    """Passes text on, up to the first stop string, holding back a tail that may still become one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is now sure to stand before any stop string."""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The held-back tail: the text ended, so it is no stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class GenerationStream(Iterator[str]):
    """Iterates over the pieces of a text as they are generated. `generation` is what there is so far, also after an interruption."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stops: Sequence[str],
        load_s: float,
        adapter: Adapter | None = None,
        costs: Costs | None = None,
        sampler: Sampler | None = None,
        prefixes: PrefixCache | None = None,
    ):
        """`costs`: of the model's forwards, to speculate by; None: token after token. `sampler`: instead of a `Sampler` of `sampling`.
        `prefixes`: where what was computed is looked for, and kept."""
        count = min(max_new_tokens, engine.config.max_context - len(prompt_ids))
        speculation = None if costs is None else Speculation(costs, tokenizer.eos_ids)
        picking = sampler or Sampler(sampling)
        self._loop = _Loop(engine, tokenizer, adapter, prefixes, prompt_ids, count, picking, speculation, StopFilter(stops))
        self._load_s = load_s
        self._text: list[str] = []
        self._pieces = self._loop.run()

    def __next__(self) -> str:
        piece = next(self._pieces)
        self._text.append(piece)
        return piece

    def close(self) -> None:
        """End here. What was computed is kept for later prompts that begin alike, and the memory of the rest is given back."""
        self._pieces.close()

    @property
    def generation(self) -> Generation:
        """The text so far, and all of it once the iteration has ended."""
        loop = self._loop
        speculated = None if loop.speculation is None else loop.speculation.speculated
        return Generation("".join(self._text), list(loop.ids), loop.finish_reason, loop.timings(self._load_s), loop.reused, speculated)


@dataclass(eq=False)
class _Loop:
    """What a stream runs and reports. It does not know the stream, so one that nobody holds any longer is closed at once."""

    engine: Engine
    tokenizer: Tokenizer
    adapter: Adapter | None
    prefixes: PrefixCache | None
    prompt_ids: list[int]
    max_new_tokens: int
    sampler: Sampler
    speculation: Speculation | None
    stop_filter: StopFilter
    ids: list[int] = field(default_factory=list)  # so far
    finish_reason: FinishReason | None = None
    reused: int = 0  # tokens of the prompt
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0

    def run(self) -> Generator[str, None, None]:
        """The loop, and what it computed is kept for later ones that begin alike."""
        if self.prefixes is None:
            yield from self.generate(self.engine.sequence(self.adapter), list(self.prompt_ids))
            return
        start = time.perf_counter()
        cache, history = self.prefixes.begin(self.prompt_ids, self.adapter), list(self.prompt_ids)
        self.reused = len(cache)
        self.prefill_s = time.perf_counter() - start
        try:
            yield from self.generate(cache, history)
        finally:
            self.prefixes.keep(history, cache)

    def generate(self, cache: Cache, history: list[int]) -> Iterator[str]:
        """Yields non-empty pieces; time outside of it (between two yields) is not counted. `history`: the prompt, to which it adds."""
        decoder = self.tokenizer.stream(self.prompt_ids)
        start = time.perf_counter()
        for at in range(len(cache), len(self.prompt_ids), PREFILL_CHUNK):
            logits = self.engine.forward([(cache, self.prompt_ids[at : at + PREFILL_CHUNK])])
        token = self.sampler.pick(logits[0], history)
        if self.prefixes is not None:
            self.prefixes.keep(self.prompt_ids, cache, full_pages=True)
        self.prefill_s += time.perf_counter() - start
        with closing(self.following(cache, history)) as following:  # which leaves no wrong guess in the cache, however this ends
            while True:
                if token in self.tokenizer.eos_ids:
                    self.finish_reason = "stop"
                    break
                self.ids.append(token)
                history.append(token)
                piece = self.stop_filter.push(decoder.push(token))
                if piece:
                    yield piece
                if self.stop_filter.stopped:
                    self.finish_reason = "stop"
                    return
                if len(self.ids) == self.max_new_tokens:
                    self.finish_reason = "length"
                    break
                token = next(following)
        tail = self.stop_filter.push(decoder.flush())
        if self.stop_filter.stopped:
            self.finish_reason = "stop"
        tail += self.stop_filter.flush()
        if tail:
            yield tail

    def following(self, cache: Cache, history: list[int]) -> Generator[int, None, None]:
        """The tokens after `history`, to which whoever takes one appends it."""
        speculation = self.speculation
        while True:
            start = time.perf_counter()
            guesses = speculation.draft(history, self.max_new_tokens - len(self.ids) - 1) if speculation else []
            fed = time.perf_counter()
            logits = self.engine.forward([(cache, [history[-1], *guesses])], all_logits=True)
            forward_s = time.perf_counter() - fed
            right = 0  # guesses so far
            try:
                while True:
                    token = self.sampler.pick(logits[right], history)
                    last = right == len(guesses) or token != guesses[right]
                    self.decode_s += time.perf_counter() - start
                    self.decode_steps += 1
                    yield token
                    if last:
                        break
                    start = time.perf_counter()
                    right += 1
            finally:
                if speculation:
                    speculation.record(len(guesses), right, forward_s)
                if guesses:
                    cache.truncate(len(cache) - len(guesses) + right)

    def timings(self, load_s: float) -> Timings:
        decode = self.decode_steps / self.decode_s if self.decode_s > 0 else None
        return Timings(
            load_s=load_s,
            prompt_tokens=len(self.prompt_ids),
            prefill_tok_s=(len(self.prompt_ids) - self.reused) / self.prefill_s if self.prefill_s > 0 else None,
            time_to_first_token_s=self.prefill_s or None,
            generated_tokens=len(self.ids),
            decode_tok_s=decode,
            ms_per_token=1000 / decode if decode else None,
        )
