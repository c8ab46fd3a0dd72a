"""Speculation by prompt lookup: what followed the same tokens before is guessed to follow again, and one forward checks several guesses.

A forward over a few tokens reads the weights once, so it costs little more than one over a single token (Leviathan et al.,
arXiv:2211.17192, where a smaller model guesses; that the text itself can: Yang et al., arXiv:2304.04487, Saxena's prompt lookup decoding).
Every token is still picked by the sampler, from the logits that all tokens before it give and with its own draw; a guess only says whose
logits are computed along. Those are the same bits in any batch, so the text is the same token for token, whatever is guessed.

How many guesses a forward takes is what pays by two measurements: how often guesses were right after a match of that length, those that
were never checked included, and what forwards of each size took. Where that misleads, an account of what was lost ends it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # tokens of a checking forward: few different ones, so that the cost of each is soon known
# What they are thought to take until they are measured, in forwards of one token; low, for only what is tried is measured.
_UNMEASURED = dict(zip((1, *SIZES), (1.0, 1.1, 1.2, 1.4, 1.5, 1.6, 1.8, 2.0, 2.6, 3.2), strict=True))
_TRIES = 3  # measurements until a cost is believed against its neighbours
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of matches, from which on they are counted apart
_LONGEST = _LENGTHS[-1]
_KIND = [bisect_right(_LENGTHS, length) for length in range(_LONGEST + 1)]  # matched tokens -> the count they fall in
_MEMORY = 24  # guesses that a rate of success remembers
_SHORTEST = 2  # tokens that a match begins with
_CHAIN = 8  # earlier places where they stand, which are compared
_QUICK_S = 5e-4  # a token that takes less: looking after every one of them would show,
_PAUSE = 6  # so after a look that finds nothing to guess so many pass without one
_WORTH = 1.1  # times the tokens a second that guesses must promise: both measurements are rough
_CREDIT = 2.0, 8.0  # forwards of one token that guessing may lose at first, and of its gains at most
_INTEREST = 0.01, 0.03  # that it may lose again for each token decoded without guesses, and for each that would have been guessed


@dataclass(frozen=True)
class Speculated:
    """What guessing did for one generation."""

    forwards: int  # that decoded, with guesses or without
    drafted: int  # guesses that were checked
    accepted: int  # and right


class Lookup:
    """Finds the longest earlier occurrence of the last tokens, as LZ77 does: a chain of the places where the last two stand."""

    def __init__(self, ids: Sequence[int]):
        self.ids = list(ids)
        self.source = 0  # where in ids the guesses begin; 0: there are none
        self.matched = 0  # tokens before it that the last tokens repeat, counted up to _LONGEST; 0 just after a guess that was wrong
        self._latest: dict[tuple[int, int], int] = {}  # two tokens -> the number of tokens up to where they stand last
        self._earlier = [0, 0]  # that number -> the one where the same two stand before; 0: nowhere
        for n in range(2, len(self.ids) + 1):
            self._enter(n)
        if len(self.ids) >= _SHORTEST:
            self._find()

    def push(self, token: int) -> None:
        """One more token at the end."""
        ids, source = self.ids, self.source
        ids.append(token)
        n = len(ids)
        if n > 1:
            self._enter(n)
        right = source > 0 and ids[source] == token
        if right and self.matched >= _SHORTEST:  # the longest match stays the longest
            self.source += 1
            if self.matched < _LONGEST:
                self.matched += 1
            return
        matched = self.matched
        self._find()
        if source and not self.source and (right or matched):  # one token in another's place: what follows may be the same again
            self.source, self.matched = source + 1, matched + 1 if right else 0

    def guesses(self, count: int) -> list[int]:
        """The next `count` tokens as they followed before; past the end the repetition goes on."""
        period = len(self.ids) - self.source
        return [self.ids[self.source + i % period] for i in range(count)]

    def _enter(self, n: int) -> None:
        pair = (self.ids[n - 2], self.ids[n - 1])
        self._earlier.append(self._latest.get(pair, 0))
        self._latest[pair] = n

    def _find(self) -> None:
        ids, n = self.ids, len(self.ids)
        self.source = self.matched = 0
        at = self._earlier[n]
        for _ in range(_CHAIN):
            if not at:
                break
            length = _SHORTEST
            while length < _LONGEST and length < at and ids[at - 1 - length] == ids[n - 1 - length]:
                length += 1
            if length > self.matched:
                self.source, self.matched = at, length
            at = self._earlier[at]


class Costs:
    """What a forward of one sequence takes by its number of tokens. One for a model: measurements serve all its generations."""

    def __init__(self) -> None:
        self.one_s = 0.0  # for a single token; 0: not measured
        self.sizes: list[tuple[int, float]] = []  # (tokens, what they take in forwards of one token)
        self._seconds: dict[int, float] = {}
        self._tries: dict[int, int] = {}
        self._fade = dict.fromkeys(SIZES, 1.0)

    def record(self, tokens: int, seconds: float) -> None:
        """A measurement. The least of the first few counts, later ones move it in small steps: a disturbance is no cost."""
        tries = self._tries[tokens] = self._tries.get(tokens, 0) + 1
        known = self._seconds.get(tokens, seconds)
        step = min(seconds - known, 0) if tries <= _TRIES else max(-known, min(known, 4 * (seconds - known))) / 16
        self._seconds[tokens] = known = max(known + step, 1e-9)
        if tokens == 1:
            self.one_s = known
            if tries % 16 != 1:
                return
            for size in SIZES:  # a cost that kept its size from being tried is believed a little less each time
                self._fade[size] = max(0.75, 0.99 * self._fade[size])
        elif tokens in self._fade:
            self._fade[tokens] = 1.0
        if self.one_s > 0:
            self.sizes = self._relative()

    def _relative(self) -> list[tuple[int, float]]:
        found, below = [], (1, 1.0)
        for size in SIZES:
            cost = thought = below[1] + _UNMEASURED[size] - _UNMEASURED[below[0]]
            if size in self._seconds:
                measured = self._seconds[size] / self.one_s
                cost = self._fade[size] * (min(measured, thought) if self._tries[size] < _TRIES else measured)
                below = (size, measured)
            found.append((size, cost))
        return found


class Speculation:
    """The guesses of one generation, and whether they pay. `costs`: of the model; `ends`: tokens that end a text and are never fed."""

    def __init__(self, costs: Costs, ends: Collection[int] = ()):
        self._costs, self._ends = costs, ends
        self._lookup: Lookup | None = None
        # How often the next guess was right after a match of each kind, and how many guesses that stands for. What is thought at first:
        self._rates = [0.2, *(length / (length + 3) for length in _LENGTHS)]
        self._weights = [4] * len(self._rates)
        self._credit = _CREDIT[0]
        self._look_at = 0  # tokens of the history from which on there are guesses again
        self._forwards = self._drafted = self._accepted = 0

    @property
    def speculated(self) -> Speculated:
        """What was done so far."""
        return Speculated(self._forwards, self._drafted, self._accepted)

    def draft(self, history: Sequence[int], most: int) -> list[int]:
        """Up to `most` guesses of what follows `history`, the prompt and the text up to now: as many as bring the most tokens a second,
        none where that is a token alone."""
        if len(history) < self._look_at:
            return []
        lookup = self._lookup
        if lookup is None:
            lookup = self._lookup = Lookup(history)
        for at in range(len(lookup.ids), len(history)):
            self._push(lookup, history[at])
        if self._costs.one_s < _QUICK_S:
            self._look_at = len(history) + _PAUSE
        if not lookup.source or self._credit <= 0:
            return []
        rates, matched = self._rates, lookup.matched
        best, chosen, tokens, expected, right = _WORTH, 0, 1, 1.0, 1.0
        for size, cost in self._costs.sizes:
            if size > most + 1 or right < 0.02:
                break
            while tokens < size:
                right *= rates[_KIND[min(matched, _LONGEST)]]
                expected += right
                tokens, matched = tokens + 1, matched + 1
            if expected > best * cost:
                best, chosen = expected / cost, size - 1
        if not chosen:
            return []
        self._look_at = 0
        guesses = lookup.guesses(chosen)
        return next((guesses[:i] for i, token in enumerate(guesses) if token in self._ends), guesses)

    def record(self, guesses: int, accepted: int, seconds: float) -> None:
        """A forward of one token and so many guesses, of which so many were right."""
        self._forwards += 1
        if not guesses and self._forwards % _PAUSE and seconds < _QUICK_S:
            return
        self._costs.record(1 + guesses, seconds)
        if guesses:
            self._drafted += guesses
            self._accepted += accepted
            self._credit = min(_CREDIT[1], self._credit + 1 + accepted - seconds / self._costs.one_s)
        elif self._credit < _CREDIT[0]:
            self._credit += _INTEREST[0]

    def _push(self, lookup: Lookup, token: int) -> None:
        """One more token, which what would have been guessed is held against, fed or not."""
        if lookup.source:
            kind = _KIND[lookup.matched]
            weight = self._weights[kind]
            right = lookup.ids[lookup.source] == token
            self._rates[kind] += (right - self._rates[kind]) / weight
            if self._credit < 0:
                self._credit += _INTEREST[1] * right
            if weight < _MEMORY:
                self._weights[kind] = weight + 1
        lookup.push(token)
