"""Text and pictures in, text out: where embedded use enters, and all that the server knows of the model.

Knows nothing of HTTP or JSON. Pictures are decoded and tokens become text on the caller's thread; the engine's steps.
"""

import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import NoneType

import numpy as np

from . import __version__, images, model
from .engine import Engine
from .errors import RequestError, SetupError, check_text
from .images import Header
from .parallel import Group
from .request import DEFAULT_MAX_TOKENS, Delta, Picture, Request, SamplingParams, question
from .sequences import Generation, Prompt, shared_length
from .tokenizer import Decoder, Parts, Tokenizer

DEMO = Path(__file__).parent / "demo"
PLACES = 2  # requests whose pictures are decoded at once


class LLM(AbstractContextManager):
    """A model that answers; safe from any thread. `name` is "demo", a checkpoint folder or a hub id.

    `adapter` is the folder of a LoRA or DoRA adapter, `group` the ranks that run it together. `limits` are those of
    `Engine`. Returns while it loads: `wait` waits. Raises SetupError for what is no checkpoint.
    """

    def __init__(self, name: str = "demo", adapter: str | None = None, group: Group | None = None, **limits):
        folder = find(name)
        adapter = Path(adapter).expanduser() if adapter else None
        self.checkpoint = _checkpoint_name(name, folder) + (f"+{adapter.resolve().name}" if adapter else "")
        with _told(folder):
            self.config = model.Config.read(folder)
            self.tokenizer = Tokenizer(folder)
            if self.tokenizer.largest_id >= self.config.vocab_size:
                raise SetupError(f"{folder}: tokenizer.json has ids beyond the model's {self.config.vocab_size}")
            self._num_crops, ends = _folder_defaults(folder)
            if adapter:
                model.read_adapter_config(adapter)  # what is none is told at once, as what is no model
        self._end_ids = self.tokenizer.end_ids | ends
        load = partial(model.load, folder, adapter=adapter, group=group)
        self._folder, self._engine = folder, Engine(load, group=group, **limits)
        self.stats = self._engine.stats
        self._moved = threading.Condition()  # guards these two: the owners of what is decoded, and of what is to be
        self._decoding: list[str] = []
        self._wanting: list[str] = []
        self.limits = self._engine.limits  # what runs at once, waits, fits and is kept; complete once it is loaded

    def __exit__(self, kind, *_) -> None:
        self._engine.close(in_order=kind is None)

    @property
    def status(self) -> str:
        """One of "loading", "ok", "idle", "draining", "failed"."""
        return self._engine.status

    def wait(self) -> None:
        """Return when the model is loaded; raise SetupError when it cannot be."""
        with _told(self._folder):
            self._engine.wait()

    def generate(self, prompt: str | list[str], images: list | None = None, **params) -> str | list[str]:
        """The whole answer, or a list of them for a list of prompts, which run as one batch.

        `images` holds paths, bytes, PIL images or data: URLs; for a list of prompts one such list for each. `params`
        are SamplingParams' fields; with `n` there are so many answers to each prompt in turn. Raises RequestError.
        """
        texts: dict[int, str] = defaultdict(str)
        with self.stream(prompt, images, **params) as deltas:
            for delta in deltas:
                texts[delta.index] += delta.text
        answers = [text for _, text in sorted(texts.items())]
        return answers[0] if isinstance(prompt, str) and len(answers) == 1 else answers

    def stream(self, prompt: str | list[str], images: list | None = None, **params) -> "Deltas":
        """The answer as it is made. The arguments are those of `generate`; all errors of theirs are raised here."""
        several = isinstance(prompt, list | tuple)
        prompts = list(prompt) if several else [prompt]
        texts = prompts and all(isinstance(text, str) for text in prompts)
        if not texts or not isinstance(images, list | tuple | NoneType):
            given = f"{type(prompt).__name__} and {type(images).__name__}"
            raise TypeError(f"prompt must be a string or a list of strings, images a list of pictures, not {given}")
        pictures = list(images or [[]] * len(prompts)) if several else [images or []]
        if len(pictures) != len(prompts):
            raise TypeError(f"images must hold {len(prompts)} lists, one for each prompt, not {len(pictures)}")
        chats = []
        for i, (text, sources) in enumerate(zip(prompts, pictures, strict=True)):
            check_text("prompt", text)
            where = f"images[{i}]" if several else "images"
            chats.append(question(text, [Picture(source, f"{where}[{k}]") for k, source in enumerate(sources)]))
        return self.answer(Request(chats, SamplingParams(**params)))

    def answer(
        self, request: Request, owner: str = "", patience: float | None = None, check: Callable[[], None] = bool
    ) -> "Deltas":
        """Queue all prompts of a request, then return its Deltas. Raises RequestError, Unavailable among them.

        What is kept is the owner's own. With `patience`, so many seconds of silence, or a token unseen, are a None.
        `check` is called now and then until it returns, and may raise when nobody wants the answer any more.
        """
        params, prompts, decoders, counts = request.params, [], [], []
        num_crops = params.num_crops or self._num_crops
        opened = [[Header(p.source, p.num_crops or num_crops, p.param) for p in c.pictures] for c in request.chats]
        pixels = sum(header.pixels for headers in opened for header in headers)
        if owner and pixels > images.MAX_JPEG_PIXELS:  # over the wire; who embeds us may ask for as much as he likes
            message = f"the pictures have {pixels:,} pixels in all, at most {images.MAX_JPEG_PIXELS:,} may be"
            raise RequestError(message, "messages" if request.clamp else "images")
        for chat, pictures in zip(request.chats, opened, strict=True):
            parts = self.tokenizer.chat(chat.messages)
            if params.choices:
                mine, length = self._choices(parts, pictures, request, owner, check)
                prompts += mine
                counts += [(length, len(p.ids) - length) for p in mine]
                continue
            ids = self._encode(parts, pictures, request)
            most = self._room(len(ids), request)
            goes_on = chat.messages[-1][0] == "assistant" and bool(chat.messages[-1][1])
            for branch in range(params.n):
                prompts.append(Prompt(ids, pictures, most, self._end_ids, owner, params, branch))
                decoders.append(self.tokenizer.decoder(params.stop, goes_on))
        self._engine.check(prompts)
        with self._place_to_decode(owner, check) if pixels else nullcontext():
            self._engine.check(prompts)  # it may have waited for long
            for headers in opened:  # the prompts have these lists; none was refused, so now their pictures are decoded
                for k, header in enumerate(headers):
                    check()
                    headers[k] = header.crops()
            generation = self._engine.submit(prompts, patience)
        chosen = params.choices and _chosen(generation, counts, params.choices)
        pieces = chosen or _pieces(generation, [len(p.ids) for p in prompts], decoders)
        return Deltas(generation, filter(None, pieces) if patience is None else pieces)

    def close(self) -> None:
        """Free the model; requests that still run fail."""
        self._engine.close()

    @contextmanager
    def _place_to_decode(self, owner: str, check: Callable[[], None]) -> Iterator[None]:
        """One of PLACES, since what is decoded takes much memory; an owner who has one lets others go first."""
        with self._moved:
            self._wanting.append(owner)
            try:
                while len(self._decoding) >= PLACES or (owner in self._decoding and {*self._wanting} != {owner}):
                    self._moved.wait(0.05)
                    check()
                self._decoding.append(owner)
            finally:
                self._wanting.remove(owner)
        try:
            yield
        finally:
            with self._moved:
                self._decoding.remove(owner)
                self._moved.notify_all()

    def _encode(self, parts: Parts, pictures: list[Header], request: Request) -> list[int]:
        try:
            return self.tokenizer.encode(parts, [p.tokens for p in pictures], self._context())
        except RequestError as error:
            raise RequestError(error.message, "messages" if request.clamp else error.param) from None

    def _choices(
        self, parts: Parts, pictures: list[Header], request: Request, owner: str, check: Callable
    ) -> tuple[list[Prompt], int]:
        """A prompt for each choice, its targets what it adds to what all share, and the end; and the tokens without."""
        turn = max(i for i, part in enumerate(parts) if not isinstance(part, str) and part >= 0)
        ids, ends = self._encode(parts[: turn + 1], pictures, request), []
        length = len(ids) + len(self._encode(parts[turn:], pictures, request)[2:])
        for choice in request.params.choices:
            check()
            # Only the last turn is encoded again, since a choice may go on in it.
            ends.append(self._encode([*parts[turn:], choice], pictures, request)[2:])
            self._room(len(ids) + len(ends[-1]), request)
        if len(set(map(tuple, ends))) < len(ends):
            raise RequestError("two of the choices are the same tokens: they differ in leading space only", "choices")
        shared = min(shared_length(np.array(ends[0]), np.array(end)) for end in ends)
        last, rest = self.tokenizer.special["<|end|>"], {"owner": owner, "params": request.params}
        return [Prompt(ids + end, pictures, 1, targets=(*end[shared:], last), **rest) for end in ends], length

    def _context(self) -> int:
        """The most tokens of a prompt and its answer: what the model takes, and this machine's memory."""
        return self.limits["context"] or self.config.max_position_embeddings

    def _room(self, prompt_tokens: int, request: Request) -> int:
        """The tokens an answer may have: what was asked, which must fit or is cut to what fits, or the default."""
        context, asked = self._context(), request.params.max_tokens
        room = context - prompt_tokens
        if room < 1:
            param = "messages" if request.clamp else "prompt"
            raise RequestError(f"the prompt has {prompt_tokens} tokens, the context {context}: shorten it", param)
        if asked is not None and asked > room and not request.clamp:
            given = f"the prompt has {prompt_tokens} tokens and max_tokens is {asked}"
            raise RequestError(f"{given}: more than the context of {context}", "max_tokens")
        return min(DEFAULT_MAX_TOKENS if asked is None else asked, room)


