"""JSON ↔ Request and Delta: the shapes on the wire.

Pure functions: knows nothing of sockets, of keys or of the model.
"""

import json
import math
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import fields
from datetime import UTC, datetime

from .errors import RequestError, check, check_number, check_text, check_texts
from .request import DEFAULT_MAX_TOKENS, Chat, Delta, Picture, Request, SamplingParams, image_bytes, question

MODEL = "phi-3-vision"  # the documented name, whatever checkpoint answers
MAX_PROMPTS = 32  # of one request, each counted `n` times: a full batch
MAX_MESSAGES = 256
MAX_IMAGES = 16  # pictures of one prompt; at 2,509 tokens each they fill a third of the context
MAX_PICTURES = 32  # of one request: each is up to 23 MB of crops until its turn comes
MAX_DEPTH = 32  # of the JSON; ours needs 6
MAX_MARKS = 500_000  # brackets, commas and colons: twenty megabytes of them would hold up everybody for a second
MAX_DIGITS = 400  # of a number: the longest float has 309 before its point, and long ones cost their square
ROLES = {"system": "system", "developer": "system", "user": "user", "tool": "user", "assistant": "assistant"}
# Fields that would change the answer and are not there: what they may hold because it changes nothing.
UNSUPPORTED = {
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "best_of": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "echo": (False,),
    "suffix": ("",),
}
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients skip


def parse_json(raw: bytes) -> dict:
    """A JSON object out of a body; strict where Python's parser is lenient."""
    if sum(map(raw.count, (b"{", b"[", b",", b":"))) > MAX_MARKS:
        raise RequestError(f"the body has over {MAX_MARKS:,} brackets, commas and colons")
    try:
        body = json.loads(raw.decode("utf-8"), parse_float=_real, parse_int=_whole, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise RequestError("the body is not UTF-8") from None
    except RecursionError:
        raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON from line {error.lineno} column {error.colno} on") from None
    except ValueError:
        raise RequestError("the body holds a number that is none, or too long") from None
    if not isinstance(body, dict):
        raise RequestError("the body is JSON, but not an object")
    level = [body]
    for _ in range(MAX_DEPTH):
        inside = (v for node in level for v in (node.values() if isinstance(node, dict) else node))
        level = [v for v in inside if isinstance(v, dict | list)]
    if level:
        raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels")
    return body


def parse_completion(body: dict, max_tokens: int) -> Request:
    """The body of /v1/completions; `max_tokens` is the most that may be asked for."""
    prompt, images = body.get("prompt"), body.get("images")
    several = isinstance(prompt, list)
    prompts = prompt if several else [prompt]
    check("prompt", prompt, prompt is not None, "a string or a list of strings")
    if several:
        check_texts("prompt", prompts, 1, MAX_PROMPTS)
    else:
        check_text("prompt", prompt)
    if several and images is not None:
        good = isinstance(images, list) and len(images) == len(prompts)
        check("images", images, good, f"a list of {len(prompts)} lists, one for each prompt")
    rows = [[]] * len(prompts) if images is None else images if several else [images]
    pictures = [_images(row, f"images[{i}]" if several else "images") for i, row in enumerate(rows)]
    if sum(map(len, pictures)) > MAX_PICTURES:
        raise RequestError(f"images has {sum(map(len, pictures))} pictures, at most {MAX_PICTURES} may be", "images")
    _check_number(body, "max_tokens", 1, max_tokens)
    most = body.get("max_tokens") or (max_tokens if max_tokens < DEFAULT_MAX_TOKENS else None)
    params = _params(body, max_tokens=most)
    if len(prompts) * params.n > MAX_PROMPTS:
        raise RequestError(f"{len(prompts)} prompts with n {params.n} are over {MAX_PROMPTS} answers", "n")
    return Request([question(*both) for both in zip(prompts, pictures, strict=True)], params)


def parse_chat(body: dict, max_tokens: int) -> Request:
    """The body of /v1/chat/completions; a larger limit of tokens than `max_tokens` is cut to it."""
    messages, parsed, pictures = body.get("messages"), [], []
    good = isinstance(messages, list) and 1 <= len(messages) <= MAX_MESSAGES
    check("messages", messages, good, f"a list of 1 to {MAX_MESSAGES}")
    for i, message in enumerate(messages):
        check(f"messages[{i}]", message, isinstance(message, dict), "an object")
        role = _one_of(message.get("role"), ROLES, f"messages[{i}].role")
        parsed.append((ROLES[role], _content(message.get("content"), role, f"messages[{i}].content", pictures)))
    if len(pictures) > MAX_IMAGES:
        raise RequestError(f"messages has {len(pictures)} pictures, at most {MAX_IMAGES} are allowed", "messages")
    limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if _check_number(body, name, 1)]
    logprobs = _flag(body, "logprobs")
    if _check_number(body, "top_logprobs", 0, 20) and not logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    shown = (body.get("top_logprobs") or 0) if logprobs else None
    return Request([Chat(parsed, pictures)], _params(body, max_tokens=min([*limits, max_tokens]), logprobs=shown), True)


