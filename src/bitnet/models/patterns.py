"""Regular expressions of other people's files, matched in a time that is bounded whatever they say.

Python's `re` backtracks: `(a+)+b` takes it for ever, and a configuration that came from the Hub may hold just that. Here every part of a
pattern takes the set of places where a match may have come to and gives the set where it may come to next (Thompson, 1968), so a name of
n characters has n + 1 places and nothing more. Read are characters, ., classes, \\d \\w \\s, groups, |, ^, $, and * + ? {m,n}, lazy or not.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from bitnet.errors import UnsupportedModelError

Places = frozenset[int]
Step = Callable[[str, Places], Places]  # the text and where a match has come to -> where it may come to

MOST_CHARACTERS, MOST_DEPTH, MOST_TIMES = 512, 4, 1000
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")  # names, with nothing to repeat: those are nearly all, and for `re`
_NONE: Places = frozenset()
_SET = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
_TIMES = re.compile(r"\{(\d{0,4})(,?)(\d{0,4})\}")


def suffix_pattern(pattern: str, where: str) -> Callable[[str], bool]:
    """Whether `re.match(rf"(.*\\.)?({pattern})$", name)` finds something, for names without line breaks: as PEFT looks names up.

    Raises UnsupportedModelError for a pattern that is none, is too long or too deep, or has other signs than those above.
    """
    if _PLAIN.fullmatch(pattern):
        plain = re.compile(rf"(.*\.)?({pattern})$")
        return lambda name: plain.match(name) is not None
    step = _Reader(pattern, where).whole()

    def matches(name: str) -> bool:
        starts = frozenset({0} | {i + 1 for i, c in enumerate(name) if c == "."})
        return len(name) in step(name, starts)

    return matches


class _Reader:
    def __init__(self, pattern: str, where: str) -> None:
        self.pattern, self.at, self.depth, self.where = pattern, 0, 0, where
        if len(pattern) > MOST_CHARACTERS:
            raise self.error(f"has {len(pattern):,} characters; expected at most {MOST_CHARACTERS}")

    def error(self, problem: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.where} {problem}")

    def whole(self) -> Step:
        found = self.alternatives()
        if self.at < len(self.pattern):
            raise self.error("closes a bracket that it does not open")
        return found

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self, text: str) -> bool:
        found = self.pattern.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def alternatives(self) -> Step:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise self.error(f"nests more than {MOST_DEPTH} deep")
        ways = [self.sequence()]
        while self.take("|"):
            ways.append(self.sequence())
        self.depth -= 1
        return ways[0] if len(ways) == 1 else lambda text, places: frozenset().union(*(way(text, places) for way in ways))

    def sequence(self) -> Step:
        parts = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated(self.atom()))

        def follow(text: str, places: Places) -> Places:
            for part in parts:
                if not places:
                    break
                places = part(text, places)
            return places

        return follow

    def atom(self) -> Step:
        if self.take("("):
            self.take("?:")
            if self.peek() == "?":
                raise self.error("has a group that looks around, is named or sets flags; expected plain groups")
            inner = self.alternatives()
            if not self.take(")"):
                raise self.error("opens a bracket that it does not close")
            return inner
        if self.take("^"):
            return lambda text, places: places & {0}
        if self.take("$"):
            return lambda text, places: places & {len(text)}
        one = _SET.match(self.pattern, self.at) if self.peek() == "[" else None
        size = len(one[0]) if one else 2 if self.peek() == "\\" else 1
        sign = self.pattern[self.at : self.at + size]
        self.at += size
        if sign in ("*", "+", "?", "[") or (len(sign) == 2 and sign[1].isalnum() and sign[1] not in "dDwWsS"):
            raise self.error(f"has {sign!r} where no such sign is read")
        try:
            kind = re.compile(sign if sign != "{" else r"\{")  # of one character: nothing to backtrack to
        except re.error as error:
            raise self.error(f"is no regular expression ({error})") from None
        return lambda text, places: frozenset(i + 1 for i in places if i < len(text) and kind.fullmatch(text[i]))

    def repeated(self, part: Step) -> Step:
        least, most = 1, 1
        counted = _TIMES.match(self.pattern, self.at)
        if self.peek() in ("*", "+", "?"):
            least, most = {"*": (0, MOST_TIMES), "+": (1, MOST_TIMES), "?": (0, 1)}[self.peek()]
            self.at += 1
        elif counted and (counted[1] or counted[3]):
            self.at += len(counted[0])
            least = int(counted[1] or 0)
            most = int(counted[3] or MOST_TIMES) if counted[2] else least
            if max(least, most) > MOST_TIMES or least > most:
                raise self.error(f"repeats by {counted[0]}; expected at most {MOST_TIMES} times, and no more than that at least")
        else:
            return part
        if not self.take("?") and (self.peek() in ("*", "+") or _TIMES.match(self.pattern, self.at)):
            raise self.error(f"has {self.peek()!r} after a repetition")

        def times(text: str, places: Places) -> Places:
            found = places if least == 0 else _NONE
            for count in range(1, most + 1):
                after = part(text, places)
                if not after or (after == places and count > least):
                    break
                found |= after if count >= least else _NONE
                if after == places:  # nothing new can come
                    return found | after
                places = after
            return found

        return times
