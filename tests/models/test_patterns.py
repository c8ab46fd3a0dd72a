"""Patterns against Python's own `re`, on names so short that its backtracking ends; and what would keep that busy for ever."""

from __future__ import annotations

import random
import re

import pytest

from bitnet.errors import UnsupportedModelError
from bitnet.models.patterns import suffix_pattern

NAMES = ["a.b", "aab.ab", "q", "a", "aaa", "ab.ba.1", "l0.q", ".a", "b.", "model.layers.1.mlp.up_proj"]
ATOMS = ["a", "b", ".", r"\.", r"\d", r"\w", r"\S", "[ab]", "[^a]", "[a-c.]", r"[\]\d]", "q", "l", "1", "0", "_", "{"]
TIMES = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "+?"]


def drawn(rng: random.Random, depth: int = 0) -> str:
    def part() -> str:
        if depth < 2 and rng.random() < 0.25:
            return rng.choice(["(", "(?:"]) + drawn(rng, depth + 1) + ")" + rng.choice(TIMES)
        if rng.random() < 0.1:
            return rng.choice(["^", "$", "layers", "up_proj"])
        return rng.choice(ATOMS) + rng.choice(TIMES)

    return "|".join("".join(part() for _ in range(rng.randint(depth == 0, 3))) for _ in range(rng.choice([1, 1, 2])))


def test_as_python_matches() -> None:
    rng, matched = random.Random(0), 0
    for _ in range(1500):
        pattern = drawn(rng)
        theirs, ours = re.compile(rf"(.*\.)?({pattern})$"), suffix_pattern(pattern, "x")
        for name in NAMES[: 9 if re.search(r"[*+}].*[*+}]", pattern) else 10]:
            expected = theirs.match(name) is not None
            assert ours(name) == expected, (pattern, name)
            matched += expected
    assert matched > 1000


@pytest.mark.parametrize("pattern", ["(a+)+b", "((a*)*)*b", "(a|a)*b", "(.*.*)*x", "(((a{1,50}){1,50}){1,50})b"])
def test_what_python_would_never_end(pattern: str) -> None:
    assert not suffix_pattern(pattern, "x")("a" * 60)


REFUSED = {
    "(?=q)q": "x has a group that looks around", "(?P<n>q)": "has a group that looks around, is named", r"(q)\1": r"x has '\\\\1' where",
    "(q": "opens a bracket that it does not close", "q)": "closes a bracket that it does not open", "*q": r"has '\*' where",
    "[q": r"has '\[' where", "q++": "after a repetition", "q{3,2}": r"repeats by \{3,2\}", "q{2000}": "expected at most 1000 times",
    "[b-a]": "is no regular expression",
    "((((q))))": "nests more than 4 deep", "q" * 300 + "+" * 300: "has 600 characters; expected at most 512",
}  # fmt: skip


@pytest.mark.parametrize("pattern", REFUSED, ids=[p[:20] for p in REFUSED])
def test_what_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[pattern]):
        suffix_pattern(pattern, "x")
