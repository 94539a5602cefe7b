"""What may be asked of the model, and the pieces in which the answer comes.

Knows nothing of JSON, of files or of the model; a field added to SamplingParams is accepted by
`LLM.stream` and on the wire.
"""

import base64
import binascii
import json
from dataclasses import dataclass, field

from .errors import RequestError

DEFAULT_MAX_TOKENS = 512  # as documented
MAX_CROPS = 16  # what Phi-3-vision's own preprocessor uses; more than the model was trained on


@dataclass(frozen=True)
class SamplingParams:
    """How to answer. `max_tokens` None means DEFAULT_MAX_TOKENS, or what room the context leaves if that is less.

    `num_crops` is the most 336×336 crops a picture is cut into; None means what the checkpoint says.
    """

    max_tokens: int | None = None
    num_crops: int | None = None

    def __post_init__(self):
        check_whole("max_tokens", self.max_tokens, 1)
        check_whole("num_crops", self.num_crops, 1, MAX_CROPS)


@dataclass(frozen=True)
class Request:
    """One or several prompts, answered side by side: `images[i]` are the pictures of `prompts[i]`."""

    prompts: list[str]
    images: list[list]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class Delta:
    """The next piece of the answer to prompt `index`; the last one has a `finish_reason` and the token counts."""

    index: int
    text: str = ""
    finish_reason: str | None = None  # "stop": the model ended; "length": max_tokens were made; "cancelled"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's, those that were not read again


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


def check_whole(name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse what is neither None nor an integer from `low` to `high`; True is no integer here."""
    if value is not None and (type(value) is not int or value < low or (high and value > high)):
        allowed = f"from {low} to {high}" if high else f"of at least {low}"
        given = json.dumps(value, default=repr)[:40]
        raise RequestError(f"{name} must be a whole number {allowed}, not {given}", name)
