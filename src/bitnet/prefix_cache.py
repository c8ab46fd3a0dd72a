"""Keys and values of earlier requests, for the next one that begins with the same tokens.

What was computed lies in pages of 256 tokens, and a page depends on the tokens up to its end, on the adapter and on the cache's format and
center, and on nothing else: so a tree whose edges are pages of tokens finds the longest beginning that is there. A sequence shares its
pages instead of copying them; one that must write into a page that others hold gets its own copy first (native/kv_cache.h), so a beginning
may end anywhere in a page. Logits are the same bits as without. Beyond the budget the pages leave that were used least recently, the far
end of a text first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from contextlib import contextmanager
from typing import Any

from bitnet import _native
from bitnet.engine import Adapter, Engine, Sequence
from bitnet.errors import UsageError

PAGE_TOKENS = _native.PAGE_TOKENS

DEFAULT_BYTES = 512 << 20

Tokens = tuple[int, ...]


class _Node:
    """A page, and those that followed it. `tokens`: of this page alone; only a full page has children. A root has no page but its way."""

    __slots__ = ("children", "page", "parent", "tokens")

    def __init__(self, parent: _Node | None, tokens: Tokens, page: Any) -> None:
        self.parent, self.tokens, self.page = parent, tokens, page
        self.children: dict[Tokens, _Node] = {}


class PrefixCache:
    """Of one engine. From any thread; sequences that it gave are their owner's alone.

    Python may collect garbage in the midst of a call, and finalizers call too: a stream's, which keeps its pages. Such a call within
    another one of the same thread finds nothing and changes nothing.

    `budget_bytes`: of the pages that are kept here, those of running sequences apart. Raises `UsageError` if that is less than one page.
    """

    def __init__(self, engine: Engine, budget_bytes: int) -> None:
        page_bytes = engine.kv_bytes_per_token * PAGE_TOKENS
        if budget_bytes < page_bytes:
            raise UsageError(
                f"prefix_cache_bytes is {budget_bytes}, and one page of {PAGE_TOKENS} tokens takes {page_bytes} bytes in this model; "
                f"expected at least that, or 0 for no prefix cache"
            )
        self.budget_bytes = budget_bytes
        self.nbytes = 0  # of the pages kept
        self._engine = engine
        self._roots: dict[Any, _Node] = {}
        # A page is always used after those that followed it, so the first of these has no children.
        self._by_use: OrderedDict[_Node, None] = OrderedDict()
        self._lock, self._inside = threading.RLock(), False

    def __len__(self) -> int:
        """Pages kept."""
        return len(self._by_use)

    def begin(self, tokens: ListLike[int], adapter: Adapter | None = None) -> Sequence:
        """A sequence that holds as many of the first tokens as are known, all but the last one at most, for which logits are wanted."""
        sequence = self._engine.sequence(adapter)
        with self._alone() as alone:
            node, at, pages = self._roots.get(self._way(sequence)) if alone else None, 0, []
            while node is not None and at < len(tokens):
                part = tuple(tokens[at : at + PAGE_TOKENS])
                child = node.children.get(part)
                shared = len(part)
                if child is None:
                    shared, child = max(
                        ((_common(part, known), found) for known, found in node.children.items()), key=_first, default=(0, None)
                    )
                if child is None or not shared:
                    break
                node = child
                pages.append(child.page)
                at += shared
                if shared < PAGE_TOKENS:
                    break
            if node is not None:
                self._use(node)
        sequence.share(pages, min(at, len(tokens) - 1))
        return sequence

    def keep(self, tokens: ListLike[int], sequence: Sequence, *, full_pages: bool = False) -> None:
        """Keep the pages of `tokens`, the first that `sequence` holds. full_pages: only those it will not write into, while it runs on."""
        pages = sequence.pages()
        n = min(len(tokens), len(sequence))
        if full_pages:
            n -= n % PAGE_TOKENS
        if n == 0:
            return
        with self._alone() as alone:
            if not alone:
                return
            way = self._way(sequence)
            node = self._roots.setdefault(way, _Node(None, (), way))
            for at, page in zip(range(0, n, PAGE_TOKENS), pages, strict=False):
                part = tuple(tokens[at : min(at + PAGE_TOKENS, n)])
                child = node.children.get(part)
                if child is None and len(part) < PAGE_TOKENS:  # the last one: is it the beginning of one that is there?
                    child = next((found for known, found in node.children.items() if known[: len(part)] == part), None)
                if child is None:
                    shorter = [found for known, found in node.children.items() if len(known) < PAGE_TOKENS and part[: len(known)] == known]
                    child = node.children[part] = _Node(node, part, page)
                    self.nbytes += page.nbytes
                    self._by_use[child] = None
                    for found in shorter:  # after the new one is there: a root without children goes
                        self._drop(found)
                node = child
            self._use(node)
            while self.nbytes > self.budget_bytes:
                self._drop(next(iter(self._by_use)))

    def clear(self) -> None:
        """Forget all."""
        with self._alone() as alone:
            if alone:
                self._roots.clear()
                self._by_use.clear()
                self.nbytes = 0

    def forget(self, adapter: Adapter) -> None:
        """Give back the pages of an adapter that is no longer used."""
        with self._alone() as alone:
            gone = [way for way in self._roots if way[0] is adapter.key] if alone else []
            left = [self._roots.pop(way) for way in gone]
            while left:
                node = left.pop()
                left += node.children.values()
                if node.parent is not None:
                    del self._by_use[node]
                    self.nbytes -= node.page.nbytes

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """With the lock; False within another call of this thread, which is in the midst of its change."""
        with self._lock:
            was, self._inside = self._inside, True
            try:
                yield not was
            finally:
                self._inside = was

    def _way(self, sequence: Sequence) -> tuple[Any, ...]:
        """All that keys and values depend on besides the tokens."""
        adapter = None if sequence.adapter is None else sequence.adapter.key  # the cache must not hold the weights
        return adapter, sequence.kv, sequence.center, self._engine.activation_group

    def _use(self, node: _Node) -> None:
        while node.parent is not None:
            self._by_use.move_to_end(node)
            node = node.parent

    def _drop(self, node: _Node) -> None:
        assert node.parent is not None and not node.children
        del node.parent.children[node.tokens]
        if node.parent.parent is None and not node.parent.children:
            del self._roots[node.parent.page]
        del self._by_use[node]
        self.nbytes -= node.page.nbytes


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]


def _common(a: Tokens, b: Tokens) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
