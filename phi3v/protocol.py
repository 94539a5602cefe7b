"""JSON ↔ Request and Delta: the shapes on the wire.

Pure functions: knows nothing of sockets, of keys or of the model.
"""

import json
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime

from .errors import RequestError
from .request import DEFAULT_MAX_TOKENS, Delta, Request, SamplingParams, check_whole, image_bytes

MODEL = "phi-3-vision"  # the documented name, whatever checkpoint answers
MAX_PROMPTS = 32  # sequences of one request: a full batch
MAX_IMAGES = 16  # pictures of one prompt; at 2,509 tokens each they fill a third of the context
MAX_PICTURES = 32  # of one request: each is up to 23 MB of crops until its turn comes
MAX_DEPTH = 32  # of the JSON; ours needs 4


def parse_json(raw: bytes) -> dict:
    """A JSON object out of a body; strict where Python's parser is lenient."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise RequestError("the body is not UTF-8") from None
    except RecursionError:
        raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON from line {error.lineno} column {error.colno} on") from None
    except ValueError:  # _no_constant, and integers of over 4,300 digits
        raise RequestError("the body holds a number that is none, or too long") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, not {_kind(body)}")
    level = [body]
    for _ in range(MAX_DEPTH):
        level = [v for node in level for v in (node.values() if isinstance(node, dict) else node) if _nested(v)]
    if level:
        raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels")
    return body


def parse_completion(body: dict, max_tokens: int) -> Request:
    """The body of /v1/completions; `max_tokens` is the most that may be asked for."""
    prompt = body.get("prompt")
    several = isinstance(prompt, list)
    prompts = prompt if several else [prompt]
    if prompt is None:
        raise RequestError("prompt is missing: a string, or a list of strings", "prompt")
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RequestError(f"prompt must be a string or a list of 1 to {MAX_PROMPTS}, not {len(prompts)}", "prompt")
    for i, text in enumerate(prompts):
        _check_text(text, f"prompt[{i}]" if several else "prompt")
    images = body.get("images")
    if images is None:
        images = [[]] * len(prompts)
    elif not several:
        images = [_images(images, "images")]
    elif not isinstance(images, list) or len(images) != len(prompts):
        given = len(images) if isinstance(images, list) else _kind(images)
        raise RequestError(f"images must be a list of {len(prompts)} lists, one for each prompt, not {given}", "images")
    else:
        images = [_images(row, f"images[{i}]") for i, row in enumerate(images)]
        if sum(map(len, images)) > MAX_PICTURES:
            raise RequestError(f"images has {sum(map(len, images))} pictures, at most {MAX_PICTURES} may be", "images")
    check_whole("max_tokens", body.get("max_tokens"), 1, max_tokens)
    params = {name: body[name] for name in SamplingParams.__dataclass_fields__ if name in body}
    if params.get("max_tokens") is None and max_tokens < DEFAULT_MAX_TOKENS:
        params["max_tokens"] = max_tokens
    return Request(prompts, images, SamplingParams(**params))


def completion_response(deltas: Iterable[Delta], checkpoint: str, now: datetime | None = None) -> dict:
    """Fold an answer into the reply of /v1/completions, a superset of the documented one."""
    texts: dict[int, list[str]] = {}
    last: dict[int, Delta] = {}
    for delta in deltas:
        texts.setdefault(delta.index, []).append(delta.text)
        if delta.finish_reason:
            last[delta.index] = delta
    responses = ["".join(texts[i]) for i in sorted(texts)]
    now = now or datetime.now(UTC)
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(now.timestamp()),
        "model": MODEL,
        "system_fingerprint": checkpoint,
        "choices": [
            {"index": i, "text": text, "logprobs": None, "finish_reason": last[i].finish_reason}
            for i, text in enumerate(responses)
        ],
        "usage": usage(last.values()),
        "responses": responses,
        "timestamp": now.isoformat(),
    }


def usage(last: Iterable[Delta]) -> dict:
    """The token counts of a request out of the last delta of each of its answers."""
    last = list(last)
    prompt, completion = sum(d.prompt_tokens for d in last), sum(d.completion_tokens for d in last)
    cached = sum(d.cached_tokens for d in last)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error(status: int, message: str, kind: str, param: str | None = None) -> dict:
    """The documented error, with the two fields that OpenAI's clients show."""
    return {"error": {"code": str(status), "message": message, "type": kind, "param": param}}


def render(body: dict) -> bytes:
    # "replace": a message may repeat half a surrogate pair out of the request, which UTF-8 cannot hold.
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _images(images, param: str) -> list[bytes]:
    if not isinstance(images, list):
        raise RequestError(f"{param} must be a list of pictures (data: URLs or base64), not {_kind(images)}", param)
    if len(images) > MAX_IMAGES:
        raise RequestError(f"{param} has {len(images)} pictures, at most {MAX_IMAGES} are allowed", param)
    for i, image in enumerate(images):
        if not isinstance(image, str):
            raise RequestError(f"{param}[{i}] must be a data: URL or base64, not {_kind(image)}", f"{param}[{i}]")
    return [image_bytes(image, f"{param}[{i}]") for i, image in enumerate(images)]


def _check_text(text, param: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{param} must be a string, not {_kind(text)}", param)
    if not text:
        raise RequestError(f"{param} is empty", param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{param} holds half a surrogate pair (\\ud800 to \\udfff)", param) from None


def _nested(value) -> bool:
    return isinstance(value, dict | list)


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON number")
