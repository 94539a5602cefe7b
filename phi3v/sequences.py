"""What the engine steps: prompts that become sequences, the batches in which they run, and what is kept of them.

Token ids and arrays only; knows nothing of threads or of who goes first. What was computed is kept by owner, the API
key, so that neither timing nor token counts tell one user what another asked; prompts are compared by content: token
ids, and in a picture's slots the digest of its pixels. The oldest goes first.
"""

import queue
import random
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from .errors import RequestError
from .images import Crops
from .language import KVCache
from .request import SamplingParams
from .sampling import Sampler

# With CUDA every new shape costs: cuDNN builds attention anew (38 ms), cuBLAS looks for kernels, graphs are made again.
# So there prompts are read in multiples of GRAIN tokens, and up to SPARE rows that have ended stay in a batch.
GRAIN, SPARE = (64, 7) if mx.cuda.is_available() else (1, 0)
MIN_PREFIX = 64  # tokens: fewer are not worth keeping, and every chat begins with some in common


@dataclass(frozen=True)
class Prompt:
    """`ids` with −k in the slots of `images[k-1]`; generation ends at one of `end_ids` or after `max_tokens`.

    `owner` is who asks: owners take turns, and what is kept for one is never used for another. `branch` tells the `n`
    answers to one prompt apart. With `targets` nothing is made: they are scored, as what follows each of the last ids.
    """

    ids: list[int]
    images: list[Crops]
    max_tokens: int
    end_ids: frozenset[int] = frozenset()
    owner: str = ""
    params: SamplingParams = field(default_factory=SamplingParams)
    branch: int = 0
    targets: tuple[int, ...] = ()


class Generation:
    """The tokens of one submission: iterate for (index of the prompt, token, finish reason or None).

    The token that ends a sequence is not shown: its item has None for it. Raises what went wrong in the engine. After
    `patience` seconds of silence there is a None between the items. `cached[index]` says how many tokens of a prompt
    were not read again, once its first token is there; `logprobs[index]` wait for the tokens that come, and
    `scores[index]` is the sum of the targets'.
    """

    def __init__(self, prompts: int, patience: float | None = None):
        self.cancelled, self.cached, self.scores = [False] * prompts, [0] * prompts, [0.0] * prompts
        self.logprobs: list[deque] = [deque() for _ in range(prompts)]
        self.items: queue.SimpleQueue = queue.SimpleQueue()  # what the engine puts there
        self._left, self._patience = prompts, patience

    def __iter__(self) -> Iterator[tuple[int, int | None, str | None] | None]:
        while self._left:
            try:
                item = self.items.get(timeout=self._patience)
            except queue.Empty:
                yield None
                continue
            if isinstance(item, RequestError):
                raise item
            if isinstance(item, BaseException):
                raise RuntimeError("generation failed") from item
            self._left -= item[2] is not None
            yield item

    def cancel(self, index: int | None = None) -> None:
        """Stop making tokens, for one prompt or for all; the engine notices before its next pass."""
        for i in range(len(self.cancelled)) if index is None else [index]:
            self.cancelled[i] = True


class Sequence:
    """A prompt on its way through the engine; only the engine's thread changes it.

    Its `number` names it among several ranks, and is the seed of who gives none.
    """

    def __init__(self, prompt: Prompt, index: int, generation: Generation, number: int | None = None):
        self.number = random.getrandbits(63) if number is None else number
        self.prompt, self.images = replace(prompt, images=[]), list(prompt.images)  # these lose their pixels once read
        self.index, self.generation, self.done = index, generation, False
        self.arrived, self.most = time.monotonic(), len(prompt.ids) + prompt.max_tokens
        self.features: list[mx.array | None] = [None] * len(prompt.images)
        self.made: list[int] = []
        self.content = np.array(prompt.ids)  # what is compared with other prompts: digests in the slots of pictures
        for k, crops in enumerate(prompt.images, 1):
            self.content[self.content == -k] = crops.digest
        self.restart(float("inf"))

    def restart(self, together: float) -> None:
        """Go back to what was delivered, whatever a pass that failed did to the rest; a seed's numbers go back, too."""
        self.together, self.flying = together, 0  # the most that may run at once; tokens that nobody looked at yet
        self.cache: KVCache | None = None  # its own while it is read, a batch's row later
        self.sampler = Sampler(self.prompt.params, self.content, self.prompt.branch, tuple(self.made), self.number)
        self.score: mx.array | float = 0.0  # of the targets so far

    @property
    def length(self) -> int:
        """Of the whole sequence, the token that is being made included."""
        return len(self.prompt.ids) + len(self.made) + self.flying

    @property
    def first(self) -> int:
        """The first position whose logits are wanted: that of the last id, or before the first of the targets."""
        return len(self.prompt.ids) + len(self.made) - max(1, len(self.prompt.targets))

    @property
    def unread(self) -> int:
        return len(self.ids) - self.read

    def begin(self, long: bool, layers: int, found: tuple[KVCache, int] | None) -> None:
        """Get ready to be read behind what was found, all that was made so far included."""
        self.long, self.ids = long, np.array(self.prompt.ids + self.made)
        self.slots = np.zeros(len(self.ids), int)
        for k, crops in enumerate(self.images, 1):
            here = self.ids == -k
            self.slots[here] = np.arange(here.sum()) % crops.tokens
        self.cache, self.read = found or (KVCache(layers), 0)
        self.cache.reserve(filled(len(self.ids)))

    def content_so_far(self) -> np.ndarray:
        """`content` and what was made."""
        return np.concatenate([self.content, np.array(self.made, int)])

    def unseen(self) -> list[int]:
        """The numbers, from 0, of the pictures whose features the unread part needs and does not have."""
        rest = self.ids[self.read :]
        return [k for k, features in enumerate(self.features) if features is None and (rest == -k - 1).any()]

    def piece(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next ids and slots to read, filled up with what is not kept."""
        some = slice(self.read, self.read + count)
        return tuple(np.pad(x[some], (0, filled(count) - count)) for x in (self.ids, self.slots))


@dataclass
class Batch:
    """Sequences that run together: row r of the cache is sequences[r], None one that has ended."""

    sequences: list[Sequence | None]
    cache: KVCache
    tokens: mx.array  # (rows,) their last ones, which may not have been computed yet

    def join(self, sequence: Sequence, token: mx.array) -> None:
        row = self.sequences.index(None) if None in self.sequences else len(self.sequences)
        self.cache.join(sequence.cache, row)
        self.sequences[row : row + 1] = [sequence]
        self.tokens = mx.concatenate([self.tokens[:row], token, self.tokens[row + 1 :]])

    def leave(self, rows: list[int]) -> None:
        """Free these rows; they are only taken out when they are many, since that changes all shapes."""
        for row in rows:
            self.sequences[row] = None
        used = [row for row, s in enumerate(self.sequences) if s]
        if rows and used and len(self.sequences) - len(used) > SPARE:
            order = self.cache.keep(used)
            self.sequences = [self.sequences[row] for row in order]
            self.tokens = self.tokens[mx.array(order)]


def filled(tokens: int) -> int:
    """The multiple of GRAIN in which so many tokens are read."""
    return -(-tokens // GRAIN) * GRAIN


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
