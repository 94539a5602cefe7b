"""The engine: one thread that owns MLX and steps all sequences together. Token ids in, token ids out.

Knows nothing of text, files or HTTP. MLX's streams belong to threads, so the model is loaded, stepped and freed on it.
A pass makes one token for every running sequence and reads a piece of the prompts that wait, in the same matrix
products. The next one is launched before the tokens of the last are looked at: they stay on the device as its input,
and whoever turns out to have ended has made one token for nothing.
"""

import atexit
import logging
import math
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn

from . import sampling, sequences
from .errors import RequestError, SetupError, Unavailable
from .images import TOKENS, Crops
from .language import KVCache, Part
from .model import Config, Phi3V
from .parallel import Group
from .sequences import Batch, Cache, Generation, Prompt, Sequence, shared_length

# The one lock that serializes MLX: held around every load and turn, by every engine of this process.
MLX = threading.RLock()
MAX_BATCH = 128  # sequences running together, where memory allows: the most that was measured
MAX_QUEUE, LEAST_QUEUE = 256, 64  # sequences that wait or run; half is for one owner, and must hold a request of 32
MAX_READING = 8  # prompts read side by side: enough to fill a piece with short ones; an owner leaves one to others
MAX_LOOKED_AT = 32  # waiting prompts of which one may begin: more cost time in each pass
# Tokens of prompts read per pass: what running sequences, and who comes later, may have to wait for. An H200
# reads 1,024 in 20 ms, and a pass has costs of its own there; the second number is for when nobody runs.
PIECE, ALONE = (1024, 2048) if mx.cuda.is_available() else (512, 512)
MAX_CROPS = 800  # that were decoded and wait, of 1.35 MB each: a request may have 544
CROPS = 17  # of pictures looked at per pass: about as much work as a piece
SHARE, SHARE_OF_GPU = 0.6, 0.85  # of a machine's memory, or a GPU's own, for weights, KV caches and kept prefixes
KEPT = 0.25  # of what the weights leave of that for kept prefixes and features
LEAST_CONTEXT = 2048  # tokens that are always let in, however little memory there seems to be
RANKS_WAIT = 5  # seconds that the end of a rank waits for a pass, which another that hangs may never join
NO_MEMORY = "malloc]", "out of memory", "Insufficient Memory"  # so Metal and CUDA say it; on a CPU MLX just crashes

log = logging.getLogger("phi3v")


@dataclass
class _Flight:
    """A pass that was launched: whose tokens it makes, and what it computes."""

    sequences: list[Sequence | None] = field(default_factory=list)
    tokens: mx.array | None = None
    shown: list[int] = field(default_factory=list)  # the rows of those that want log-probabilities
    logprobs: list[mx.array] = field(default_factory=list)
    scored: list[Sequence] = field(default_factory=list)  # whose targets have all been scored
    arrays: list[mx.array] = field(default_factory=list)


