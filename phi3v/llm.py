"""Text and pictures in, text out: where embedded use enters, and all that the server knows of the model.

Knows nothing of HTTP or JSON. Pictures are decoded and tokens become text on the caller's thread, so that the
engine's only steps.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import NoneType

from . import images, model
from .engine import Engine
from .errors import RequestError, SetupError
from .request import DEFAULT_MAX_TOKENS, Delta, Request, SamplingParams, image_bytes
from .sequences import Generation, Prompt
from .tokenizer import Decoder, Tokenizer

DEMO = Path(__file__).parent / "demo"

log = logging.getLogger("phi3v")


class LLM:
    """A model that answers; safe from any thread. `name` is "demo", a checkpoint folder or a hub id.

    Returns at once while the engine loads; `wait` waits for it. `limits` are those of `Engine`. Raises SetupError for
    what is no checkpoint.
    """

    def __init__(self, name: str = "demo", **limits):
        folder = _find(name)
        self.checkpoint = _checkpoint_name(name, folder)
        with _told(folder):
            self.config = model.Config.read(folder)
            self.tokenizer = Tokenizer(folder)
            if self.tokenizer.largest_id >= self.config.vocab_size:
                raise SetupError(f"{folder}: tokenizer.json has ids beyond the model's {self.config.vocab_size}")
            self._num_crops, ends = _folder_defaults(folder)
        self._end_ids = self.tokenizer.end_ids | ends
        self._folder, self._engine = folder, Engine(partial(model.load, folder, self.config), **limits)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def status(self) -> str:
        """One of "loading", "ok", "idle", "draining", "failed"."""
        return self._engine.status

    @property
    def limits(self) -> dict[str, int]:
        """What runs at once, waits, fits and is kept; complete once the model is loaded."""
        return self._engine.limits

    def stats(self) -> dict[str, float]:
        return self._engine.stats()

    def wait(self) -> None:
        """Return when the model is loaded; raise SetupError when it cannot be."""
        with _told(self._folder):
            self._engine.wait()

    def generate(self, prompt: str | list[str], images: list | None = None, **params) -> str | list[str]:
        """The whole answer, or a list of them for a list of prompts, which run as one batch.

        `images` holds paths, bytes, PIL images or data: URLs; for a list of prompts one such list for each.
        `params` are the fields of SamplingParams. Raises RequestError for what cannot be answered.
        """
        with self.stream(prompt, images, **params) as deltas:
            texts = [""] * (1 if isinstance(prompt, str) else len(prompt))
            for delta in deltas:
                texts[delta.index] += delta.text
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str | list[str], images: list | None = None, **params) -> "Deltas":
        """The answer as it is made. The arguments are those of `generate`; all errors of theirs are raised here."""
        several = not isinstance(prompt, str)
        if not isinstance(prompt, str | list | tuple) or not isinstance(images, list | tuple | NoneType):
            given = f"{type(prompt).__name__} and {type(images).__name__}"
            raise TypeError(f"prompt must be a string or a list of strings, images a list of pictures, not {given}")
        prompts = list(prompt) if several else [prompt]
        pictures = list(images or []) if several else [list(images or [])]
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise TypeError("prompt must be a string or a list of at least one")
        if len(pictures) not in (0, len(prompts)):
            raise TypeError(f"images must hold {len(prompts)} lists, one for each prompt, not {len(pictures)}")
        if "" in prompts:
            raise RequestError("prompt is empty", "prompt")
        request = Request(prompts, pictures or [[]] * len(prompts), SamplingParams(**params))
        return self.answer(request)

    def answer(self, request: Request, owner: str = "") -> "Deltas":
        """Queue all prompts of a request, then return its Deltas. Raises RequestError, Unavailable among them.

        What is kept of a request is only ever used for others of the same owner.
        """
        prompts, room = [], self._context()
        for i, (text, sources) in enumerate(zip(request.prompts, request.images, strict=True)):
            where = f"images[{i}]" if len(request.prompts) > 1 else "images"
            crops = [self._crops(source, request.params, f"{where}[{k}]") for k, source in enumerate(sources)]
            ids = self.tokenizer.encode(self.tokenizer.prompt(text, len(crops)), [c.tokens for c in crops], room)
            prompts.append(Prompt(ids, crops, self._room(len(ids), request.params.max_tokens), self._end_ids, owner))
        lengths, decoders = [len(p.ids) for p in prompts], [self.tokenizer.decoder() for _ in prompts]
        return Deltas(self._engine.submit(prompts), lengths, decoders)

    def close(self) -> None:
        """Free the model; requests that still run fail."""
        self._engine.close()

    def _crops(self, source, params: SamplingParams, param: str) -> images.Crops:
        try:
            picture = images.load(image_bytes(source) if _is_data_url(source) else source)
            return images.process(picture, params.num_crops or self._num_crops)
        except RequestError as error:
            raise RequestError(f"{param}: {error.message}", param) from error.__cause__

    def _context(self) -> int:
        """The most tokens of a prompt and its answer: what the model takes, and this machine's memory."""
        return self.limits["context"] or self.config.max_position_embeddings

    def _room(self, prompt_tokens: int, asked: int | None) -> int:
        """The tokens an answer may have: what was asked, which must fit, or the default, cut to what fits."""
        context = self._context()
        room = context - prompt_tokens
        if room < 1:
            raise RequestError(f"the prompt has {prompt_tokens} tokens, the context {context}: shorten it", "prompt")
        if asked is not None and asked > room:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens and max_tokens is {asked}: more than the context of {context}",
                "max_tokens",
            )
        return min(DEFAULT_MAX_TOKENS, room) if asked is None else asked


class Deltas:
    """The pieces of a request's answers as they come: an iterator, and a context manager that cancels on leaving.

    One that is dropped, as by `break` in a `for` loop, cancels too.
    """

    def __init__(self, generation: Generation, lengths: list[int], decoders: list[Decoder]):
        self._generation = generation
        self._pieces = _pieces(generation, lengths, decoders)

    def __iter__(self) -> "Deltas":
        return self

    def __next__(self) -> Delta:
        return next(self._pieces)

    def __enter__(self) -> "Deltas":
        return self

    def __exit__(self, *_) -> None:
        self._generation.cancel()

    __del__ = __exit__


def _pieces(generation: Generation, lengths: list[int], decoders: list[Decoder]) -> Iterator[Delta]:
    made = [0] * len(lengths)
    for index, token, reason in generation:
        text = ""
        if token is not None:
            made[index] += 1
            text = decoders[index].push(token)
        if reason:
            text += decoders[index].finish()
            yield Delta(index, text, reason, lengths[index], made[index], generation.cached[index])
        elif text:
            yield Delta(index, text)


def _find(name: str) -> Path:
    """The folder of a checkpoint: the embedded one, a folder, or what the hub's cache on this machine holds."""
    if name == "demo":
        return DEMO
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise SetupError(f"{name} is a file; a model is a folder with config.json and .safetensors files")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise SetupError(f"there is no folder {name}; try --model demo, the embedded model")
    from mlx_lm.utils import hf_repo_to_path  # 2 s to import, and only this path needs it

    try:
        return hf_repo_to_path(name)
    except Exception as error:  # huggingface_hub's errors differ from version to version
        log.debug("hub id %r was not found in the cache: %s", name, error)
        raise SetupError(
            f"{name} is neither a folder nor in this machine's Hugging Face cache: fetch it with"
            f" `hf download {name}`, or try --model demo, which needs no download"
        ) from None


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
        from . import __version__

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


def _is_data_url(source) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"