def streaming(body: dict) -> tuple[bool, bool]:
    """Whether the answer is wanted as it is made, and its token counts at the end of that."""
    options = {} if body.get("stream_options") is None else body["stream_options"]
    check("stream_options", options, isinstance(options, dict), "an object")
    return _flag(body, "stream"), _flag(options, "include_usage", "stream_options.")


class Answer:
    """How one request is answered: `whole` is a fold of the deltas, `events` has them one by one.

    `chat` chooses the shape.
    """

    def __init__(self, chat: bool, checkpoint: str, prompts: int = 1, n: int = 1, now: datetime | None = None):
        self._chat, self._count, self._n, self._now = chat, prompts * n, n, now or datetime.now(UTC)
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(self._now.timestamp()),
            "model": MODEL,
            "system_fingerprint": checkpoint,
        }
        self._last: dict[int, Delta] = {}

    @property
    def counts(self) -> dict[str, int]:
        """The tokens so far; a prompt that is answered `n` times counts once, as its first answer has it."""
        prompts = {index // self._n: self._last[index] for index in sorted(self._last, reverse=True)}.values()
        return {
            "prompt_tokens": sum(delta.prompt_tokens for delta in prompts),
            "completion_tokens": sum(delta.completion_tokens for delta in self._last.values()),
            "cached_tokens": sum(delta.cached_tokens for delta in prompts),
        }

    def _usage(self) -> dict:
        prompt, completion, cached = self.counts.values()
        whole = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return whole | {"prompt_tokens_details": {"cached_tokens": cached}}

    def whole(self, deltas: Iterable[Delta | None]) -> dict:
        """The reply; /v1/completions has the documented fields beside those of OpenAI's clients."""
        texts, logprobs = [""] * self._count, [[] for _ in range(self._count)]
        for delta in filter(None, deltas):
            self._last[delta.index] = delta
            texts[delta.index] += delta.text
            logprobs[delta.index] += delta.logprobs
        choices = []
        for i, text in enumerate(texts):
            message = {"message": {"role": "assistant", "content": text, "refusal": None}}
            body = message if self._chat else {"text": text}
            choices.append(self._choice(self._last[i], body, logprobs[i]))
        reply = self._head | {"choices": choices, "usage": self._usage()}
        return reply if self._chat else reply | {"responses": texts, "timestamp": self._now.isoformat()}

    def events(self, deltas: Iterable[Delta | None], include_usage: bool) -> Iterator[bytes]:
        """The same as server-sent events; None among the deltas is a silence in which the connection is kept."""
        yield KEEP_ALIVE
        if self._chat:
            self._head["object"] += ".chunk"
            for index in range(self._count):
                yield self._event(Delta(index), {"delta": {"role": "assistant", "content": ""}})
        for delta in deltas:
            if delta is None:
                yield KEEP_ALIVE
                continue
            self._last[delta.index] = delta
            if not self._chat:
                yield self._event(delta, {"text": delta.text}, delta.logprobs)
                continue
            if delta.text or delta.logprobs:
                content = {"delta": {"content": delta.text}}
                yield self._event(Delta(delta.index, scores=delta.scores), content, delta.logprobs)
            if delta.finish_reason:
                yield self._event(Delta(delta.index, finish_reason=delta.finish_reason), {"delta": {}})
        if include_usage:
            yield sse(self._head | {"choices": [], "usage": self._usage()})
        yield DONE

    def _event(self, delta: Delta, body: dict, logprobs: list | None = None) -> bytes:
        return sse(self._head | {"choices": [self._choice(delta, body, logprobs)]})

    def _choice(self, delta: Delta, body: dict, logprobs: list | None) -> dict:
        shown = None
        if logprobs and self._chat:
            shown = {"content": [_chat_logprob(entry) for entry in logprobs], "refusal": None}
        elif logprobs:
            shown = {
                "tokens": [_shown(entry.token) for entry in logprobs],
                "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
                # Of alternatives that read the same, the best counts.
                "top_logprobs": [{_shown(token): _finite(value) for token, value in e.top[::-1]} for e in logprobs],
                "text_offset": [entry.start for entry in logprobs],
            }
        elif delta.scores:
            shown = ({"content": None} if self._chat else {}) | {"scores": delta.scores}
        return {"index": delta.index, **body, "logprobs": shown, "finish_reason": delta.finish_reason}


def error(e: RequestError) -> dict:
    """The documented error, with the two fields that OpenAI's clients show."""
    return {"error": {"code": str(e.status), "message": e.message, "type": e.type, "param": e.param}}


def render(body: dict) -> bytes:
    # "replace": a message may repeat half a surrogate pair out of the request, which UTF-8 cannot hold.
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def sse(body: dict) -> bytes:
    """One server-sent event, without the characters that some clients take for the end of a line."""
    text = render(body).decode().replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")
    return f"data: {text}\n\n".encode()


def _params(body: dict, **given) -> SamplingParams:
    """The options of both routes; fields that nobody knows are left alone, those that we lack are not."""
    for name, harmless in UNSUPPORTED.items():
        allowed = [json.dumps(value) for value in harmless]  # as text, or true would be 1
        if body.get(name) is not None and json.dumps(body[name]) not in allowed:
            allowed = " or ".join(["leave it out", *allowed])
            raise RequestError(f"{name} is not supported with this value: {allowed}", name)
    return SamplingParams(**{o.name: body[o.name] for o in fields(SamplingParams) if o.name in body} | given)


def _content(content, role: str, param: str, pictures: list[Picture]) -> list[str | int]:
    """The text of a message and, as −k, the places of its pictures, which are added to `pictures`."""
    if (content is None and role == "assistant") or content == "":  # null where tools were called
        return []
    if isinstance(content, str):
        check_text(param, content)
        return [content]
    check(param, content, content and isinstance(content, list), "a string or a list of parts")
    parts: list[str | int] = []
    for i, part in enumerate(content):
        where = f"{param}[{i}]"
        check(where, part, isinstance(part, dict), "an object")
        kind = _one_of(part.get("type"), ("text", "image_url", "input_image"), f"{where}.type")
        if kind == "text":
            if part.get("text") != "":
                check_text(where, part.get("text"))
            between = parts and isinstance(parts[-1], str) and parts[-1] != "\n"
            parts += ["\n", part["text"]] if between else [part["text"]]
        else:
            image = part.get("image_url")
            image = image if isinstance(image, dict) else {"url": image, "detail": part.get("detail")}
            detail = image.get("detail")
            detail = detail if detail is None else _one_of(detail, ("auto", "low", "high"), f"{where}.detail")
            pictures.append(_picture(image.get("url"), where, 1 if detail == "low" else None))
            parts += [-len(pictures), "\n"]
    return parts


def _images(images, param: str) -> list[Picture]:
    good = isinstance(images, list) and len(images) <= MAX_IMAGES
    check(param, images, good, f"a list of at most {MAX_IMAGES} pictures (data: URLs or base64)")
    return [_picture(image, f"{param}[{i}]") for i, image in enumerate(images)]


def _picture(image, where: str, num_crops: int | None = None) -> Picture:
    check(where, image, isinstance(image, str), "a data: URL or base64")
    return Picture(image_bytes(image, where), where, num_crops)


def _chat_logprob(entry) -> dict:
    def one(token: bytes, logprob: float) -> dict:
        return {"token": _shown(token), "logprob": _finite(logprob), "bytes": list(token)}

    return one(entry.token, entry.logprob) | {"top_logprobs": [one(*other) for other in entry.top]}


def _shown(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity


def _check_number(body: dict, name: str, low: int, high: float = math.inf) -> bool:
    """Whether a whole number is given; refuses anything else."""
    if body.get(name) is not None:
        check_number(name, body[name], low, high)
    return body.get(name) is not None


def _flag(body: dict, name: str, where: str = "") -> bool:
    value = body.get(name)
    check(where + name, value, isinstance(value, bool | None), "true or false")
    return bool(value)


def _one_of(value, allowed: Iterable[str], param: str) -> str:
    check(param, value, isinstance(value, str) and value in allowed, f"one of {', '.join(allowed)}")
    return value


def _real(text: str) -> int | float:
    """A number with a point; 5.0 is a whole one, as in JSON Schema: not every client can write 5."""
    value = float(text[:MAX_DIGITS])
    if len(text) > MAX_DIGITS or math.isinf(value):
        raise ValueError("too long or too large")
    return int(value) if value.is_integer() else value


def _whole(text: str) -> int:
    return int(text if len(text) <= MAX_DIGITS else "")  # which is a ValueError, too


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON number")
