"""What was computed and may be asked for again: features of pictures and prompts that were read; the oldest goes first.

Everything is kept by owner, the API key, so that neither timing nor token counts tell one user what another asked.
Prompts are compared by content: token ids, and in a picture's slots the digest of its pixels.
"""

from collections import OrderedDict
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from .language import KVCache

MIN_PREFIX = 64  # tokens: fewer are not worth an entry, and every chat begins with some in common


class Cache:
    """At most `most` bytes of features and prefixes together; 0 keeps nothing."""

    def __init__(self, most: int):
        self.most, self.bytes, self.hits = most, 0, 0
        self._entries: OrderedDict[tuple, tuple] = OrderedDict()  # key → (value, bytes), the next to go first

    def features(self, owner: str, digest: int) -> mx.array | None:
        """A picture's rows as they enter the language model."""
        found = self._entries.get((owner, digest))
        if found:
            self._entries.move_to_end((owner, digest))
        return found and found[0]

    def add_features(self, owner: str, digest: int, features: mx.array) -> None:
        self._add((owner, digest), features, features.nbytes)

    def prefix(self, owner: str, long: bool, content: np.ndarray, grain: int) -> tuple[KVCache, int] | None:
        """A copy of what the prompt begins with, and its length: a multiple of `grain`, and never all of it."""
        alike = {key: shared_length(stored, content) for key, (_, stored) in self._alike(owner, long, content)}
        best = max(alike, key=alike.get, default=None)
        length = min(alike.get(best, 0), len(content) - 1) // grain * grain
        if length < MIN_PREFIX:
            return None
        self._entries.move_to_end(best)
        self.hits += length
        return self._entries[best][0][0].head(length, -(-len(content) // grain) * grain), length

    def add_prefix(self, owner: str, long: bool, content: np.ndarray, cache: KVCache) -> None:
        """Keep a cache of one row that holds `content`; of two of which one begins the other, the longer is kept."""
        size = sum(array.nbytes for array in cache.arrays())
        if len(content) < MIN_PREFIX or size > self.most:
            return
        for key, (_, stored) in list(self._alike(owner, long, content)):
            shared = shared_length(stored, content)
            if shared == len(content):
                return  # it is a part of that one
            if shared == len(stored):
                self._remove(key)
        self._add((owner, long, content.tobytes()), (cache, content), size)

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0

    def _alike(self, owner: str, long: bool, content: np.ndarray) -> Iterator[tuple]:
        """The prefixes of an owner and regime that begin as `content` does: their keys and values."""
        head = content[:MIN_PREFIX].tobytes()
        for key, (value, _) in self._entries.items():
            if len(key) == 3 and key[:2] == (owner, long) and key[2].startswith(head):
                yield key, value

    def _add(self, key: tuple, value, size: int) -> None:
        self._remove(key)
        if size <= self.most:
            self._entries[key] = value, size
            self.bytes += size
        while self.bytes > self.most:
            self._remove(next(iter(self._entries)))

    def _remove(self, key: tuple) -> None:
        self.bytes -= self._entries.pop(key, (None, 0))[1]


def shared_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many ids two prompts have in common from their first on."""
    n = min(len(one), len(other))
    different = np.flatnonzero(one[:n] != other[:n])
    return int(different[0]) if len(different) else n
