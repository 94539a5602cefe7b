"""The engine: one thread that owns MLX and steps all sequences together. Token ids in, token ids out.

Knows nothing of text, files or HTTP. MLX's streams belong to threads, so the model is loaded, stepped and freed
on the engine's own; requests reach it through a queue and get their tokens through another.
"""

import atexit
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import mlx.core as mx

from .errors import RequestError, Unavailable
from .images import Crops
from .language import KVCache
from .model import Phi3V

# The one lock that serializes MLX: held around every load and step, by every engine of this process.
MLX = threading.Lock()
MAX_BATCH = 32  # sequences decoded together, as many as one request may bring
MAX_QUEUE = 128  # sequences waiting or running; beyond it a client is better told than kept waiting

log = logging.getLogger("phi3v")


@dataclass(frozen=True)
class Prompt:
    """`ids` with −k in the slots of `images[k-1]`; generation ends at one of `end_ids` or after `max_tokens`."""

    ids: list[int]
    images: list[Crops]
    max_tokens: int
    end_ids: frozenset[int] = frozenset()


@dataclass(eq=False)
class _Sequence:
    """A prompt on its way through the engine; only the engine's thread changes it."""

    prompt: Prompt
    index: int
    generation: "Generation"
    made: list[int] = field(default_factory=list)
    features: list[mx.array] | None = None
    done: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + len(self.made)


class Generation:
    """The tokens of one submission: iterate for (index of the prompt, token, finish reason or None).

    The token that ends a sequence is not shown: its item has None for it. Raises what went wrong in the engine.
    """

    def __init__(self, prompts: int):
        self.cancelled = False
        self._items: queue.SimpleQueue = queue.SimpleQueue()
        self._left = prompts

    def __iter__(self) -> Iterator[tuple[int, int | None, str | None]]:
        while self._left:
            item = self._items.get()
            if isinstance(item, RequestError):
                raise item
            if isinstance(item, BaseException):
                raise RuntimeError("generation failed") from item
            self._left -= item[2] is not None
            yield item

    def cancel(self) -> None:
        """Stop making tokens for it; the engine notices before its next step."""
        self.cancelled = True