class Deltas(AbstractContextManager, Iterator):
    """The pieces of a request's answers as they come; leaving the `with`, or dropping it by a `break`, cancels."""

    def __init__(self, generation: Generation, pieces: Iterator[Delta | None]):
        self._generation, self._pieces = generation, pieces

    def __next__(self) -> Delta | None:
        return next(self._pieces)

    def __exit__(self, *_) -> None:
        self._generation.cancel()

    __del__ = __exit__


def _pieces(generation: Generation, lengths: list[int], decoders: list[Decoder]) -> Iterator[Delta | None]:
    made, running = [0] * len(lengths), set(range(len(lengths)))
    for item in generation:
        if item is None or item[0] not in running:
            yield None
            continue
        index, token, reason = item
        decoder, known = decoders[index], generation.logprobs[index]
        text = "" if token is None else decoder.push(token, known.popleft() if known else None)
        made[index] += token is not None
        text += decoder.finish() if reason and not decoder.stopped else ""
        if decoder.stopped:
            generation.cancel(index)
            reason = "stop"
        counts = lengths[index], made[index], generation.cached[index]
        yield Delta(index, text, reason, *counts, decoder.logprobs()) if text or reason else None
        if reason:
            running.discard(index)
        if not running:
            return


def _chosen(generation: Generation, counts: list[tuple], choices: tuple[str, ...]) -> Iterator[Delta | None]:
    """One Delta for each question: the most probable of its choices, which are next to each other in `counts`."""
    left, cancelled = [len(choices)] * (len(counts) // len(choices)), set()
    for item in generation:
        if item is None:
            yield None
            continue
        chat = item[0] // len(choices)
        left[chat] -= 1
        cancelled |= {chat} if item[2] == "cancelled" else set()
        if left[chat]:
            yield None
        elif chat in cancelled:
            yield Delta(chat, "", "cancelled")
        else:
            mine = slice(chat * len(choices), (chat + 1) * len(choices))
            scores = np.array(generation.scores[mine])
            shares = np.exp(scores - np.logaddexp.reduce(scores)).tolist()
            best = int(scores.argmax())
            cached, shown = min(generation.cached[mine]), dict(zip(choices, shares, strict=True))
            yield Delta(chat, choices[best], "stop", *counts[mine][best], cached, scores=shown)


def find(name: str) -> Path:
    """The folder of a checkpoint: the embedded one, a folder, or that of a hub id, which may have to be downloaded."""
    folder = DEMO if name == "demo" else Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise SetupError(f"{name} is a file; a model is a folder with config.json and .safetensors files")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise SetupError(f"there is no folder {name}; a model is demo (embedded), a checkpoint folder or a hub id")
    from . import hub  # 0.3 s to import, and what is a path has no business with it

    return hub.find(name)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Whatever else a folder's files make go wrong is one line for a person, too."""
    try:
        yield
    except SetupError:
        raise
    except Exception as error:
        raise SetupError(f"{folder} cannot be loaded: {type(error).__name__}: {str(error)[:200]}") from error


def _checkpoint_name(name: str, folder: Path) -> str:
    """What `system_fingerprint` says: demo-VERSION, the folder's name, or hub id and revision."""
    if folder == DEMO:
        return f"demo-{__version__}"
    return f"{name}@{folder.name[:12]}" if folder.parent.name == "snapshots" else folder.resolve().name


def _folder_defaults(folder: Path) -> tuple[int, frozenset[int]]:
    """`num_crops` of preprocessor_config.json, and the end ids that generation_config.json adds, if any."""
    found = []
    for name in ("preprocessor_config.json", "generation_config.json"):
        path = folder / name
        try:
            found.append(json.loads(path.read_bytes()) if path.exists() else {})
        except (OSError, ValueError):
            raise SetupError(f"{path} is not JSON") from None
    crops, ends = found[0].get("num_crops") or 4, found[1].get("eos_token_id") or []
    ends = frozenset([ends] if isinstance(ends, int) else ends)
    SamplingParams(num_crops=crops)
    return crops, ends