def token_bytes(config: Config, itemsize: int) -> int:
    """A token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


def room_for(
    config: Config, weights: int, itemsize: int, memory: int, kept: int | None = None, ranks: int = 1
) -> tuple[int, int]:
    """What `memory` bytes have room for beside the weights: bytes that are kept, and tokens of all KV caches."""
    free = max(0, memory - weights)
    kept = int(free * KEPT) if kept is None else kept
    return kept, max(LEAST_CONTEXT, (free - kept) * ranks // token_bytes(config, itemsize))


class Engine:
    """Runs the model that `load()` returns; `load` is called on the engine's thread, again after `idle_unload`.

    None for a limit is what this machine's memory allows; `limits` has the numbers once the model is loaded.
    `cache_bytes` 0 keeps no prefixes. After `idle_unload` seconds without work the model is freed; 0 keeps it. In a
    `group` of ranks rank 0 tells the others its turns, and all take the same: nothing else may decide what a turn does.
    """

    def __init__(
        self,
        load: Callable[[], Phi3V],
        max_batch: int | None = None,
        max_queue: int = MAX_QUEUE,
        max_context: int | None = None,
        cache_bytes: int | None = None,
        idle_unload: float = 0,
        group: Group | None = None,
    ):
        if max_queue < LEAST_QUEUE:
            raise SetupError(f"--max-queue must be at least {LEAST_QUEUE}, not {max_queue}")
        self._load, self._idle_unload, self._group = load, idle_unload, group
        self.limits = {"batch": max_batch, "queue": max_queue, "context": max_context, "cache_bytes": cache_bytes}
        self._changed = threading.Condition()  # guards these three; never held during a pass, or nobody could submit
        self._arrived: list[Sequence] = []
        self._alive: set[Sequence] = set()  # all that were taken and have not ended, wherever they are
        self._closing = False
        self._model: Phi3V | None = None
        self._cache = Cache(0)
        self._waiting: list[Sequence] = []
        self._reading: list[Sequence] = []
        # By rope regime, of which a pass over a cache has one, and by length: all rows take the room of the longest.
        self._batches: dict[tuple[bool, int], Batch] = {}
        self._flight = _Flight()
        self._cancelled: list[Sequence] = []  # of this turn
        self._delivered: list[int] = []  # the tokens of the last
        self._tokens = 0
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        atexit.register(self.close)  # a daemon's step that outlives the interpreter ends in a crash
        self._thread.start()

    @property
    def status(self) -> str:
        """One of "loading", "ok", "idle" (freed until the next request), "draining", "failed"."""
        if self._failure or self._closing:
            return "failed" if self._failure else "draining"
        return "loading" if not self._ready.is_set() else "ok" if self._model else "idle"

    def stats(self) -> dict[str, int]:
        """What runs and waits now, what was made and not read again so far, and the bytes that are kept."""
        with self._changed:  # or one that is just received would be counted twice
            waiting = sum(not s.done for s in [*self._arrived, *self._waiting])
            now = {"running": len(self._alive) - waiting, "waiting": waiting, "tokens": self._tokens}
        return now | {"cached_tokens": self._cache.hits, "cache_bytes": self._cache.bytes}

    def wait(self) -> None:
        """Return when the model is loaded, or raise what prevented it."""
        self._ready.wait()
        if self._failure:
            raise self._failure

    def check(self, prompts: list[Prompt]) -> None:
        """Raise what `submit` would: RequestError for what never fits, Unavailable for what does not now."""
        queue, context = self.limits["queue"], self.limits["context"]
        owner, most = prompts[0].owner, queue // 2 if prompts[0].owner else queue
        if len(prompts) > most:
            given = f"{len(prompts)} sequences (prompts × n or choices)"
            raise RequestError(f"{given} at once: one key may have at most {most} in the queue", "prompt")
        for p in prompts:
            if not p.ids or len(p.ids) + p.max_tokens > (context or math.inf):
                given = f"{len(p.ids)} tokens with an answer of {p.max_tokens}"
                raise RequestError(f"a prompt has 1 token or more, with its answer {context}, not {given}", "prompt")
        with self._changed:
            if self.status not in ("ok", "idle"):
                raise Unavailable(f"the model is {'closed' if self.status == 'draining' else self.status}")
            if len(self._alive) + len(prompts) > queue:
                raise Unavailable(f"the queue is full: {len(self._alive)} of {queue} sequences run or wait")
            if (mine := sum(s.prompt.owner == owner for s in self._alive)) + len(prompts) > most:
                raise Unavailable(f"this key has {mine} of its {most} places in the queue")
            held = {id(c): len(c.pixels) for s in self._alive for c in s.images if c.pixels is not None}
            more = {id(c): c.tokens // TOKENS for p in prompts for c in p.images}
            if owner and held and sum(held.values()) + sum(more.values()) > MAX_CROPS:
                raise Unavailable(f"{sum(held.values())} crops of pictures wait to be looked at, {MAX_CROPS} may be")

    def submit(self, prompts: list[Prompt], patience: float | None = None) -> Generation:
        """Queue prompts of one owner that start together."""
        generation = Generation(len(prompts), patience)
        arrived = [Sequence(p, i, generation) for i, p in enumerate(prompts)]
        with self._changed:
            self.check(prompts)
            self._alive.update(arrived)
            self._arrived += arrived
            self._changed.notify()
        return generation

    def close(self, in_order: bool = True) -> None:
        """End the thread; what still runs fails with Unavailable. In order, other ranks end with success, too."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._group:
            self._group.patient, self._group.in_order = False, in_order
        self._thread.join((0 if self._group.lost else RANKS_WAIT) if self._group else None)
        if self._thread.is_alive():
            self._group.abandon()
        atexit.unregister(self.close)

    def _run(self) -> None:
        try:
            if self._group:
                self._group.meet(self._lose)
            self._load_model()
            self._ready.set()
            while self._receive():
                self._turn()
            if self._group:
                self._group.end()
        except BaseException as error:
            if self._group:
                self._group.abandon()
            if self._ready.is_set() and not self._failure:
                log.critical("the engine has failed", exc_info=True)
            self._failure = self._failure or error.with_traceback(None)  # whose frames hold the model
        self._refuse_all(self._failure or Unavailable("the model is shutting down"))
        self._waiting, self._reading, self._batches, self._model = [], [], {}, None
        self._clear()
        mx.clear_streams()  # with CUDA, MLX's own threads would abort the process at its end (MLX issue 4506)

    def _lose(self) -> None:
        """A rank is lost: tell everybody now, since the engine's own thread may wait for it without end."""
        self._failure = SetupError(self._group.lost)
        self._group.abandon()
        self._refuse_all(Unavailable(self._group.lost))

    def _refuse_all(self, error: BaseException) -> None:
        with self._changed:
            self._closing = True  # nothing can be submitted after this
        for s in list(self._alive):
            self._put(s, error)
        self._ready.set()

    def _load_model(self) -> None:
        """Load, and fill in the limits that were left open: from this machine's memory and the model's size."""
        with MLX:
            model, limits = self._load(), self.limits
            memory, share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), SHARE
            if mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu):
                memory, share = int(mx.device_info()["total_memory"]), SHARE_OF_GPU
            weights = sum(array.nbytes for _, array in nn.utils.tree_flatten(model.parameters()))
            itemsize, kept = model.model.norm.weight.itemsize, limits["cache_bytes"]
            sizes = weights, itemsize, int(memory * share), kept, self._group.size if self._group else 1
            limits["cache_bytes"], self._room = room_for(model.config, *sizes)
            limits["context"] = min(limits["context"] or self._room, self._room, model.config.max_position_embeddings)
            limits["batch"] = limits["batch"] or max(1, min(MAX_BATCH, self._room // 1024))
            if self._group:  # they decide what a turn does
                limits |= {name: self._group.least(limits[name]) for name in ("batch", "context", "cache_bytes")}
                self._room = self._group.least(self._room)
            self._cache.most = limits["cache_bytes"]
            mx.set_cache_limit(memory // 16)  # of freed buffers that MLX keeps for later; it would keep all
            self._model = model

    def _receive(self) -> bool:
        """Take what was submitted, sleeping while there is nothing to do; False when the engine is to end."""
        if self._group and self._group.rank:
            return self._follow()
        with self._changed:
            if not (self._waiting or self._reading or self._batches or self._flight.arrays):
                patience = self._idle_unload if self._model else 0
                if not self._changed.wait_for(lambda: self._arrived or self._closing, patience or None):
                    self._model = None
                    self._clear()
                    self._changed.wait_for(lambda: self._arrived or self._closing)
            self._cancelled = [s for s in self._alive if s.generation.cancelled[s.index]]
            arrived, self._arrived = self._arrived, []
            self._waiting += arrived
            if self._closing:
                return False
        if self._group:
            self._group.tell(arrived, self._cancelled, self._delivered)
        return True

    def _follow(self) -> bool:
        """Take what rank 0 has."""
        if not (told := self._group.hear()):
            return False
        arrived, cancelled, delivered = told
        if delivered != self._delivered:
            raise SetupError("this rank makes other tokens than rank 0: all need the same model, machine and versions")
        self._alive.update(arrived)
        self._waiting += arrived
        self._cancelled = [s for s in self._alive if s.number in cancelled]
        return True

    def _turn(self) -> None:
        """Launch a pass for whoever can go on, then look at the tokens of the one before."""
        with MLX:
            try:
                if not self._model:
                    self._load_model()
                self._sweep()
                self._admit()
                last, self._flight = self._flight, self._launch()
                self._deliver(last)
                self._look()
            except Exception as error:
                if self._group:
                    raise  # one rank alone cannot go back
                log.exception("a pass failed")
                self._retry(error.with_traceback(None))  # its frames would keep the arrays as long as a client has it

    def _sweep(self) -> None:
        """Take out who has ended, was cancelled, has asked for its last token or outgrows the regime of its batch."""
        for s in self._cancelled:
            self._put(s, (s.index, None, "cancelled"))
        self._waiting = [s for s in self._waiting if not s.done]
        self._reading = [s for s in self._reading if not s.done]
        for key, batch in list(self._batches.items()):
            rows = {row: s for row, s in enumerate(batch.sequences) if s}
            ended = {row: s for row, s in rows.items() if s.done or s.length == s.most}
            for row, s in ended.items() if self._cache.most else ():  # the next turn of a conversation begins with it
                content = s.content_so_far()[: batch.cache.lengths[row]]
                self._cache.add_prefix(s.prompt.owner, s.long, content, batch.cache.copy(row, len(content)))
            moved = {row: s for row, s in rows.items() if row not in ended and self._key(s) != key}
            self._waiting += moved.values()
            batch.leave([*ended, *moved])
            if not any(batch.sequences):
                del self._batches[key]

    def _key(self, s: Sequence) -> tuple[bool, int]:
        """The batch of a sequence: its regime, and a class of lengths that differ by less than a factor of 4."""
        return self._model.config.is_long(s.length), s.most.bit_length() // 2

    def _admit(self) -> None:
        """Begin to read those whose turn it is."""
        while len(self._reading) < MAX_READING and (s := self._next()):
            self._waiting.remove(s)
            self._reading.append(s)
            long, layers = self._key(s)[0], self._model.config.num_hidden_layers
            content = s.content_so_far()[: s.first + 1]
            s.begin(long, layers, self._cache.prefix(s.prompt.owner, long, content, sequences.GRAIN))
            if not s.made:
                s.generation.cached[s.index] = s.read

    def _next(self) -> Sequence | None:
        """Who ran already goes first, then the owner who has least running, and of an owner's the oldest."""
        active = [*self._reading, *(s for b in self._batches.values() for s in b.sequences if s)]
        begun = self._begun()
        if not self._waiting or len(active) >= self.limits["batch"] or any(len(begun) >= s.together for s in begun):
            return None
        owners, reading = (Counter(s.prompt.owner for s in group) for group in (active, self._reading))
        # Each further prompt of a request counts as a second younger: a request of many must not hold up all others.
        rank = lambda s: (not (s.made or s.flying), owners[s.prompt.owner], s.arrived + s.index)  # noqa: E731
        for s in sorted(self._waiting, key=rank)[:MAX_LOOKED_AT]:
            if s.flying or len(begun) >= s.together or not self._fits([*active, s]):
                return None  # who came first waits for its token or for room, and is not overtaken
            if reading[s.prompt.owner] < MAX_READING - 1 and not any(self._gains(s, other) for other in self._reading):
                return s
        return None

    def _fits(self, all_of: list[Sequence]) -> bool:
        """Whether these have room at their longest; a batch has slots to spare, each as long as the longest ever."""
        rows, room = defaultdict(list), 0.0
        for s in all_of:
            rows[self._key(s)].append(s.most)
        for key, lengths in rows.items():
            held = self._batches[key].cache if key in self._batches else KVCache(0)
            room += max(1.25 * len(lengths), held.slots) * max(*lengths, held.capacity)
        return len(all_of) == 1 or room <= self._room

    def _gains(self, s: Sequence, other: Sequence) -> bool:
        """Whether it is quicker to wait until another prompt, which begins alike, is read, than to read it as well."""
        alike = self._cache.most and other.prompt.owner == s.prompt.owner and other.long == self._key(s)[0]
        return alike and 2 * shared_length(s.content, other.content) >= other.unread

    def _look(self) -> None:
        """Make the features of pictures that those being read need next: of one at least, else up to CROPS crops."""
        missing = [(s, k, (s.prompt.owner, s.images[k].digest)) for s in self._reading for k in s.unseen()]
        wanted: dict[tuple[str, int], Crops] = {}
        for s, k, key in missing:
            s.features[k] = self._cache.features(*key)
            crops = sum(len(picture.pixels) for picture in [*wanted.values(), s.images[k]])
            if s.features[k] is None and (not wanted or crops <= CROPS):
                wanted.setdefault(key, s.images[k])
        if wanted:
            made = dict(zip(wanted, self._model.image_features(list(wanted.values())), strict=True))
            mx.async_eval(list(made.values()))
            for key, features in made.items():
                self._cache.add_features(*key, features)
            for s, k, key in missing:
                if key in made:
                    s.features[k] = made[key]
                    s.images[k] = replace(s.images[k], pixels=None)  # up to 23 MB that are not needed again

    def _pieces(self) -> list[tuple[Sequence, int]]:
        """Who reads how many tokens in this pass: the shortest first, but half of it is the oldest's."""
        ready = [s for s in self._reading if not s.unseen()]
        left, pieces = PIECE if self._batches else ALONE, []
        held = min(ready[0].unread, left // 2) if ready else 0
        for s in sorted(ready, key=lambda s: s.unread):
            held = 0 if s is ready[0] else held
            count = min(s.unread, (left - held) // sequences.GRAIN * sequences.GRAIN)
            if count > 0:
                pieces.append((s, count))
                left -= sequences.filled(count)
        return pieces

    def _launch(self) -> _Flight:
        """One pass: a token for each running sequence, a piece of each prompt that is being read."""
        model, flight = self._model, _Flight()
        inputs, parts = [], []
        for (long, _), batch in self._batches.items():
            batch.cache.lengths = [n if s else 0 for n, s in zip(batch.cache.lengths, batch.sequences, strict=True)]
            inputs.append(model.model.embed_tokens(batch.tokens))
            parts.append(Part(batch.cache, 1, long))
            flight.sequences += batch.sequences
        at = len(flight.sequences)
        picks = list(range(at))
        scored: list[tuple[Sequence, range, int]] = []  # with the rows and the first position of what is scored
        for s, count in self._pieces():
            ids, slots = s.piece(count)
            inputs.append(model.embed(ids, slots, s.features))
            parts.append(Part(s.cache, len(ids), s.long, count))
            if s.prompt.targets:
                start = max(s.read, s.first)
                scored.append((s, range(at + start - s.read, at + count), start))
            s.read += count
            if not s.unread and not s.prompt.targets:
                flight.sequences.append(s)
                picks.append(at + count - 1)
            at += len(ids)
        if parts:
            rows = picks + [row for _, some, _ in scored for row in some]
            logits = model(mx.concatenate(inputs), parts, None if rows == list(range(at)) else mx.array(rows, mx.int32))
            flight.arrays = [array for s in self._reading if s.unread and s.read for array in s.cache.arrays()]
            if picks:
                self._sample(flight, logits[: len(picks)])
            self._score(flight, scored, logits[len(picks) :])
            mx.async_eval(flight.arrays)
            self._regroup(flight)
        return flight

    def _sample(self, flight: _Flight, logits: mx.array) -> None:
        """Choose the next tokens, and note how probable they are for those who want to know."""
        flight.tokens = sampling.sample(logits, [s.sampler if s else None for s in flight.sequences])
        asked = [(row, s.prompt.params.logprobs) for row, s in enumerate(flight.sequences) if s]
        flight.shown = [row for row, top in asked if top is not None]
        if flight.shown:
            rows, top = mx.array(flight.shown), max(top or 0 for _, top in asked)
            flight.logprobs = sampling.logprobs(logits[rows], flight.tokens[rows], top)
        flight.arrays += [flight.tokens, *flight.logprobs]

    def _score(self, flight: _Flight, scored: list[tuple[Sequence, range, int]], logits: mx.array) -> None:
        """Add up the log-probabilities of the targets that follow what was read in this pass."""
        at = 0
        for s, rows, start in scored:
            targets = s.prompt.targets[start - s.first :][: len(rows)]
            if targets:
                own, *_ = sampling.logprobs(logits[at : at + len(rows)], mx.array(targets), 0)
                s.score = s.score + own.sum()
                flight.arrays.append(s.score)
                at += len(rows)
            if not s.unread:
                flight.scored.append(s)
                self._reading.remove(s)
                if s.generation.cached[s.index] < s.first // sequences.GRAIN * sequences.GRAIN:
                    # Nobody had all of what the other choices begin with.
                    self._cache.add_prefix(s.prompt.owner, s.long, s.content_so_far(), s.cache.snapshot())

    def _regroup(self, flight: _Flight) -> None:
        """Give the batches their new tokens, and a row in one of them to each prompt that was read to its end."""
        start = 0
        for batch in self._batches.values():
            batch.tokens = flight.tokens[start : start + len(batch.sequences)]
            start += len(batch.sequences)
        for s in filter(None, flight.sequences):
            s.flying += 1
        for row, s in enumerate(flight.sequences[start:], start):
            self._reading.remove(s)
            self._cache.add_prefix(s.prompt.owner, s.long, s.content_so_far(), s.cache.snapshot())
            token, key = flight.tokens[row : row + 1], (s.long, self._key(s)[1])
            if key in self._batches and s.length < s.most:
                self._batches[key].join(s, token)
            elif s.length < s.most:
                self._batches[key] = Batch([s], s.cache, token)
            s.cache = None

    def _deliver(self, flight: _Flight) -> None:
        """Wait for a pass and hand its tokens to their requests."""
        mx.eval(flight.arrays)
        for row, own, *top in zip(flight.shown, *(array.tolist() for array in flight.logprobs), strict=True):
            s = flight.sequences[row]
            best = sorted(zip(*top, strict=True), key=lambda each: -each[1])[: s.prompt.params.logprobs]
            s.generation.logprobs[s.index].append((own, best))
        for s in flight.scored:
            s.generation.scores[s.index] = s.score.item()
            self._put(s, (s.index, None, "stop"))
        self._delivered = []
        for s, token in zip(flight.sequences, flight.tokens.tolist() if flight.sequences else [], strict=True):
            if not s or s.done:
                continue
            self._delivered.append(token)
            s.flying -= 1
            if token in s.prompt.end_ids:
                self._put(s, (s.index, None, "stop"))
            else:
                s.made.append(token)
                self._tokens += 1
                self._put(s, (s.index, token, "length" if len(s.made) >= s.prompt.max_tokens else None))

    def _begun(self) -> set[Sequence]:
        """Who runs, is being read or has a token on its way: all that a pass which fails sets back."""
        with self._changed:
            return self._alive.difference(self._arrived, [s for s in self._waiting if not s.flying])

    def _retry(self, error: Exception) -> None:
        """After a failed pass, read again, half as many together each time: who fails alone has the error."""
        begun = self._begun()
        if not self._model:
            error = Unavailable("the model cannot be loaded now")
        elif isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
            error = Unavailable("there is not enough memory for this request now")
        for s in begun or list(self._alive):  # if nobody has begun it is no pass that fails, and it would for ever
            s.restart(len(begun) // 2) if len(begun) > 1 else self._put(s, error)
        self._waiting, self._reading, self._batches = list(begun.union(self._waiting)), [], {}
        self._clear()  # it may be memory that was lacking
        mx.eval(mx.ones(1) + 1)  # raises, and ends the engine, where it is the GPU that is lost

    def _clear(self) -> None:
        self._flight = _Flight()
        self._cache.clear()
        mx.clear_cache()

    def _put(self, s: Sequence, item: tuple[int, int | None, str | None] | BaseException) -> None:
        """Tell a request of a token or of the end of a sequence, which comes once and makes room for another."""
        if s.done:
            return
        if isinstance(item, BaseException) or item[2]:
            s.done = True
            s.features, s.cache = [], None  # freed on this thread, not on the request's
            with self._changed:
                self._alive.discard(s)
        s.generation.items.put(item)
