"""What speculation gains: a text that a model would write after a prompt is replayed with guesses and without, in turns.

Random weights repeat nothing by themselves, and other models write other texts. So whatever the logits say, the sampler picks the replayed
text's next token. All else is a generation as it always is: every forward is computed, every token picked, every guess made and checked.
Acceptance is that of a model which would write this text; the cost is real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import UsageError
from bitnet.generation import GenerationStream
from bitnet.sample import text
from bitnet.sampling import Sampler, Sampling
from bitnet.speculation import Costs

if TYPE_CHECKING:
    from bitnet.engine import Engine
    from bitnet.tokenizer import Tokenizer

DIVIDER = "=====\n"  # a line between prompt and text

LEAST_TOKENS = 64  # of a text, for a rate


@dataclass(frozen=True)
class Replay:
    """A prompt and the text that follows it. `name`: what it is."""

    name: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Gain:
    """Medians over rounds, decoding only. Rates in tokens/s."""

    name: str
    prompt_tokens: int
    tokens: int  # replayed
    decode_tok_s: float
    decode_tok_s_alone: float  # without speculation
    speedup: float
    first_speedup: float  # of the first round, in which the costs of forwards were not known yet
    tokens_a_forward: float
    drafted: int  # guesses checked in the last round
    acceptance: float | None  # the share of them that was right
    speedups: list[float] = field(repr=False)  # of each round


def builtin() -> list[Replay]:
    """A summary that quotes its document, a file of code with some edits, and for comparison a story that goes on and repeats nothing."""
    folder = resources.files("bitnet") / "bench" / "replays"
    story = text()
    cut = story.index(". ", len(story) // 4) + 1
    found = [parse(name, (folder / f"{name}.txt").read_text(encoding="utf-8")) for name in ("summary", "edit")]
    return [*found, Replay("story", story[:cut], story[cut:])]


def read(path: str) -> Replay:
    """The prompt and text of a file, with a line ===== between them. Raises `UsageError`."""
    try:
        return parse(path, Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def parse(name: str, content: str) -> Replay:
    """Raises `UsageError` where the line is missing, or nothing before or after it."""
    prompt, _, rest = content.partition("\n" + DIVIDER)
    if not prompt.strip() or not rest.strip():
        raise UsageError(f"{name}: expected a prompt, a line {DIVIDER.strip()}, and the text that follows the prompt")
    return Replay(name, prompt + "\n", rest)


class Replayed(Sampler):
    """Looks at the logits as greedy decoding does, then picks the next of `ids`. `first`: tokens of the prompt."""

    def __init__(self, ids: Sequence[int], first: int):
        super().__init__(Sampling(temperature=0))
        self._ids, self._first = ids, first

    def pick(self, logits: NDArray[np.float32], history: Sequence[int] = ()) -> int:
        super().pick(logits, history)
        return self._ids[len(history) - self._first]


def measure(
    engine: Engine, tokenizer: Tokenizer, replay: Replay, rounds: int
) -> Gain:  # fmt: skip
    """Replays the text `rounds` times with speculation and without, in turns.

    Raises `UsageError` where the context holds less than the prompt and LEAST_TOKENS of the text, which is cut to what it holds.
    """
    if rounds < 1:
        raise UsageError(f"repetitions is {rounds}; expected a whole number >= 1")
    prompt = tokenizer.encode(replay.prompt)
    ids = tokenizer.encode(replay.text, add_special=False)
    context = engine.config.max_context
    if len(prompt) + min(LEAST_TOKENS, len(ids)) > context:
        raise UsageError(
            f"{replay.name} has a prompt of {len(prompt)} tokens and a text of {len(ids)}; the model's context holds {context}"
        )
    ids = ids[: context - len(prompt)]
    costs = Costs()

    def decode(known: Costs | None) -> GenerationStream:
        stream = GenerationStream(
            engine, tokenizer, prompt, max_new_tokens=len(ids), sampling=Sampling(temperature=0), stops=(), load_s=0.0, costs=known,
            sampler=Replayed(ids, len(prompt)),
        )  # fmt: skip
        for _ in stream:
            pass
        return stream

    rates: list[tuple[float, float]] = []
    for _ in range(rounds):
        alone, guessing = decode(None).generation, decode(costs).generation
        assert alone.token_ids == guessing.token_ids == ids
        rates.append((guessing.timings["decode_tok_s"] or 0.0, alone.timings["decode_tok_s"] or 0.0))
    did = guessing.speculated
    assert did is not None
    speedups = [a / b for a, b in rates]
    return Gain(
        replay.name, len(prompt), len(ids), median(a for a, _ in rates), median(b for _, b in rates), median(speedups), speedups[0],
        (len(ids) - 1) / max(1, did.forwards), did.drafted, did.accepted / did.drafted if did.drafted else None, speedups,
    )  # fmt: skip


def row(gain: Gain | None = None) -> str:
    """One line of the table; without a measurement, its heads."""
    if gain is None:
        heads = f"{'alone':>9} {'tokens/s':>9} {'gain':>7} {'first':>7} {'a forward':>9} {'right':>6}"
        return f"  {'text':<10} {'prompt':>6} {'tokens':>6} {heads}"
    right = "-" if gain.acceptance is None else f"{gain.acceptance:.0%}"
    return (
        f"  {gain.name:<10} {gain.prompt_tokens:>6} {gain.tokens:>6} {gain.decode_tok_s_alone:>9,.1f} {gain.decode_tok_s:>9,.1f} "
        f"{gain.speedup:>5.2f} x {gain.first_speedup:>5.2f} x {gain.tokens_a_forward:>9.2f} {right:>6}"
    )