class Engine:
    """Runs the model that `load()` returns; `load` is called on the engine's thread."""

    def __init__(self, load: Callable[[], Phi3V], max_batch: int = MAX_BATCH, max_queue: int = MAX_QUEUE):
        self._load, self._max_batch, self._max_queue = load, max_batch, max_queue
        self._changed = threading.Condition()  # guards these three; never held during a step, or nobody could submit
        self._arrived: list[_Sequence] = []
        self._count = 0
        self._closing = False
        self._waiting: list[_Sequence] = []
        self._batches: dict[bool, _Batch] = {}  # by rope regime: one pass has one set of frequencies
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        atexit.register(self.close)  # a daemon's step that outlives the interpreter ends in a crash
        self._thread.start()

    @property
    def status(self) -> str:
        """One of "loading", "ok", "draining", "failed"."""
        if self._failure:
            return "failed"
        if self._closing:
            return "draining"
        return "ok" if self._ready.is_set() else "loading"

    def wait(self) -> None:
        """Return when the model is loaded, or raise what prevented it."""
        self._ready.wait()
        if self._failure:
            raise self._failure

    def submit(self, prompts: list[Prompt]) -> Generation:
        """Queue prompts that start together; raises Unavailable when the engine cannot take them."""
        if len(prompts) > self._max_queue:
            raise RequestError(f"{len(prompts)} prompts at once, at most {self._max_queue} may be", "prompt")
        generation = Generation(len(prompts))
        with self._changed:
            if self.status != "ok":
                raise Unavailable(f"the model is {self.status}")
            if self._count + len(prompts) > self._max_queue:
                raise Unavailable(f"{self._count} sequences wait or run, at most {self._max_queue} may")
            self._count += len(prompts)
            self._arrived += [_Sequence(p, i, generation) for i, p in enumerate(prompts)]
            self._changed.notify()
        return generation

    def close(self) -> None:
        """End the thread; what still runs fails with Unavailable."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        try:
            self._load_and_step()
        finally:
            mx.clear_streams()  # with CUDA, MLX's own threads would abort the process at its end (MLX issue 4506)

    def _load_and_step(self) -> None:
        try:
            with MLX:
                model = self._load()
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._ready.set()
        try:
            while self._receive():
                self._step(model)
        except BaseException as error:
            log.critical("the engine has failed", exc_info=True)
            self._failure = error
        with self._changed:  # nothing can be submitted after this
            self._closing = True
            self._waiting += self._arrived
        self._fail(self._failure or Unavailable("the model is shutting down"))

    def _receive(self) -> bool:
        """Take what was submitted, sleeping while there is nothing to do; False when the engine is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._waiting or self._batches or self._closing)
            self._waiting += self._arrived
            self._arrived = []
            return not self._closing

    def _step(self, model: Phi3V) -> None:
        """Read one waiting prompt, then make one token for every running sequence."""
        try:
            with MLX:
                self._drop_cancelled()
                running = sum(len(b.sequences) for b in self._batches.values())
                if self._waiting and running < self._max_batch:
                    # What was running already, then first prompts: a request of many must not hold up all others.
                    first = min(self._waiting, key=lambda s: (not s.made, s.index))
                    self._waiting.remove(first)
                    self._prefill(model, first)
                for long in list(self._batches):
                    self._decode(model, long)
        except Exception as error:
            log.exception("a step failed; its sequences are ended")
            self._fail(error)

    def _prefill(self, model: Phi3V, sequence: _Sequence) -> None:
        """Read all ids of a sequence, those it made included: one that outgrows the short factors starts over."""
        try:
            if sequence.features is None:
                sequence.features = [model.image_features(crops) for crops in sequence.prompt.images]
                mx.eval(sequence.features)
                sequence.prompt = replace(sequence.prompt, images=[])  # the pixels are not needed again
            cache = KVCache(model.config.num_hidden_layers)
            long = model.config.is_long(sequence.length)
            logits = model.prefill(model.embed(sequence.prompt.ids + sequence.made, sequence.features), cache)
            self._deliver(sequence, mx.argmax(logits, -1).item())
            if not sequence.done:
                self._batches.setdefault(long, _Batch()).add(sequence, cache)
        except Exception as error:
            log.exception("a prompt failed; the others go on")
            self._end(sequence, error)

    def _decode(self, model: Phi3V, long: bool) -> None:
        """One token for each sequence of a batch, but those that outgrow its regime are to be read anew."""
        batch = self._batches[long]
        outgrown = [s for s in batch.sequences if model.config.is_long(s.length) != long]
        self._waiting += outgrown
        self._keep(long, [s for s in batch.sequences if s not in outgrown])
        if batch.sequences:
            logits = model.decode([s.made[-1] for s in batch.sequences], batch.cache, long)
            for sequence, token in zip(batch.sequences, mx.argmax(logits, -1).tolist(), strict=True):
                self._deliver(sequence, token)
            self._keep(long, [s for s in batch.sequences if not s.done])

    def _keep(self, long: bool, sequences: list[_Sequence]) -> None:
        self._batches[long].keep(sequences)
        if not sequences:
            del self._batches[long]

    def _deliver(self, sequence: _Sequence, token: int) -> None:
        """Hand a token to its request, and end the sequence if it was the last."""
        ended = token in sequence.prompt.end_ids
        if not ended:
            sequence.made.append(token)
        reason = "stop" if ended else "length" if len(sequence.made) >= sequence.prompt.max_tokens else None
        item = (sequence.index, None if ended else token, reason)
        if reason:
            self._end(sequence, item)
        else:
            sequence.generation._items.put(item)

    def _drop_cancelled(self) -> None:
        for sequence in self._known():
            if sequence.generation.cancelled:
                self._end(sequence, (sequence.index, None, "cancelled"))
        self._waiting = [s for s in self._waiting if not s.done]
        for long in list(self._batches):
            self._keep(long, [s for s in self._batches[long].sequences if not s.done])

    def _fail(self, error: BaseException) -> None:
        for sequence in self._known():
            self._end(sequence, error)
        self._waiting.clear()
        self._batches.clear()

    def _known(self) -> list[_Sequence]:
        return [*self._waiting, *(s for batch in self._batches.values() for s in batch.sequences)]

    def _end(self, sequence: _Sequence, item: tuple | BaseException) -> None:
        """The engine is done with a sequence, once: make room for another, and tell its request."""
        if not sequence.done:
            sequence.done = True
            sequence.features = None  # freed on this thread, not on the request's
            with self._changed:
                self._count -= 1
            sequence.generation._items.put(item)


class _Batch:
    """The sequences of one rope regime and their common cache: row r of the cache is sequences[r]."""

    def __init__(self):
        self.sequences: list[_Sequence] = []
        self.cache: KVCache | None = None

    def add(self, sequence: _Sequence, cache: KVCache) -> None:
        if self.cache is None:
            self.cache = cache
        else:
            self.cache.join(cache)
        self.sequences.append(sequence)

    def keep(self, sequences: list[_Sequence]) -> None:
        if 0 < len(sequences) < len(self.sequences):
            self.cache.keep([i for i, s in enumerate(self.sequences) if s in sequences])
        self.sequences = sequences
