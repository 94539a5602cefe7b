"""What may be asked of the model, and the pieces in which the answer comes.

Knows nothing of JSON, of files or of the model. A field added to SamplingParams is accepted, and held to its bounds,
by `LLM.stream` and on the wire; what is left to write is its use, in `sampling`.
"""

import base64
import binascii
import re
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from .errors import RequestError, check_number, check_texts

DEFAULT_MAX_TOKENS = 512  # as documented
MAX_CROPS = 16  # what Phi-3-vision's own preprocessor uses; more than the model was trained on
MAX_CHOICES, MAX_STOPS = 64, 8
MAX_CHOICE, MAX_STOP = 1024, 256  # characters of one
IMAGE_TAG = re.compile(r"<\|image_([0-9]{1,9})\|>")


def _option(default, **bounds):
    return field(default=default, metadata=bounds)  # those of check_number or of check_texts


@dataclass(frozen=True)
class SamplingParams:
    """How to answer; None means the default. Temperature 0 is greedy; a `top_k` of 0 and the other defaults do nothing.

    `max_tokens` None means DEFAULT_MAX_TOKENS, or what room the context leaves if that is less. `num_crops` is the most
    336×336 crops a picture is cut into, None what the checkpoint says. `repetition_penalty` counts prompt and answer,
    the other two the answer only. `logprobs` is the number of alternatives shown beside each token, None for no
    log-probabilities. `n` answers are made to each prompt; with `choices` it is the most probable of them.
    """

    max_tokens: int | None = _option(None, low=1)
    num_crops: int | None = _option(None, low=1, high=MAX_CROPS)
    temperature: float = _option(0.0, low=0, high=2, kind=float)
    top_p: float = _option(1.0, low=0, high=1, kind=float)
    top_k: int = _option(0, low=0, high=1_000_000)
    min_p: float = _option(0.0, low=0, high=1, kind=float)
    repetition_penalty: float = _option(1.0, low=0.1, high=10, kind=float)
    presence_penalty: float = _option(0.0, low=-2, high=2, kind=float)
    frequency_penalty: float = _option(0.0, low=-2, high=2, kind=float)
    seed: int | None = _option(None, low=-(2**63), high=2**63 - 1)
    n: int = _option(1, low=1, high=8)
    logprobs: int | None = _option(None, low=0, high=20)
    stop: tuple[str, ...] = _option((), least=0, most=MAX_STOPS, longest=MAX_STOP)
    choices: tuple[str, ...] = _option((), least=1, most=MAX_CHOICES, longest=MAX_CHOICE)

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            if value is None or value is option.default:
                value = option.default
            elif "low" in option.metadata:
                check_number(option.name, value, **option.metadata)
            else:
                value = (value,) if isinstance(value, str) else value
                check_texts(option.name, value, **option.metadata)
                value = tuple(value)
            object.__setattr__(self, option.name, value)
        if len(set(self.choices)) < len(self.choices):
            raise RequestError("choices must differ from each other", "choices")
        if self.choices and self.n > 1:
            raise RequestError(f"with choices there is one answer: n must be 1, not {self.n}", "n")


class Picture(NamedTuple):
    """What a picture is read from, the field it came in, and its own `num_crops`, if any."""

    source: object
    param: str = "images"
    num_crops: int | None = None


class Chat(NamedTuple):
    """What is put to the model: (role, content) of each message, and the pictures; −k is the place of pictures[k − 1].

    A last message of the assistant's is continued.
    """

    messages: list[tuple[str, list[str | int]]]
    pictures: list[Picture]


class Request(NamedTuple):
    """Conversations that are answered side by side; `clamp` says that a max_tokens beyond the context is cut to it."""

    chats: list[Chat]
    params: SamplingParams
    clamp: bool = False


class TokenLogprob(NamedTuple):
    """A token's bytes, its natural log-probability, the same of the most probable ones, best first, and where in the
    text, in characters, it begins."""

    token: bytes
    logprob: float
    top: list[tuple[bytes, float]]
    start: int = 0


@dataclass(frozen=True)
class Delta:
    """The next piece of answer `index` = prompt · n + i, with the token counts so far.

    The last one has a `finish_reason`, and with `choices` their probabilities.
    """

    index: int
    text: str = ""
    finish_reason: str | None = None  # "stop": the model ended; "length": max_tokens were made; "cancelled"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's, those that were not read again
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scores: dict[str, float] | None = None


def question(text: str, pictures: list[Picture]) -> Chat:
    """One user's turn, with its pictures where their `<|image_k|>` tags stand, or in front if there are none."""
    tags = {int(k) for k in IMAGE_TAG.findall(text)}
    if not tags:
        content = [part for k in range(1, len(pictures) + 1) for part in (-k, "\n")] + [text]
    elif tags == set(range(1, len(pictures) + 1)):
        pieces = IMAGE_TAG.split(text)  # text, number, text, number, …, text
        content = [-int(piece) if i % 2 else piece for i, piece in enumerate(pieces)]
    else:
        named = ", ".join(f"<|image_{k}|>" for k in sorted(tags)[:4])
        raise RequestError(f"the prompt names {named} but has {len(pictures)} pictures; name each, or none", "images")
    return Chat([("user", content)], pictures)


def image_bytes(text: str, param: str | None = None) -> bytes:
    """The bytes of a `data:` URL or of bare base64; nothing is ever fetched or opened by name."""
    payload = text
    if text[:5].lower() == "data:":
        head, comma, payload = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RequestError("a data: URL must read data:image/…;base64,…", param)
    elif "://" in text[:16]:
        raise RequestError(f"pictures are not fetched from {text[:8]}…: send a data: URL or base64", param)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("the picture is not valid base64 (alphabet A-Z a-z 0-9 + /, padded with =)", param) from None
